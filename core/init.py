"""`init`: the first values of a model's variables.

The key of a variable depends only on its path, so values do not depend on call order, mesh or scanning. `spec` gives
the declarations; `drawing` groups equal ones and draws each group in one program. Variables whose initializer reads
activations (``data=True``) are made by a forward pass in `_forward` instead.
"""

import itertools
import math
import types
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sapwood.core import paths
from sapwood.core.bind import bind
from sapwood.core.effects import Collector
from sapwood.core.errors import DeclarationError
from sapwood.core.initializers import FLAT_BELOW
from sapwood.core.param import Param
from sapwood.core.rng import as_key, fold, path_hash
from sapwood.core.same_initializer import initializer_key
from sapwood.core.spec import Spec, arrays_apart, spec
from sapwood.core.target_platform import platform
from sapwood.core.traces import is_traced
from sapwood.core.vars import with_collector

GROUPED_BELOW = 2**22
"""Number of elements up to which variables of one shape and initializer are drawn together. A hundred layers then need
one compilation. Larger variables are drawn one by one, so that no copy of them is ever held.

On a mesh, every device draws variables below `FLAT_BELOW` elements whole, at most this many elements at a time, by the
same program that one device runs; then it keeps its shard. If XLA partitioned the draw instead, it would fuse it
differently, and numbers would differ by a rounding."""


@jax.transfer_guard("allow")  # the caller asks for these transfers: a seed and the hashes of paths go to the device
def init(
    f: Callable,
    key: Any,
    *xs: Any,
    data: bool = False,
    policy: Any = None,
    place: Any = None,
    shardings: Any = None,
) -> tuple[dict, dict]:
    """The first ``(params, state)`` of ``f(v, *xs)``.

    A variable's key depends only on its path, so values do not depend on call order, mesh or scanning.

    Args:
        f: the model, a function or a layer.
        key: random key or integer seed.
        xs: inputs of the model: pytrees of arrays, or of `jax.ShapeDtypeStruct` without ``data``.
        data: True runs the forward pass once for initializers that read their input (weight norm, ActNorm). With False
            such an initializer raises `DeclarationError`.
        policy: a `Policy` or the name of a compute dtype.
        place: ``place(axes, shape)`` returns the sharding of an activation in that forward pass.
        shardings: ``shardings(spec)`` returns a pair of trees, the shardings of parameters and of state; each array is
            created with its sharding. None uses the default device. `sapwood.parallel.init` passes it.

    Returns:
        Two nested dicts of arrays.

    >>> def model(v, x):
    ...     return x @ v.head.param("kernel", (x.shape[-1], 10), jax.nn.initializers.lecun_normal())
    >>> params, state = init(model, 0, jnp.ones((8, 4)))
    >>> params["head"]["kernel"].shape, state
    ((4, 10), {})
    """
    declared = spec(f, *xs, policy=policy)
    born = shardings(declared) if shardings else None
    return initializer(f, declared, data=data, policy=policy, place=place, shardings=born)(as_key(key), *xs)


def initializer(
    f: Callable,
    declared: Spec,
    *,
    data: bool = False,
    policy: Any = None,
    place: Any = None,
    shardings: Any = None,
    given: tuple[bool, ...] = (False, False),
) -> Callable[..., tuple[dict, dict]]:
    """`init` of a model whose declarations are known, as a function ``make(key, *xs, there=(None, None))``.

    Its programs are compiled once, so it may be called with many keys.

    Args:
        f: the model, a function or a layer.
        declared: its declarations, from `spec`.
        data: as in `init`.
        policy: as in `init`.
        place: as in `init`.
        shardings: pair of trees, the shardings of parameters and of state; None uses the default device.
        given: pair of booleans, True if the caller has the parameters, or the state, and passes them as ``there``.
            ``make`` returns them unchanged. ``there`` is a pair of trees, with None for a tree that ``make`` makes.
    """
    declared = Spec(*({} if there else tree for tree, there in zip(declared, given, strict=True)))
    late = {where for where, param in _entries(declared) if _reads_data(param.init)}
    if late and not data:
        names = ", ".join(paths.join(path) for _, path in sorted(late))
        raise DeclarationError(f"the initialisers of {names} read the model's input; use sw.init(..., data=True)")
    drawn = drawing(declared, shardings or ({}, {}), skip=late)

    def make(key: jax.Array, *xs: Any, there: tuple = (None, None)) -> tuple[dict, dict]:
        params, state = drawn(key)
        first = params if there[0] is None else there[0], state if there[1] is None else there[1]
        if not late:
            return first
        arrays, rest = arrays_apart(xs)
        whole = jax.jit(partial(_forward, f, rest, policy=policy, place=place), out_shardings=shardings)
        return whole(first, key, arrays)

    return make


