"""The grouped matmul against a loop over groups: values, gradients, the work it does, and the TPU's kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.layers.experts import grouped_matmul as grouped_matmul_file
from sapwood.layers.experts import grouped_matmul_cpu

module = grouped_matmul_file


def by_hand(x, kernels, sizes):
    y, start = np.zeros((x.shape[0], kernels.shape[2])), 0
    for kernel, size in zip(np.asarray(kernels, np.float64), sizes, strict=True):
        y[start : start + size] = np.asarray(x, np.float64)[start : start + size] @ kernel
        start += size
    return y


def gradients_by_hand(x, kernels, sizes, dy):
    dx, dk, start = np.zeros(x.shape), np.zeros(kernels.shape), 0
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    for g, size in enumerate(sizes):
        rows = slice(start, start + size)
        dx[rows], dk[g] = dy[rows] @ np.asarray(kernels[g], np.float64).T, x[rows].T @ dy[rows]
        start += size
    return dx, dk


SIZES = [
    [10, 7, 3, 13],  # odd, all rows used
    [0, 33, 0, 0],  # one group has all
    [5, 0, 0, 2],  # padding behind
    [0, 0, 0, 0],
    [8, 8, 8, 8],
]


@jax.jit
def with_gradients(x, kernels, sizes, dy):
    y, pull = jax.vjp(lambda x, kernels: L.grouped_matmul(x, kernels, sizes), x, kernels)
    return y, *pull(dy)


@pytest.mark.parametrize("sizes", SIZES)
def test_it_is_one_product_for_each_group(sizes, sample):
    x, kernels, dy = sample(33, 5), sample(4, 5, 6), sample(33, 6)
    y, dx, dk = with_gradients(x, kernels, np.array(sizes, "int32"), dy)
    np.testing.assert_allclose(y, by_hand(x, kernels, sizes), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip((dx, dk), gradients_by_hand(x, kernels, sizes, dy), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_lies_behind_the_groups_does_not_matter(sample):
    x, kernels, sizes, dy = sample(33, 5), sample(4, 5, 6), np.array([9, 0, 12, 0], "int32"), sample(33, 6)
    clean = with_gradients(x, kernels, sizes, dy)
    behind = np.arange(33)[:, None] >= 21
    x, dy = np.where(behind, np.float32(np.nan), x), np.where(behind, np.float32(np.inf), dy)
    for ours, theirs in zip(with_gradients(x, kernels, sizes, dy), clean, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("groups", [1, 3])
def test_no_rows_at_all(groups, sample):
    x, dy = np.zeros((0, 5), "float32"), np.zeros((0, 6), "float32")
    y, dx, dk = with_gradients(x, sample(groups, 5, 6), np.zeros(groups, "int32"), dy)
    assert (y.shape, dx.shape) == ((0, 6), (0, 5))
    np.testing.assert_array_equal(dk, np.zeros((groups, 5, 6)))


def test_second_derivatives(sample):
    """The gradient's own gradient, against the same by one dense product for all groups."""
    x, kernels, sizes = sample(12, 3), sample(3, 3, 4), np.array([5, 0, 6], "int32")
    group = np.array([0] * 5 + [2] * 6 + [3])

    def dense(x, kernels):
        each = jnp.einsum("nf,gfo->gno", x, kernels)
        return jnp.sum(each * (group == np.arange(3)[:, None])[..., None], 0)

    def penalty(multiply, x, kernels):
        gradients = jax.grad(lambda *a: jnp.sum(jnp.sin(multiply(*a))), (0, 1))(x, kernels)
        return sum(jnp.sum(g**3) for g in gradients)

    ours, theirs = (
        jax.jit(jax.grad(functools.partial(penalty, f), (0, 1)))(x, kernels)
        for f in (lambda x, kernels: L.grouped_matmul(x, kernels, sizes), dense)
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_summed_in_float32(sample):
    x, kernels, dy = (sample(*shape, dtype="bfloat16") for shape in ((600, 8), (2, 8, 8), (600, 8)))
    y, dx, dk = jax.device_get(with_gradients(x, kernels, np.array([590, 10], "int32"), dy))
    assert {a.dtype for a in (y, dx, dk)} == {jnp.dtype("bfloat16")}
    _, right = gradients_by_hand(x, kernels, [590, 10], dy)
    np.testing.assert_allclose(dk.astype("float32"), right, rtol=8e-3, atol=1e-2)


def loads(rows, groups):
    """What routers do: nearly even, and with a few favourites."""
    random = np.random.default_rng(0)
    for share in (np.ones(groups) / groups, random.dirichlet(np.full(groups, 2.0))):
        yield np.bincount(random.choice(groups, rows, p=share), minlength=groups)


def times(load, block, rows):
    """How often the loop runs."""
    return int(jax.jit(lambda load: grouped_matmul_cpu.blocks(load, block, rows)[0])(np.asarray(load, "int32")))


@pytest.mark.parametrize(("rows", "groups"), [(8192, 8), (4096, 64), (1024, 16)])
def test_it_does_at_most_half_again_the_ideal_work(rows, groups):
    """The compiler counts the body of a loop once; the times it runs are counted here."""
    features, out = 64, 96
    shapes = (jax.ShapeDtypeStruct(s, "float32") for s in ((rows, features), (groups, features, out)))
    sizes = jax.ShapeDtypeStruct((groups,), "int32")
    block = module.block_size(rows, groups)
    cost = jax.jit(L.grouped_matmul).lower(*shapes, sizes).compile().cost_analysis()
    body, ideal = 2 * block * features * out, 2 * rows * features * out
    assert body <= cost["flops"] < 1.05 * body + 100 * rows  # no product but the loop's, once
    for load in loads(rows, groups):
        assert ideal <= times(load, block, rows) * body <= 1.5 * ideal


def test_most_of_a_padded_buffer_costs_nothing():
    block = module.block_size(400, 4)
    assert times([100, 120, 90, 110], block, 10_000) * block <= 1.5 * 420


@functools.partial(jax.jit, static_argnums=0)
def tpu_and_plain(turned, x, y, kernels, sizes):
    """Both products, each by the kernel of a TPU (run as plain operations) and by what it is held against."""
    products = (
        module._kernel_multiply(64, turned, x, kernels, sizes, interpret=True),
        module._ragged_multiply(64, turned, x, kernels, sizes),
    )
    return products, (module._kernel_outer(64, x, y, sizes, interpret=True), grouped_matmul_cpu.outer(64, x, y, sizes))


@pytest.mark.costs("Pallas kernels, which run as long programs of plain operations")
@pytest.mark.parametrize(
    ("rows", "turned", "sizes"),  # the kernel's tiles have 128 rows
    [
        (300, False, [100, 0, 130, 40]),  # the last group reaches into the last tile, which is not full
        (300, False, [256, 0, 0, 0]),  # nothing is in the last tile
        (256, True, [100, 0, 116, 40]),
        (256, True, [256, 0, 0, 0]),
    ],
)
def test_the_kernel_of_a_tpu_is_the_same(rows, sizes, turned, sample):
    x, y, kernels = sample(rows, 40), sample(rows, 24), sample(4, 24, 40) if turned else sample(4, 40, 24)
    (ours, theirs), outer = jax.device_get(tpu_and_plain(turned, x, y, kernels, np.array(sizes, "int32")))
    np.testing.assert_allclose(ours[: sum(sizes)], theirs[: sum(sizes)], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(*outer, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("turned", [False, True])
def test_the_ragged_form_is_the_same(turned, sample):
    x, y, kernels = sample(30, 5), sample(30, 4), sample(3, 4, 5) if turned else sample(3, 5, 4)

    @jax.jit
    def run(x, y, kernels, sizes):
        multiply, outer = (
            (grouped_matmul_cpu.multiply, module._ragged_multiply),
            (grouped_matmul_cpu.outer, module._ragged_outer),
        )
        return [f(8, turned, x, kernels, sizes)[:27] for f in multiply], [f(8, x, y, sizes) for f in outer]

    products, outer = run(x, y, kernels, np.array([7, 0, 20], "int32"))
    np.testing.assert_allclose(*products, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(*outer, rtol=1e-5, atol=1e-5)


def test_each_platform_has_its_way(monkeypatch):
    x, half = np.ones((2, 2), "float32"), np.ones((2, 2), "float16")
    assert [module._way(p, x) for p in ("cpu", "gpu", None)] == ["blocked", "ragged", "blocked"]
    assert module._way("tpu", x) == "ragged"  # eight devices, and nothing says how x is split
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert (module._way("tpu", x), module._way("tpu", half)) == ("kernel", "ragged")


@pytest.mark.parametrize(
    ("x", "kernels", "sizes"),
    [((4, 3), (2, 5, 3), (2,)), ((4, 3), (2, 3, 5), (3,)), ((4,), (2, 4, 5), (2,)), ((4, 3), (3, 5), (3,))],
)
def test_shapes_that_do_not_fit(x, kernels, sizes):
    with pytest.raises(sw.core.errors.InputError, match=r"grouped_matmul expects x \(rows, features\)"):
        L.grouped_matmul(*(np.ones(shape, "float32") for shape in (x, kernels)), np.ones(sizes, "int32"))
