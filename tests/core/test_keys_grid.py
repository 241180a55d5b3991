"""Contract 5 as a grid: each transform within each other, with the key passed in or closed over, used once or twice."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import sapwood as sw
from sapwood.core import vars as core_vars


@pytest.fixture
def hashes(monkeypatch):
    """Draws give the 64 bits of their place in the stead of a key: the same rules, a fraction of the program."""
    monkeypatch.setattr(core_vars, "fold_once", lambda key, h: jnp.stack([jnp.asarray(lane, "uint32") for lane in h]))


def draw(w):
    return w.rng("mask")


# ---- the transforms: `f(w)` run inside of each, with a cursor that was passed in or is closed over ------------------

ROWS = {"vmap": 2, "scan": 2, "while": 2, "fori": 2, "map": 2, "shard_map": 2}
"""How often a transform runs what is inside of it; the others once."""

IN_PLACE = {"grad"}
"""What runs a function once, in the midst of what is around: a key may be closed over."""


@functools.cache
def inner(name, f):
    """The function that the transform is of: one for each f, so that JAX finds what it traced before."""
    return {
        "scan": lambda w, _: (w, f(w)),
        "map": lambda w: f(w),
        "cond": lambda w: jnp.zeros_like(f(w)),
        "grad": lambda p, w: (p, f(w)),
        "shard_map": lambda w: f(jax.tree.map(lambda part: part[0], w))[None],
    }[name]


def manual():
    return jax.sharding.get_abstract_mesh().manual_axes


AXES = ("data", "tensor")


def sharded(f, *stacks):
    """`f` on each of two devices with its part of a stack; within another shard_map it takes the other axis."""
    axis = AXES[len(manual())]
    mesh = None if manual() else sw.mesh("data=2,tensor=2", devices=jax.devices()[:4])
    specs = (P(axis),) * len(stacks)
    return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P(axis), axis_names={axis}, check_vma=False)(*stacks)


def looped(loop, step, w, shape):
    out = jnp.zeros((2, *shape), jnp.uint32)
    if loop == "fori":
        return jax.lax.fori_loop(0, 2, lambda i, c: step(i, *c), (w, out))[1]
    return jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, *step(*c)), (0, w, out))[2]


def twin(f):
    vjp = jax.custom_vjp(lambda w: f(w))
    vjp.defvjp(lambda w: (f(w), None), lambda _, g: (None,))
    return vjp


PASSED = {
    "vmap": lambda f, w, _: jax.vmap(f)(w.stack(2)),
    "scan": lambda f, w, _: jax.lax.scan(inner("scan", f), w.fork(), None, 2)[1],
    "while": lambda f, w, shape: looped("while", lambda i, w, out: (w, out.at[i].set(f(w))), w.fork(), shape),
    "fori": lambda f, w, shape: looped("fori", lambda i, w, out: (w, out.at[i].set(f(w.fold(i)))), w.fork(), shape),
    "map": lambda f, w, _: jax.lax.map(inner("map", f), w.stack(2)),
    "cond": lambda f, w, _: jax.lax.cond(jnp.ones(()) > 0, f, inner("cond", f), w.fork()),
    "switch": lambda f, w, _: jax.lax.switch((jnp.ones(()) > 0).astype(int), [inner("cond", f), f], w.fork()),
    "jit": lambda f, w, _: jax.jit(f)(w.fork()),
    "checkpoint": lambda f, w, _: jax.checkpoint(f)(w.fork()),
    "grad": lambda f, w, _: jax.grad(inner("grad", f), has_aux=True)(1.0, w.fork())[1],
    "custom_vjp": lambda f, w, _: twin(f)(w.fork()),
    "shard_map": lambda f, w, _: sharded(inner("shard_map", f), w.stack(2)),
}
CLOSED = {
    "vmap": lambda f, w, _: jax.vmap(lambda x: f(w))(jnp.ones(2)),
    "scan": lambda f, w, _: jax.lax.scan(lambda c, i: (c, f(w.fold(i))), 0, jnp.arange(2))[1],
    "while": lambda f, w, shape: looped("while", lambda i, c, out: (c, out.at[i].set(f(w.fold(i)))), 0, shape),
    "fori": lambda f, w, shape: looped("fori", lambda i, c, out: (c, out.at[i].set(f(w))), 0, shape),
    "map": lambda f, w, _: jax.lax.map(lambda i: f(w.fold(i)), jnp.arange(2)),
    "cond": lambda f, w, _: jax.lax.cond(jnp.ones(()) > 0, lambda: f(w), lambda: f(w) * 0),
    "switch": lambda f, w, _: jax.lax.switch((jnp.ones(()) > 0).astype(int), [lambda: f(w) * 0, lambda: f(w)]),
    "jit": lambda f, w, _: jax.jit(lambda: f(w))(),
    "checkpoint": lambda f, w, _: jax.checkpoint(lambda: f(w))(),
    "grad": lambda f, w, _: jax.grad(lambda p: (p, f(w)), has_aux=True)(1.0)[1],
    "custom_vjp": lambda f, w, _: twin(lambda x: f(w))(1.0),
    "shard_map": lambda f, w, _: sharded(lambda: f(w)[None]),
}


WAYS = {"passed in": PASSED, "closed over": CLOSED}
CELLS = [(i, *ways, bodies) for i in PASSED for ways in itertools.product(WAYS, WAYS) for bodies in ("one", "two")]


def uses(v, o, i, outside, inside, bodies):
    """The draws of two uses of the key of `v` through `i` in `o`: of one function that JAX knows, or of two."""
    rows = (ROWS[i],) if i in ROWS else ()

    def body():
        return lambda w: WAYS[inside][i](draw, w, (2,))

    first = body()
    return [WAYS[outside][o](f, v, (*rows, 2)) for f in (first, first if bodies == "one" else body())]


def expected(o, i, outside, inside, bodies):
    """What a cell is to do, whether one body is used twice or two are."""
    passed = (outside == "passed in" or o in IN_PLACE) and (inside == "passed in" or i in IN_PLACE)
    return "all uses, rows, steps and devices differ" if passed else "EffectError"


def outcome(draws, count):
    if draws is None:
        return "EffectError"
    rows = [tuple(row) for a in draws for row in np.asarray(a).reshape(-1, 2).tolist()]
    assert len(rows) == count
    return "all uses, rows, steps and devices differ" if len(set(rows)) == count else f"some draws are the same: {rows}"


@pytest.mark.slow
@pytest.mark.usefixtures("hashes")
@pytest.mark.parametrize("o", PASSED)
def test_no_two_draws_meet(o):
    @jax.jit
    def run(key):
        found = {}
        for cell in CELLS:
            try:
                found[cell] = uses(sw.bind({}, {}, rng=key).place, o, *cell)
            except sw.EffectError:
                found[cell] = None
        return found

    found = run(jax.random.key(0))
    got = {cell: outcome(found[cell], 2 * ROWS.get(o, 1) * ROWS.get(cell[0], 1)) for cell in CELLS}
    assert got == {cell: expected(o, *cell) for cell in CELLS}


@pytest.mark.usefixtures("hashes")
def test_what_runs_once_draws_as_without_it():
    """Remat, branches, jit and gradients change no number, alone or in each other."""
    once = [name for name in PASSED if name not in ROWS]

    @jax.jit
    def run(key):
        plain = draw(sw.bind({}, {}, rng=key).place)
        return plain, {
            (o, i): PASSED[o](lambda w, i=i: PASSED[i](draw, w, ()), sw.bind({}, {}, rng=key).place, ())
            for o, i in itertools.product(once, once)
        }

    plain, found = run(jax.random.key(0))
    assert {cell for cell, drawn in found.items() if not np.array_equal(drawn, plain)} == set()
