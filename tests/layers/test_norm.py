"""Norms against Keras, NumPy in float64, and their own definitions."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.inspection.layer_calls import trace_calls

START = {"mean": np.zeros(3, "float32"), "var": np.ones(3, "float32")}


@pytest.mark.parametrize("shape", [(4, 3), (2, 5, 7), (6,), (2, 1, 3, 8)])
def test_layer_and_rms_norm_match_numpy(shape, sample):
    x, scale, bias = 3 * sample(*shape) + 10, sample(shape[-1]), sample(shape[-1])
    centred_and_scaled, scaled = jax.jit(lambda *xs: (L.layer_norm(*xs, 1e-3), L.rms_norm(*xs[:2], 1e-3)))(
        x, scale, bias
    )
    wide = np.asarray(x, np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / np.sqrt(wide.var(-1, keepdims=True) + 1e-3) * scale + bias
    np.testing.assert_allclose(centred_and_scaled, expected, rtol=1e-4, atol=1e-5)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-3) * scale
    np.testing.assert_allclose(scaled, expected, rtol=1e-5, atol=1e-6)


def test_layer_norm_matches_keras(keras, agree, draw):
    layer = keras.layers.LayerNormalization(epsilon=1e-5)
    layer.build((None, 4, 6))
    agree(
        lambda x, s, b: L.LayerNorm()({"scale": s, "bias": b}, x),
        lambda x, s, b: layer.stateless_call([s, b], [], x)[0],
        draw(3, 4, 6), draw(6), draw(6), rtol=1e-3,
    )  # fmt: skip


def test_rms_norm_matches_keras(keras, agree, draw):
    layer = keras.layers.RMSNormalization()
    layer.build((None, 4, 6))
    agree(
        lambda x, s: L.RMSNorm()({"scale": s}, x),
        lambda x, s: layer.stateless_call([s], [], x)[0],
        draw(3, 4, 6), draw(6), rtol=1e-3,
    )  # fmt: skip


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_group_norm_matches_keras(groups, keras, agree, draw):
    layer = keras.layers.GroupNormalization(groups, epsilon=1e-5)
    layer.build((None, 4, 5, 6))
    agree(
        lambda x, s, b: L.GroupNorm(groups)({"scale": s, "bias": b}, x),
        lambda x, s, b: layer.stateless_call([s, b], [], x)[0],
        draw(2, 4, 5, 6), draw(6), draw(6), rtol=1e-3, atol=1e-4,
    )  # fmt: skip


def test_group_norm_of_vectors_and_sequences(sample):
    given = sample(3, 6), sample(2, 5, 6)
    found = jax.jit(lambda given: [L.group_norm(x, 2) for x in given])(given)
    for x, y in zip(given, found, strict=True):
        shape = x.shape
        wide = np.asarray(x, np.float64).reshape(shape[0], -1, 2, 3)
        expected = (wide - wide.mean((1, 3), keepdims=True)) / np.sqrt(wide.var((1, 3), keepdims=True) + 1e-5)
        np.testing.assert_allclose(y, expected.reshape(shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_matches_keras(train, keras, agree, sample):
    layer = keras.layers.BatchNormalization(momentum=0.8, epsilon=1e-5)
    layer.build((None, 4, 5, 3))
    start = {"mean": sample(3), "var": sample(3) ** 2 + np.float32(0.1)}

    def ours(x, scale, bias):
        params = {"scale": scale, "bias": bias}
        state = {"mean": start["mean"], "var": start["var"]}
        y, state = sw.apply(L.BatchNorm(momentum=0.8), params, state, x, train=train)
        return jnp.concatenate([y.ravel(), state["mean"], state["var"]])

    def oracle(x, scale, bias):
        y, state = layer.stateless_call([scale, bias], [start["mean"], start["var"]], x, training=train)
        return jnp.concatenate([y.ravel(), *state])

    agree(ours, oracle, sample(4, 4, 5, 3), sample(3), sample(3), rtol=1e-3, atol=1e-4)


def written_out(x, scale, bias):
    """Batch norm by its definition, which the chain rule takes apart; and its statistics."""
    axes = tuple(range(x.ndim - 1))
    mean, var = x.mean(axes), x.var(axes)
    return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias, mean, var


def ours(x, scale, bias):
    mean, var = L.moments(x, tuple(range(x.ndim - 1)))
    return L.batch_norm(x, mean, var, scale, bias), mean.ravel(), var.ravel()


@pytest.mark.costs("six derivatives, three of them second ones, in one program")
def test_derivatives_of_batch_norm_are_those_of_its_definition_up_to_the_second(sample):
    shapes = (4, 5, 3), (3,), (3,)
    xs, weights = ([sample(*shape, dtype="float64") for shape in shapes] for _ in range(2))

    def summed(f, weights):
        return lambda *xs: sum(jnp.vdot(w, jnp.sin(y)) for w, y in zip(weights, f(*xs), strict=True))

    @jax.jit
    def derived(weights, *xs):
        f, by = summed(ours, weights), (0, 1, 2)
        first = {"reverse": jax.grad(f, by)(*xs), "forward": jax.jacfwd(f, by)(*xs)}
        twice = {"forward over reverse": jax.hessian(f, by)(*xs), "reverse twice": jax.jacrev(jax.grad(f, by), by)(*xs)}
        f = summed(written_out, weights)
        return (first, jax.grad(f, by)(*xs)), (twice, jax.hessian(f, by)(*xs))

    with jax.enable_x64():
        for found, expected in derived(weights, *xs):
            for name, derivative in found.items():
                for a, b in zip(jax.tree.leaves(derivative), jax.tree.leaves(expected), strict=True):
                    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11, err_msg=name)


def test_a_step_of_batch_norm_sums_over_its_input_four_times(draw):
    """Mean and variance; the gradients of the bias and of the scale, of which the input's is made."""

    def loss(x, scale, bias, weights):
        return jnp.vdot(weights, ours(x, scale, bias)[0])

    derive = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    text = derive.lower(draw(4, 5, 3), draw(3), draw(3), draw(4, 5, 3)).compile().as_text()
    assert len(re.findall(r" reduce\(.*dimensions=\{0,1\}", text)) == 4, text


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_cross_a_named_axis(masked, sample):
    x, weights = sample(8, 6, 3) * np.arange(1, 9, dtype="float32")[:, None, None], sample(8, 6, 3)
    mask = np.arange(48).reshape(8, 6) % 3 > 0 if masked else None

    def loss(layer, x, mask, weights):
        y, _ = sw.apply(layer, {}, START, x, mask, train=True)
        return jnp.sum(y * weights, where=None if mask is None else mask[..., None])

    plain = jax.jit(jax.grad(lambda x: loss(L.BatchNorm(scale=False, bias=False), x, mask, weights)))
    named = L.BatchNorm(scale=False, bias=False, axis_name="data")

    def whole(x, mask, weights):
        return jax.lax.psum(loss(named, x, mask, weights), "data")

    mesh = sw.parallel.mesh("data=8")
    across = jax.shard_map(whole, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P())
    found, expected = jax.jit(jax.grad(across))(x, mask, weights), plain(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask_shape", [(4,), (4, 5)])
def test_masked_batch_statistics_are_those_of_the_rest(mask_shape, sample):
    x = sample(4, 5, 3)
    mask = np.random.default_rng(0).random(mask_shape) < 0.6
    rest = x[mask].reshape(-1, 3)
    layer = L.BatchNorm(scale=False, bias=False)
    hidden = np.where(mask.reshape(mask.shape + (1,) * (3 - mask.ndim)), x, np.float32(np.nan))
    run = jax.jit(lambda *inputs: [sw.apply(layer, {}, START, *xs, train=True) for xs in inputs])
    (y, after), (expected, expected_after) = jax.device_get(run((hidden, mask), (rest,)))
    np.testing.assert_allclose(y[mask].reshape(-1, 3), expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), after, expected_after)
    for leaf in after.values():
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("masked", [False, True])
def test_statistics_cross_a_named_axis(masked, sample):
    x = sample(4, 6, 3) * np.arange(1, 5, dtype="float32")[:, None, None]  # rows differ: row statistics would show
    mask = np.arange(24).reshape(4, 6) % 3 > 0 if masked else np.ones((4, 6), bool)

    def one(x, mask):
        layer = L.BatchNorm(scale=False, bias=False, axis_name="rows")
        return sw.apply(layer, {}, START, x, *([mask] if masked else []), train=True)

    plain = L.BatchNorm(scale=False, bias=False)

    @jax.jit
    def run(x, mask):
        return jax.vmap(one, axis_name="rows")(x, mask), sw.apply(plain, {}, START, x, mask, train=True)

    (y, after), (whole, expected) = run(x, mask)
    np.testing.assert_allclose(y, whole, rtol=1e-4, atol=1e-5)
    for name, value in after.items():
        np.testing.assert_allclose(value, np.broadcast_to(expected[name], (4, 3)), rtol=1e-5, atol=1e-6)


