import os
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sapwood import parallel
from sapwood.core.errors import ConfigError, DataError
from sapwood.data import Source, batches, load, to_device
from sapwood.data.dataset import Dataset
from sapwood.data.feature import Feature


def stream(count=50, size=8, **options):
    data = load({"x": np.arange(count), "image": np.random.RandomState(0).rand(count, 4, 4)})
    return batches(data, size, **options)


@pytest.fixture
def sharding():
    return parallel.batch_sharding(parallel.mesh("data=4,fsdp=2"))


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_what_arrives_is_what_was_sent(sharding, prefetch):
    expected = list(stream(epochs=2))
    found = list(to_device(stream(epochs=2), sharding, prefetch=prefetch))
    assert len(found) == len(expected)
    for here, there in zip(expected, found, strict=True):
        for name in here:
            assert there[name].sharding == sharding
            np.testing.assert_array_equal(there[name], here[name])


def test_each_device_holds_its_rows(sharding):
    batch = next(to_device(stream(shuffle=False), sharding))
    assert [s.data.shape for s in batch["image"].addressable_shards] == [(1, 4, 4)] * 8
    assert sorted(int(s.data[0]) for s in batch["x"].addressable_shards) == list(range(8))


def test_the_default_device():
    batch = next(to_device(stream()))
    assert batch["x"].devices() == {jax.devices()[0]}


def test_the_position_counts_what_was_handed_out(sharding):
    feed = to_device(stream(seed=1), sharding, prefetch=4)
    walked = [np.asarray(next(feed)["x"]) for _ in range(5)]
    assert feed.position == 5
    assert feed.state()["position"] == 5
    np.testing.assert_array_equal(next(feed.seek(2))["x"], walked[2])
    resumed = to_device(stream(seed=1), sharding).restore({**feed.state(), "position": 3})
    np.testing.assert_array_equal(next(resumed)["x"], walked[3])


def test_the_callers_stream_stays_where_it_is(sharding):
    source = stream(seed=1).seek(4)
    feed = to_device(source, sharding)
    np.testing.assert_array_equal(next(feed)["x"], source[4]["x"])
    assert (source.position, feed.position) == (4, 5)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_blocks_stack_batches_for_several_steps_in_one_dispatch(sharding, prefetch):
    expected = list(stream(epochs=1))  # 7 batches
    feed = to_device(stream(epochs=1), sharding, prefetch=prefetch, block=3)
    found = list(feed)
    assert [b["x"].shape for b in found] == [(3, 8), (3, 8), (1, 8)]
    assert found[0]["image"].sharding.is_equivalent_to(
        NamedSharding(sharding.mesh, P(None, *sharding.spec)), found[0]["image"].ndim
    )
    np.testing.assert_array_equal(np.concatenate([b["x"] for b in found]), [b["x"] for b in expected])
    assert feed.position == 7


def test_a_batch_that_does_not_divide_over_the_mesh(sharding):
    with pytest.raises(ConfigError, match=r"batch size 12 does not divide over the 8 shards"):
        to_device(stream(size=12), sharding)
    with pytest.raises(ConfigError, match=r"batch size 4 is smaller than the 8 shards"):
        to_device(stream(size=4), sharding)


def test_text_is_refused_by_name():
    data = load({"name": np.array(["a", "b"]), "x": np.zeros(2)})
    with pytest.raises(DataError, match="name holds text, which no device takes; use `map`"):
        next(to_device(batches(data, 2)))


def test_options():
    with pytest.raises(ConfigError, match="prefetch is -1"):
        to_device(stream(), prefetch=-1)
    with pytest.raises(ConfigError, match="block is 0"):
        to_device(stream(), block=0)


class Gated(Source):
    """A source whose reads can be held up, or fail."""

    threads = 1
    remember = False

    def __init__(self):
        self.features = {"x": Feature((), "float32")}
        self.reads, self.fail, self.gate = [], False, threading.Event()

    def __len__(self):
        return 100

    def read(self, index):
        self.gate.wait(600)
        if self.fail and index >= 20:
            raise DataError(f"example {index} is bad")
        self.reads.append(index)
        return {"x": np.float32(index)}


