"""A function of an unrolled model's tree, run on the stacks: what all blocks do alike is done for all of them at once.

The function is traced on the unrolled tree, so it sees each block's rank, norm and name. Its operations are then told
by what they do and read: those that are the same for each block of a stack, on that block's own values, become one
operation on the stack (`jax.vmap` of it). All others stay as they are: a sum over the whole tree, a block that is
treated otherwise. So the result is always that of the unrolled program, and the program is as long as one block's where
blocks are treated alike. (Sums of numbers of all blocks are taken in another order.)
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.core.fingerprint import Same
from sapwood.core.unrolled_trees import Index, Stacks, View


def rolled(function: Callable[..., Any], views: Sequence[View], stacks: Stacks) -> Callable[..., Any]:
    """``function(*unrolled trees)`` as a function of the stacked trees; ``views`` say how each of them lies.

    The results, too, are stacked, as `View` does it.

    >>> from sapwood.core.unrolled_trees import StackedLeaf
    >>> tree = {"blocks": {"0": {"up": jnp.zeros(2)}, "1": {"up": jnp.zeros(2)}}}
    >>> stacks = (StackedLeaf(("blocks", "up"), (1,), (2,), (2,)),)
    >>> unit = rolled(lambda x: jax.tree.map(lambda x: x / jnp.abs(x).max(), x), [View(tree, stacks)], stacks)
    >>> unit({"blocks": {"up": jnp.array([[1.0, 4.0], [2.0, 1.0]])}})["blocks"]["up"].tolist()
    [[0.25, 1.0], [1.0, 0.5]]
    """

    def run(*trees: Any) -> Any:
        shapes = [view.structs(tree) for view, tree in zip(views, trees, strict=True)]
        jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(*shapes)
        program, given = _Program(), []
        for view, tree in zip(views, trees, strict=True):
            given += program.inputs(view, tree)
        results = program.read(jaxpr, given)
        view, leaves = View(shape, stacks), []
        for slot in view.slots:
            x = program.together([results[i] for i in slot.members], None if slot.stack is None else slot.sizes)
            leaves.append(slot.blocks_in_place(x))
        return jax.tree.unflatten(view.stacked, leaves)

    return run


class _Node:
    """Something to be done once: an operation, on all blocks of a stack where there are `sizes`.

    `reads` is what it reads, for the first block. What has no equation is given, or done by `run`, a function of all
    that is read. `uses` counts those who read it.
    """

    def __init__(self, equation: Any, sizes: Index | None, reads: Sequence["_Value"] = (), run: Any = None):
        self.equation, self.sizes, self.reads, self.run = equation, sizes, reads, run
        self.uses = 0
        for read in reads:
            read.node.uses += 1


class _Value(NamedTuple):
    """One result of a node: for one block, by its index, or all that it is."""

    node: _Node
    result: int
    index: Index | None


class _Step(NamedTuple):
    """An equation of the unrolled program, and the numbers of the values that it reads and makes."""

    equation: Any
    reads: list[int]
    makes: range


class _Program:
    """The nodes of an unrolled program, and what is known of their results."""

    def __init__(self):
        self.values: list[_Value | None] = []  # of the unrolled program, by number
        self.levels: list[int] = []  # how many operations lie before a value: the same for all blocks that are alike
        self.steps: dict[int, list[_Step]] = {}
        self.nodes: dict[Any, _Node] = {}
        self.effects: list[tuple[int, _Node]] = []
        self.done: dict[_Node, Sequence[Any]] = {}
        self.parts: dict[_Value, Any] = {}
        self.bodies: dict[int, Any] = {}  # what `_same` found, by the number of a jaxpr, which lives as long

    # ---- reading -----------------------------------------------------------------------------------------------------

    def given(self, x: Any, sizes: Index | None = None) -> _Value:
        """A value from outside."""
        node = _Node(None, sizes)
        self.done[node] = [x]
        return _Value(node, 0, None)

    def inputs(self, view: View, tree: Any) -> list[_Value]:
        """The leaves of an unrolled tree, those of a stack as its blocks."""
        parts = []
        for slot, x in zip(view.slots, view.stacked.flatten_up_to(tree), strict=True):
            whole = self.given(slot.blocks_first(x), slot.sizes if slot.stack is not None else None)
            parts.append([whole._replace(index=index) for index in slot.indices] if slot.stack is not None else [whole])
        return jax.tree.leaves(view.scatter(parts), is_leaf=lambda x: isinstance(x, _Value))

    def read(self, jaxpr: Any, given: Sequence[_Value]) -> list[_Value]:
        """The results of a program: all of one level after the other, so that it is known of what is read whether all
        blocks have it."""
        results = self._unravel(jaxpr.jaxpr, jaxpr.consts, [self._number(value) for value in given])
        for level in sorted(self.steps):
            self._level(self.steps[level])
        return [self.values[i] for i in results]  # type: ignore[misc]

    def _number(self, value: _Value | None, level: int = 0) -> int:
        self.values.append(value)
        self.levels.append(level)
        return len(self.values) - 1

    def _unravel(self, jaxpr: Any, consts: Sequence[Any], given: list[int]) -> list[int]:
        """Sort the equations of a program, and of jitted functions in it, by level; the numbers of its results."""
        known = dict(zip(jaxpr.constvars, (self._number(self._constant(x)) for x in consts), strict=True))
        known |= zip(jaxpr.invars, given, strict=True)

        def number(var: Any) -> int:
            return self._number(self._constant(var.val, str(var.aval))) if hasattr(var, "val") else known[var]

        for equation in jaxpr.eqns:
            reads = [number(var) for var in equation.invars]
            if _is_plain_jit(equation):
                body = equation.params["jaxpr"]
                makes: Any = self._unravel(body.jaxpr, body.consts, reads)
            else:
                level = 1 + max((self.levels[i] for i in reads), default=0)
                makes = range(len(self.values), len(self.values) + len(equation.outvars))
                for _ in makes:
                    self._number(None, level)
                self.steps.setdefault(level, []).append(_Step(equation, reads, makes))
            known |= zip(equation.outvars, makes, strict=True)
        return [number(var) for var in jaxpr.outvars]

    def _level(self, steps: list[_Step]) -> None:
        same: dict[Any, dict[Index, list[_Step]]] = {}
        alone = []
        for step in steps:
            reads: list[Any] = [self.values[i] for i in step.reads]
            blocks = {(read.node.sizes, read.index) for read in reads if read.index is not None}
            if len(blocks) != 1 or step.equation.effects:
                alone.append(step)
                continue
            sizes, index = blocks.pop()
            told = tuple((read.node, read.result, read.index is not None) for read in reads)
            same.setdefault((sizes, self._kind(step.equation), told), {}).setdefault(index, []).append(step)
        for (sizes, _, _), found in same.items():
            if len(found) < math.prod(sizes):  # not all blocks do it
                alone += itertools.chain(*found.values())
                continue
            first = next(iter(found.values()))[0]
            node = _Node(first.equation, sizes, [self.values[i] for i in first.reads])  # type: ignore[misc]
            for index, repeated in found.items():
                for step in repeated:
                    self._made(step, node, index)
        for step in alone:
            self._alone(step)

    def _alone(self, step: _Step) -> None:
        reads: list[Any] = [self.values[i] for i in step.reads]
        equation = step.equation
        if equation.effects:
            node = _Node(equation, None, reads)
            self.effects.append((step.makes.start, node))
        elif equation.primitive.name == "cond" and reads[0].index is None and any(x.index is not None for x in reads):
            for i, value in zip(step.makes, self._either(equation, reads), strict=True):
                self.values[i] = value
            return
        else:
            key = (self._kind(equation), tuple(reads))
            if key not in self.nodes:
                self.nodes[key] = _Node(equation, None, reads)
            node = self.nodes[key]
        self._made(step, node, None)

    def _made(self, step: _Step, node: _Node, index: Index | None) -> None:
        for result, i in enumerate(step.makes):
            self.values[i] = _Value(node, result, index)

    def _either(self, equation: Any, reads: list[_Value]) -> list[_Value]:
        """A choice between programs over whole trees, such as `optax.MultiSteps` makes: each of them on the stacks."""
        known: dict[_Value, int] = {}
        places = [(known.setdefault(read._replace(index=None), len(known)), read.index) for read in reads[1:]]
        branches = [_Branch(body, [x.node.sizes for x in known], places) for body in equation.params["branches"]]
        plan: list[tuple[Index | None, list[int]]] = []

        def switch(which: Any, *given: Any) -> list[Any]:
            return jax.lax.switch(which, [branch.run(plan) for branch in branches], *given)

        node = _Node(None, None, [reads[0], *known], switch)
        results: list[Any] = [None] * len(equation.outvars)
        for sizes, found in _alike([branch.results for branch in branches]):
            value = _Value(node, len(plan), None)
            part = None if sizes is None else _Node(None, sizes, [value], lambda x: [x])
            for i, index in zip(found, [None] if sizes is None else _indices(sizes), strict=True):
                results[i] = value if part is None else _Value(part, 0, index)
            plan.append((sizes, found))
        return results

    def _constant(self, x: Any, kind: str = "") -> _Value:
        key = (kind, _told(x))
        if key not in self.nodes:
            self.nodes[key] = self.given(x).node
        return _Value(self.nodes[key], 0, None)

    def _kind(self, equation: Any) -> Any:
        return equation.primitive, self._same(equation.params), _told(equation.ctx)

    def _same(self, x: Any) -> Any:
        """What is equal for parameters of equations that do the same: bodies of loops by what they do, not by name."""
        if isinstance(x, dict):
            return tuple((name, self._same(value)) for name, value in sorted(x.items()))
        if isinstance(x, tuple | list):
            return (type(x), *map(self._same, x))
        if hasattr(x, "eqns"):
            if id(x) not in self.bodies:
                self.bodies[id(x)] = x, self._body(x)
            return self.bodies[id(x)][1]
        return _told(x)

    def _body(self, x: Any) -> Any:
        jaxpr = getattr(x, "jaxpr", x)
        numbers: dict[Any, int] = {}

        def name(var: Any) -> Any:
            value = _told(var.val) if hasattr(var, "val") else numbers.setdefault(var, len(numbers))
            return value, str(var.aval), getattr(var.aval, "weak_type", None)

        inputs = tuple(map(name, (*jaxpr.constvars, *jaxpr.invars)))
        done = tuple(
            (self._kind(equation), tuple(map(name, equation.invars)), tuple(map(name, equation.outvars)))
            for equation in jaxpr.eqns
        )
        return tuple(map(_told, getattr(x, "consts", ()))), inputs, done, tuple(map(name, jaxpr.outvars))

    # ---- running -----------------------------------------------------------------------------------------------------

    def together(self, values: list[_Value], sizes: Index | None) -> Any:
        """The stack of the values of all blocks; where there is no stack, the one value."""
        for node in (*(node for _, node in sorted(self.effects, key=lambda x: x[0])), *(x.node for x in values)):
            self._do(node)
        if sizes is None:
            return self._value(values[0])
        node, result, _ = values[0]
        if node.sizes == sizes and values == [_Value(node, result, index) for index in _indices(sizes)]:
            return self.done[node][result]
        if len(set(values)) == 1:  # the same for all blocks, such as zeros
            x = self._value(values[0])
            return jnp.broadcast_to(x, (*sizes, *x.shape))
        x = jnp.stack([self._value(value) for value in values])
        return x.reshape(*sizes, *x.shape[1:])

    def _do(self, node: _Node) -> None:
        """Do it, and before it whatever it reads (in a list of our own: such a chain is longer than Python's)."""
        waiting = [node]
        while waiting:
            node = waiting[-1]
            if node in self.done:
                waiting.pop()
                continue
            reads = _terms(node) if _is_total(node) else node.reads
            before = [read.node for read in reads if read.node not in self.done]
            if before:
                waiting += before
                continue
            waiting.pop()
            self.done[node] = self._results(node, reads)

    def _results(self, node: _Node, reads: Sequence[_Value]) -> Sequence[Any]:
        if node.sizes is not None and node.run is None:
            own = [read.index is not None for read in reads]
            return _for_all(node.equation, node.sizes, own, [self.done[read.node][read.result] for read in reads])
        if _is_total(node):
            return [self._total(node.equation.primitive, reads)]
        if node.run is None and _joins(node.equation) and any(read.index is not None for read in reads):
            return [self._joined(node.equation, reads)]
        return (node.run or _function(node.equation))(*map(self._value, reads))

    def _value(self, value: _Value) -> Any:
        if value.index is None:
            return self.done[value.node][value.result]
        if value not in self.parts:
            self.parts[value] = self.done[value.node][value.result][value.index]
        return self.parts[value]

    def _total(self, primitive: Any, terms: Sequence[_Value]) -> Any:
        """A sum of many numbers: those of all blocks of a stack by one operation."""
        of: dict[_Value, list[_Value]] = {}
        for term in terms:
            of.setdefault(term._replace(index=None), []).append(term)
        parts = []
        for whole, found in of.items():
            sizes = whole.node.sizes
            if sizes is not None and len(found) == len(set(found)) == math.prod(sizes):
                x = self.done[whole.node][whole.result]
                parts.append(_TOTALS[primitive.name](x).astype(x.dtype))
            else:
                parts += map(self._value, found)
        return _in_turn(primitive, parts)

    def _joined(self, equation: Any, reads: Sequence[_Value]) -> Any:
        """Arrays of one shape put together: those of a stack are together already."""
        starts: dict[_Value, int] = {}
        pieces, places, count = [], [], 0
        for read in reads:
            whole, sizes = read._replace(index=None), read.node.sizes or ()
            if whole not in starts:
                x = self._value(whole)
                starts[whole] = count
                pieces.append(x.reshape(-1, *x.shape[len(sizes) :]))
                count += len(pieces[-1])
            places.append(starts[whole] + (int(np.ravel_multi_index(read.index, sizes)) if read.index else 0))
        x = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)
        x = x if places == list(range(count)) else x[np.asarray(places)]
        x = jnp.moveaxis(x, 0, equation.params["axis" if equation.primitive.name == "stack" else "dimension"])
        return x.reshape(equation.outvars[0].aval.shape)


