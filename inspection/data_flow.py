"""The data flow of a traced model: its operations in program order, and the layer calls that each one is in.

`trace_flow` walks the jaxpr of a `Program`. It enters an equation with an inner jaxpr only if that jaxpr holds layer
calls; any other equation is one `Operation`. Each value is tracked as the set of its sources, so a loop or a branch
disappears from the data flow and only the operations inside it remain. `summary` and `graph` are made from the result.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sapwood.core import paths
from sapwood.core.jaxpr import holds, inner, is_literal
from sapwood.inspection.layer_calls import Call, TracedModel, call_numbers, function_numbers

Instance = tuple[int, int]
"""One occurrence of a call in the program: (level, number).

`number` is the key in `Program.calls` or `Program.named`. `level` counts the jaxprs walked so far: a jitted layer is
traced once but may occur several times, and each occurrence has its own level.
"""

Value = tuple
"""The source of a value: an input of the program, as `Program.inputs` names it, or (operation index, output index)."""


@dataclass(frozen=True)
class Operation:
    """One equation of the traced program.

    Attributes:
        equation: the equation of the jaxpr.
        within: the layer calls it is in, outermost first.
        functions: the functions of `Program.named` it is in, outermost first.
        reads: the sources of each of its inputs.
    """

    equation: Any
    within: tuple[Instance, ...]
    functions: tuple[Instance, ...]
    reads: tuple[frozenset[Value], ...]

    @property
    def values(self) -> frozenset[Value]:
        """The sources of all its inputs together."""
        return frozenset().union(*self.reads)


@dataclass
class Region:
    """One occurrence of a layer call.

    Attributes:
        call: the call.
        within: the calls around it, outermost first.
        times: how often it runs in one run of the program.
        equations: its equations in the jaxpr that contains it. A loop or a jitted function counts as one equation.
    """

    call: Call
    within: tuple[Instance, ...]
    times: int
    equations: list = field(default_factory=list)


@dataclass
class Flow:
    """The data flow of a program.

    Attributes:
        program: the traced program.
        operations: all operations in program order.
        regions: the `Region` of each occurrence of a layer call.
        results: the sources of each result of the program.
        levels: how many jaxprs were walked, which gives each walk its level.
        inside: the functions of `Program.named` around the jaxpr that is being walked, outermost first.
    """

    program: TracedModel
    operations: list[Operation] = field(default_factory=list)
    regions: dict[Instance, Region] = field(default_factory=dict)
    results: list[frozenset[Value]] = field(default_factory=list)
    levels: int = 0
    inside: tuple[Instance, ...] = ()

    def walk(self, jaxpr: Any, given: Iterable[frozenset[Value]], within: tuple[Instance, ...], times: int) -> list:
        """Add the operations of a jaxpr to the flow.

        Args:
            jaxpr: the jaxpr to walk.
            given: the sources of each input of the jaxpr.
            within: the layer calls around the jaxpr, outermost first.
            times: how often the jaxpr runs in one run of the program.

        Returns:
            The sources of each result of the jaxpr.
        """
        level, self.levels = self.levels, self.levels + 1
        source: dict[Any, frozenset[Value]] = dict(zip(jaxpr.invars, given, strict=True))

        def sources(variables) -> list[frozenset[Value]]:
            return [frozenset() if is_literal(var) else source.get(var, frozenset()) for var in variables]

        wanted, around = needed(jaxpr, jaxpr.outvars), self.inside
        for equation in live(jaxpr):
            here = within + self._enter(equation, level, within, times)
            self.inside = around + tuple((level, number) for number in function_numbers(equation))
            results = self._step(equation, sources(equation.invars), here, times, wanted)
            source.update(zip(equation.outvars, results, strict=True))
        self.inside = around
        return sources(jaxpr.outvars)

    def _enter(self, equation: Any, level: int, within: tuple[Instance, ...], times: int) -> tuple[Instance, ...]:
        """Add the equation to the regions of the calls that it is in at this level; returns them, outermost first."""
        here: list[Instance] = []
        for number in call_numbers(equation):
            instance = (level, number)
            if number not in self.program.calls:
                continue
            if instance not in self.regions:
                self.regions[instance] = Region(self.program.calls[number], (*within, *here), times)
            self.regions[instance].equations.append(equation)
            here.append(instance)
        return tuple(here)

    def _step(self, equation: Any, reads: list, here: tuple[Instance, ...], times: int, wanted: set) -> list:
        """The sources of an equation's outputs.

        An equation that holds layer calls (a loop, a branch or a call of one jaxpr) is walked, and the sources lie
        inside it. Any other equation becomes an operation, which is itself the source.
        """
        name, bodies = equation.primitive.name, list(inner(equation))
        if holds(equation, lambda e: bool(call_numbers(e))):
            if name == "cond":
                ends = [self.walk(body, reads[1:], here, times) for body in bodies]
                decides = self._deciding(reads[0], reads[1:], here)
                return [decides.union(*end) for end in zip(*ends, strict=True)]
            if name == "while":
                first, second = equation.params["cond_nconsts"], equation.params["body_nconsts"]
                carry = reads[first + second :]
                (goes_on,) = self.walk(equation.params["cond_jaxpr"].jaxpr, [*reads[:first], *carry], here, times)
                body = equation.params["body_jaxpr"].jaxpr
                ends = self.walk(body, [*reads[first:][:second], *carry], here, times)
                decides = self._deciding(goes_on, ends, here)
                return [decides | end for end in self._carried(equation, body.invars[second:], ends, here, wanted)]
            if len(bodies) == 1 and len(bodies[0].invars) == len(reads):
                if name != "scan":
                    return self.walk(bodies[0], reads, here, times)
                ends = self.walk(bodies[0], reads, here, times * equation.params["length"])
                return self._carried(equation, _carry(equation, bodies[0]), ends, here, wanted)
        self.operations.append(Operation(equation, here, self.inside, tuple(reads)))
        return [frozenset({(len(self.operations) - 1, k)}) for k in range(len(equation.outvars))]

    def _deciding(self, condition: frozenset[Value], others: list, here: tuple[Instance, ...]) -> frozenset[Value]:
        """The sources of a condition if they have to be kept, else nothing.

        A condition chooses a branch, ends a loop or begins the next iteration. It is kept only if it depends on layer
        calls that none of ``others`` depends on: without it, these layers would have no edge to any result.
        """
        return condition if self._behind([condition]) - self._behind(others) - set(here) else frozenset()

    def _carried(self, loop: Any, carry: list, ends: list, here: tuple[Instance, ...], wanted: set) -> list:
        """The sources of each loop output.

        Sources reached through the previous iteration's carry are included, unless that carry is itself a requested
        output (in ``wanted``). `_deciding` drops them if they add no layer call.
        """
        body = loop.params["jaxpr" if loop.primitive.name == "scan" else "body_jaxpr"].jaxpr
        found = []
        for result, end in zip(body.outvars, ends, strict=True):
            read = needed(body, [result])
            passed = zip(carry, ends, loop.outvars, strict=False)
            before = [last for var, last, outside in passed if var in read and outside not in wanted]
            found.append(end | self._deciding(frozenset().union(*before), [end], here))
        return found

    def _behind(self, reads: list) -> set[Instance]:
        """The layer calls that some values depend on, directly or through other operations."""
        waiting = [value[0] for values in reads for value in values if isinstance(value[0], int)]
        seen: set[int] = set()
        while waiting:
            if (k := waiting.pop()) not in seen:
                seen.add(k)
                waiting += [value[0] for value in self.operations[k].values if isinstance(value[0], int)]
        return {instance for k in seen for instance in self.operations[k].within}

    def outermost(self, path: paths.Path) -> list[Region]:
        """The calls at a path that are not inside another call at the same path."""
        return [
            region
            for region in self.regions.values()
            if region.call.path == path and all(self.regions[i].call.path != path for i in region.within)
        ]

    def readers(self) -> dict[paths.Path, set]:
        """The innermost calls that read each parameter, by parameter path; None stands for code outside any layer."""
        found: dict[paths.Path, set] = {}
        for operation in self.operations:
            for value in operation.values:
                if value[0] == "params":
                    found.setdefault(value[1:], set()).add(operation.within[-1] if operation.within else None)
        return found


def trace_flow(program: TracedModel) -> Flow:
    """The data flow of a traced model."""
    flow = Flow(program)
    given = [frozenset({name}) for name in program.inputs]
    flow.results = flow.walk(program.jaxpr, given, (), 1)
    return flow


def _carry(scan: Any, body: Any) -> list[Any]:
    """The carry of a scan, as input variables of its body.

    The body's inputs are constants, then the carry, then slices of the scanned arrays. A scanned array has one
    dimension more outside than its slice inside, so the three groups are told apart by rank. The equation's parameters
    that would say the same differ between releases of JAX.
    """
    shared = sum(outside.aval.ndim == var.aval.ndim for outside, var in zip(scan.invars, body.invars, strict=True))
    handed = sum(outside.aval.ndim == var.aval.ndim for outside, var in zip(scan.outvars, body.outvars, strict=True))
    return body.invars[shared - handed : shared]


def live(jaxpr: Any) -> list[Any]:
    """The equations that the results of a jaxpr depend on, in program order."""
    read = needed(jaxpr, jaxpr.outvars)
    return [equation for equation in jaxpr.eqns if any(var in read for var in equation.outvars)]


def needed(jaxpr: Any, results: list) -> set[Any]:
    """The variables that some results of a jaxpr depend on, the results included."""
    read = {var for var in results if not is_literal(var)}
    for equation in reversed(jaxpr.eqns):
        if any(var in read for var in equation.outvars):
            read.update(var for var in equation.invars if not is_literal(var))
    return read
