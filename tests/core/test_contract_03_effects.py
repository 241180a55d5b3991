"""Contract 3: reading is free in any transform; effects work only in the trace of the run that collects them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.core.initializers import zeros

X = np.arange(6, dtype="float32").reshape(3, 2)
STATE = {"n": jnp.zeros(2)}


def write(v, x):
    v.state("n", (2,), zeros)
    v.put(n=x)
    return x


EFFECTS = {
    r"put\(n=...\)": write,
    r"loss\('l'\)": lambda v, x: v.loss("l", x.sum()),
    r"sow\('s'\)": lambda v, x: v.sow("s", x),
    r"check\('fine'\)": lambda v, x: v.check(x > 0, "fine"),
}
CLOSED_OVER = {
    "jit": lambda f, v: jax.jit(lambda x: (f(v, x), x)[1])(X[0]),
    "vmap": lambda f, v: jax.vmap(lambda x: (f(v, x), x)[1])(X),
    "grad": lambda f, v: jax.grad(lambda x: (f(v, x), x.sum())[1])(X[0]),
    "scan": lambda f, v: jax.lax.scan(lambda c, x: (c, (f(v, x), x)[1]), 0, X),
    "cond": lambda f, v: jax.lax.cond(True, lambda x: (f(v, x), x)[1], lambda x: x, X[0]),
    "checkpoint": lambda f, v: jax.checkpoint(lambda x: (f(v, x), x)[1])(X[0]),
    "jvp": lambda f, v: jax.jvp(lambda x: (f(v, x), x)[1], (X[0],), (X[1],)),
}


@pytest.mark.parametrize("transform", CLOSED_OVER)
@pytest.mark.parametrize("effect", EFFECTS)
def test_effects_in_another_trace_say_what_to_do(effect, transform):
    run = sw.pure(lambda v: CLOSED_OVER[transform](EFFECTS[effect], v.inner))
    message = rf"inner: {effect} cannot work: it belongs to another JAX trace .* wrap the inner function in sw.pure"
    with pytest.raises(sw.EffectError, match=message):
        run(sw.bind({}, {"inner": STATE}))


@pytest.mark.parametrize("transform", CLOSED_OVER)
def test_reading_is_free(transform):
    v = sw.bind({"inner": {"w": jnp.ones(2)}}, {"inner": STATE})
    read = lambda v, x: v.param("w", (2,), zeros) + v.state("n", (2,), zeros) + x  # noqa: E731
    sw.pure(lambda v: CLOSED_OVER[transform](read, v.inner))(v)


@pytest.mark.parametrize("effect", [r"put\(n=...\)", r"loss\('l'\)"])
def test_effects_that_nothing_collects(effect):
    message = rf"\(root\): {effect} cannot work: nothing collects it here: run the model with sw.apply.* or sw.pure"
    with pytest.raises(sw.EffectError, match=message):
        EFFECTS[effect](sw.bind({}, STATE), X[0])


def test_what_nobody_captures_or_checks_is_quiet():
    EFFECTS[r"sow\('s'\)"](sw.bind({}), X[0])
    EFFECTS[r"check\('fine'\)"](sw.bind({}), X[1])
    with pytest.raises(sw.CheckError, match=r"\(root\): fine at entry 0"):
        EFFECTS[r"check\('fine'\)"](sw.bind({}), X[0])


def test_a_cursor_that_outlives_its_run():
    kept = []
    sw.pure(lambda v: kept.append(v))(sw.bind({}, STATE))
    with pytest.raises(sw.EffectError, match=r"put\(n=...\) cannot work"):
        write(kept[0], X[0])
    assert np.array_equal(kept[0].state("n", (2,), zeros), [0, 0])


@pytest.mark.costs("it runs op by op, which is what it is about")
def test_effects_without_jit():
    def model(v, x):
        write(v, x)
        v.loss("l", x.sum())
        v.sow("s", L.Dropout(0.5)(v.drop, x))
        return jax.lax.scan(lambda c, r: (c + sw.pure(write)(v, r)[0], None), x, X)[0]

    run = lambda: sw.pure(model)(sw.bind({}, STATE, rng=0, train=True), X[0])  # noqa: E731
    y, updates = run()
    with jax.disable_jit():
        z, again = run()
    assert np.array_equal(y, z)
    assert jax.tree.all(jax.tree.map(np.array_equal, updates, again))


def test_a_failed_check_names_path_entry_and_number():
    with pytest.raises(sw.CheckError, match=r"in/deep: fine at entry 0, 1 \(2 entries in all\)"):
        sw.apply(lambda v, x: v["in"].deep.check(x < 1, "fine"), {}, {}, np.array([[0, 1], [0, 2]]))


def test_traced_checks_are_one_bit_each():
    def model(v, x):
        v.a.check(x >= 0, "not negative")
        v.a.check(x < 3, "small")
        v.a.check(x > -9, "not negative")
        L.Scan(lambda v, x: (v.check(x != 2, "not two"), x)[1], 2)(v.b, x)

    _, updates = jax.jit(sw.pure(model))(sw.bind({}), X[1])
    assert jax.tree.map(bool, updates.checks) == {"a": {"not negative": True, "small": False}, "b": {"not two": False}}