class _Branch:
    """One of the programs that a choice is made between, with the stacks of what it is given in one."""

    def __init__(self, body: Any, stacks: list[Index | None], places: list[tuple[int, Index | None]]):
        self.body, self.stacks, self.places = body, stacks, places
        self.results = self._read([None] * len(stacks))[1]

    def _read(self, given: Sequence[Any]) -> tuple[_Program, list[_Value]]:
        program = _Program()
        inputs = [program.given(x, sizes) for x, sizes in zip(given, self.stacks, strict=True)]
        return program, program.read(self.body, [inputs[n]._replace(index=index) for n, index in self.places])

    def run(self, plan: list[tuple[Index | None, list[int]]]) -> Callable[..., list[Any]]:
        """It as a function of these inputs; its results are those of `plan`, which says what of them is a stack."""

        def function(*given: Any) -> list[Any]:
            program, results = self._read(given)
            return [program.together([results[i] for i in found], sizes) for sizes, found in plan]

        return function


def _alike(branches: list[list[_Value]]) -> Iterator[tuple[Index | None, list[int]]]:
    """Which results are one stack's in all branches: its sizes, and where its blocks are in order; then the others."""
    same: dict[Any, dict[Index, int]] = {}
    alone = dict.fromkeys(range(len(branches[0])))
    for i, values in enumerate(zip(*branches, strict=True)):
        own = {(value.node.sizes, value.index) for value in values if value.index is not None}
        if len(own) == 1:
            sizes, index = own.pop()
            key = tuple((value.node, value.result, value.index is None) for value in values)
            same.setdefault((sizes, key), {}).setdefault(index, i)
    for (sizes, _), found in same.items():
        if len(found) == math.prod(sizes):
            for i in found.values():
                del alone[i]
            yield sizes, [found[index] for index in _indices(sizes)]
    yield from ((None, [i]) for i in alone)


