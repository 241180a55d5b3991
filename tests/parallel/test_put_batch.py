"""Batches on a mesh: sizes, messages, and which process feeds which rows."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from sapwood.core.errors import ConfigError
from sapwood.parallel import DEFAULT, batch_sharding, check_batch, check_batch_size, feed, mesh, put_batch, shards
from sapwood.parallel.batches import Feed, batch_multiple
from sapwood.parallel.pipeline.settings import Pipeline

P = PartitionSpec


@pytest.mark.parametrize(
    ("text", "spec", "parts"),
    [
        ("data=8", P("data"), 8),
        ("data=4,fsdp=2", P(("data", "fsdp")), 8),
        ("replica=2,data=2,fsdp=2", P(("replica", "data", "fsdp")), 8),
        ("data=2,tensor=4", P("data"), 2),
        ("tensor=8", P(None), 1),
        ("fsdp=2,expert=4", P(("fsdp", "expert")), 8),
        ("data=2,sequence=4", P("data"), 2),
    ],
)
def test_the_batch_is_split_over_the_data_axes(text, spec, parts):
    sharding = batch_sharding(mesh(text))
    assert sharding == NamedSharding(mesh(text), spec)
    assert shards(sharding) == parts


def test_an_array_of_any_rank_is_put_in_order():
    batch = {
        "image": np.arange(16 * 3 * 3.0).reshape(16, 3, 3),
        "label": np.arange(16),
        "nested": {"mask": np.ones(16, bool)},
    }
    placed = put_batch(batch, batch_sharding(mesh("data=2,fsdp=2,tensor=2")))
    jax.tree.map(np.testing.assert_array_equal, placed, batch)
    label = placed["label"]
    assert [s.data.tolist() for s in label.addressable_shards if s.replica_id == 0] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]
    ]  # fmt: skip
    assert len(label.addressable_shards) == 8


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (4, "batch size 4 is smaller than the 8 shards of mesh data=4,fsdp=2 (data=4 × fsdp=2); use 8, or a smaller"),
        (12, "batch size 12 does not divide over the 8 shards of mesh data=4,fsdp=2 (data=4 × fsdp=2); use 8 or 16"),
        (0, "batch size 0 is smaller than the 8 shards"),
    ],
)
def test_a_batch_that_does_not_fit_the_mesh(size, message):
    sharding = batch_sharding(mesh("data=4,fsdp=2"))
    for call in (lambda: check_batch_size(size, sharding), lambda: put_batch({"x": np.zeros((size, 3))}, sharding)):
        with pytest.raises(ConfigError) as error:
            call()
        assert message in str(error.value)
    assert check_batch_size(16, sharding) == 16


def test_entries_that_do_not_agree():
    sharding = batch_sharding(mesh("data=8"))
    with pytest.raises(ConfigError, match="differ in their batch size: 'x' has 8, 'y' has 16"):
        check_batch({"x": np.zeros(8), "y": np.zeros(16)}, sharding)
    for scalar in (np.float32(3), 3, True):
        with pytest.raises(ConfigError, match="batch entry 'a/step' is a scalar"):
            put_batch({"a": {"step": scalar}}, sharding)


@pytest.mark.parametrize(
    ("text", "microbatches", "expected"),
    [
        ("data=2,fsdp=2,tensor=2", 12, 4),  # no stages, no micro-batches
        ("data=2,stage=4", None, 8),
        ("data=2,stage=4", 4, 8),
        ("data=2,stage=4", 12, 24),
        ("replica=2,data=2,stage=2", 6, 24),
    ],
)
def test_what_a_batch_is_cut_into(text, microbatches, expected):
    assert batch_multiple(mesh(text), replace(DEFAULT, pipeline=Pipeline(microbatches))) == expected


@pytest.mark.parametrize(
    ("text", "processes", "expected"),
    [
        ("data=8", 2, [Feed(0, 2), Feed(1, 2)]),
        ("data=4,fsdp=2", 4, [Feed(0, 4), Feed(1, 4), Feed(2, 4), Feed(3, 4)]),
        ("data=2,tensor=4", 2, [Feed(0, 2), Feed(1, 2)]),
        ("data=2,tensor=4", 4, [Feed(0, 2), Feed(0, 2), Feed(1, 2), Feed(1, 2)]),  # pairs feed the same rows
        ("tensor=8", 2, [Feed(0, 1), Feed(0, 1)]),  # both feed everything
    ],
)
def test_processes_that_share_rows_feed_the_same_ones(text, processes, expected, monkeypatch):
    sharding = batch_sharding(mesh(text))
    assert [_feed(sharding, p, processes, monkeypatch) for p in range(processes)] == expected


def test_rows_that_overlap_in_part_are_refused(monkeypatch):
    sharding = batch_sharding(mesh("data=8"))
    with pytest.raises(ConfigError, match="do not feed equal runs of rows"):
        _feed(sharding, 0, 3, monkeypatch)


def _feed(sharding, process, processes, monkeypatch):
    """`feed` with the eight devices dealt out in order to so many processes."""
    import sapwood.parallel.batches as batches

    monkeypatch.setattr(batches, "_process_of", lambda device: device.id * processes // 8)
    return feed(sharding, process)


def test_one_process_feeds_all():
    assert feed(batch_sharding(mesh("data=8"))) == Feed(0, 1)


def test_an_abstract_mesh_has_a_batch_sharding_too():
    assert shards(batch_sharding(AbstractMesh((64, 4), ("fsdp", "tensor")))) == 64


def test_a_process_without_devices_in_the_mesh(monkeypatch):
    sharding = batch_sharding(mesh("data=8"))
    with pytest.raises(ConfigError, match="none of its devices belongs to process 2, only to 0, 1; make the mesh"):
        _feed(sharding, 2, 2, monkeypatch)


def test_text_in_a_batch_is_named():
    sharding = batch_sharding(mesh("data=8"))
    with pytest.raises(ConfigError, match="batch entry 'name' has dtype <U1, which no device can hold"):
        put_batch({"name": np.array(["a"] * 8), "x": np.zeros(8)}, sharding)
    halves = put_batch({"x": np.zeros(8, jax.numpy.bfloat16)}, sharding)["x"]
    assert halves.dtype == jax.numpy.bfloat16
