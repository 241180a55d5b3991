"""`v.shard` under a mesh: where activations go, inside and outside of `shard_map`."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sapwood.core.apply import apply
from sapwood.core.bind import bind
from sapwood.core.errors import ConfigError, DeclarationError
from sapwood.parallel import ShardingWarning, mesh, placement

P = PartitionSpec


def test_an_activation_goes_where_its_names_say():
    m = mesh("data=2,fsdp=2,tensor=2")
    place = placement(m)
    assert place(("batch", "length", "embed"), (8, 4, 16)) == NamedSharding(m, P(("data", "fsdp"), None, None))
    assert place(("batch", "length", "mlp"), (8, 4, 16)) == NamedSharding(m, P(("data", "fsdp"), None, "tensor"))
    data_only = placement(mesh("data=4,fsdp=2"), "data")
    assert data_only(("batch", "mlp"), (8, 16)).spec == P(("data", "fsdp"), None)


def test_a_cursor_constrains_what_it_shards():
    m = mesh("data=4,tensor=2")

    def model(v, x):
        return v.shard(x * 2, "batch", "mlp")

    x = jnp.arange(64.0).reshape(8, 8)
    y, _ = jax.jit(lambda x: apply(model, {}, {}, x, place=placement(m)))(x)
    assert y.sharding.is_equivalent_to(NamedSharding(m, P("data", "tensor")), 2)
    np.testing.assert_array_equal(y, x * 2)
    eager, _ = apply(model, {}, {}, x, place=placement(m))
    assert eager.sharding.is_equivalent_to(NamedSharding(m, P("data", "tensor")), 2)
    assert apply(model, {}, {}, x)[0].sharding == x.sharding  # without a mesh nothing happens


def test_gradients_pass_through():
    m = mesh("data=4,tensor=2")
    w = np.ones((8, 8), "float32")

    def loss(w, place):
        v = bind({"w": w}, place=place)
        return (v.shard(jnp.sin(v.param("w", (8, 8), None)), "batch", "mlp") ** 2).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    np.testing.assert_allclose(gradient(w, placement(m)), gradient(w, None), 1e-6)


def test_equal_placements_share_compiled_code():
    assert placement(mesh("data=8")) == placement(mesh(data=8), "default")
    assert hash(placement(mesh("data=8"))) == hash(placement(mesh("data=8")))
    assert placement(mesh("data=8")) != placement(mesh("data=8"), "data")
    traces = []

    def block(v, x):
        traces.append(1)
        return v.shard(x, "batch", "embed")

    run = jax.jit(block)
    for _ in range(3):
        v = bind({"blocks": {"0": {}, "1": {}}}, place=placement(mesh("data=8")))
        run(v.blocks[0], jnp.ones((8, 2)))
        run(v.blocks[1], jnp.ones((8, 2)))
    assert len(traces) == 1


def test_inside_shard_map_only_the_free_axes_are_named():
    m = mesh("data=4,tensor=2")
    place, seen = placement(m), []

    def body(x):
        seen.append(place(("batch", "mlp"), x.shape))
        return jax.lax.with_sharding_constraint(x * 2, seen[-1]) if seen[-1] else x * 2

    x = jnp.arange(64.0).reshape(8, 8)
    some = jax.shard_map(body, mesh=m, in_specs=P("data"), out_specs=P("data"), axis_names={"data"})
    np.testing.assert_array_equal(jax.jit(some)(x), x * 2)
    assert seen[-1].spec == P(None, "tensor")
    full = jax.shard_map(body, mesh=m, in_specs=P("data", "tensor"), out_specs=P("data", "tensor"))
    np.testing.assert_array_equal(jax.jit(full)(x), x * 2)
    assert seen[-1] is None


def test_what_does_not_divide_is_whole_with_a_warning():
    place = placement(mesh("data=8"))
    with pytest.warns(
        ShardingWarning, match=r"of shape \(6, 4\): dimension 0 \('batch', size 6\) does not divide by data=8"
    ):
        assert place(("batch", "embed"), (6, 4)).spec == P(None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert place(("batch", "embed"), (1, 4)).spec == P(None, None)  # one example is no mistake


def test_a_wrong_number_of_names():
    with pytest.raises(DeclarationError, match=r"1 names \('batch',\) for an array of shape \(8, 4\)"):
        placement(mesh("data=8"))(("batch",), (8, 4))


def test_an_explicit_mesh_works_unless_it_is_set():
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    place = placement(explicit)
    assert place == placement(mesh("data=8"))
    y = jax.jit(lambda x: jax.lax.with_sharding_constraint(x, place(("batch",), x.shape)))(jnp.ones(8))
    assert y.sharding.spec == P("data")
    with jax.set_mesh(explicit), pytest.raises(ConfigError, match="Explicit"):
        place(("batch",), (8,))