_TOTALS = {"add": jnp.sum, "mul": jnp.prod, "max": jnp.max, "min": jnp.min}
"""Operations on two numbers, and the same on an array of them."""


def _is_total(node: _Node) -> bool:
    """Whether it is a sum (product, maximum, ...) of two numbers that are no block's."""
    if node.equation is None or node.sizes is not None or node.equation.primitive.name not in _TOTALS:
        return False
    made = node.equation.outvars[0].aval
    return made.shape == () and made.dtype != bool


def _terms(node: _Node) -> list[_Value]:
    """What a sum is the sum of, where what lies between serves for nothing else."""
    found: list[_Value] = []
    waiting = list(reversed(node.reads))
    while waiting:
        read = waiting.pop()
        part = read.node
        if _is_total(part) and part.uses == 1 and part.equation.primitive is node.equation.primitive:
            waiting += reversed(part.reads)
        else:
            found.append(read)
    return found


def _in_turn(primitive: Any, parts: list[Any]) -> Any:
    total = parts[0]
    for part in parts[1:]:
        total = primitive.bind(total, part)
    return total


def _joins(equation: Any) -> bool:
    """Whether it puts arrays of one shape together."""
    return equation.primitive.name in ("concatenate", "stack") and len({var.aval.shape for var in equation.invars}) == 1


