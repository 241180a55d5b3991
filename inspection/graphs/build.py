"""Build the nested groups of a drawing from the data flow of a program.

`_Units` gathers operations into units, and each unit becomes one node:

- A layer without layers inside is one unit.
- A plain function that takes a cursor (`Vars`) is one unit, if it calls no layer and no other such function.
- Other operations that read parameters of the same scope are one unit.
- The operations of one call of an array function, such as `jax.nn.softmax`, are one unit. Each operation that is still
  left is a unit of its own. Neighbors among the units of this point are then merged.

The frames of a unit are the groups around it. `_Tree` nests the units into groups by their frames and draws edges. An
edge that crosses a group's border goes through a port of the group.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sapwood.core import paths
from sapwood.core.jaxpr import inner
from sapwood.core.layer import describe
from sapwood.inspection.data_flow import Flow, Instance, Operation
from sapwood.inspection.function_calls import FunctionCall
from sapwood.inspection.graphs.boxes import Edge, Group, Node
from sapwood.inspection.layer_calls import layer_label, layers_by_path

Frame = tuple[paths.Path, Instance | None]
"""One group around a unit: its path and its layer call. The call is None for a scope that is not a layer."""

_TRIVIAL: dict[str, str] = {  # used in a title only if a box holds no other operations
    "broadcast_in_dim": "broadcast", "convert_element_type": "convert", "reshape": "reshape", "squeeze": "reshape",
    "expand_dims": "reshape", "transpose": "transpose", "copy": "copy", "stop_gradient": "stop gradient",
    "sharding_constraint": "shard", "copy_p": "copy",
}  # fmt: skip
_WRAPPERS = {"jit", "custom_jvp_call", "custom_vjp_call", "closed_call", "remat2", "checkpoint"}
_NAMES = {
    "dot_general": "matmul", "reduce_sum": "sum", "reduce_max": "max", "reduce_min": "min", "add_any": "add",
    "integer_pow": "power", "conv_general_dilated": "conv", "concatenate": "concat", "select_n": "select",
    "dynamic_slice": "slice", "dynamic_update_slice": "update", "div": "divide", "mul": "multiply", "sub": "subtract",
    "neg": "negate", "pow": "power", "exp": "exp", "reduce_window_max": "max pool",
}  # fmt: skip


@dataclass
class Unit:
    """Operations that become one node. Units are numbered by their index in `_Units.units`.

    Attributes:
        kind: the `Node.kind`.
        frames: the groups around it, outermost first.
        path: the path of its layer, scope or input.
        operations: indices in `Flow.operations`, in program order.
        reads: the units it reads from, each with the shapes of what comes from it.
        names: the names of its operations for the title.
        shape: dtypes and shapes of its last operation's outputs.
        merged: True if the unit was merged into another one or skipped, so that it is not drawn.
    """

    kind: str
    frames: tuple[Frame, ...]
    path: paths.Path
    operations: list[int] = field(default_factory=list)
    reads: dict[int, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    shape: str = ""
    merged: bool = False


def build(flow: Flow) -> Group:
    """The root group of a program's drawing."""
    units = _Units(flow)
    units.skip_moves()
    units.merge_loose()
    units.settle()
    return _Tree(flow, units.units).group((), range(len(units.units)))


