"""`run_on_stacks`: a function of the unrolled model's tree, run on stacks with one operation for all like blocks.

The function is traced on the unrolled tree, so it sees the rank, norm and name of each block. The operations of its
jaxpr are then grouped by what they do and what they read. An operation that every block of a stack does on its own
values becomes one operation on the stack (`jax.vmap` of it). All other operations stay single: a sum over the whole
tree, or a block that is treated differently. So the result is always that of the unrolled program. If blocks are
treated alike, the program is as long as that of one block. (Sums of numbers of all blocks are taken in another order.)

`_Program.read` groups the equations into nodes and computes nothing. `_Program.together` then runs the nodes that a
result needs.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.core.fingerprint import Same
from sapwood.core.unrolled_trees import Index, StackMapping, Stacks


def run_on_stacks(function: Callable[..., Any], views: Sequence[StackMapping], stacks: Stacks) -> Callable[..., Any]:
    """Convert a function of unrolled trees into one of stacked trees.

    Args:
        function: the function of unrolled trees.
        views: the `StackMapping` of each of its arguments.
        stacks: the stacks of the parameters.

    Returns:
        The function of stacked trees. Its results are stacked too, as `StackMapping` does it.

    >>> from sapwood.core.unrolled_trees import StackedLeaf
    >>> tree = {"blocks": {"0": {"up": jnp.zeros(2)}, "1": {"up": jnp.zeros(2)}}}
    >>> stacks = (StackedLeaf(("blocks", "up"), (1,), (2,), (2,)),)
    >>> by_largest = lambda x: jax.tree.map(lambda x: x / jnp.abs(x).max(), x)
    >>> unit = run_on_stacks(by_largest, [StackMapping(tree, stacks)], stacks)
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
        view, leaves = StackMapping(shape, stacks), []
        for slot in view.slots:
            x = program.together([results[i] for i in slot.members], None if slot.stack is None else slot.sizes)
            leaves.append(slot.blocks_in_place(x))
        return jax.tree.unflatten(view.stacked, leaves)

    return run


class _Node:
    """One operation to run once, on a single value or on all blocks of a stack at once.

    Attributes:
        equation: the jaxpr equation; None if the value comes from outside, or if `run` computes it.
        sizes: dimensions of the stack; None for a single value.
        reads: the values that it reads; in a stack, those of the first block.
        run: function of all values that are read, in place of an equation.
        uses: number of times that other nodes read this one.
    """

    def __init__(self, equation: Any, sizes: Index | None, reads: Sequence["_Value"] = (), run: Any = None):
        self.equation, self.sizes, self.reads, self.run = equation, sizes, reads, run
        self.uses = 0
        for read in reads:
            read.node.uses += 1


class _Value(NamedTuple):
    """One result of a node: the block of a stack at `index`, or all of the result if `index` is None."""

    node: _Node
    result: int
    index: Index | None


class _Step(NamedTuple):
    """An equation of the unrolled program, with the numbers (in `_Program.values`) of what it reads and makes."""

    equation: Any
    reads: list[int]
    makes: range


