"""A mesh axis over which a model splits nothing is told of, once, with what would use it."""

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.models import Decoder
from sapwood.parallel import DEFAULT, ShardingWarning, batch_sharding
from sapwood.parallel.wasted_axes import wasted
from sapwood.train import next_token, supervised
from sapwood.train.state import plan

BATCH = {"x": np.ones((8, 256), "float32"), "label": np.zeros(8, int)}


def dense(axes):
    return supervised(lambda v, x: L.Dense(16)(v.out, L.Dense(256, axes=axes)(v.up, x)), inputs="x")


def told(objective, mesh, batch=BATCH, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan.plan(sw.Trainer(objective, optax.sgd(0.1), mesh=mesh, **options), batch)
    return [str(one.message) for one in caught if "do the same work" in str(one.message)]


def test_dense_without_names_does_not_use_tensor():
    (said,) = told(dense(None), "data=2,tensor=4")
    assert said.startswith(
        "mesh data=2,tensor=4: nothing of this model is split over 'tensor', so its 4 devices all do"
    )
    assert "'mlp'" in said
    assert "mesh data=8 has work for every device" in said
    assert told(dense(("embed", "mlp")), "data=2,tensor=4") == []
    for mesh in ("data=8", "fsdp=8", "expert=8", "stage=8", "replica=2,data=4"):  # over these the batch is split
        assert told(dense(None), mesh) == []


def test_it_is_an_error_under_strict_rules():
    with pytest.raises(sw.ConfigError, match="strict rules: nothing of this model is split over 'tensor'"):
        told(dense(None), "tensor=8", rules=replace(DEFAULT, strict=True))


def test_an_axis_that_activations_alone_use_is_used():
    tokens = dict.fromkeys(("tokens", "targets"), np.zeros((8, 16), int))
    assert (
        told(next_token(Decoder(32, 1, 16, 4)), "data=2,sequence=4", tokens) == []
    )  # too small for parameters in pieces
    assert told(next_token(Decoder(32, 1, 16, 4)), "data=2,tensor=4", tokens) == []
    (said,) = told(dense(("embed", "mlp")), "data=2,sequence=4")
    assert "'length'" in said


@pytest.mark.parametrize("how", ["constraint", "rows alone", "jitted", "shard_map", "numbered", "not at all"])
def test_what_a_user_splits_without_the_cursor_is_used(how):
    mesh = sw.mesh("data=2,tensor=4")
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "tensor"))

    other = jax.sharding.NamedSharding(sw.mesh("tensor=8"), jax.sharding.PartitionSpec("tensor"))

    def numbered(x):
        return jax.lax.psum(jnp.where(jax.lax.axis_index("tensor") == 1, x, 0), "tensor")

    def over(f, spec):
        return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)

    ways = {
        "constraint": lambda x: jax.lax.with_sharding_constraint(x, split),
        "rows alone": jax.vmap(lambda x: jax.lax.with_sharding_constraint(x, other)),
        "jitted": jax.jit(jnp.sin, out_shardings=split),
        "shard_map": over(jnp.sin, split.spec),
        "numbered": over(numbered, jax.sharding.PartitionSpec("data")),
        "not at all": over(jnp.sin, jax.sharding.PartitionSpec("data")),
    }
    objective = supervised(lambda v, x: L.Dense(4)(v.out, ways[how](L.Dense(64)(v.up, x))), inputs="x")
    assert len(told(objective, mesh)) == (how == "not at all")


def test_a_loop_of_ones_own_is_told_too():
    with pytest.warns(ShardingWarning, match="nothing of this model is split over 'tensor'"):
        sw.parallel.init(L.Dense(256), 0, jnp.ones((8, 256)), mesh=sw.mesh("tensor=8"))


def test_nothing_is_traced_where_the_shardings_say_it(monkeypatch):
    monkeypatch.setattr("sapwood.parallel.wasted_axes.trace", None)
    mesh = jax.sharding.AbstractMesh((8,), ("fsdp",))
    split = [batch_sharding(mesh, None)]
    assert wasted(L.Dense(4), jnp.ones((8, 4)), mesh=mesh, rules=DEFAULT, shardings=split) == ()