class _Units:
    """Gathers the operations between inputs and results into units.

    `scopes` are the paths of plain functions with a cursor. `closed` are the scopes that are drawn as one node, since
    nothing else is called in them.
    """

    def __init__(self, flow: Flow):
        self.flow = flow
        self.calls = layers_by_path(flow.program)
        self.units: list[Unit] = []
        self.of: dict[int, int] = {}  # operation -> unit
        self.inputs: dict[tuple, int] = {}
        self.scopes = {named.path for named in flow.program.named.values() if not named.name} - {()}
        self.closed = self.scopes - self._opened()
        self.params: dict[int, set] = {}  # operation -> parameters it reads, also through operations that prepare them
        needed = self._needed()
        for name in dict.fromkeys(n for n in flow.program.inputs if n[0] == "input"):
            if any(name in flow.operations[k].values for k in needed) or any(name in r for r in self._results()):
                self.inputs[name] = self._add(Unit("input", (), (name[1],)))
        self._gather(needed)
        self._add_results()

    def _opened(self) -> set[paths.Path]:
        """The scopes that are drawn as groups, because a layer or another function with a cursor is called in them."""
        found = {path[:n] for path in (*self.calls, *self.scopes) for n in range(len(path))} | set(self.calls)
        for operation in self.flow.operations:
            inside = [named.path for _, named in self._functions(operation) if not named.name]
            around = [self.flow.regions[instance].call.path for instance in operation.within]
            found.update(path for path in inside if path != inside[-1] or any(path[: len(c)] != c for c in around))
        return found

    def _add(self, unit: Unit) -> int:
        self.units.append(unit)
        return len(self.units) - 1

    def _results(self) -> list[frozenset]:
        return [
            values
            for name, values in zip(self.flow.program.results, self.flow.results, strict=True)
            if name[0] != "state"
        ]

    def _needed(self) -> list[int]:
        """The operations that results depend on, without those that only prepare parameters and constants.

        If all of them only prepare parameters and constants (no result depends on an input or a layer), none is left
        out. This method also fills `params`.
        """
        operations = self.flow.operations
        wanted, stack = set(), [value for values in self._results() for value in values]
        while stack:
            value = stack.pop()
            if isinstance(value[0], int) and value[0] not in wanted:
                wanted.add(value[0])
                stack.extend(operations[value[0]].values)
        fed: set[int] = set()
        for k, operation in enumerate(operations):
            values = operation.values
            if self._in_leaf(operation) or any(v[0] == "input" or v[0] in fed for v in values):
                fed.add(k)
            own = {v[1:] for v in values if v[0] == "params"}
            self.params[k] = own.union(
                *(self.params[v[0]] for v in values if isinstance(v[0], int) and v[0] not in fed)
            )
        found = sorted(wanted & fed) or sorted(wanted)
        together: dict[Any, set] = defaultdict(set)  # all operations of one call of an array function stay together
        for k in found:
            together[self._array_function(operations[k])] |= self.params[k]
        for k in found:
            if (array := self._array_function(operations[k])) is not None:
                self.params[k] = together[array]
        return found

    def _in_leaf(self, operation: Operation) -> bool:
        """True if an operation is in a layer that has no layers inside."""
        found = [self.flow.regions[instance].call.path for instance in operation.within]
        return any(path not in self.calls.above for path in found)

    def _gather(self, needed: list[int]) -> None:
        keys: dict[Any, int] = {}
        for k in needed:
            operation = self.flow.operations[k]
            key, unit = self._home(k, operation)
            if key not in keys:
                keys[key] = self._add(unit)
            self.of[k] = keys[key]
            mine = self.units[keys[key]]
            mine.operations.append(k)
            array = self._array_function(operation)
            mine.names += _operation_names(operation) if array is None else [] if array[1] in mine.names else [array[1]]
            mine.shape = describe([var.aval for var in operation.equation.outvars])
            self._read(keys[key], operation.values)

    def _read(self, unit: int, values: frozenset) -> None:
        for value in values:
            source = self.of.get(value[0]) if isinstance(value[0], int) else self.inputs.get(value)
            if source is not None and source != unit:
                self.units[unit].reads.setdefault(source, self._shape(value))

    def _shape(self, value: tuple) -> str:
        if isinstance(value[0], int):
            return describe(self.flow.operations[value[0]].equation.outvars[value[1]].aval)
        return describe(self.flow.program.jaxpr.invars[self.flow.program.inputs.index(value)].aval)

    def _home(self, k: int, operation: Operation) -> tuple[Any, Unit]:
        """Choose the unit of operation ``k``.

        The unit is the first of these that exists:

        1. a layer around the operation, if no layer is called in that layer;
        2. the closed scope around the operation;
        3. the deepest scope that contains all parameters it reads, if that is inside the groups around the operation;
        4. the call of an array function that it is part of;
        5. a unit of its own.

        Returns:
            A key that is equal for all operations of the unit, and a new `Unit` to use if the key is new.
        """
        frames: list[Frame] = []
        at: paths.Path = ()
        for instance in operation.within:
            path = self.flow.regions[instance].call.path
            if not path or (frames and path == at):
                continue
            frames += [(path[:n], None) for n in range(len(at) + 1, len(path))]
            if path not in self.calls.above:
                return (instance, path), Unit("layer", tuple(frames), path)
            frames.append((path, instance))
            at = path
        if operation.within and () not in self.calls.above:
            return ((), operation.within[0]), Unit("layer", (), ())
        mine = [(instance, named.path) for instance, named in self._functions(operation) if not named.name]
        call, path = next(((i, p) for i, p in mine if p == mine[-1][1]), (None, ()))
        if path[: len(at)] == at:
            frames += [(path[:n], None) for n in range(len(at) + 1, len(path))]
            if path in self.closed:
                return (call, path), Unit("scope", tuple(frames), path)
            frames += [(path, None)] if path != at else []
            at = path
        scope = _common([path[:-1] for path in self.params[k]])
        if scope is not None and len(scope) > len(at) and scope[: len(at)] == at:
            frames += [(scope[:n], None) for n in range(len(at) + 1, len(scope))]
            return (tuple(frames), scope), Unit("scope", tuple(frames), scope)
        array = self._array_function(operation)
        return k if array is None else array, Unit("op", tuple(frames), at)

    def _functions(self, operation: Operation) -> list[tuple[Instance, FunctionCall]]:
        """The functions that an operation is in, outermost first."""
        return [(instance, self.flow.program.named[instance[1]]) for instance in operation.functions]

    def _array_function(self, operation: Operation) -> tuple[Instance, str] | None:
        """The outermost call of an array function that an operation is part of, and the function's name for a title."""
        found = ((instance, _plain(named.name)) for instance, named in self._functions(operation) if named.name)
        return next(found, None)

    def _add_results(self) -> None:
        program = self.flow.program
        only = sum(name[0] == "output" for name in program.results) == 1
        for name, values, var in zip(program.results, self.flow.results, program.jaxpr.outvars, strict=True):
            if name[0] == "state":
                continue
            place = name[1:] if name[0] == "output" else name
            shown = "/".join(place) if place and not (only and name[0] == "output") else "output"
            unit = self._add(Unit("output", (), (f"output {shown}" if shown[0].isdigit() else shown,)))
            self._read(unit, values)
            self.units[unit].shape = describe(var.aval)

    # ---- operations between layers ------------------------------------------------------------------------------

    def consumers(self) -> dict[int, list[int]]:
        """The units that read from each unit."""
        found: dict[int, list[int]] = defaultdict(list)
        for k, unit in enumerate(self.units):
            for source in unit.reads:
                found[source].append(k)
        return found

    def merge_loose(self) -> None:
        """Merge neighboring small operations into one node, such as "add, relu".

        In a layer all connected operations of one group are merged. Outside layers a change of shape separates nodes,
        since the borders between the model's parts are unknown there.
        """
        consumers = self.consumers()
        for k, unit in enumerate(self.units):
            into = next((c for c in sorted(consumers[k]) if self._one_step(k, c, consumers)), None)
            if unit.kind == "op" and into is not None:
                self._merge(k, into, consumers)

    def _one_step(self, k: int, c: int, consumers: dict[int, list[int]]) -> bool:
        unit, other = self.units[k], self.units[c]
        if (other.kind, other.frames) != (unit.kind, unit.frames):
            return False
        in_layer = bool(unit.frames) and unit.frames[-1][1] is not None
        if not in_layer and unit.names and other.names and unit.shape != other.shape:
            return False
        stack, seen = [d for d in consumers[k] if d != c], set()
        while stack:  # a second path from k to c would become a cycle if they were merged
            d = stack.pop()
            if d == c:
                return False
            if d not in seen:
                seen.add(d)
                stack += consumers[d]
        return True

    def _merge(self, k: int, into: int, consumers: dict[int, list[int]]) -> None:
        """Merge unit ``k`` into one of its readers, the unit ``into``. Other readers of ``k`` then read ``into``."""
        unit, other = self.units[k], self.units[into]
        for source, shape in unit.reads.items():
            other.reads.setdefault(source, shape)
            consumers[source] = list(dict.fromkeys(into if c == k else c for c in consumers[source]))
        for c in consumers.pop(k, []):
            shape = self.units[c].reads.pop(k)
            if c != into:
                self.units[c].reads.setdefault(into, shape)
                consumers[into] = list(dict.fromkeys([*consumers[into], c]))
        other.operations = sorted(unit.operations + other.operations)
        other.names = unit.names + other.names
        unit.merged, unit.reads = True, {}

    def skip_moves(self) -> None:
        """Skip operations in a layer that only reshape, convert or move one unit's result on its way to others."""
        consumers = self.consumers()
        for k, unit in enumerate(self.units):
            in_layer = bool(unit.frames) and unit.frames[-1][1] is not None
            if unit.kind != "op" or unit.merged or unit.names or not in_layer or len(unit.reads) != 1:
                continue
            (source,) = unit.reads
            for c in consumers.pop(k, []):
                self.units[c].reads.setdefault(source, self.units[c].reads.pop(k))
                consumers[source] = list(dict.fromkeys([*(d for d in consumers[source] if d != k), c]))
            unit.merged, unit.reads = True, {}

    def settle(self) -> None:
        """Move loose operations (units of kind "op") into the scopes they belong to, by two rules.

        1. An operation that reads from a scope, and is read in the same scope, moves into it. Both may be indirect,
           through other loose operations. If there are several such scopes, it is the deepest.
        2. An operation that combines a result of a scope with an input of that scope (a residual connection) moves into
           that scope.

        Operations never move into a layer or a function, since it is known which operations these have.
        """
        consumers = self.consumers()
        loose = [k for k, unit in enumerate(self.units) if unit.kind == "op" and not unit.merged]
        before = self._ends(loose, {k: self.units[k].reads for k in loose})
        after = self._ends(loose, consumers)
        for k in loose:
            unit = self.units[k]
            for source in before[k]:
                for end in after[k]:
                    between = _common([source, end]) or ()
                    unit.frames = max(unit.frames, self._scopes_only(unit.frames, between), key=len)
            last = self.units[max(unit.reads, default=k)].frames
            for n in range(len(last), len(unit.frames), -1):
                if self._scopes_only(unit.frames, last[:n]) == last[:n] and self._closes(k, last[:n], consumers):
                    unit.frames = last[:n]
                    break

    def _ends(self, loose: list[int], to: Mapping[int, Iterable[int]]) -> dict[int, set[tuple[Frame, ...]]]:
        """For each loose unit, the frames of all units that can be reached from it.

        ``to`` maps a unit to its neighbors: either the units it reads, or the units that read it. The search continues
        behind loose units, and stops at all other units.
        """
        found: dict[int, set[tuple[Frame, ...]]] = {}
        for k in loose:
            found[k], waiting, seen = set(), [*to[k]], {k}
            while waiting:
                if (c := waiting.pop()) not in seen:
                    seen.add(c)
                    found[k].add(self.units[c].frames)
                    waiting += to[c] if c in to and self.units[c].kind == "op" else ()
        return found

    def _scopes_only(self, base: tuple, frames: tuple) -> tuple:
        """The longest prefix of ``frames`` that consists of ``base`` and of scopes that are no layers and no functions.

        If ``frames`` does not begin with ``base``, the result is ``base``.
        """
        if frames[: len(base)] != base:
            return base
        n = len(base)
        while n < len(frames) and frames[n][1] is None and frames[n][0] not in self.scopes:
            n += 1
        return frames[:n]

    def _closes(self, k: int, frames: tuple, consumers: dict[int, list[int]]) -> bool:
        """True if unit ``k`` combines results of the scope at ``frames`` with inputs of that scope.

        No other unit outside the scope may read these results. An input of the scope is a value from outside that a
        unit in the scope reads too.
        """
        inside = lambda c: self.units[c].frames[: len(frames)] == frames  # noqa: E731
        mine = [s for s in self.units[k].reads if inside(s)]
        other = [s for s in self.units[k].reads if not inside(s)]
        return (
            bool(mine)
            and len(self.units[k].reads) > 1
            and all(any(inside(c) for c in consumers[s] if c != k) for s in other)
            and all(inside(c) or c == k for s in mine for c in consumers[s])
        )