class _Program:
    """An unrolled program as nodes, with the results of those that have run."""

    def __init__(self):
        self.values: list[_Value | None] = []  # values of the unrolled program by number, None if not read yet
        self.levels: list[int] = []  # operations before each value; equal in all blocks that are treated alike
        self.steps: dict[int, list[_Step]] = {}  # equations by level
        self.nodes: dict[Any, _Node] = {}  # constants and single equations by what they are, so that equal ones are one
        self.effects: list[tuple[int, _Node]] = []  # nodes with side effects, each with its place in the order
        self.done: dict[_Node, Sequence[Any]] = {}  # results of the nodes that have run
        self.parts: dict[_Value, Any] = {}  # single blocks that were sliced from a stacked result
        self.bodies: dict[int, Any] = {}  # results of `_same` by id of a jaxpr, kept alive beside it

    # ---- reading -----------------------------------------------------------------------------------------------------

    def given(self, x: Any, sizes: Index | None = None) -> _Value:
        """Add a value from outside; ``sizes`` are the dimensions of a stack, or None."""
        node = _Node(None, sizes)
        self.done[node] = [x]
        return _Value(node, 0, None)

    def inputs(self, view: StackMapping, tree: Any) -> list[_Value]:
        """Add the leaves of a stacked tree, and return the values of the unrolled tree's leaves."""
        parts = []
        for slot, x in zip(view.slots, view.stacked.flatten_up_to(tree), strict=True):
            whole = self.given(slot.blocks_first(x), slot.sizes if slot.stack is not None else None)
            parts.append([whole._replace(index=index) for index in slot.indices] if slot.stack is not None else [whole])
        return jax.tree.leaves(view.scatter(parts), is_leaf=lambda x: isinstance(x, _Value))

    def read(self, jaxpr: Any, given: Sequence[_Value]) -> list[_Value]:
        """Group the equations of a jaxpr into nodes, and return the values of its results.

        Equations are grouped level by level: it is then known of each input of an equation whether all blocks have it.
        """
        results = self._unravel(jaxpr.jaxpr, jaxpr.consts, [self._number(value) for value in given])
        for level in sorted(self.steps):
            self._level(self.steps[level])
        return [self.values[i] for i in results]  # type: ignore[misc]

    def _number(self, value: _Value | None, level: int = 0) -> int:
        """Add a value (None if it is not known yet), and return its number."""
        self.values.append(value)
        self.levels.append(level)
        return len(self.values) - 1

    def _unravel(self, jaxpr: Any, consts: Sequence[Any], given: list[int]) -> list[int]:
        """Sort the equations of a jaxpr, and of plain jitted functions in it, by level.

        Returns the numbers of the jaxpr's results.
        """
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
        """Make the nodes of one level: one for each group that all blocks of a stack share, the others single."""
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
            if len(found) < math.prod(sizes):  # not every block has this operation
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
        """Make the node of one equation that is not done for all blocks of a stack. Equal equations share it."""
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
        """Set the values of an equation's results to those of a node."""
        for result, i in enumerate(step.makes):
            self.values[i] = _Value(node, result, index)

    def _either(self, equation: Any, reads: list[_Value]) -> list[_Value]:
        """Run each branch of a `cond` over whole trees, such as `optax.MultiSteps` makes, on the stacks."""
        known: dict[_Value, int] = {}
        places = [(known.setdefault(read._replace(index=None), len(known)), read.index) for read in reads[1:]]
        branches = [_Branch(body, [x.node.sizes for x in known], places) for body in equation.params["branches"]]
        plan: list[tuple[Index | None, list[int]]] = []  # filled below, before `switch` runs

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
        """Add a constant; equal constants are one node."""
        key = (kind, _told(x))
        if key not in self.nodes:
            self.nodes[key] = self.given(x).node
        return _Value(self.nodes[key], 0, None)

    def _kind(self, equation: Any) -> Any:
        """Return a key that is equal for equations that do the same."""
        return equation.primitive, self._same(equation.params), _told(equation.ctx)

    def _same(self, x: Any) -> Any:
        """Return a key that is equal for parameters of equations that do the same.

        A jaxpr, such as the body of a loop, counts by what it does, not by the names of its variables.
        """
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
        """Return a key of what a jaxpr does, with its variables numbered in order."""
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
        """Run what is needed for the values of all blocks, and return their stack, or without sizes the one value."""
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
        """Run a node, after all nodes that it reads.

        The nodes that wait are in a list: a chain of them may be longer than Python's recursion allows.
        """
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
        """Compute the results of a node whose inputs are computed."""
        if node.sizes is not None and node.run is None:
            own = [read.index is not None for read in reads]
            return _for_all(node.equation, node.sizes, own, [self.done[read.node][read.result] for read in reads])
        if _is_total(node):
            return [self._total(node.equation.primitive, reads)]
        if node.run is None and _joins(node.equation) and any(read.index is not None for read in reads):
            return [self._joined(node.equation, reads)]
        return (node.run or _function(node.equation))(*map(self._value, reads))

    def _value(self, value: _Value) -> Any:
        """Return the array of a value; the block of a stack is sliced once."""
        if value.index is None:
            return self.done[value.node][value.result]
        if value not in self.parts:
            self.parts[value] = self.done[value.node][value.result][value.index]
        return self.parts[value]

    def _total(self, primitive: Any, terms: Sequence[_Value]) -> Any:
        """Add up (multiply, ...) many scalars; those of all blocks of a stack are one operation on the stack."""
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
        """Concatenate or stack arrays of one shape; blocks of a stack are not taken apart for it."""
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
    """One branch of a `cond`, as a program whose inputs are stacks."""

    def __init__(self, body: Any, stacks: list[Index | None], places: list[tuple[int, Index | None]]):
        self.body, self.stacks, self.places = body, stacks, places
        self.results = self._read([None] * len(stacks))[1]

    def _read(self, given: Sequence[Any]) -> tuple[_Program, list[_Value]]:
        program = _Program()
        inputs = [program.given(x, sizes) for x, sizes in zip(given, self.stacks, strict=True)]
        return program, program.read(self.body, [inputs[n]._replace(index=index) for n, index in self.places])

    def run(self, plan: list[tuple[Index | None, list[int]]]) -> Callable[..., list[Any]]:
        """Return the branch as a function of its inputs.

        ``plan`` lists the results: the sizes of a stack, or None, and the numbers of the values that it consists of.
        """

        def function(*given: Any) -> list[Any]:
            program, results = self._read(given)
            return [program.together([results[i] for i in found], sizes) for sizes, found in plan]

        return function