def draw(declared: Spec, key: jax.Array, shardings: tuple[dict, dict] = ({}, {})) -> tuple[dict, dict]:
    """The first values of everything in ``declared``, each array created with its sharding."""
    return drawing(declared, shardings)(key)


def drawing(
    declared: Spec, shardings: tuple[dict, dict] = ({}, {}), skip: Collection = ()
) -> Callable[[jax.Array], tuple[dict, dict]]:
    """`draw` as a function of the key, whose programs are compiled once. Variables in ``skip`` are left out.

    Variables of one shape and initializer are drawn as one array. A second program, compiled once for each group, cuts
    one variable out of it: if one program made a hundred slices, XLA would repeat the draw in each of them.
    """
    born = dict(_entries(Spec(*shardings)))
    entries = [(where, param) for where, param in _entries(declared) if where not in skip]
    hashes = [path_hash(path) for where, param in entries for path in _unrolled(where[1], param)]
    numbers = np.array(hashes, np.uint32).reshape(-1, 2)
    starts = itertools.accumulate((math.prod(s.size for s in param.stacked) for _, param in entries), initial=0)
    start = dict(zip((where for where, _ in entries), starts, strict=False))
    groups = [(group, _drawing(group, start, born)) for group in _groups(entries, born)]

    def values(key: jax.Array) -> tuple[dict, dict]:
        keys = jax.jit(_keys, compiler_options=run_once_options(key))(key, numbers)
        made: dict = {}
        for group, drawn in groups:
            made.update(_cut(group, drawn(keys), born))
        trees = {"params": [], "state": []}
        for (kind, path), _ in entries:
            trees[kind].append((path, made[kind, path]))
        return paths.nest(trees["params"]), paths.nest(trees["state"])

    return values


def _entries(declared: Spec) -> list:
    kinds = ("params", "state")
    return [
        ((kind, path), param) for kind, tree in zip(kinds, declared, strict=True) for path, param in paths.leaves(tree)
    ]


def _unrolled(path: paths.Path, param: Param) -> list[paths.Path]:
    """The paths that a variable's stacked copies have in an unrolled stack, outer dimension first."""
    result = []
    for indices in itertools.product(*(range(s.size) for s in param.stacked)):
        name = path
        for i, s in reversed(list(zip(indices, param.stacked, strict=True))):
            name = (*name[: s.depth], str(i), *name[s.depth :])
        result.append(name)
    return result


def _groups(entries: list, born: dict) -> list[list]:
    """Group entries that one vectorized draw can serve: equal shape, dtype, initializer and sharding."""
    groups: dict = {}
    for where, param in entries:
        alone = where if param.size > GROUPED_BELOW else None
        alike = (param.shape, param.stacked, str(param.dtype), initializer_key(param.init), born.get(where), alone)
        groups.setdefault(alike, []).append((where, param))
    return list(groups.values())


def _keys(key: jax.Array, hashes: np.ndarray) -> jax.Array:
    return jax.vmap(lambda h: fold(key, (h[0], h[1])))(hashes)


