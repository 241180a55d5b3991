"""Convolution against its formula, written as a sum over the window, and against Keras."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L


def formula(x, kernel, bias, strides, pads, dilation, groups):
    """The sum over window positions of a strided slice of the padded input times one slice of the kernel."""
    n = kernel.ndim - 2
    x = np.pad(x, ((0, 0), *pads, (0, 0)))
    spans = [(k - 1) * d + 1 for k, d in zip(kernel.shape, dilation, strict=False)]
    sizes = [(s - span) // stride + 1 for s, span, stride in zip(x.shape[1:], spans, strides, strict=False)]
    parts = []
    for g in range(groups):
        channels = slice(g * kernel.shape[-2], (g + 1) * kernel.shape[-2])
        out = slice(g * kernel.shape[-1] // groups, (g + 1) * kernel.shape[-1] // groups)
        total = 0
        for place in itertools.product(*map(range, kernel.shape[:n])):
            window = tuple(
                slice(p * d, p * d + (size - 1) * s + 1, s)
                for p, d, s, size in zip(place, dilation, strides, sizes, strict=True)
            )
            total = total + np.einsum("...i,io->...o", x[(slice(None), *window, channels)], kernel[place][:, out])
        parts.append(total)
    return np.concatenate(parts, -1) + bias


CASES = {
    "1d": dict(x=(2, 7, 3), window=(3,)),
    "1d causal": dict(x=(2, 7, 3), window=(3,), padding="CAUSAL", pads=((2, 0),)),
    "1d causal dilated": dict(x=(2, 9, 2), window=(2,), padding="causal", dilation=3, pads=((3, 0),)),
    "2d same": dict(x=(2, 5, 6, 3), window=(3, 2), pads=((1, 1), (0, 1))),
    "2d valid": dict(x=(2, 5, 6, 3), window=(3, 2), padding="VALID", pads=((0, 0), (0, 0))),
    "2d strided same": dict(x=(1, 5, 6, 2), window=(3, 3), strides=2, pads=((1, 1), (0, 1))),
    "2d strides differ": dict(x=(1, 7, 6, 2), window=(3, 2), strides=(3, 1), padding="VALID", pads=((0, 0), (0, 0))),
    "2d dilated": dict(x=(1, 7, 7, 2), window=(3, 3), dilation=(2, 1), pads=((2, 2), (1, 1))),
    "2d int padding": dict(x=(1, 4, 4, 2), window=(3, 3), padding=2, pads=((2, 2), (2, 2))),
    "2d pairs": dict(x=(1, 4, 4, 2), window=(3, 3), padding=((0, 2), 1), pads=((0, 2), (1, 1))),
    "2d grouped": dict(x=(2, 4, 5, 6), window=(3, 3), groups=3, pads=((1, 1), (1, 1))),
    "2d depthwise": dict(x=(2, 4, 5, 3), window=(3, 3), groups=3, strides=2, pads=((0, 1), (1, 1))),
    "2d pointwise": dict(x=(2, 3, 3, 4), window=(1, 1), pads=((0, 0), (0, 0))),
    "3d": dict(x=(1, 3, 4, 5, 2), window=(2, 3, 1), pads=((0, 1), (1, 1), (0, 0))),
    "3d everything": dict(
        x=(1, 5, 6, 5, 4), window=(2, 2, 3), strides=(1, 2, 1), dilation=(2, 1, 1), groups=2, padding=(1, 0, (1, 0)),
        pads=((1, 1), (0, 0), (1, 0)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_the_formula(case, sample):
    case = {"strides": 1, "dilation": 1, "groups": 1, "padding": "SAME", "pads": ((1, 1),), **case}
    n, groups = len(case["window"]), case["groups"]
    each = {k: case[k] if isinstance(case[k], tuple) else (case[k],) * n for k in ("strides", "dilation")}
    layer = L.Conv(2 * groups, case["window"], **{k: case[k] for k in ("strides", "padding", "dilation", "groups")})

    def oracle(x, kernel, bias):
        return formula(x, kernel, bias, each["strides"], case["pads"], each["dilation"], groups)

    def arguments():
        return sample(*case["x"]), sample(*case["window"], case["x"][-1] // groups, 2 * groups), sample(2 * groups)

    given, probes = arguments(), arguments()
    expected = oracle(*given)
    weights = sample(*expected.shape)

    @jax.jit
    def run(*given):
        y, pull = jax.vjp(lambda x, k, b: layer({"kernel": k, "bias": b}, x), *given)
        return y, pull(weights)

    y, gradients = jax.device_get(run(*given))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    # y is affine in each argument, so each gradient's product with a probe is a difference of outputs
    for i, probe in enumerate(probes):
        moved = [g + probe if i == j else g for j, g in enumerate(given)]
        difference = np.sum(weights * (oracle(*moved) - expected))
        np.testing.assert_allclose(np.sum(gradients[i] * probe), difference, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "size", "x", "options"),
    [
        ("Conv1D", (3,), (2, 8, 3), {"padding": "causal", "dilation_rate": 2}),
        ("Conv1D", (4,), (2, 9, 3), {"padding": "same", "strides": 3}),
        ("Conv2D", (3, 3), (2, 5, 7, 4), {"padding": "same", "strides": 2, "groups": 2}),
        ("Conv3D", (2, 2, 2), (1, 4, 4, 4, 2), {"padding": "valid"}),
    ],
)
def test_matches_keras(name, size, x, options, keras, agree, sample):
    layer = getattr(keras.layers, name)(4, size, **options)
    layer.build((None, *x[1:]))
    ours = L.Conv(
        4,
        size,
        options.get("strides", 1),
        options["padding"],
        options.get("dilation_rate", 1),
        options.get("groups", 1),
    )
    agree(
        lambda x, k, b: ours({"kernel": k, "bias": b}, x),
        lambda x, k, b: layer.stateless_call([k, b], [], x)[0],
        sample(*x), sample(*layer.kernel.shape), sample(4),
    )  # fmt: skip


def test_causal_sees_no_later_input(sample):
    x, kernel = sample(1, 9, 2), sample(3, 2, 4)
    run = jax.jit(lambda x: L.conv(x, kernel, padding="CAUSAL", dilation=2))
    before = np.asarray(run(x))
    x[:, 5] += 1
    changed = np.flatnonzero(np.any(before != run(x), (0, 2)))
    np.testing.assert_array_equal(changed, [5, 7])


def described(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_declares_its_parameters():
    layer = L.Conv(8, (3, 5), groups=2, axes=("channels_in", "channels_out"))
    params = sw.spec(layer, described(1, 9, 9, 4)).params
    assert params["kernel"].shape == (3, 5, 2, 8)
    assert params["kernel"].axes == (None, None, "channels_in", "channels_out")
    assert params["bias"].axes == ("channels_out",)
    assert sw.spec(L.Conv(8, (3,), bias=False), described(1, 9, 4)).params.keys() == {"kernel"}


def test_starts_with_unit_variance():
    layer, x = L.Conv(64, (3, 3), padding="VALID"), np.random.default_rng(0).normal(size=(4, 9, 9, 32)).astype("f4")
    params, _ = sw.init(layer, 0, x)
    assert 0.95 < np.asarray(jax.jit(layer)(params, x)).std() < 1.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 3}, r"kernel_size must be a tuple .* got 3"),
        ({"kernel_size": [3, 3]}, r"kernel_size must be a tuple"),
        ({"kernel_size": (3, 0)}, r"kernel_size must be .* above 0 .* got \(3, 0\)"),
        ({"kernel_size": (1, 1, 1, 1)}, r"\(3, 3, 3\)"),
        ({"strides": 0}, r"strides must be an integer above 0 or a tuple of 2"),
        ({"strides": (1, 2, 3)}, r"strides must be .* a tuple of 2"),
        ({"dilation": -1}, r"dilation must be"),
        ({"padding": "FULL"}, r"padding must be 'SAME', 'VALID', 'CAUSAL'.* got 'FULL'"),
        ({"padding": (1, 2, 3)}, r"a tuple of 2 integers or pairs"),
        ({"padding": -1}, r"an integer from 0 up"),
        ({"padding": "CAUSAL"}, r"'CAUSAL' is for sequences"),
        ({"groups": 3}, r"features must divide by groups, got 4 and 3"),
        ({"groups": 0}, r"groups must be an integer above 0"),
        ({"features": 0}, r"features must be an integer above 0"),
        ({"axes": ("a", "b", "c")}, r"the kernel's \(channels, features\)"),
    ],
)
def test_refuses_bad_options(options, message):
    with pytest.raises(sw.ConfigError, match=message):
        L.Conv(**{"features": 4, "kernel_size": (3, 3), **options})


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (described(28, 28), r"\(batch, height, width, channels\), got float32\[28,28\] of rank 2; add the missing"),
        (described(2, 3, 28, 28, 1), r"\(batch, height, width, channels\), got .* of rank 5"),
        (described(2, 8, 8, 3, dtype="uint8"), r"floating numbers, got uint8"),
        (described(2, 8, 8, 3), r"3 channels do not divide into groups=2"),
        (described(2, 2, 8, 4), r"a window of \(3, 3\) does not fit into \(2, 8\)"),
    ],
)
def test_explains_an_input_that_does_not_fit(x, message):
    with pytest.raises(ValueError, match=message):
        sw.spec(L.Conv(4, (3, 3), groups=2, padding="VALID"), x)


@pytest.mark.parametrize(
    ("kernel", "groups", "message"),
    [
        (described(3, 3, 2, 4), 1, r"has 3 channels; the kernel .* takes 2"),
        (described(3, 3, 1, 4), 3, r"outputs must divide by groups"),
        (described(3, 4), 1, r"1 to 3 window dimensions"),
    ],
)
def test_array_function_explains_a_kernel_that_does_not_fit(kernel, groups, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x, kernel: L.conv(x, kernel, groups=groups), described(1, 8, 8, 3), kernel)


@pytest.mark.parametrize(("narrow", "dtype"), [("bfloat16", "float32"), ("float16", "float32")])
def test_dtypes_are_promoted(narrow, dtype, sample):
    x, kernel, bias = sample(2, 5, 5, 3), sample(3, 3, 3, 4), sample(4)
    mixtures = [(x.astype(jnp.dtype(narrow)), kernel), (x, kernel.astype(jnp.dtype(narrow)))]

    @jax.jit
    def run(mixtures, alike, params, x):
        y, pull = jax.vjp(L.Conv(4, (3, 3)), params, x)
        return [L.conv(*xs) for xs in mixtures], [L.conv(*xs) for xs in alike], (y, *pull(y))

    alike = [[a.astype(dtype) for a in mixed] for mixed in mixtures]
    mixed, expected, (y, slopes, dx) = run(mixtures, alike, {"kernel": kernel, "bias": bias}, mixtures[0][0])
    for a, b in zip(mixed, expected, strict=True):
        assert a.dtype == dtype
        np.testing.assert_array_equal(a, b)
    assert (y.dtype, slopes["kernel"].dtype, dx.dtype) == (dtype, dtype, narrow)
    assert "convert_element_type" not in str(jax.make_jaxpr(L.conv)(x, kernel))
