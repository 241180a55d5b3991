"""Arrays are born sharded, and with the values they have everywhere."""

import importlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood import parallel
from sapwood.core.errors import ConfigError, DeclarationError
from sapwood.core.initializers import glorot_uniform, lecun_normal, normal, orthogonal, truncated_normal, uniform
from sapwood.parallel import DEFAULT, mesh

INIT = jax.nn.initializers.normal(0.1)
ZEROS = jax.nn.initializers.zeros


def dense(v, x, features, axes=None):
    return x @ v.param("kernel", (x.shape[-1], features), INIT, axes=axes) + v.param("bias", (features,), ZEROS)


def model(v, x):
    v.norm.state("mean", (32,), ZEROS)
    for i in range(2):
        x = jnp.tanh(dense(v.blocks[i], x, 32))
    return dense(v.logits, dense(v.up, x, 512, ("embed", "mlp")), 64, ("mlp", "embed"))


X = np.ones((8, 32), "float32")
SMALL = replace(DEFAULT, min_size=64)


@pytest.fixture(scope="session")
def unsharded():
    return jax.device_get(sw.init(model, jax.random.key(3), X))


@pytest.mark.parametrize("text", ["data=4,fsdp=2", "data=2,fsdp=2,tensor=2"])
def test_values_are_bit_for_bit_the_unsharded_ones(text, unsharded):
    params, state = unsharded
    sharded, sharded_state = parallel.init(model, jax.random.key(3), X, mesh=mesh(text), rules=SMALL)
    jax.tree.map(np.testing.assert_array_equal, sharded, params)
    jax.tree.map(np.testing.assert_array_equal, sharded_state, state)
    expected = parallel.param_shardings(sw.spec(model, X).params, mesh(text), SMALL)
    assert jax.tree.map(lambda x: x.sharding, sharded) == expected
    for leaf in jax.tree.leaves(sharded):
        assert {s.data.shape for s in leaf.addressable_shards} == {leaf.sharding.shard_shape(leaf.shape)}
    kernel = sharded["up"]["kernel"]
    assert kernel.addressable_shards[0].data.nbytes * mesh(text).size // mesh(text).shape["data"] == kernel.nbytes
    assert sharded_state["norm"]["mean"].sharding == parallel.replicated(mesh(text))


def drawn_by(names, once=()):
    """A model of some of `OWN`, by names of axes on either dimension and by none, and narrow; "layers" are a stack.

    Those in `once` have one shape.
    """

    def model(v, x):
        for name in names:
            if name == "layers":
                h = L.Dense(128, axes=("embed", "mlp"))(v.up, x)
                L.Dense(256)(v.down, h)
                L.Scan(lambda v, x: x + L.Dense(128, axes=("embed", "mlp"))(v.dense, x), 4)(v.blocks, h)
            else:
                v[name].param("wide", (96, 192), OWN[name], axes=("embed", "mlp"))
                if name in once:
                    continue
                v[name].param("high", (192, 96), OWN[name], axes=("mlp", "embed"))
                v[name].param("half", (128, 144), OWN[name], dtype="bfloat16")

    return model


OWN = {
    "lecun_normal": lecun_normal(),
    "glorot_uniform": glorot_uniform(),
    "normal": normal(0.02),
    "truncated_normal": truncated_normal(0.1),
    "uniform": uniform(-0.1, 0.3),
    "orthogonal": orthogonal(),
    "jax_normal": jax.nn.initializers.normal(0.1),
    "jax_he": jax.nn.initializers.he_normal(),
}


DIAGONAL = {
    "data=8": ["normal", "jax_normal"],
    "fsdp=8": ["lecun_normal", "uniform"],
    "tensor=8": ["glorot_uniform", "jax_he"],
    "fsdp=4,tensor=2": ["truncated_normal", "orthogonal"],
    "stage=2,fsdp=4": ["layers"],
}


def same_bits(names, text, once=()):
    assert sorted(name for names in DIAGONAL.values() for name in names) == sorted([*OWN, "layers"])
    x = np.ones((8, 512), "float32")
    one, _ = sw.init(drawn_by(names, once), 5, x)
    many, _ = parallel.init(drawn_by(names, once), 5, x, mesh=mesh(text))
    whole = [leaf for leaf in jax.tree.leaves(many) if leaf.sharding.is_fully_replicated]
    assert text == "data=8" or len(whole) < 0.5 * len(jax.tree.leaves(many))
    jax.tree.map(np.testing.assert_array_equal, many, one)


