"""cuDNN's attention: when it is chosen, what the program lowered for a GPU calls, and what is around the kernel.

No GPU is needed: JAX lowers for CUDA anywhere, once it is told which cuDNN to lower for, and devices are stood in for.
What the kernel itself computes is not tested here.
"""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import NamedSharding, PartitionSpec

import sapwood as sw
from sapwood import layers as L
from sapwood.core.target_platform import compiling_for
from sapwood.layers.attentions import gpu_cudnn
from sapwood.models import Decoder

KERNELS = ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]


def struct(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.fixture
def gpu(monkeypatch):
    """One GPU of a compute capability, Hopper's if nothing is said, with cuDNN."""

    def stand_in(capability="9.0", devices=1, version=91000):
        def found():
            if version is None:
                raise RuntimeError("cuDNN is not detected.")
            return version

        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        device, others = SimpleNamespace(platform="gpu", compute_capability=capability), jax.local_devices
        monkeypatch.setattr(jax, "local_devices", lambda backend=None: others(backend=backend) if backend else [device])
        monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", found)

    return stand_in


def chosen(length=256, heads=2, kv_heads=2, head_dim=64, dtype="bfloat16", batch=2, **options):
    q, k = (struct(batch, length, n, head_dim, dtype=dtype) for n in (heads, kv_heads))
    return gpu_cudnn.chosen(q, k, **options)


@pytest.mark.parametrize("capability", ["8.0", "8.9", "9.0", "12.0"])
@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"kv_heads": 1}, {"length": 1000}, {"head_dim": 128}])
def test_it_is_chosen_on_an_nvidia_gpu_since_ampere(gpu, capability, options):
    gpu(capability)
    assert chosen(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"length": 64},
        {"head_dim": 60},
        {"head_dim": 256},
        {"mask": np.ones((1, 1, 1, 256), bool)},
        {"segments": np.zeros((2, 256), "int32")},
    ],
)
def test_it_is_not_chosen_for_what_it_cannot_do(gpu, options):
    gpu()
    assert chosen()
    assert not chosen(**options)


@pytest.mark.parametrize(
    "machine",
    [{"capability": "7.5"}, {"capability": "gfx90a"}, {"capability": None}, {"devices": 2}, {"version": None}],
)
def test_it_is_not_chosen_where_it_cannot_run(gpu, machine):
    gpu(**machine)
    assert not chosen()


def test_a_cpu_is_no_gpu():
    assert gpu_cudnn._generation(None) == 0
    assert not chosen()


def test_what_counts_is_the_platform_we_compile_for(gpu):
    gpu()
    for platform in ("cpu", "tpu"):
        with compiling_for(platform):
            assert not chosen()
    with compiling_for("cuda"):
        assert chosen()


def test_a_symbolic_length_is_none(gpu):
    gpu()
    (n,) = jax.export.symbolic_shape("n")
    assert not chosen(length=n)


def test_on_a_mesh_it_may_split_batch_and_heads(gpu):
    gpu(devices=8)
    mesh = sw.mesh("data=4,tensor=2").abstract_mesh  # of no devices: the default one says what we compile for

    def on(*spec, **options):
        return chosen(batch=8, heads=4, sharding=NamedSharding(mesh, PartitionSpec(*spec)), **options)

    assert on("data", None, "tensor", None)
    assert on("data")
    assert on(("data", "tensor"))
    assert not on("data", None, "tensor", None, kv_heads=1)  # k is whole where q is split
    assert not on("data", "tensor")
    assert not on("data", None, None, "tensor")


def test_the_device_is_that_of_the_mesh_or_the_default_one():
    last = jax.devices()[-1]
    mesh = jax.sharding.Mesh(np.array([last]), ("data",))
    assert gpu_cudnn._device(NamedSharding(mesh, PartitionSpec())) is last
    assert gpu_cudnn._device(None) is jax.devices()[0]
    with jax.default_device(last):
        assert gpu_cudnn._device(None) is last
    with jax.default_device("cpu"):
        assert gpu_cudnn._device(None) is jax.devices()[0]


def kernels(run, *xs):
    """The kernels of cuDNN in a program for a GPU, in order."""
    program = jax.jit(run).trace(*xs).lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r"custom_call @(__cudnn\$\w+)", program), program


@pytest.mark.costs("a training step, traced twice")
def test_a_bfloat16_decoder_trains_with_it_on_a_gpu(gpu):
    """The whole training step, as `Trainer` has it: a kernel forward and one backward, and no logits of attention."""
    gpu()
    model = Decoder(vocabulary=32, depth=2, width=32, heads=4)
    tokens = {name: struct(2, 192, dtype="int32") for name in ("tokens", "targets")}
    objective = sw.supervised(model, inputs="tokens", target="targets")
    trainers = {policy: sw.Trainer(objective, optax.adam(1e-3), policy=policy) for policy in ("bfloat16", None)}
    state = jax.eval_shape(lambda: trainers[None].init(0, {n: jnp.zeros((2, 192), "int32") for n in tokens}))

    def step(policy):
        return kernels(trainers[policy].step, state, tokens)

    calls, program = step("bfloat16")
    assert calls == KERNELS  # once each: the blocks are a scan
    assert "192x192" not in program
    calls, program = step(None)
    assert calls == []
    assert "192x192" in program