def test_batches_are_read_ahead_but_not_too_far():
    source = Gated()
    source.gate.set()
    feed = to_device(batches(Dataset.over(source), 10, shuffle=False), prefetch=2)
    next(feed)
    for future in list(feed._ahead):
        future.result()
    assert max(source.reads) == 29


def test_an_error_ahead_comes_in_its_turn_and_again_when_asked_again():
    source = Gated()
    source.fail = True
    source.gate.set()
    feed = to_device(batches(Dataset.over(source), 10, shuffle=False), prefetch=3)
    assert [float(next(feed)["x"][0]) for _ in range(2)] == [0, 10]
    for _ in range(2):
        with pytest.raises(DataError, match="example 20 is bad"):
            next(feed)
        assert feed.position == 2
    source.fail = False
    assert float(next(feed)["x"][0]) == 20


def test_a_feed_that_is_dropped_ends_its_thread():
    def feeding():
        return [t for t in threading.enumerate() if t.name.startswith("sapwood-feed")]

    before = set(feeding())
    feed = to_device(stream(), prefetch=2)
    next(feed)
    mine = set(feeding()) - before
    assert len(mine) == 1
    del feed
    mine.pop().join(300)
    assert not set(feeding()) - before


WORKER = """
import sys
import numpy as np
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
port, index = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from sapwood.data import batches, load, to_device

devices = np.array(jax.devices()).reshape(2, 2)  # processes by row
GRIDS = {"rows": devices, "columns": devices.T, "mixed": devices[:, ::-1].T}

def numbers(**processes):
    return batches(load({"x": np.arange(20), "y": np.arange(20) % 3}), 8, seed=5, **processes)

whole = numbers(process_index=0, process_count=1)

def check(layout):
    mesh = Mesh(GRIDS[layout], ("data", "tensor"))
    sharding = NamedSharding(mesh, P("data") if layout != "mixed" else P(("data", "tensor")))
    together = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))
    stream = numbers()
    feed = to_device(stream, sharding)
    for step in range(4):
        found, expected = next(feed), whole[step]
        for name in expected:
            np.testing.assert_array_equal(together(found[name]).addressable_data(0), expected[name], layout)
    block = next(to_device(stream, sharding, block=3))["x"]
    np.testing.assert_array_equal(together(block).addressable_data(0), whole.block(0, 3)["x"], layout)
    rows = {"rows": 4, "columns": 8, "mixed": 4}[layout]
    assert len(feed.batches.rows) == rows, (layout, feed.batches.rows)

for layout in GRIDS:
    check(layout)
    print(layout)
"""


@pytest.mark.costs("two processes, and each imports JAX")
def test_two_processes_feed_what_their_devices_hold():
    """Where the mesh runs along the processes, across them (both need every row), and in mixed order."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(port), str(i)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [w.communicate(timeout=600) for w in workers]
    assert [w.returncode for w in workers] == [0, 0], outputs
    assert all({"rows", "columns", "mixed"} <= set(out.split()) for out, _ in outputs), outputs


def test_blocks_of_sizes_that_a_function_says():
    feed = to_device(stream(shuffle=False), block=lambda step: [3, 0, 0, 1, 1, 2, 0, 0][step])
    assert [np.shape(next(feed)["x"]) for _ in range(4)] == [(3, 8), (8,), (8,), (2, 8)]
    assert feed.position == 7
    with pytest.raises(StopIteration):
        next(feed)


def test_on_the_host_batches_are_the_same_and_lie_where_a_program_can_use_them():
    for found, expected in zip(to_device(stream(epochs=9), host=True), stream(epochs=9), strict=True):
        for name, values in found.items():
            assert type(values) is np.ndarray
            np.testing.assert_array_equal(values, expected[name])
    block = next(to_device(stream(size=16), host=True, block=2))
    assert all(values.ctypes.data % 64 == 0 for values in block.values())


def test_what_comes_before_a_batch_that_cannot_be_read_is_handed_out():
    x = np.arange(400.0)
    x[333] = np.nan
    feed = to_device(batches(load({"x": x}), 4, shuffle=False), host=True)
    for i in range(333 // 4):
        assert next(feed)["x"][0] == 4 * i
    for _ in range(2):  # asking again asks for the same batch
        with pytest.raises(DataError, match="example 333"):
            next(feed)
