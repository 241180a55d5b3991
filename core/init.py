"""`init`: the first values of a model's variables, each from its path alone."""

import itertools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.core import paths
from sapwood.core.collect import Collector, is_traced
from sapwood.core.declare import identity
from sapwood.core.errors import DeclarationError
from sapwood.core.param import Param
from sapwood.core.rng import as_key, fold, path_hash
from sapwood.core.run import bind
from sapwood.core.spec import Spec, spec
from sapwood.core.vars import collecting

GROUPED_BELOW = 2**22
"""Elements up to which variables of one shape and initialiser are drawn together: one compilation for a hundred layers.
Larger ones are drawn one by one, so that no copy of them is ever held."""


def init(f: Callable, key: Any, *xs: Any, data: bool = False, policy=None, place=None) -> tuple[dict, dict]:
    """The first ``(params, state)`` of ``f(v, *xs)``.

    ``key`` is a random key or an integer seed. A variable's key depends on its path alone, so values do not depend on
    call order, mesh or scanning. ``data=True`` runs the forward pass once for initialisers that read their input
    (weight norm, ActNorm); without it they are an error. ``place(axes, shape)`` says where arrays are born.

    >>> def model(v, x):
    ...     return x @ v.head.param("kernel", (x.shape[-1], 10), jax.nn.initializers.lecun_normal())
    >>> params, state = init(model, 0, jnp.ones((8, 4)))
    >>> params["head"]["kernel"].shape, state
    ((4, 10), {})
    """
    key, declared = as_key(key), spec(f, *xs, policy=policy)
    late = {where for where, param in _entries(declared) if _reads_data(param.init)}
    if late and not data:
        names = ", ".join(paths.join(path) for _, path in sorted(late))
        raise DeclarationError(f"the initialisers of {names} read the model's input; use sw.init(..., data=True)")
    first = jax.jit(lambda key: draw(declared, key, place=place, skip=late))(key)
    return jax.jit(lambda first, key, xs: _forward(f, first, key, xs, policy, place))(first, key, xs) if late else first


def draw(declared: Spec, key: jax.Array, *, place=None, skip: frozenset | set = frozenset()) -> tuple[dict, dict]:
    """The first values of everything declared; a pure function of the key, to be run under `jax.jit`."""
    entries = [(where, param) for where, param in _entries(declared) if where not in skip]
    names = {where: _unrolled(where[1], param) for where, param in entries}
    if not entries:
        return {}, {}
    hashes = np.array([path_hash(path) for where, _ in entries for path in names[where]], np.uint32).reshape(-1, 2)
    keys = jax.vmap(lambda h: fold(key, (h[0], h[1])))(hashes)
    starts = itertools.accumulate((len(names[where]) for where, _ in entries), initial=0)
    values: dict = {}
    for group in _groups([(where, param, start, len(names[where])) for (where, param), start in zip(entries, starts)]):
        values.update(_draw_group(group, keys, place))
    trees = (((path, x) for (kind, path), x in values.items() if kind == want) for want in ("params", "state"))
    return tuple(paths.nest(sorted(tree, key=lambda entry: [paths.order(n) for n in entry[0]])) for tree in trees)  # type: ignore


def _entries(declared: Spec) -> list:
    kinds = ("params", "state")
    return [((kind, path), param) for kind, tree in zip(kinds, declared) for path, param in paths.leaves(tree)]


def _unit_shape(param: Param) -> tuple[int, ...]:
    return param.shape[len(param.stacked) :]


def _unrolled(path: paths.Path, param: Param) -> list[paths.Path]:
    """The paths of a variable's copies, as an unrolled stack would name them, outer dimension first."""
    result = []
    for indices in itertools.product(*(range(s.size) for s in param.stacked)):
        name = path
        for i, s in reversed(list(zip(indices, param.stacked))):
            name = (*name[: s.depth], str(i), *name[s.depth :])
        result.append(name)
    return result


def _groups(entries: list) -> list[list]:
    """Entries that one vectorised draw can serve: equal shape, dtype and initialiser."""
    groups: dict = {}
    for entry in entries:
        (_, path), param, _, count = entry
        shape = _unit_shape(param)
        alone = path if int(np.prod(shape)) * count > GROUPED_BELOW else None
        groups.setdefault((shape, str(param.dtype), identity(param.init), param.axes, alone), []).append(entry)
    return list(groups.values())


def _draw_group(group: list, keys: jax.Array, place: Callable | None) -> dict:
    param = group[0][1]
    shape = _unit_shape(param)
    index = np.concatenate([np.arange(start, start + count) for _, _, start, count in group])
    many = jax.vmap(lambda key: _first_value(group[0][0], param, key, shape))(keys[index])
    values, start = {}, 0
    for where, param, _, count in group:
        value = many[start : start + count].reshape(param.shape)
        sharding = place(param.axes, param.shape) if place and param.axes else None
        values[where] = value if sharding is None else jax.lax.with_sharding_constraint(value, sharding)
        start += count
    return values


def _first_value(where: tuple[str, paths.Path], param: Param, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """What the initialiser gives, held to the declaration."""
    name = f"the initialiser of {where[0]} {paths.join(where[1])}"
    if not callable(param.init):
        raise DeclarationError(f"{name} must be a function init(key, shape, dtype), got {param.init!r}")
    value = jnp.asarray(param.init(key, shape, param.dtype))
    if value.shape != shape:
        raise DeclarationError(f"{name} ({param.init!r}) gave shape {value.shape}, declared is {shape}")
    return value.astype(param.dtype)


def _reads_data(init: Any, depth: int = 3) -> bool:
    """Whether an initialiser is a closure over values of the forward pass, which are gone once that has run."""
    if is_traced(init):
        return True
    held = [cell.cell_contents for cell in getattr(init, "__closure__", None) or () if cell != types.CellType()]
    held += [*(getattr(init, "__defaults__", None) or ()), *getattr(init, "args", ())]
    held += getattr(init, "keywords", {}).values()
    return depth > 0 and any(_reads_data(leaf, depth - 1) for leaf in jax.tree.leaves(held))


def _forward(f: Callable, first: tuple[dict, dict], key: jax.Array, xs: tuple, policy, place) -> tuple[dict, dict]:
    """Run the model once in train mode; what is not there yet is made where the model asks for it."""
    rng = jax.random.fold_in(key, 1)
    v, collector = collecting(bind(*first, rng=rng, train=True, policy=policy, place=place), init_key=key)
    f(v, *xs)
    return _with_fresh(first, collector)


def _with_fresh(first: tuple[dict, dict], collector: Collector) -> tuple[dict, dict]:
    made = {"params": [], "state": []}
    for (kind, path), value in collector.fresh.items():
        made[kind].append((path, value))
    return paths.overlay(first[0], paths.nest(made["params"])), paths.overlay(first[1], paths.nest(made["state"]))
