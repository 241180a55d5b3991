"""Embedding: rows of a table, ids checked, logits with the same table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sapwood as sw
from sapwood import layers as L
from sapwood.layers.embedding import embed_split


@pytest.mark.parametrize("dtype", ["int32", "uint8", "int16"])
def test_matches_a_one_hot_product(dtype, agree, draw):
    ids = jnp.array([[0, 4, 4], [2, 1, 0]], dtype)
    agree(lambda t: L.Embed(5, 3)({"table": t}, ids), lambda t: jax.nn.one_hot(ids, 5) @ t, draw(5, 3))


def test_matches_keras(keras, agree, draw):
    layer, ids = keras.layers.Embedding(5, 3), jnp.array([[0, 4], [2, 2]])
    layer.build()
    agree(lambda t: L.embed(ids, t), lambda t: layer.stateless_call([t], [], ids)[0], draw(5, 3))


def test_array_function_gives_nan_and_no_gradient_outside_the_table():
    ids = jnp.array([-1, 0, 3, 100])
    y, pull = jax.vjp(lambda t: L.embed(ids, t), jnp.ones((3, 2)))
    np.testing.assert_array_equal(jnp.isnan(y).all(1), [True, False, True, True])
    np.testing.assert_array_equal(pull(jnp.ones_like(y))[0], [[1, 1], [0, 0], [0, 0]])


@pytest.mark.parametrize("bad", [-1, 5, 1000])
def test_an_id_outside_the_table_is_reported(bad):
    model, ids = L.Embed(5, 3), jnp.array([[0, 1], [bad, 2]])
    params, _ = sw.init(model, 0, jnp.zeros((2, 2), int))
    with pytest.raises(sw.CheckError, match=r"id outside \[0, 5\) at entry 1, 0"):
        model(params, ids)
    (checks,) = jax.jit(lambda p, i: sw.pure(model)(sw.bind(p), i)[1].checks)(params, ids).values()
    assert not bool(checks)
    (checks,) = jax.jit(lambda p, i: sw.pure(model)(sw.bind(p), i)[1].checks)(params, jnp.array([[0, 4]])).values()
    assert bool(checks)


def test_tied_logits(agree, draw):
    embed = L.Embed(5, 3)
    ids = jnp.array([3, 0])

    def tied(t):
        v = sw.bind({"table": t})
        return embed.attend(v, jnp.tanh(embed(v, ids)))

    agree(tied, lambda t: jnp.tanh(t[ids]) @ t.T, draw(5, 3))

    def model(v, i):
        return embed.attend(v.table, embed(v.table, i))

    spec = sw.spec(model, ids)
    assert spec.params.keys() == {"table"}


@pytest.mark.parametrize(("dtype", "kept"), [("int32", "fsdp"), ("uint8", None)])
def test_a_split_table_gives_the_same_rows_and_gradients(dtype, kept, draw):
    table, ids, probe = draw(256, 2), jnp.array([[0, 31, 32, 255], [255, 7, 100, 0]], dtype), draw(2, 4, 2)
    mesh = sw.mesh("fsdp=2,tensor=4")
    rows, out = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("tensor", kept), ("fsdp", None)))
    split = jax.jit(lambda t: jax.vjp(lambda t: embed_split(ids, t, rows, out), t))
    y, pull = split(table)
    theirs, push = jax.vjp(lambda t: L.embed(ids, t), table)
    np.testing.assert_array_equal(y, theirs)
    np.testing.assert_allclose(jax.jit(pull)(probe)[0], push(probe)[0], rtol=1e-6)


def test_a_split_table_gives_nan_and_no_gradient_outside():
    mesh = sw.mesh("tensor=8")
    rows, out = NamedSharding(mesh, PartitionSpec("tensor", None)), NamedSharding(mesh, PartitionSpec())
    y, pull = jax.vjp(lambda t: embed_split(jnp.array([-1, 0, 8, 100]), t, rows, out), jnp.ones((8, 2)))
    np.testing.assert_array_equal(jnp.isnan(y).all(1), [True, False, True, True])
    np.testing.assert_array_equal(pull(jnp.ones_like(y))[0], [[1, 1], *[[0, 0]] * 7])


def test_declares_its_table():
    table = sw.spec(L.Embed(100, 16), jnp.zeros(3, int)).params["table"]
    assert (table.shape, table.axes) == ((100, 16), ("vocab", "embed"))
    assert sw.spec(L.Embed(100, 16, axes=None), jnp.zeros(3, int)).params["table"].axes is None
    params, _ = sw.init(L.Embed(1000, 64), 0, jnp.zeros(3, int))
    assert abs(float(params["table"].std()) * 8 - 1) < 0.05


def test_refuses_what_is_no_id_and_no_table():
    with pytest.raises(ValueError, match=r"expects integers, got float32\[2\]"):
        L.Embed(5, 3)({"table": jnp.ones((5, 3))}, jnp.ones(2))
    with pytest.raises(ValueError, match=r"expects integers, got bool"):
        L.embed(jnp.array([True]), jnp.ones((5, 3)))
    with pytest.raises(ValueError, match=r"table \(vocab, features\), got float32\[5\]"):
        L.embed(jnp.zeros(2, int), jnp.ones(5))
    for options in ({"vocab": 0}, {"features": -1}, {"axes": ("vocab",)}):
        with pytest.raises(sw.ConfigError):
            L.Embed(**{"vocab": 5, "features": 3, **options})


@pytest.mark.parametrize("vocab", [256, 300])
def test_ids_too_narrow_for_the_size_of_the_table(vocab):
    params, ids = {"table": jnp.arange(2.0 * vocab).reshape(vocab, 2)}, jnp.array([0, 255], "uint8")
    run = jax.jit(lambda ids: sw.pure(L.Embed(vocab, 2))(sw.bind(params), ids))
    y, updates = run(ids)
    np.testing.assert_array_equal(y, params["table"][jnp.array([0, 255])])
    assert [bool(ok) for ok in updates.checks.values()] == [True]
    (ok,) = run(jnp.array([0, -1], "int8"))[1].checks.values()
    assert not bool(ok)