def _drawing(group: list, start: dict, born: dict) -> Callable[[jax.Array], jax.Array]:
    """A function that draws all variables of a group as one array, stacked along a new first dimension.

    A group of one variable gets no new dimension. The function takes the keys of all variables of the model. ``start``
    maps a variable to the index of its first key, and ``born`` maps it to its sharding.
    """
    where, param = group[0]
    shape, sharding = param.shape[len(param.stacked) :], born.get(where)
    copies = math.prod(s.size for s in param.stacked)
    index = np.concatenate([np.arange(copies) + start[name] for name, _ in group])
    result = param.shape if len(group) == 1 else (len(group), *param.shape)
    size = math.prod(shape)  # of one copy, so that scanned and unrolled stacks take the same branch below
    if sharding is not None and len(group) > 1:
        sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))

    def values(keys, index):
        if len(index) == 1:  # a draw for one key compiles faster than a vectorized draw for a batch of one
            return _first_value(where, param, keys[index[0]], shape)[None]
        return jax.vmap(lambda key: _first_value(where, param, key, shape))(keys[index])

    def joined(*parts):
        return jnp.concatenate(parts).reshape(result)

    def at_once(keys):
        return joined(values(keys, index))

    def drawn(keys):
        compiled = partial(jax.jit, compiler_options=run_once_options(keys) if size < GROUPED_BELOW else None)
        if sharding is None or size >= FLAT_BELOW:
            return compiled(at_once, out_shardings=sharding)(keys)
        whole, cut = PartitionSpec(), PartitionSpec(None, *tuple(sharding.spec)[len(result) - len(shape) :])
        draw = compiled(values, out_shardings=NamedSharding(sharding.mesh, whole))
        keep = compiled(_same, out_shardings=NamedSharding(sharding.mesh, cut))
        parts = np.array_split(index, max(1, -(-len(index) * size // GROUPED_BELOW)))
        each = (draw(keys, part) for part in parts)
        return compiled(joined, out_shardings=sharding)(*(map(keep, each) if len(parts) > 1 else each))

    return drawn


def _same(x: jax.Array) -> jax.Array:
    return x


def run_once_options(key: jax.Array) -> dict[str, Any] | None:
    """Compiler options for a program that runs once, or None.

    On a CPU they turn LLVM's optimization off, and compiling takes a third of the time. The result is None on other
    platforms, and if the key is traced: the program is then a part of another one and takes no options of its own.
    """
    return {"xla_backend_optimization_level": 0} if platform() == "cpu" and not is_traced(key) else None


def _cut(group: list, drawn: jax.Array, born: dict) -> dict:
    """The variables of a group, sliced out of the array that they were drawn in."""
    if len(group) == 1:
        return {group[0][0]: drawn}
    at = jax.jit(_at, out_shardings=born.get(group[0][0]))
    return {where: at(drawn, i) for i, (where, _) in enumerate(group)}


def _at(drawn: jax.Array, i: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(drawn, i, keepdims=False)


def _first_value(where: tuple[str, paths.Path], param: Param, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Call the initializer and cast its result to the declared dtype.

    Raises `DeclarationError` if the initializer is not callable or returns another shape.
    """
    name = f"the initialiser of {where[0]} {paths.join(where[1])}"
    if not callable(param.init):
        raise DeclarationError(f"{name} must be a function init(key, shape, dtype), got {param.init!r}")
    try:
        value = jnp.asarray(param.init(key, shape, param.dtype))
    except Exception as error:
        error.add_note(f"in {name}: {param.init!r} of {param.dtype}{list(shape)}")
        raise
    if value.shape != shape:
        raise DeclarationError(f"{name} ({param.init!r}) gave shape {value.shape}, declared is {shape}")
    return value.astype(param.dtype)


def _reads_data(init: Any, depth: int = 3) -> bool:
    """True if an initializer holds a traced value, in its closure, defaults or partial arguments.

    Such a value is an activation of the forward pass, and is gone once that trace ends. Nested functions are searched
    up to ``depth`` levels.
    """
    if is_traced(init):
        return True
    held = [cell.cell_contents for cell in getattr(init, "__closure__", None) or () if cell != types.CellType()]
    held += [*(getattr(init, "__defaults__", None) or ()), *getattr(init, "args", ())]
    held += getattr(init, "keywords", {}).values()
    return depth > 0 and any(_reads_data(leaf, depth - 1) for leaf in jax.tree.leaves(held))


def _forward(
    f: Callable, rest: Callable, first: tuple[dict, dict], key: jax.Array, arrays: list, *, policy, place
) -> tuple[dict, dict]:
    """Run the model once in train mode. A variable that is not in ``first`` is made when the model declares it."""
    rng = jax.random.fold_in(key, 1)
    v, collector = with_collector(bind(*first, rng=rng, train=True, policy=policy, place=place), init_key=key)
    f(v, *rest(arrays))
    return _with_fresh(first, collector)


def _with_fresh(first: tuple[dict, dict], collector: Collector) -> tuple[dict, dict]:
    made = {"params": [], "state": []}
    for (kind, path), value in collector.fresh.items():
        made[kind].append((path, value))
    return paths.overlay(first[0], paths.nest(made["params"])), paths.overlay(first[1], paths.nest(made["state"]))
