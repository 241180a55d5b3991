"""Contract 4: `pure` hands everything back, relative to the cursor it ran, and writes nothing behind one's back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood.core.initializers import zeros


def count(v, x):
    n = v.state("n", (), zeros)
    v.put(n=n + x)
    v.loss("l", x)
    v.sow("s", x)
    return v.state("n", (), zeros)  # what was put is read


def cursor(**options):
    return sw.bind({}, {"deep": {"n": jnp.float32(1), "other": jnp.float32(7)}}, **options)


def test_updates_are_relative():
    y, updates = sw.pure(count)(cursor().deep, 2.0)
    assert float(y) == 3
    assert updates == sw.Updates({"n": 3.0}, {"l": 2.0}, {"s": 2.0}, {})
    _, updates = sw.pure(lambda v, x: count(v.deep, x))(cursor(), 2.0)
    assert updates.state == {"deep": {"n": 3.0}}


def test_full_is_the_whole_next_state():
    _, state = sw.pure(count, full=True)(cursor().deep, 2.0)
    assert state == {"n": 3.0, "other": 7.0}
    _, state = sw.pure(lambda v: None, full=True)(cursor())
    assert state == {"deep": {"n": 1.0, "other": 7.0}}


def test_full_has_no_place_for_losses():
    with pytest.raises(
        sw.EffectError, match=r"auxiliary losses deep/l would be lost: only sw.pure\(f\)\(v, ...\) hands"
    ):
        sw.pure(count, full=True)(cursor(train=True).deep, 2.0)


def test_nothing_is_written_behind_ones_back():
    state = {"deep": {"n": jnp.float32(1)}}
    v = sw.bind({}, state)
    sw.pure(count)(v.deep, 2.0)
    assert float(sw.state(v)["deep"]["n"]) == 1

    def outer(v):
        _, updates = sw.pure(count)(v.deep, 2.0)
        before = v.deep.state("n", (), zeros)
        v.deep.merge(updates)
        return before, v.deep.state("n", (), zeros)

    (before, after), next_state = sw.apply(outer, {}, state)
    assert (float(before), float(after)) == (1, 3)
    assert float(next_state["deep"]["n"]) == 3
    assert float(state["deep"]["n"]) == 1


def test_pure_inside_pure():
    def outer(v):
        a, updates = sw.pure(count)(v.deep, 2.0)
        v.deep.merge(updates)
        b, updates = sw.pure(lambda v: sw.pure(count, full=True)(v.deep, 10.0)[0])(v)
        assert updates.state == {}
        return a, b

    (a, b), updates = sw.pure(outer)(cursor())
    assert (float(a), float(b)) == (3, 13)
    assert updates == sw.Updates({"deep": {"n": 3.0}}, {"deep": {"l": 2.0}}, {"deep": {"s": 2.0}}, {})


def test_merge_takes_updates_or_a_state():
    def outer(v):
        _, state = sw.pure(count, full=True)(v.deep, 2.0)
        v.deep.merge(state)

    assert sw.pure(outer)(cursor())[1].state == {"deep": {"n": 3.0, "other": 7.0}}


def test_losses_add_up():
    def model(v, x):
        count(v.deep, x)
        count(v.deep, x)
        _, updates = jax.vmap(sw.pure(lambda v, x: v.loss("l", x)), in_axes=(None, 0))(v.deep, jnp.ones(3))
        v.deep.merge(updates)

    assert sw.pure(model)(cursor(), 2.0)[1].losses == {"deep": {"l": 7.0}}
    with pytest.raises(sw.DeclarationError, match=r"loss\('l'\) at 'a': a scalar is expected, got shape \(2,\)"):
        sw.pure(lambda v: v.a.loss("l", jnp.ones(2)))(cursor())


def test_stacked_updates_merge():
    stacked = sw.bind({}, {"deep": {"n": jnp.arange(3.0)}})

    def model(v):
        y, updates = jax.vmap(sw.pure(count))(v.deep.stack(3), jnp.ones(3))
        v.deep.merge(updates)
        return y

    _, updates = sw.pure(model)(stacked)
    assert np.array_equal(updates.state["deep"]["n"], [1, 2, 3])
    assert float(updates.losses["deep"]["l"]) == 3
    assert updates.captured["deep"]["s"].shape == (3,)


def test_a_merged_state_keeps_its_shape_and_dtype():
    message = r"merge\(updates\): state deep/n is float32\[\], the update float32\[3\]; .*v.stack\(n\) gives each row"
    with pytest.raises(sw.DeclarationError, match=message):
        sw.pure(lambda v: v.deep.merge({"n": jnp.ones(3)}))(cursor())
    with pytest.raises(sw.DeclarationError, match=r"state deep/n is float32\[\], the update int32\[\]"):
        sw.pure(lambda v: v.deep.merge({"n": jnp.int32(1)}))(cursor())


def test_merge_is_an_effect():
    updates = sw.Updates({"n": jnp.float32(1)}, {}, {}, {})
    with pytest.raises(sw.EffectError, match=r"deep: merge\(updates\) cannot work: it belongs to another JAX trace"):
        sw.pure(lambda v: jax.jit(lambda: v.deep.merge(updates))())(cursor())
    with pytest.raises(sw.EffectError, match=r"merge into a cursor whose state was replaced would be lost"):
        sw.pure(lambda v: v.deep.replace(state={"n": 1.0}).merge(updates))(cursor())


def test_a_carry_of_fixed_structure():
    def loop(v):
        def body(i, carry):
            return sw.pure(count, full=True)(v.deep.replace(state=carry[1]), 1.0)

        y, state = jax.lax.fori_loop(0, 5, body, (0.0, sw.state(v.deep)))
        v.deep.merge(state)
        return y

    y, state = sw.apply(loop, {}, cursor()._state)
    assert (float(y), float(state["deep"]["n"]), float(state["deep"]["other"])) == (6, 6, 7)


def test_pure_keeps_name_and_options():
    def model(v, x, *, scale=1):
        """What it does."""
        return x * scale

    assert (sw.pure(model).__name__, sw.pure(model).__doc__) == ("model", "What it does.")
    assert sw.pure(model)(sw.bind({}), 2, scale=3)[0] == 6
    with pytest.raises(TypeError, match="takes its variables first, then its inputs: expected a cursor or a dict"):
        sw.pure(model)(2.0, 3)


def test_apply_with_capture_does_not_lose_losses():
    def model(v, x):
        v.loss("l2", x.sum())
        return x

    with pytest.raises(sw.EffectError, match="auxiliary losses l2 would be lost"):
        sw.apply(model, {}, {}, jnp.ones(2), train=True, capture=True)