def _indices(sizes: Index) -> Iterator[Index]:
    return itertools.product(*map(range, sizes))


def _is_plain_jit(equation: Any) -> bool:
    """Whether it is a jitted function that says nothing about where its arrays lie: then it is what is in it."""
    if equation.primitive.name not in ("jit", "pjit") or equation.effects:
        return False
    said = (equation.params[f"{side}_{what}"] for side in ("in", "out") for what in ("shardings", "layouts"))
    return all(x is None or type(x).__name__ == "UnspecifiedValue" for x in itertools.chain(*said))


def _told(x: Any) -> Any:
    """What is equal for constants that are: zeros of either sign are two, and so are 1 and True."""
    if isinstance(x, jax.Array):  # perhaps a tracer, which is not to be compared
        return Same(x)
    if isinstance(x, np.ndarray | np.generic) and x.dtype != object:
        return x.shape, str(x.dtype), x.tobytes()
    if isinstance(x, float | complex):
        return type(x), repr(x)
    try:
        hash(x)
    except TypeError:
        return Same(x)
    return type(x), x


def _function(equation: Any, own: Sequence[bool] = (), sizes: Index = ()) -> Callable[..., list[Any]]:
    """An operation as a function of what it reads; for each block of a stack, where each has its `own`."""
    from jax.extend.core import ClosedJaxpr, DebugInfo, Jaxpr, jaxpr_as_fun

    places = {var: i for i, var in reversed(list(enumerate(equation.invars))) if not hasattr(var, "val")}
    dropped = [type(var).__name__ == "DropVar" for var in equation.outvars]
    made = [var for var, unused in zip(equation.outvars, dropped, strict=True) if not unused]
    names = DebugInfo("rolled", "sapwood.train.optimizers.stacked_program", ("",) * len(places), ("",) * len(made))
    run = jaxpr_as_fun(ClosedJaxpr(Jaxpr((), list(places), made, [equation], debug_info=names), ()))
    for _ in sizes:
        run = jax.vmap(run, in_axes=tuple(0 if own[i] else None for i in places.values()))

    def results(*values: Any) -> list[Any]:
        found = iter(run(*(values[i] for i in places.values())))
        return [None if unused else next(found) for unused in dropped]

    return results


def _for_all(equation: Any, sizes: Index, own: Sequence[bool], values: Sequence[Any]) -> list[Any]:
    return _function(equation, own, sizes)(*values)
