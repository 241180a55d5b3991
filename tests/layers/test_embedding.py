"""Embedding: rows of a table, ids checked, logits with the same table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sapwood as sw
from sapwood import layers as L
from sapwood.layers.linear.embedding import embed_split


@pytest.mark.parametrize("dtype", ["int32", "uint8", "int16"])
def test_matches_a_one_hot_product(dtype, agree, sample):
    ids = np.array([[0, 4, 4], [2, 1, 0]], dtype)
    agree(lambda t: L.Embed(5, 3)({"table": t}, ids), lambda t: jax.nn.one_hot(ids, 5) @ t, sample(5, 3))


def test_matches_keras(keras, agree, sample):
    layer, ids = keras.layers.Embedding(5, 3), np.array([[0, 4], [2, 2]])
    layer.build()
    agree(lambda t: L.embed(ids, t), lambda t: layer.stateless_call([t], [], ids)[0], sample(5, 3))


@functools.partial(jax.jit, static_argnums=0)
def value_and_pull(embed, table, probe):
    y, pull = jax.vjp(embed, table)
    return y, pull(probe)[0]


def test_array_function_gives_nan_and_no_gradient_outside_the_table():
    table, probe = np.ones((3, 2), "float32"), np.ones((4, 2), "float32")
    y, slope = value_and_pull(lambda t: L.embed(np.array([-1, 0, 3, 100]), t), table, probe)
    np.testing.assert_array_equal(np.isnan(y).all(1), [True, False, True, True])
    np.testing.assert_array_equal(slope, [[1, 1], [0, 0], [0, 0]])


@pytest.mark.parametrize("bad", [-1, 5, 1000])
def test_an_id_outside_the_table_is_reported(bad):
    model, params, ids = L.Embed(5, 3), {"table": np.ones((5, 3), "float32")}, np.array([[0, 1], [bad, 2]])
    with pytest.raises(sw.CheckError, match=r"id outside \[0, 5\) at entry 1, 0"):
        model(params, jnp.asarray(ids))
    run = jax.jit(lambda p, i: sw.pure(model)(sw.bind(p), i)[1].checks)
    (checks,) = run(params, ids).values()
    assert not bool(checks)
    (checks,) = run(params, np.array([[0, 4], [4, 0]])).values()
    assert bool(checks)


def test_tied_logits(agree, sample):
    embed = L.Embed(5, 3)
    ids = np.array([3, 0])

    def tied(t):
        v = sw.bind({"table": t})
        return embed.attend(v, jnp.tanh(embed(v, ids)))

    agree(tied, lambda t: jnp.tanh(t[ids]) @ t.T, sample(5, 3))

    def model(v, i):
        return embed.attend(v.table, embed(v.table, i))

    spec = sw.spec(model, ids)
    assert spec.params.keys() == {"table"}


@pytest.mark.parametrize(("dtype", "kept"), [("int32", "fsdp"), ("uint8", None)])
def test_a_split_table_gives_the_same_rows_and_gradients(dtype, kept, sample):
    table, ids, probe = sample(256, 2), np.array([[0, 31, 32, 255], [255, 7, 100, 0]], dtype), sample(2, 4, 2)
    mesh = sw.mesh("fsdp=2,tensor=4")
    rows, out = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("tensor", kept), ("fsdp", None)))
    y, slope = value_and_pull(lambda t: embed_split(ids, t, rows, out), table, probe)
    np.testing.assert_array_equal(y, table[ids])
    expected = np.zeros_like(table)
    np.add.at(expected, ids, probe)
    np.testing.assert_allclose(slope, expected, rtol=1e-6)


def test_a_split_table_gives_nan_and_no_gradient_outside():
    mesh = sw.mesh("tensor=8")
    rows, out = NamedSharding(mesh, PartitionSpec("tensor", None)), NamedSharding(mesh, PartitionSpec())
    table, probe = np.ones((8, 2), "float32"), np.ones((4, 2), "float32")
    y, slope = value_and_pull(lambda t: embed_split(jnp.array([-1, 0, 8, 100]), t, rows, out), table, probe)
    np.testing.assert_array_equal(np.isnan(y).all(1), [True, False, True, True])
    np.testing.assert_array_equal(slope, [[1, 1], *[[0, 0]] * 7])


@pytest.mark.slow
def test_a_split_table_needs_no_jit(sample):
    mesh = sw.mesh("tensor=2", devices=jax.devices()[:2])
    rows, out = NamedSharding(mesh, PartitionSpec("tensor", None)), NamedSharding(mesh, PartitionSpec())
    table = sample(8, 2)
    y = np.asarray(embed_split(np.array([-1, 0, 5, 8]), table, rows, out))
    np.testing.assert_array_equal(y[1:3], table[[0, 5]])
    assert np.isnan(y[[0, 3]]).all()


def test_declares_its_table():
    ids = np.zeros(3, int)
    table = sw.spec(L.Embed(100, 16), ids).params["table"]
    assert (table.shape, table.axes) == ((100, 16), ("vocab", "embed"))
    assert sw.spec(L.Embed(100, 16, axes=None), ids).params["table"].axes is None
    params, _ = sw.init(L.Embed(1000, 64), 0, ids)
    assert abs(np.asarray(params["table"]).std() * 8 - 1) < 0.05


def test_refuses_what_is_no_id_and_no_table():
    table = np.ones((5, 3), "float32")
    with pytest.raises(ValueError, match=r"expects integers, got float32\[2\]"):
        L.Embed(5, 3)({"table": table}, np.ones(2, "float32"))
    with pytest.raises(ValueError, match=r"expects integers, got bool"):
        L.embed(np.array([True]), table)
    with pytest.raises(ValueError, match=r"table \(vocab, features\), got float32\[5\]"):
        L.embed(np.zeros(2, "int32"), table[:, 0])
    for options in ({"vocab": 0}, {"features": -1}, {"axes": ("vocab",)}):
        with pytest.raises(sw.ConfigError):
            L.Embed(**{"vocab": 5, "features": 3, **options})


@pytest.mark.parametrize("vocab", [256, 300])
def test_ids_too_narrow_for_the_size_of_the_table(vocab):
    params, ids = {"table": np.arange(2 * vocab, dtype="float32").reshape(vocab, 2)}, np.array([0, 255], "uint8")
    run = jax.jit(lambda ids: sw.pure(L.Embed(vocab, 2))(sw.bind(params), ids))
    y, updates = run(ids)
    np.testing.assert_array_equal(y, params["table"][ids])
    assert [bool(ok) for ok in updates.checks.values()] == [True]
    (ok,) = run(np.array([0, -1], "int8"))[1].checks.values()
    assert not bool(ok)