def loss(q, k, v):
    return gpu_cudnn.cudnn_attention(q, k, v, True).astype("float32").sum()


GRADIENT = jax.grad(loss, (0, 1, 2))


@pytest.mark.parametrize(
    ("run", "shapes"),
    [
        (jax.vmap(GRADIENT), [(3, 2, 128, 4, 8)] * 3),
        (jax.vmap(GRADIENT, in_axes=(2, None, 1)), [(2, 128, 3, 4, 8), (2, 128, 4, 8), (2, 3, 128, 4, 8)]),
        (
            jax.vmap(jax.vmap(GRADIENT, in_axes=(None, 2, 0)), in_axes=(3, None, 0)),
            [(2, 128, 4, 5, 8), (2, 128, 3, 4, 8), (5, 3, 2, 128, 4, 8)],
        ),
        (
            jax.grad(lambda *x: jax.vmap(loss, in_axes=(None, 1, 2))(*x).sum(), (0, 1, 2)),
            [(2, 128, 4, 8), (2, 3, 128, 4, 8), (2, 128, 3, 4, 8)],
        ),
        (jax.grad(jax.checkpoint(loss), (0, 1, 2)), [(2, 128, 4, 8)] * 3),
    ],
)
def test_it_lowers_under_any_transform(gpu, run, shapes):
    gpu()
    assert kernels(run, *(struct(*shape) for shape in shapes))[0] == KERNELS


def test_on_a_mesh_it_lowers(gpu, monkeypatch):
    gpu(devices=8)
    monkeypatch.setattr(gpu_cudnn, "platform", lambda mesh: "gpu")  # whatever the devices of the mesh are
    monkeypatch.setattr(gpu_cudnn, "_generation", lambda sharding: 9)
    sharding = NamedSharding(sw.mesh("data=4,tensor=2"), PartitionSpec("data", None, "tensor", None))
    layer, x = L.MultiHeadAttention(4, causal=True), struct(8, 256, 32)
    params = jax.eval_shape(lambda: sw.init(layer, 0, jnp.zeros((8, 256, 32)))[0])
    place = sw.parallel.placement(sharding.mesh)

    def run(params, x):
        return sw.apply(layer, params, {}, x, policy="bfloat16", place=place)[0].astype("float32").sum()

    _, program = kernels(jax.grad(run), params, x)
    assert program.count("@CustomSPMDPartitioning(") == 2  # the kernels, to be split when the program is compiled
    assert "256x256" not in program


@pytest.mark.parametrize("axes", [(0, 0, 0), (2, None, 1), (None, 0, 3)])
def test_what_is_around_the_kernel_changes_no_number(axes):
    """With JAX's own attention in the place of the kernel: forward and gradient, mapped or not."""
    random = np.random.default_rng(0)
    arrays = [random.standard_normal((2, 5, 4, 8)).astype("float32") for _ in range(3)]
    scales = np.arange(1, 4, dtype="float32")[:, None, None, None, None]
    mapped = [
        x if axis is None else np.moveaxis(scales * x, 0, axis)
        for x, axis in zip(arrays, axes, strict=True)
    ]  # fmt: skip

    def both(attend, *mapped):
        def total(*x):
            return jnp.square(jax.vmap(attend, in_axes=axes)(*x)).sum()

        return jax.value_and_grad(total, (0, 1, 2))(*mapped)

    def ours(q, k, v):
        return gpu_cudnn.cudnn_attention(q, k, v, True, 0.3, implementation="xla")

    def plain(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=0.3)

    mine, theirs = jax.jit(lambda *mapped: (both(ours, *mapped), both(plain, *mapped)))(*mapped)
    for found, expected in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_attention_and_the_layer_hand_over_to_it(monkeypatch, weights):
    seen = []

    def kernel(q, k, v, causal, scale):
        seen.append((causal, scale))
        return q

    monkeypatch.setattr(gpu_cudnn, "chosen", lambda q, k, mask, segments, sharding: mask is None and segments is None)
    monkeypatch.setattr(gpu_cudnn, "cudnn_attention", kernel)
    x, segments = np.ones((2, 4, 2, 8), "float32"), np.zeros((2, 4), "int32")
    attend = jax.jit(lambda q, k, v: L.attention(q, k, v, causal=True, scale=0.5))
    np.testing.assert_array_equal(attend(2 * x, x, x), 2 * x)
    assert seen == [(True, 0.5)]
    np.testing.assert_array_equal(jax.jit(lambda x: L.attention(x, x, x, segments=segments))(x), x)
    assert len(seen) == 1
    layer, x = L.MultiHeadAttention(2, causal=True), x[:, :, 0]
    jax.eval_shape(layer, weights(layer, x), x)
    assert seen[-1] == (True, None)


def test_a_summary_on_a_gpu_sees_into_attention(gpu):
    """It is made of the operations of the CPU's program: a kernel is a closed box that no CPU can lower."""
    layer, x = L.MultiHeadAttention(2, causal=True), struct(2, 256, 16)
    here = sw.summary(layer, x, policy="bfloat16").flops
    gpu()
    assert sw.summary(layer, x, policy="bfloat16").flops == here > 0
