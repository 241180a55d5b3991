"""Splash attention: its kernel, run as plain operations, against plain attention; when it is chosen, and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sapwood as sw
from sapwood import layers as L
from sapwood.core import target_platform
from sapwood.layers.attentions import tpu_splash


def arrays(batch=1, length=256, heads=2, kv_heads=2, head_dim=128, dtype="float32", keys=None):
    shapes = [(length, heads), (keys or length, kv_heads), (keys or length, kv_heads), (length, heads)]
    random = np.random.default_rng(0)
    return [random.standard_normal((batch, n, h, head_dim)).astype(jnp.dtype(dtype)) for n, h in shapes]


def both(run, q, k, v, dy):
    """The output, and the gradients of q, k and v."""

    @jax.jit
    def compiled(q, k, v, dy):
        y, pull = jax.vjp(run, q, k, v)
        return y, *pull(dy)

    return compiled(q, k, v, dy)


@pytest.mark.costs("the kernel and its gradients, interpreted")
@pytest.mark.parametrize(
    ("options", "causal", "scale"),
    [
        ({"kv_heads": 1, "head_dim": 64}, True, 0.3),
        pytest.param({"batch": 2}, True, None, marks=pytest.mark.slow),
        pytest.param({"keys": 384}, False, None, marks=pytest.mark.slow),
    ],
)
def test_it_is_attention(monkeypatch, options, causal, scale):
    monkeypatch.setattr(tpu_splash, "BLOCK", 128)  # so that there are several
    q, k, v, dy = arrays(**options)
    plain = both(lambda *x: jax.nn.dot_product_attention(*x, is_causal=causal, scale=scale), q, k, v, dy)
    kernel = both(lambda *x: tpu_splash.splash_attention(*x, causal, scale, interpret=True), q, k, v, dy)
    for name, ours, theirs in zip(("y", "dq", "dk", "dv"), kernel, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_in_bfloat16_it_is_as_near_the_truth_as_plain_attention():
    exact = arrays(batch=1, heads=1, kv_heads=1)
    rounded = [x.astype("bfloat16") for x in exact]
    truth = both(lambda *x: L.attention(*x, causal=True), *(x.astype("float32") for x in rounded))
    plain = both(lambda *x: L.attention(*x, causal=True), *rounded)
    kernel = both(lambda *x: tpu_splash.splash_attention(*x, True, interpret=True), *rounded)
    for name, ours, theirs, right in zip(("y", "dq", "dk", "dv"), kernel, plain, truth, strict=True):
        assert ours.dtype == jnp.bfloat16
        error, allowed = (float(jnp.abs(x.astype("float32") - right).max()) for x in (ours, theirs))
        assert error < 2 * allowed + 0.01, name


@pytest.mark.costs("the kernel and its gradients, interpreted, for one device and for eight")
@pytest.mark.parametrize(
    ("mesh", "spec", "heads", "kv_heads"),  # in the first and the last shards do not divide the heads of keys
    [
        ("data=2,fsdp=2,tensor=2", PartitionSpec(("data", "fsdp"), None, "tensor", None), 6, 3),
        pytest.param("data=4,fsdp=2", PartitionSpec(("data", "fsdp"), None, None, None), 2, 2, marks=pytest.mark.long),
        pytest.param("data=2,tensor=4", PartitionSpec("data", None, "tensor", None), 4, 4, marks=pytest.mark.long),
        pytest.param("data=2,tensor=4", PartitionSpec("data", None, "tensor", None), 4, 2, marks=pytest.mark.long),
    ],
)
def test_on_a_mesh_it_is_the_same(mesh, spec, heads, kv_heads):
    q, k, v, dy = arrays(batch=8, length=128, heads=heads, kv_heads=kv_heads)
    sharding = NamedSharding(sw.mesh(mesh), spec)
    one = both(lambda *x: tpu_splash.splash_attention(*x, True, interpret=True), q, k, v, dy)
    run = lambda *x: tpu_splash.splash_attention(*x, True, sharding=sharding, interpret=True)  # noqa: E731
    many = both(run, q, k, v, dy)
    assert many[0].sharding.is_equivalent_to(sharding, 4)
    for ours, theirs in zip(many, one, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def chosen(monkeypatch, platform="tpu", **options):
    monkeypatch.setattr(target_platform, "platform", lambda: platform)  # of the default device
    devices, mask, sharding = options.pop("devices", 1), options.pop("mask", None), options.pop("sharding", None)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    q, k, _, _ = arrays(**{"batch": 1, "length": 128, "heads": 1, "kv_heads": 1, **options})
    return tpu_splash.chosen(q, k, mask, sharding)


def test_it_is_chosen_on_a_tpu_alone(monkeypatch):
    assert chosen(monkeypatch)
    assert not chosen(monkeypatch, platform="cpu")
    assert not chosen(monkeypatch, platform="gpu")


@pytest.mark.parametrize(
    "options",
    [{"length": 100}, {"length": 64}, {"keys": 200}, {"dtype": "float16"}, {"devices": 4}, {"mask": np.ones(1)}],
)
def test_it_is_not_chosen_for_what_it_cannot_do(monkeypatch, options):
    assert not chosen(monkeypatch, **options)


def test_the_devices_of_the_mesh_say_what_we_compile_for(monkeypatch):
    """On a machine whose default device is a TPU, a mesh of CPU devices runs plain attention."""
    sharding = NamedSharding(sw.mesh("data=8"), PartitionSpec("data", None, None, None))
    assert not chosen(monkeypatch, batch=8, sharding=sharding)
    abstract = NamedSharding(sharding.mesh.abstract_mesh, sharding.spec)  # of no devices: the default decides
    assert chosen(monkeypatch, batch=8, sharding=abstract)
    assert not chosen(monkeypatch, batch=8, sharding=NamedSharding(abstract.mesh, PartitionSpec(None, "data")))
    assert not chosen(
        monkeypatch, batch=8, sharding=NamedSharding(abstract.mesh, PartitionSpec(None, None, None, "data"))
    )


def test_attention_and_the_layer_hand_over_to_it(monkeypatch, weights):
    """With the choice forced, both run the kernel, the layer with the sharding of its mesh."""
    seen, mesh = [], sw.mesh("data=4,tensor=2")

    def kernel(q, k, v, causal, scale, sharding, segments):
        seen.append((causal, sharding))
        return q

    monkeypatch.setattr(tpu_splash, "chosen", lambda q, k, mask, sharding: mask is None)
    monkeypatch.setattr(tpu_splash, "splash_attention", kernel)
    q, k, v, _ = arrays(batch=8, length=4, head_dim=4)
    np.testing.assert_array_equal(jax.jit(lambda *x: L.attention(*x, causal=True))(q, k, v), q)
    layer, x, place = L.MultiHeadAttention(2), np.ones((8, 4, 8), "float32"), sw.parallel.placement(mesh)
    jax.eval_shape(lambda params, x: sw.apply(layer, params, {}, x, place=place)[0], weights(layer, x), x)
    assert seen[0] == (True, None)
    assert seen[-1][0] is False
    assert seen[-1][1].spec == PartitionSpec("data", None, "tensor", None)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [None, "data=4,tensor=2"])
def test_packed_segments_see_themselves_alone(sharding):
    q, k, v, dy = arrays(batch=4, heads=2)
    segments = np.sort(np.random.default_rng(1).integers(0, 3, (4, 256), "int32"), 1)
    split = sharding and NamedSharding(sw.mesh(sharding), PartitionSpec("data", None, "tensor", None))
    mask = (segments[:, :, None] == segments[:, None, :])[:, None]
    plain = both(lambda *x: L.attention(*x, mask=mask, causal=True), q, k, v, dy)
    run = lambda *x: tpu_splash.splash_attention(*x, True, None, split, segments, interpret=True)  # noqa: E731
    for ours, theirs in zip(both(run, q, k, v, dy), plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)
