"""Tied embeddings: one table turns ids into vectors and vectors into logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L

VOCAB = 11


def model(v, ids):
    table = L.Embed(VOCAB, 8)
    x = L.Dense(8)(v.mix, table(v.table, ids))
    return table.attend(v.table, x)


IDS = np.array([[1, 2, 3], [4, 5, 10]], "int32")
OUTSIDE = np.array([[1, VOCAB, 3], [4, 5, 10]], "int32")


@functools.cache
def weights():
    return jax.device_get(sw.init(model, 0, IDS))


def test_there_is_one_table_and_both_uses_move_it():
    params, _ = weights()
    assert {name: list(tree) for name, tree in params.items()} == {"mix": ["bias", "kernel"], "table": ["table"]}
    gradient = jax.jit(jax.grad(lambda p: sw.apply(model, p, {}, IDS)[0].sum()))(params)["table"]["table"]
    assert np.any(np.asarray(gradient)[0])  # id 0 is never looked up: its gradient is that of the logits alone

    def by_hand(table):
        x = table[IDS] @ params["mix"]["kernel"] + params["mix"]["bias"]
        return (x @ table.T).sum()

    assert np.allclose(gradient, jax.jit(jax.grad(by_hand))(params["table"]["table"]), atol=1e-5)


def test_the_second_use_must_agree():
    def untied(v, ids):
        x = L.Embed(VOCAB, 8)(v.table, ids)
        return L.Embed(VOCAB + 1, 8).attend(v.table, x)

    with pytest.raises(sw.DeclarationError, match=r"table/table is declared twice with a different shape: .*make them"):
        sw.spec(untied, IDS)


def test_an_id_outside_the_table():
    params, _ = weights()
    with pytest.raises(sw.CheckError, match=r"table: id outside \[0, 11\) at entry 0, 1"):
        sw.apply(model, params, {}, OUTSIDE)
    _, updates = jax.jit(sw.pure(model))(sw.bind(params), OUTSIDE)
    assert not updates.checks["table"]["id outside [0, 11)"]


if __name__ == "__main__":
    params, _ = sw.init(model, 0, IDS)
    print("logits", sw.apply(model, params, {}, IDS)[0].shape, "from", jax.tree.map(jnp.shape, params))
