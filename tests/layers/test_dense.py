"""Dense against Keras and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L


@pytest.mark.parametrize("shape", [(4, 3), (2, 5, 3), (3,), (0, 3), (2, 1, 4, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_matches_numpy(shape, bias, sample):
    x, kernel, b = sample(*shape), sample(3, 5), sample(5) if bias else None
    expected = np.einsum("...i,io->...o", x, kernel) + (b if bias else 0)
    np.testing.assert_allclose(jax.jit(L.dense)(x, kernel, b), expected, rtol=1e-5, atol=1e-6)


def test_matches_keras_and_its_gradients(keras, agree, sample):
    layer = keras.layers.Dense(5)
    layer.build((None, 7, 3))

    def oracle(x, kernel, bias):
        return layer.stateless_call([kernel, bias], [], x)[0]

    agree(lambda x, k, b: L.Dense(5)({"kernel": k, "bias": b}, x), oracle, sample(2, 7, 3), sample(3, 5), sample(5))


def test_a_raw_dict_is_enough():
    """And an un-jitted call."""
    kernel, bias, x = (jnp.asarray(np.ones(shape, "float32")) for shape in ((3, 1), 1, (2, 3)))
    y = L.Dense(1)({"kernel": kernel, "bias": bias}, x)
    np.testing.assert_array_equal(y, [[4.0], [4.0]])


def test_declares_its_parameters():
    x = np.ones((2, 3), "float32")
    spec = sw.spec(L.Dense(5, axes=("embed", "mlp")), x)
    kernel, bias = spec.params["kernel"], spec.params["bias"]
    assert (kernel.shape, kernel.axes, bias.shape, bias.axes) == ((3, 5), ("embed", "mlp"), (5,), ("mlp",))
    assert sw.spec(L.Dense(5), x).params["kernel"].axes is None
    assert set(sw.spec(L.Dense(5, bias=False), x).params) == {"kernel"}


def test_starts_with_unit_variance():
    layer, x = L.Dense(200), np.random.default_rng(1).normal(size=(50, 400)).astype("float32")
    params, _ = sw.init(layer, 0, x)
    assert 0.95 < np.asarray(jax.jit(layer)(params, x)).std() < 1.05
    np.testing.assert_array_equal(params["bias"], 0)


@pytest.mark.parametrize(
    ("x", "kernel", "message"),
    [
        (np.ones((2, 3), np.uint8), np.ones((3, 4), np.float32), r"floating numbers, got uint8\[2,3\].*/ 255"),
        (np.ones((2, 3), np.float32), np.ones((4, 5), np.float32), r"got float32\[2,3\], float32\[4,5\]"),
        (np.float32(1), np.ones((4, 5), np.float32), r"x \(..., features\)"),
        (np.ones((2, 3), np.float32), np.ones(3, np.float32), r"kernel \(features, out\)"),
    ],
)
def test_array_function_explains_what_does_not_fit(x, kernel, message):
    with pytest.raises(ValueError, match=message):
        L.dense(x, kernel)


@pytest.mark.parametrize("features", [0, -3, 2.5, "10", True])
def test_refuses_bad_features(features):
    with pytest.raises(sw.ConfigError, match="features must be an integer above 0"):
        L.Dense(features)


@pytest.mark.parametrize("axes", [("embed",), "embed", ("embed", 3), ["embed", "mlp"]])
def test_refuses_bad_axes(axes):
    with pytest.raises(sw.ConfigError, match="axes must be None or a tuple"):
        L.Dense(3, axes=axes)