def _common(of: list) -> tuple | None:
    """The longest common beginning of some tuples; None for an empty list."""
    if not of:
        return None
    first, last = min(of, key=len), of
    n = 0
    while n < len(first) and all(other[n] == first[n] for other in last):
        n += 1
    return first[:n]


def _operation_names(operation: Operation) -> list[str]:
    """The names of an operation for a title: the function of `jax.nn` or `jax.numpy` that it comes from, else its
    primitive. Empty for an operation that only moves or converts numbers.
    """
    equation, name = operation.equation, operation.equation.primitive.name
    if name in _TRIVIAL:
        return []
    public = _public_name(equation)
    while not public and name in _WRAPPERS:  # a jitted function, or one with a custom gradient
        public = _plain(str(equation.params.get("name", "")))
        inside = [e for body in inner(equation) for e in body.eqns]
        if public or len(inside) != 1:
            return [public or "function"]
        equation, name = inside[0], inside[0].primitive.name
    return [public or _NAMES.get(name) or name.replace("_", " ")]


def _public_name(equation: Any) -> str:
    """The outermost function of `jax.nn` or `jax.numpy` in the traceback of an equation; empty for an operator."""
    found = ""
    for frame in getattr(equation.source_info.traceback, "frames", ()):  # innermost first
        file = frame.file_name.replace("\\", "/")
        numpy = "/jax/_src/numpy/" in file and not file.endswith(("array_methods.py", "ufunc_api.py"))
        if numpy or "/jax/_src/nn/" in file:
            found = frame.function_name
        elif found and "/jax/" not in file:
            break
    return "index" if found == "rewriting_take" else _plain(found)  # the function in JAX behind `x[...]`