def test_batch_statistics_do_not_depend_on_the_mesh(sample):
    x = sample(16, 3)
    layer = L.BatchNorm(scale=False, bias=False)
    run = jax.jit(lambda x: sw.apply(layer, {}, START, x, train=True))
    sharding = jax.NamedSharding(sw.parallel.mesh("data=8"), jax.P("data"))
    for a, b in zip(jax.tree.leaves(run(x)), jax.tree.leaves(run(jax.device_put(x, sharding))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_large_mean_costs_no_digits(sample):
    x = sample(1000, 2) + 4096
    mean, var = jax.device_get(jax.jit(lambda x: L.moments(x, (0,)))(x))
    np.testing.assert_allclose(var[0], np.asarray(x, np.float64).var(0), rtol=1e-3)
    assert mean.shape == (1, 2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("layer", [L.LayerNorm(), L.RMSNorm(), L.GroupNorm(2), L.BatchNorm()], ids=repr)
def test_statistics_are_float32_in_low_precision(layer, dtype, sample):
    """The bits of the float32 layer, rounded last: in one program, as LLVM may or may not fuse `* scale + bias`."""
    x = (sample(64, 8) + 200).astype(jnp.dtype(dtype))  # squares overflow float16, sums of bfloat16 lose all digits
    params, state = (jax.tree.map(lambda p: np.arange(1, 9, dtype="float32"), tree) for tree in sw.spec(layer, x))

    @jax.jit
    def run(x):
        wide, _ = sw.apply(layer, params, state, x.astype("float32"), train=True)
        return sw.apply(layer, params, state, x, train=True, policy=dtype), wide.astype(dtype)

    (low, after), high = run(x)
    assert low.dtype == dtype
    np.testing.assert_array_equal(low, high)
    assert all(leaf.dtype == jnp.float32 for leaf in after.values())


def test_variables_can_be_left_out():
    x = np.ones((2, 4), "float32")
    for layer in (L.LayerNorm, L.GroupNorm, L.BatchNorm):
        options = {"groups": 2} if layer is L.GroupNorm else {}
        assert sw.spec(layer(**options, scale=False), x).params.keys() == {"bias"}
        assert sw.spec(layer(**options, bias=False), x).params.keys() == {"scale"}
    assert sw.spec(L.RMSNorm(scale=False), x).params == {}
    spec = sw.spec(L.BatchNorm(), x)
    assert spec.state.keys() == {"mean", "var"}
    _, state = sw.init(L.BatchNorm(), 0, x)
    np.testing.assert_array_equal(state["mean"], 0)
    np.testing.assert_array_equal(state["var"], 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L.BatchNorm(momentum=1.0), r"momentum must be a number in \[0, 1\), got 1.0"),
        (lambda: L.BatchNorm(eps=-1e-3), r"eps must be a number in \[0, 1\)"),
        (lambda: L.LayerNorm(eps="small"), r"eps must be a number in \[0, 1\), got 'small'"),
        (lambda: L.RMSNorm(eps=-1), r"eps"),
        (lambda: L.GroupNorm(0), r"groups must be an integer above 0"),
    ],
)
def test_refuses_bad_options(make, message):
    with pytest.raises(sw.ConfigError, match=message):
        make()


def described(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("layer", "xs", "message"),
    [
        (L.GroupNorm(4), (described(2, 6),), r"6 channels do not divide into groups=4"),
        (L.LayerNorm(), (described(2, 6, dtype="int32"),), r"floating numbers, got int32\[2,6\]"),
        (L.BatchNorm(), (described(6),), r"\(batch, \.\.\., features\), got float32\[6\] of rank 1"),
        (L.BatchNorm(), (described(4, 6), described(4)), r"boolean mask .* got mask float32\[4\]"),
        (L.BatchNorm(), (described(4, 6), described(6, dtype="bool")), r"mask bool\[6\] for x float32\[4,6\]"),
        (L.BatchNorm(), (described(4, 6), described(4, 6, dtype="bool")), r"leading dimensions"),
    ],
)
def test_explains_an_input_that_does_not_fit(layer, xs, message):
    with pytest.raises(ValueError, match=message):
        sw.spec(layer, *xs)


def test_it_is_declared_and_initialised_without_its_axis():
    layer, x = L.BatchNorm(axis_name="rows"), np.arange(12, dtype="float32").reshape(4, 3)
    assert sw.spec(layer, x) == sw.spec(L.BatchNorm(), x)

    def model(v, x):
        return layer(v.norm, x) + v.param("shift", (3,), lambda key, shape, dtype: x.mean(0))

    params, state = sw.init(model, 0, x, data=True)
    np.testing.assert_array_equal(params["shift"], x.mean(0))
    np.testing.assert_array_equal(state["norm"]["mean"], 0)
    with pytest.raises(NameError, match="unbound axis name"):
        jax.eval_shape(lambda x: sw.apply(model, params, state, x, train=True), x)


def test_what_is_looked_at_inside_its_axis_has_the_sum():
    """A summary records declarations too, of the program as it runs: `shard_map` checks that all devices agree."""
    layer, x, mesh = L.BatchNorm(axis_name="data"), jnp.ones((8, 3)), sw.mesh("data=8")

    def model(v, x):
        local = lambda x: sw.pure(layer)(v.norm, x)[1].state  # noqa: E731
        return jax.shard_map(local, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P())(x)

    assert "psum" in str(trace_calls(model, (x,), train=True).jaxpr)