@pytest.mark.slow
@pytest.mark.fresh_compile  # it is about bits
@pytest.mark.parametrize("text", DIAGONAL)
def test_our_own_initialisers_give_the_same_bits_on_any_mesh(text):
    same_bits(DIAGONAL[text], text, once=["orthogonal"])  # a factorisation takes 4 s to compile


@pytest.mark.long
@pytest.mark.fresh_compile
@pytest.mark.parametrize("text", DIAGONAL)
def test_every_initialiser_gives_the_same_bits_on_every_mesh(text):
    same_bits([*OWN, "layers"], text)


def test_what_a_stack_is_drawn_whole_in_is_bounded(monkeypatch):
    """A stack of more elements than are drawn at a time: the parts are put together in order, each in its place."""
    monkeypatch.setattr(importlib.import_module("sapwood.core.init"), "GROUPED_BELOW", 2**15)

    def stack(v, x):
        return L.Scan(lambda v, x: x + L.Dense(128, axes=("embed", "mlp"))(v.dense, x), 6)(v.blocks, x)

    x = np.ones((8, 128), "float32")
    one, _ = sw.init(stack, 5, x)
    many, _ = parallel.init(stack, 5, x, mesh=mesh("stage=2,fsdp=4"))
    assert tuple(many["blocks"]["dense"]["kernel"].sharding.spec) == ("stage", "fsdp", None)
    np.testing.assert_allclose(many["blocks"]["dense"]["kernel"], one["blocks"]["dense"]["kernel"], 1e-6)


@pytest.mark.long
@pytest.mark.fresh_compile
@pytest.mark.parametrize("text", ["fsdp=8", "tensor=8", "fsdp=4,tensor=2"])
@pytest.mark.parametrize("shape", [(1024, 1024), (1000, 1112), (2048, 2056)])
def test_large_ones_are_drawn_in_pieces_with_the_same_bits(text, shape):
    def large(v, x):
        for name, init in OWN.items():
            if name != "orthogonal":
                v.param(name, shape, init, axes=("embed", "mlp"))

    one, _ = sw.init(large, 5, X)
    many, _ = parallel.init(large, 5, X, mesh=mesh(text))
    jax.tree.map(np.testing.assert_array_equal, many, one)


def test_no_device_holds_the_whole_on_the_way_either():
    def large(v, x):
        for i in range(4):
            v.blocks[i].param("kernel", (2048, 512), INIT, axes=("embed", "mlp"))

    m = mesh("fsdp=8")
    shardings = parallel.param_shardings(sw.spec(large, X).params, m)
    born = jax.jit(lambda key: parallel.init(large, key, X, mesh=m)[0], out_shardings=shardings)
    program = born.lower(jax.random.key(0)).compile()
    assert program.memory_analysis().output_size_in_bytes < 1.01 * 4 * 2048 * 512 * 4 / 8
    assert "256,512]" in program.as_text()  # what one device makes
    assert "2048,512]" not in program.as_text()


def test_data_dependent_values_agree():
    def scaled(v, x):
        v.param("scale", (x.shape[-1],), lambda key, shape, dtype: x.std(0).astype(dtype))
        return v.shard(dense(v.up, x, 512), "batch", "mlp")

    x = np.random.default_rng(1).normal(size=(16, 32)).astype("f")
    params, _ = sw.init(scaled, 0, x, data=True)
    sharded, _ = parallel.init(scaled, 0, x, mesh=mesh("data=2,fsdp=4"), data=True)
    np.testing.assert_array_equal(sharded["up"]["kernel"], params["up"]["kernel"])
    np.testing.assert_allclose(sharded["scale"], params["scale"], 1e-6)
    assert tuple(sharded["up"]["kernel"].sharding.spec) == (None, "fsdp")
    with pytest.raises(DeclarationError, match="data=True"):
        parallel.init(scaled, 0, x, mesh=mesh("data=8"))


def test_shapes_are_enough_and_a_policy_is_kept():
    shapes, policy = jax.ShapeDtypeStruct((8, 32), jnp.float32), sw.Policy("bfloat16", "bfloat16")
    params, _ = parallel.init(model, 0, shapes, mesh=mesh("fsdp=8"), policy=policy)
    assert params["up"]["kernel"].dtype == jnp.bfloat16
    assert tuple(params["up"]["kernel"].sharding.spec) == ("fsdp", None)


def test_a_mesh_that_is_none():
    with pytest.raises(ConfigError, match=r"expected a jax.sharding.Mesh, got 'fsdp=8'"):
        parallel.init(model, 0, X, mesh="fsdp=8")