def _plain(name: str) -> str:
    """The name of a function with spaces for underscores; empty for a lambda and for `wrapped`."""
    return name.strip("_").replace("_", " ") if name.isidentifier() and name != "wrapped" else ""


class _Tree:
    """Makes nested groups of units, by their frames."""

    def __init__(self, flow: Flow, units: list[Unit]):
        self.flow, self.units = flow, units
        self.calls = layers_by_path(flow.program)
        self.leaves = [(kind, path, param) for kind, tree in zip(("params", "state"), flow.program.spec, strict=True)
                       for path, param in paths.leaves(tree)]  # fmt: skip
        self.numbers: dict[tuple, int] = {}
        self.consumers: dict[int, list[int]] = defaultdict(list)
        for k, unit in enumerate(units):
            for source in unit.reads:
                self.consumers[source].append(k)

    def group(self, frames: tuple[Frame, ...], members: Any) -> Group:
        """The group at ``frames`` with all groups below it. ``members`` are the units to choose from."""
        members = [k for k in members if self.units[k].frames[: len(frames)] == frames and not self.units[k].merged]
        items: list[Node | Group] = []
        seen = set()
        for k in sorted(members, key=self._position):
            deeper = self.units[k].frames[: len(frames) + 1]
            if len(deeper) == len(frames):
                items.append(self._node(k))
            elif deeper not in seen:
                seen.add(deeper)
                items.append(self.group(deeper, members))
        enter, leave, edges = self._edges(frames, members)
        path = frames[-1][0] if frames else ()
        container = self.calls.get(path, []) if not frames or frames[-1][1] is not None else []
        around, copies = self._copies(frames[:-1]), self._copies(frames)
        return Group(
            id=self._id(frames), path=paths.join(path), name=path[-1] if path else "",
            label=layer_label(path, self.calls, around) if container else "",
            shape=container[0][0].output if container else "",
            params=self._params(path), copies=copies // around,
            items=(*enter, *items, *leave), edges=tuple(edges),
        )  # fmt: skip

    def _id(self, frames: tuple[Frame, ...]) -> str:
        return f"g{self.numbers.setdefault(frames, len(self.numbers))}"

    def _position(self, k: int) -> tuple[int, int]:
        unit = self.units[k]
        return {"input": 0, "output": 2}.get(unit.kind, 1), unit.operations[0] if unit.operations else k

    def _copies(self, frames: tuple[Frame, ...]) -> int:
        """How many copies of a group a stack of layers makes, including copies of the groups around it."""
        return max((call.copies for path, i in frames if i for c in self.calls.get(path, []) for call in c), default=1)

    def _params(self, path: paths.Path) -> int:
        return sum(param.size for kind, at, param in self.leaves if kind == "params" and at[: len(path)] == path)

    def _node(self, k: int) -> Node:
        unit = self.units[k]
        calls = self.calls.get(unit.path, [])
        label, shape, copies = "", unit.shape, 1
        if unit.kind == "layer":
            around, call = self._copies(unit.frames), calls[0][-1]
            label, shape = layer_label(unit.path, self.calls, around), calls[0][0].output
            copies = max(call.copies // around, 1)
        if unit.kind == "input":
            name = unit.path[0]
            index = self.flow.program.inputs.index(("input", name))
            shape = describe(self.flow.program.jaxpr.invars[index].aval)
        elif unit.kind == "op":
            name = self._title(unit)
        else:
            name = unit.path[-1] if unit.path else type(calls[0][0].layer).__name__
        if unit.kind == "scope":
            label = self._title(unit) + (" (shared)" if calls else "")
        params = self._params(unit.path) if unit.kind == "layer" or (unit.kind == "scope" and not calls) else 0
        within = unit.frames[-1][0] if unit.frames else ()
        path = (*within, name) if unit.kind == "op" else unit.path
        return Node(f"n{k}", unit.kind, paths.join(path), name, label, shape, params, copies)

    def _title(self, unit: Unit) -> str:
        """The title of a unit: the names of its first three operations, and the number of further ones."""
        moves = (self.flow.operations[k].equation.primitive.name for k in unit.operations)
        few = list(dict.fromkeys(unit.names or (_TRIVIAL[move] for move in moves)))
        return ", ".join(few[:3]) + (f" and {len(few) - 3} more" if len(few) > 3 else "")

    def _edges(self, frames: tuple[Frame, ...], members: list[int]) -> tuple[list[Node], list[Node], list[Edge]]:
        """The ports where values enter the group, the ports where they leave it, and the edges between its items."""
        depth, inside = len(frames), set(members)
        enter: dict[int, Node] = {}
        leave: dict[int, Node] = {}
        edges: dict[tuple[str, str], Edge] = {}

        def join(source: str, target: str, shape: str) -> None:
            edges.setdefault((source, target), Edge(source, target, shape))

        for k in members:
            for source, shape in self.units[k].reads.items():
                if self._together(source, k, depth):
                    continue
                start = self._end(source, depth, "o")
                if source not in inside:
                    enter.setdefault(source, self._port(frames, "in", source, shape))
                    start = enter[source].id
                join(start, self._end(k, depth, f"i{source}"), shape)
            outside = [c for c in self.consumers[k] if c not in inside]
            if frames and outside:
                shape = self.units[outside[0]].reads[k]
                leave.setdefault(k, self._port(frames, "out", k, shape))
                join(self._end(k, depth, "o"), leave[k].id, shape)
        return list(enter.values()), list(leave.values()), list(edges.values())

    def _together(self, a: int, b: int, depth: int) -> bool:
        """True if a deeper group holds both units; that group draws the edge."""
        first, second = (self.units[k].frames[: depth + 1] for k in (a, b))
        return first == second and len(first) > depth

    def _end(self, k: int, depth: int, side: str) -> str:
        """The id of an edge's end for unit ``k`` at this depth: its node, or "GROUP|PORT" of the group around it.

        ``side`` is "o" for an edge that leaves the unit and "iSOURCE" for one that enters it.
        """
        deeper = self.units[k].frames[: depth + 1]
        if len(deeper) == depth:
            return f"n{k}"
        which = f"{side}{k}" if side == "o" else side
        return f"{self._id(deeper)}|{which}"

    def _port(self, frames: tuple[Frame, ...], kind: str, k: int, shape: str) -> Node:
        return Node(f"{self._id(frames)}|{'i' if kind == 'in' else 'o'}{k}", kind, "", "", "", shape, 0, 1)
