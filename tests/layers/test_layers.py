"""What every layer keeps to: values that compare, print and hash; one dict for a cursor; precision; readable errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.core.layer import Layer

IMAGE, SEQUENCE = (2, 6, 6, 4), (2, 6, 4)
CASES = [
    (L.Dense(3, axes=("embed", "mlp")), SEQUENCE),
    (L.Conv(4, (3, 3), strides=(2, 1), padding=((0, 1), 1), groups=2), IMAGE),
    (L.BatchNorm(momentum=0.5), IMAGE),
    (L.LayerNorm(bias=False), SEQUENCE),
    (L.RMSNorm(), SEQUENCE),
    (L.GroupNorm(2), IMAGE),
    (L.Dropout(0.5), SEQUENCE),
    (L.MaxPool((2, 2), padding="SAME"), IMAGE),
    (L.AvgPool((2, 2), 1, count_padding=True), IMAGE),
    (L.GlobalMaxPool(), IMAGE),
    (L.GlobalAvgPool(), IMAGE),
    (L.Flatten(), IMAGE),
    (L.MultiHeadAttention(2, kv_heads=1, causal=True, rotary=L.Rotary(500.0)), SEQUENCE),
    (L.MixtureOfExperts(2, 8, k=2, gated=False), SEQUENCE),
    (L.Rotary(), IMAGE),
    (L.LearnedPositions(8), SEQUENCE),
    (L.Sequential((L.Dense(4), L.Sequential((("act", L.Dropout(0.1)),)))), SEQUENCE),
    (L.Scan(L.Dense(4), 2, remat="dots_saveable"), SEQUENCE),
    (L.Remat(L.Dense(4), "dots_saveable"), SEQUENCE),
    (L.Vmap(L.Dense(3), 2, in_axes=None), SEQUENCE),
]
EVERY = pytest.mark.parametrize(("layer", "shape"), CASES, ids=[type(layer).__name__ for layer, _ in CASES])


def variables(layer, x, sample):
    params, state = sw.spec(layer, x)
    return (
        jax.tree.map(lambda p: jnp.asarray(sample(*p.shape) / 2), params),
        jax.tree.map(lambda p: jnp.asarray(np.ones(p.shape, "float32")), state),
    )


def test_the_table_names_every_layer():
    named = {type(layer) for layer, _ in CASES} | {L.Embed}  # an embedding takes ids: its own file has it all
    public = {x for x in map(L.__dict__.get, L.__all__) if isinstance(x, type) and issubclass(x, Layer)}
    assert named == public


@EVERY
def test_is_a_value(layer, shape):
    again = eval(repr(layer), vars(L) | vars(sw.core.initializers))
    assert again == layer
    assert hash(again) == hash(layer)
    assert repr(again) == repr(layer)
    with pytest.raises(AttributeError):
        layer.features = 3


@pytest.mark.costs("each layer in three precisions, with gradients; a mixture takes four seconds")
@EVERY
def test_one_dict_is_a_cursor_and_any_precision_is_close(layer, shape, sample):
    x = jnp.asarray(sample(*shape))
    params, state = variables(layer, x, sample)

    def low(dtype):
        def run(params, x):
            return sw.apply(layer, params, state, x, policy=dtype)[0]

        y, pull = jax.vjp(run, params, x.astype(dtype))
        return y, pull(jnp.ones_like(y))

    @jax.jit  # one compilation for all
    def everything():
        return layer({**params, **state}, x), sw.apply(layer, params, state, x), low("bfloat16"), low("float16")

    by_dict, (high, after), *lows = jax.device_get(everything())
    np.testing.assert_array_equal(by_dict, high)
    jax.tree.map(np.testing.assert_array_equal, after, state)  # evaluation changes nothing
    for dtype, (y, (for_params, for_x)) in zip(("bfloat16", "float16"), lows, strict=True):
        assert y.dtype == for_x.dtype == dtype
        error = np.abs(np.asarray(high) - np.asarray(y, "f4")).max() / max(1, np.abs(high).max())
        assert error < 16 * float(jnp.finfo(dtype).eps)
        assert all(np.isfinite(leaf).all() and leaf.dtype == "float32" for leaf in jax.tree.leaves(for_params))


@EVERY
def test_integers_are_refused_with_a_reason(layer, shape):
    if isinstance(layer, L.Flatten):
        assert jax.eval_shape(lambda x: layer({}, x), jax.ShapeDtypeStruct(shape, "uint8")).dtype == "uint8"
        return
    with pytest.raises(sw.SapwoodError, match=r"floating numbers, got uint8\[.*x.astype"):
        sw.spec(layer, jax.ShapeDtypeStruct(shape, "uint8"))


@EVERY
def test_something_that_is_no_cursor_is_refused(layer, shape):
    x = jnp.asarray(np.ones(shape, "float32"))
    with pytest.raises(TypeError, match=f"{type(layer).__name__}.* takes its variables first"):
        layer(x, x)