def _alike(branches: list[list[_Value]]) -> Iterator[tuple[Index | None, list[int]]]:
    """Group the results of the branches of a `cond` into stacks.

    For results that are the blocks of one stack in every branch, yields the stack's sizes and the places of its blocks
    in order. Then yields None and the place of each other result.
    """
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
"""Operations on two scalars by the name of their primitive, each as a reduction of an array."""


def _is_total(node: _Node) -> bool:
    """Return True if a node is a sum (product, maximum or minimum) of two scalars outside of any stack."""
    if node.equation is None or node.sizes is not None or node.equation.primitive.name not in _TOTALS:
        return False
    made = node.equation.outvars[0].aval
    return made.shape == () and made.dtype != bool


def _terms(node: _Node) -> list[_Value]:
    """List the terms of a sum, through partial sums that nothing else reads."""
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
    """Combine scalars one after the other."""
    total = parts[0]
    for part in parts[1:]:
        total = primitive.bind(total, part)
    return total


def _joins(equation: Any) -> bool:
    """Return True if an equation concatenates or stacks arrays of one shape."""
    return equation.primitive.name in ("concatenate", "stack") and len({var.aval.shape for var in equation.invars}) == 1


def _indices(sizes: Index) -> Iterator[Index]:
    return itertools.product(*map(range, sizes))


def _is_plain_jit(equation: Any) -> bool:
    """Return True for a jitted function without effects, shardings and layouts. Its equations are used in its place."""
    if equation.primitive.name not in ("jit", "pjit") or equation.effects:
        return False
    said = (equation.params[f"{side}_{what}"] for side in ("in", "out") for what in ("shardings", "layouts"))
    return all(x is None or type(x).__name__ == "UnspecifiedValue" for x in itertools.chain(*said))


def _told(x: Any) -> Any:
    """Return a key that is equal for equal constants.

    Zeros of different sign differ, and so do 1 and True.
    """
    if isinstance(x, jax.Array):  # may be a tracer, so it is equal only to itself
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
    """Return an equation as a function of what it reads.

    With ``sizes`` it runs for each block of a stack; ``own`` says which inputs each block has for itself.
    """
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
    """Run an equation for all blocks of a stack."""
    return _function(equation, own, sizes)(*values)
