"""The data flow of a traced model: its operations in program order, with the layer calls they are in."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sapwood.core import paths
from sapwood.core.jaxpr import holds, inner, is_literal
from sapwood.inspection.layer_calls import Call, Program, functions, marks

Instance = tuple[int, int]
"""A call as it occurs in the program: (level, number). A jitted layer is traced once and may occur several times."""

Value = tuple
"""Where a value comes from: an input of the program, as `Program.inputs` names it, or (operation, output)."""


@dataclass(frozen=True)
class Operation:
    """One equation, the calls and functions it is in (outermost first), and where each of its inputs comes from."""

    equation: Any
    within: tuple[Instance, ...]
    functions: tuple[Instance, ...]
    reads: tuple[frozenset[Value], ...]

    @property
    def values(self) -> frozenset[Value]:
        """All that it reads."""
        return frozenset().union(*self.reads)


@dataclass
class Region:
    """What one call does: its equations in the jaxpr that it stands in, the calls around it, how often it runs."""

    call: Call
    within: tuple[Instance, ...]
    times: int
    equations: list = field(default_factory=list)


@dataclass
class Flow:
    """Operations, call regions, and where each result of the program comes from."""

    program: Program
    operations: list[Operation] = field(default_factory=list)
    regions: dict[Instance, Region] = field(default_factory=dict)
    results: list[frozenset[Value]] = field(default_factory=list)
    levels: int = 0
    inside: tuple[Instance, ...] = ()  # the functions that the walk is in

    def walk(self, jaxpr: Any, given: Iterable[frozenset[Value]], within: tuple[Instance, ...], times: int) -> list:
        """Take in a jaxpr whose inputs come from ``given``; returns where its results come from."""
        level, self.levels = self.levels, self.levels + 1
        source: dict[Any, frozenset[Value]] = dict(zip(jaxpr.invars, given, strict=True))

        def sources(variables) -> list[frozenset[Value]]:
            return [frozenset() if is_literal(var) else source.get(var, frozenset()) for var in variables]

        wanted, around = needed(jaxpr, jaxpr.outvars), self.inside
        for equation in live(jaxpr):
            here = within + self._enter(equation, level, within, times)
            self.inside = around + tuple((level, number) for number in functions(equation))
            results = self._step(equation, sources(equation.invars), here, times, wanted)
            source.update(zip(equation.outvars, results, strict=True))
        self.inside = around
        return sources(jaxpr.outvars)

    def _enter(self, equation: Any, level: int, within: tuple[Instance, ...], times: int) -> tuple[Instance, ...]:
        """Note the equation with each call that it is in at this level."""
        here: list[Instance] = []
        for number in marks(equation):
            instance = (level, number)
            if number not in self.program.calls:
                continue
            if instance not in self.regions:
                self.regions[instance] = Region(self.program.calls[number], (*within, *here), times)
            self.regions[instance].equations.append(equation)
            here.append(instance)
        return tuple(here)

    def _step(self, equation: Any, reads: list, here: tuple[Instance, ...], times: int, wanted: set) -> list:
        """Where the results of an equation come from: from inside it if there are calls in it, else from itself."""
        name, bodies = equation.primitive.name, list(inner(equation))
        if holds(equation, lambda e: bool(marks(e))):
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
        """What chooses a branch, ends a loop or begins its next round, where layers compute it that nothing else of it
        depends on: without it they would lead nowhere. Any other condition says no more than the branch or loop."""
        return condition if self._behind([condition]) - self._behind(others) - set(here) else frozenset()

    def _carried(self, loop: Any, carry: list, ends: list, here: tuple[Instance, ...], wanted: set) -> list:
        """Where the results of a loop come from, those made of what an earlier round carried included, if that is not
        wanted itself."""
        body = loop.params["jaxpr" if loop.primitive.name == "scan" else "body_jaxpr"].jaxpr
        found = []
        for result, end in zip(body.outvars, ends, strict=True):
            read = needed(body, [result])
            passed = zip(carry, ends, loop.outvars, strict=False)
            before = [last for var, last, outside in passed if var in read and outside not in wanted]
            found.append(end | self._deciding(frozenset().union(*before), [end], here))
        return found

    def _behind(self, reads: list) -> set[Instance]:
        """The calls that some values depend on."""
        waiting = [value[0] for values in reads for value in values if isinstance(value[0], int)]
        seen: set[int] = set()
        while waiting:
            if (k := waiting.pop()) not in seen:
                seen.add(k)
                waiting += [value[0] for value in self.operations[k].values if isinstance(value[0], int)]
        return {instance for k in seen for instance in self.operations[k].within}

    def outermost(self, path: paths.Path) -> list[Region]:
        """The calls at a path that are not within another call at that path."""
        return [
            region
            for region in self.regions.values()
            if region.call.path == path and all(self.regions[i].call.path != path for i in region.within)
        ]

    def readers(self) -> dict[paths.Path, set]:
        """For each parameter the innermost calls that read it; None stands for code outside any layer."""
        found: dict[paths.Path, set] = {}
        for operation in self.operations:
            for value in operation.values:
                if value[0] == "params":
                    found.setdefault(value[1:], set()).add(operation.within[-1] if operation.within else None)
        return found


def trace_flow(program: Program) -> Flow:
    """The data flow of a traced model."""
    flow = Flow(program)
    given = [frozenset({name}) for name in program.inputs]
    flow.results = flow.walk(program.jaxpr, given, (), 1)
    return flow


def _carry(scan: Any, body: Any) -> list[Any]:
    """What a round of a scan hands to the next, as its body's inputs: constants, then these, then slices of arrays,
    which have a dimension more outside. JAX's releases differ in what else says so."""
    shared = sum(outside.aval.ndim == var.aval.ndim for outside, var in zip(scan.invars, body.invars, strict=True))
    handed = sum(outside.aval.ndim == var.aval.ndim for outside, var in zip(scan.outvars, body.outvars, strict=True))
    return body.invars[shared - handed : shared]


def live(jaxpr: Any) -> list[Any]:
    """The equations of a jaxpr that its results depend on, in order."""
    read = needed(jaxpr, jaxpr.outvars)
    return [equation for equation in jaxpr.eqns if any(var in read for var in equation.outvars)]


def needed(jaxpr: Any, results: list) -> set[Any]:
    """The variables of a jaxpr that some of them depend on, themselves included."""
    read = {var for var in results if not is_literal(var)}
    for equation in reversed(jaxpr.eqns):
        if any(var in read for var in equation.outvars):
            read.update(var for var in equation.invars if not is_literal(var))
    return read
