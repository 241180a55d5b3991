"""Checkpoints: what goes in comes out on any mesh, and whatever happens to a disk or a process is noticed and named."""

import asyncio
import contextlib
import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sapwood as sw
from sapwood.core.errors import CheckpointError, ConfigError
from sapwood.core.param import Param
from sapwood.saving import orbax_arrays
from sapwood.saving.checkpoints import INDEX, Checkpoints
from sapwood.saving.checksummed_json import seal, unseal
from sapwood.saving.digest import HOST_ELEMENTS, digests, named_leaves, tree_digest


class State(NamedTuple):
    """Stands for a training state: named fields, nested dicts, a tuple of moments, a typed key, nothing at all."""

    step: jax.Array
    params: dict
    opt_state: tuple
    rng: jax.Array
    ema: dict | None = None


@functools.cache
def state(seed=0) -> State:
    """The state of that number, which no test changes."""
    kernel = np.random.default_rng(seed).normal(size=(4, 8)).astype("float32")
    bias = np.arange(8).astype(jnp.bfloat16)
    params = {"stem": {"kernel": kernel, "bias": bias}, "blocks": {"10": {"w": kernel[0]}, "9": {"w": kernel[1]}}}
    moments = (jax.tree.map(lambda x: x / 2, params), np.int32(seed))
    key = jax.random.wrap_key_data(np.array([[0, seed], [1, seed]], "uint32"))
    return State(*jax.device_put((np.int32(7), params, moments)), key)


def write(directory, *steps, keep=10, tree=state, **options) -> Checkpoints:
    with Checkpoints(directory, keep=keep, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, tree(step), {"position": 32 * step, "seed": 0}, {"loss": 1 / step})
    return checkpoints


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert digests(named_leaves(a)) == digests(named_leaves(b))


def damage(file, how):
    """Flip a byte, cut the file, empty it or delete it."""
    data = bytearray(file.read_bytes())
    if how == "delete":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        data[how % len(data)] ^= 1 << how % 8
        file.write_bytes(data)


def mesh(*shape):
    return jax.make_mesh(shape, ("data", "fsdp")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


# What goes in comes out


def test_a_whole_training_state(tmp_path):
    write(tmp_path, 3)
    tree, info = Checkpoints(tmp_path).restore(state())
    same(tree, state(3))
    assert (info.step, info.info, info.metrics) == (3, {"position": 96, "seed": 0}, {"loss": 1 / 3})
    assert jax.random.bits(tree.rng[0]) == jax.random.bits(state(3).rng[0])
    same(Checkpoints(tmp_path).restore(jax.eval_shape(lambda: state()))[0], state(3))


def test_what_the_first_version_wrote_is_checked_by_its_own_rule(tmp_path):
    """`goldens/format1.zip` was written before digests had a second rule."""
    with zipfile.ZipFile(Path(__file__).parents[1] / "goldens" / "format1.zip") as file:
        file.extractall(tmp_path)
    tree, info = Checkpoints(tmp_path / "checkpoints").restore()
    assert (info.step, info.info, info.rule) == (7, {"position": 224}, 1)
    assert info.digests == digests(named_leaves(tree), rule=1)
    assert info.digests["params/kernel"] == "ad7ca68b1f10f5a5774f7d222a3918d9"
    kernel = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    np.testing.assert_array_equal(tree["params"]["kernel"], kernel)
    np.testing.assert_array_equal(sw.load(tmp_path / "model").params["kernel"], kernel)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(8, checkpoints.restore()[0])
    assert checkpoints.info(8).rule == 2
    weights = tmp_path / "model" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes().replace(kernel.tobytes(), (-kernel).tobytes()))
    with pytest.raises(CheckpointError, match="params/kernel read back other than saved"):
        sw.load(tmp_path / "model")
    index = tmp_path / "checkpoints" / "00000007" / INDEX
    index.write_text(seal({**unseal(index.read_text()), "digest": 3}))
    with pytest.raises(CheckpointError, match="written by a newer Sapwood"):
        Checkpoints(tmp_path / "checkpoints").restore(step=7)


def test_without_a_target_it_is_nested_dicts_by_path(tmp_path):
    write(tmp_path, 3)
    tree, _ = Checkpoints(tmp_path).restore()
    assert digests(named_leaves(tree)) == digests(named_leaves(state(3)))
    assert list(tree["opt_state"]) == ["0", "1"]
    assert tree["params"]["blocks"]["10"]["w"].shape == (8,)


def test_a_name_with_a_slash_needs_a_target(tmp_path):
    tree = {"a/b": jnp.ones(2), "a": {"c": jnp.zeros(2)}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree)
    same(Checkpoints(tmp_path).restore(tree)[0], tree)
    with pytest.raises(CheckpointError, match=r"holds 'a/b', where a slash is part of a name.*give restore a target"):
        Checkpoints(tmp_path).restore()


DTYPES = [
    "bool",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "float16",
    "bfloat16",
    "float32",
    "complex64",
    "int4",
    "uint4",
    "int2",
    "uint2",
]
DTYPES += ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn"]


def test_every_dtype_and_shape(tmp_path):
    tree = {name: jnp.asarray(np.arange(6).reshape(2, 3).astype(jnp.dtype(name))) for name in DTYPES}
    tree |= {"scalar": jnp.float32(-0.0), "none": jnp.zeros((3, 0)), "nan": jnp.float32(jnp.nan), "int": 3}
    tree |= {
        "empty_key": jax.random.split(jax.random.key(0), 1)[:0],
        "numpy": np.float32([1, 2]),
        "odd.na me%é": jnp.ones(2),
    }
    tree |= {"rbg": jax.random.key(1, impl="rbg"), "urbg": jax.random.key(1, impl="unsafe_rbg")}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree)
    for target in (tree, None):
        back = Checkpoints(tmp_path).restore(target)[0]
        same(back, tree | {"int": jnp.int32(3)})
    assert isinstance(Checkpoints(tmp_path).restore(tree)[0]["numpy"], np.ndarray)


def test_64_bits(tmp_path):
    wide = {"x": np.arange(3.0), "y": np.ones(2, np.complex128)}
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ConfigError, match=r"x is float64, which JAX would make float32; .*jax_enable_x64"):
            checkpoints.save(1, wide)
        with jax.enable_x64(True):
            checkpoints.save(1, wide)
            checkpoints.wait()
            same(checkpoints.restore(wide)[0], wide)
        with pytest.raises(CheckpointError, match="jax_enable_x64"):
            checkpoints.restore()


@pytest.mark.parametrize(("saved_on", "read_on"), [((), (8,)), ((4, 2), ()), ((4, 2), (2, 4)), ((8,), (4, 2))])
def test_from_any_mesh_to_any_mesh(tmp_path, saved_on, read_on):
    def place(tree, shape):
        if not shape:
            return tree
        spec = PartitionSpec(None, "data") if len(shape) == 1 else PartitionSpec("fsdp", "data")
        whole = NamedSharding(mesh(*shape), PartitionSpec())
        split = NamedSharding(mesh(*shape), spec)
        return jax.tree.map(lambda x: jax.device_put(x, split if x.ndim == 2 else whole), tree)

    expected = state(1)
    write(tmp_path, 1, tree=lambda _: place(expected, saved_on))
    target = place(state(), read_on)
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target)
    for wanted in (target, structs):
        tree, _ = Checkpoints(tmp_path).restore(wanted)
        same(tree, expected)
        for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(target), strict=True):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_sharded_keys(tmp_path):
    sharding = NamedSharding(mesh(8), PartitionSpec("data"))
    keys = jax.device_put(jax.random.split(jax.random.key(0), 16), sharding)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"keys": keys})
    back = Checkpoints(tmp_path).restore({"keys": keys})[0]["keys"]
    assert back.sharding.is_equivalent_to(sharding, 1)
    assert (jax.random.key_data(back) == jax.random.key_data(keys)).all()


def test_a_large_array_in_host_memory(tmp_path):
    sharding = NamedSharding(mesh(8), PartitionSpec("data"), memory_kind="pinned_host")
    moment = jax.device_put(jnp.arange(HOST_ELEMENTS + 8, dtype=jnp.float32).reshape(8, -1), sharding)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"mu": moment})
    back = Checkpoints(tmp_path).restore({"mu": moment})[0]["mu"]
    assert back.sharding == sharding
    assert (np.asarray(back) == np.asarray(moment)).all()


def test_a_subset_and_params_as_a_target(tmp_path):
    write(tmp_path, 1)
    target = {"params": {"stem": {"kernel": Param((4, 8), "float32", None, None)}}}
    tree, _ = Checkpoints(tmp_path).restore(target, subset=True)
    same(tree, {"params": {"stem": {"kernel": state(1).params["stem"]["kernel"]}}})
    with pytest.raises(CheckpointError, match=r"of another model: it has .*in addition"):
        Checkpoints(tmp_path).restore(target)


def test_saved_arrays_may_be_donated_at_once(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 1.001 + 1, tree), donate_argnums=0)
    tree = {f"w{i}": jnp.full((512, 512), float(i)) for i in range(6)}
    marks = {}
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for n in range(5):
            tree = step(tree)
            marks[n] = tree_digest(tree)
            checkpoints.save(n, tree)
            for _ in range(20):  # while the write is under way
                tree = step(tree)
    for n in range(5):
        assert tree_digest(Checkpoints(tmp_path).restore(step=n)[0]) == marks[n]


def test_it_can_be_read_by_orbax_alone(tmp_path):
    import orbax.checkpoint as ocp

    write(tmp_path, 1)
    args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in Checkpoints(tmp_path).contents(1)}
    tree = ocp.PyTreeCheckpointer().restore(tmp_path / "00000001", restore_args=args)
    assert (tree["params/stem/kernel"] == state(1).params["stem"]["kernel"]).all()


def test_keys_of_the_info_may_be_integers(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(1)}, {"memory": {n: n for n in range(12)}})
    assert Checkpoints(tmp_path).restore()[1].info == {"memory": {str(n): n for n in range(12)}}


@pytest.mark.parametrize("integer", [np.int64, np.uint8, jnp.int32])
def test_steps_of_any_integer_type(tmp_path, integer):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(integer(3), state(3))
        checkpoints.save(integer(4), state(4))
        assert checkpoints.restore(step=integer(3))[1].step == 3
    assert checkpoints.steps() == [3, 4]


@pytest.mark.parametrize("step", [-1, np.int32(-1), 1.0, "1", None])
def test_what_is_no_step(tmp_path, step):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ConfigError, match=r"step=.*an integer from 0 on"):
        checkpoints.save(step, state())
    assert os.listdir(tmp_path) == []


def test_info_without_reading_arrays(tmp_path):
    checkpoints = write(tmp_path, 4, 5)
    assert checkpoints.info(4).info == {"position": 128, "seed": 0}
    assert checkpoints.info(4).digests == digests(named_leaves(state(4)))
    assert checkpoints.contents(5)["params/stem/bias"] == jax.ShapeDtypeStruct(
        (8,), "bfloat16", sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )


# What is kept


@pytest.mark.parametrize(
    ("options", "kept", "best"),
    [
        ({"keep": 1}, [6], None),
        ({"keep": 3}, [4, 5, 6], None),
        ({"keep": 2, "best": "max:score"}, [3, 5, 6], 3),
        ({"keep": 1, "best": "min:score"}, [1, 6], 1),
        ({"keep": 1, "best": "max:late"}, [6], 6),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, options, kept, best):
    scores = [1, 4, 5, 3, float("nan"), 2]
    with Checkpoints(tmp_path, **options) as checkpoints:
        for step, score in enumerate(scores, 1):
            checkpoints.save(step, {"x": jnp.float32(step)}, metrics={"score": score, "late": step == 6})
    assert checkpoints.steps() == kept
    assert Checkpoints(tmp_path, **options).best() == best
    assert Checkpoints(tmp_path).best() == best  # as they say themselves
    assert checkpoints.latest() == 6
    assert sorted(os.listdir(tmp_path)) == [f"{step:08d}" for step in kept]


def test_a_checkpoint_without_metrics_is_never_best(tmp_path):
    with Checkpoints(tmp_path, keep=1, best="max:score") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": jnp.ones(())}, metrics={"score": 1.0} if step == 2 else None)
        assert checkpoints.best() == 2
        message = r'best="max:score", but the metrics are \[.scored.\]; did you mean .scored.'
        with pytest.raises(ConfigError, match=message):
            checkpoints.save(4, {"x": jnp.ones(())}, metrics={"scored": 1})


def test_which_checkpoint_is_meant(tmp_path):
    write(tmp_path / "plain", 1, 2)
    plain = Checkpoints(tmp_path / "plain")
    assert [plain.choose(step) for step in (None, "last", 1, np.int64(2))] == [None, None, 1, 2]
    with pytest.raises(CheckpointError, match=r"has no best checkpoint: the run did not say .*\[1, 2\]"):
        plain.choose("best")
    with Checkpoints(tmp_path / "best", best="min:loss") as checkpoints:
        for step, loss in ((1, 0.5), (2, 0.25), (3, 0.75)):
            checkpoints.save(step, state(step), metrics={"loss": loss})
    best = Checkpoints(tmp_path / "best")
    assert [best.choose(step) for step in (None, "best", "last", 1)] == [2, 2, None, 1]
    assert int(sw.load(tmp_path / "best").extra["step"]) == 2
    assert [sw.load(tmp_path / "best", step=step).extra["step"] for step in ("last", 1)] == [3, 1]
    with pytest.raises(CheckpointError, match=r"has no checkpoint of step 4; it has \[1, 2, 3\]"):
        sw.load(tmp_path / "best", step=4)
    with pytest.raises(ConfigError, match="step='newest'"):
        sw.load(tmp_path / "best", step="newest")


def test_going_on_from_an_earlier_checkpoint_drops_the_later_ones(tmp_path):
    write(tmp_path, 1, 2, 3)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.restore(state(), step=1)
        checkpoints.save(2, state(20))
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        same(checkpoints.restore(state())[0], state(20))
    assert sorted(os.listdir(tmp_path)) == ["00000001", "00000002"]


@pytest.fixture
def small_files():
    """Makes files of more than 100 kB impossible to write, inside a `with`."""
    resource = pytest.importorskip("resource")

    @contextlib.contextmanager
    def limit():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


def test_a_checkpoint_stays_until_the_one_that_replaces_it_is_written(tmp_path, small_files):
    old, new = {"w": jnp.ones(1000)}, {"w": jnp.arange(1e6)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, old)
        checkpoints.wait()
        with small_files():
            checkpoints.save(1, new)
            with pytest.raises(CheckpointError, match="checkpoint 1 could not be written"):
                checkpoints.wait()
        assert (tmp_path / "00000001").is_dir()
        same(checkpoints.restore(old)[0], old)
        checkpoints.save(1, new)
        checkpoints.wait()
        same(checkpoints.restore(new)[0], new)
        assert checkpoints.info(1).digests == digests(new)
    assert os.listdir(tmp_path) == ["00000001"]


KILLED = """
import os, signal, sys, jax.numpy as jnp
from sapwood.saving.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {"w": jnp.ones(9)})
checkpoints.wait()
checkpoints._writer._checkpointer.save = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
checkpoints.save(1, {"w": jnp.zeros(9)})
"""


@pytest.mark.costs("a process of its own, which imports all anew, has to be killed")
def test_killed_while_a_checkpoint_is_replaced(tmp_path):
    assert run(KILLED, tmp_path).wait() == -signal.SIGKILL
    tree = {"w": jnp.ones(9)}
    with pytest.raises(CheckpointError, match="already holds checkpoints of an earlier run"):
        Checkpoints(tmp_path).save(1, tree)
    with Checkpoints(tmp_path) as checkpoints:
        same(checkpoints.restore(tree)[0], tree)
        checkpoints.save(2, tree)
    assert sorted(os.listdir(tmp_path)) == ["00000001", "00000002"]
    same(Checkpoints(tmp_path).restore(tree, step=1)[0], tree)


def test_what_cannot_be_removed_does_not_end_the_run(tmp_path, monkeypatch):
    def busy(path):
        raise OSError(16, "Device or resource busy", str(path))

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state(1))
        checkpoints.save(2, state(2))
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            patch.setattr(shutil, "rmtree", busy)
            checkpoints.wait()
            checkpoints.save(3, state(3))
            checkpoints.wait()
        assert [str(w.message).split(":")[0] for w in warned] == [
            f"{step} could not be removed from {tmp_path}" for step in ("00000001", "00000002")
        ]
        assert "Device or resource busy" in str(warned[0].message)
        assert checkpoints.steps() == [3]
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setattr(shutil, "rmtree", busy)
            for value in range(4):
                checkpoints.save(4, state(value))
        checkpoints.save(5, state(5))
    assert os.listdir(tmp_path) == ["00000005"]


def test_another_run_is_not_mixed_in(tmp_path):
    write(tmp_path, 1, 2)
    with pytest.raises(CheckpointError, match=r"already holds checkpoints of an earlier run .2 is the newest.; resume"):
        write(tmp_path, 1)
    assert Checkpoints(tmp_path).steps() == [1, 2]


def test_reading_leaves_the_directory_alone(tmp_path):
    write(tmp_path, 1, 2, 3)
    (tmp_path / "00000004.orbax-checkpoint-tmp").mkdir()
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*")}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.restore(state())
        checkpoints.best()
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*")} == before
    assert not (tmp_path / "nothing").exists()
    assert Checkpoints(tmp_path / "nothing").latest() is None


# Another model, wrong use


def test_another_model_is_named_path_by_path(tmp_path):
    write(tmp_path, 1)
    other = state(1)._replace(params={"stem": {"kernel": jnp.ones((4, 9)), "bias": jnp.ones(8), "scale": jnp.ones(8)}})
    with pytest.raises(CheckpointError) as error:
        Checkpoints(tmp_path).restore(other)
    message = str(error.value)
    assert "is of another model" in message
    assert "it lacks 'params/stem/scale'" in message
    assert "it has 'params/blocks/10/w', 'params/blocks/9/w' in addition" in message
    assert "params/stem/kernel is float32[4,8] there and float32[4,9] here" in message
    assert "params/stem/bias is bfloat16[8] there and float32[8] here" in message


def test_long_lists_are_cut(tmp_path):
    write(tmp_path, 1, tree=lambda _: {"x": jnp.ones(1)})
    with pytest.raises(CheckpointError, match=r"it lacks 'y/0', .*'y/4' and 20 more"):
        Checkpoints(tmp_path).restore({"x": jnp.ones(1), "y": [jnp.ones(1)] * 25})


@pytest.mark.parametrize(
    ("tree", "info", "message"),
    [
        ({"a": "text"}, {}, "a is of type str"),
        ({"a": {"b": 1}, "a/b": 2}, {}, "two leaves of the tree have the path 'a/b'"),
        ({}, {}, "it holds no numbers"),
        ({"a": 1}, {"x": object()}, "the info of a checkpoint must be what JSON can hold: .*object"),
        ({"a": np.array(["x"])}, {}, "."),
    ],
)
def test_what_cannot_be_saved(tmp_path, tree, info, message):
    with pytest.raises((ConfigError, TypeError), match=message), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree, info)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("options", [{"keep": 0}, *({"best": x} for x in ("", "min:", "-loss", "accuracy", 1))])
def test_wrong_options(tmp_path, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Checkpoints(tmp_path, **options)
    with pytest.raises(ConfigError, match="mount the bucket"):
        Checkpoints("gs://bucket/run")


@pytest.mark.parametrize("name", ["a[1]", "a*", "really?", *(["a\\b"] if os.sep == "/" else [])])
def test_a_path_that_orbax_takes_for_a_pattern(tmp_path, name):
    with pytest.raises(ConfigError, match=r"cannot be written to .*: rename"), Checkpoints(tmp_path / name) as found:
        found.save(1, state())
    assert os.listdir(tmp_path) == []


def test_every_read_has_ended_when_one_that_failed_is_told(tmp_path, monkeypatch):
    """Orbax closes the event loop that the others come back to, which is a traceback for each."""
    from orbax.checkpoint._src.serialization import serialization

    real, begun, ended, left = serialization._read_shard, [], [], []

    async def slow(**options):
        begun.append(None)
        if len(begun) == 1:
            raise OSError("a hiccup")
        await asyncio.sleep(0.02)
        ended.append(None)
        return await real(**options)

    def told(checkpoints, step, name, stored, real=Checkpoints._readable):
        left.append(len(begun) - 1 - len(ended))  # it is asked once the first attempt has failed
        return real(checkpoints, step, name, stored)

    write(tmp_path, 1)
    monkeypatch.setattr(serialization, "_read_shard", slow)
    monkeypatch.setattr(Checkpoints, "_readable", told)
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        Checkpoints(tmp_path).restore(state())
    assert len(begun) > 3
    assert left[0] == 0


def test_the_next_best_stands_in_for_the_best(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", keep=9, best="max:accuracy") as checkpoints:
        for step, metrics in ((10, {"accuracy": 0.9}), (20, {"accuracy": 0.5}), (30, {"accuracy": 0.8}), (40, {})):
            checkpoints.save(step, {"params": {"w": jnp.full(4, step)}}, {"step": "one's own"}, metrics)
    assert checkpoints.order("best") == [10, 30, 20, 40]
    assert (checkpoints.order(), checkpoints.order(20)) == ([40, 30, 20, 10], [20])

    def loaded(**options):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            model = sw.load(tmp_path, **options)
        assert model.params["w"].tolist() == [model.extra["step"]] * 4
        return model.extra["step"], len(seen)

    assert loaded() == loaded(step="best") == (10, 0)
    for n, (step, instead) in enumerate([(10, 30), (30, 20), (20, 40)]):
        if step == 10:  # nobody knows any more that it was the best
            (tmp_path / "checkpoints" / "00000010" / INDEX).write_text("{")
        else:
            for file in (tmp_path / "checkpoints" / f"{step:08}").rglob("d/*"):
                file.write_bytes(b"")
        assert loaded() == loaded(step="best") == (instead, n + 1)
        with pytest.raises(CheckpointError, match=f"checkpoint {step} in .* is damaged"):
            sw.load(tmp_path, step=step)
    assert loaded(step="last") == (40, 0)


@pytest.mark.parametrize(("file", "how"), [("weights.safetensors", -9), ("weights.safetensors", "delete"),
                                           ("artifact.json", 99), ("artifact.json", "delete")])  # fmt: skip
def test_checkpoints_stand_in_for_a_damaged_model_of_a_run(tmp_path, file, how):
    def weights(step):
        return {"params": {"w": jnp.full(4, step)}}

    sw.save(tmp_path / "model", weights(2)["params"], extra={"step": 2})
    damage(tmp_path / "model" / file, how)
    with pytest.raises(CheckpointError, match="model is damaged: "):
        sw.load(tmp_path)
    write(tmp_path / "checkpoints", 1, 2, tree=weights)
    with pytest.warns(UserWarning, match="model is damaged: .*: its checkpoints are read, which hold no model"):
        model = sw.load(tmp_path)
    assert (model.extra["step"], model.params["w"].tolist()) == (2, [2] * 4)


def test_an_interruption_while_reading_is_no_damage(tmp_path, monkeypatch):
    from orbax.checkpoint._src.serialization import serialization

    async def interrupted(**_):
        raise KeyboardInterrupt

    write(tmp_path, 1, 2)
    monkeypatch.setattr(serialization, "_read_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Checkpoints(tmp_path).restore(state())


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        Checkpoints(tmp_path).restore(state())
    write(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"has no checkpoint of step 3; it has \[1\]"):
        Checkpoints(tmp_path).restore(state(), step=3)


# Damage


# Orbax's abandoned reads may come back to a closed event loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.costs("a whole checkpoint is read for each of some eighty damages")
def test_each_byte_counts_or_does_no_harm(tmp_path):
    """Damage each file of a checkpoint in turn: what comes back is what was saved, or an error that says what."""
    small = {"params": {"stem": {"kernel": state(1).params["stem"]["kernel"]}}, "rng": state(1).rng}
    write(tmp_path / "whole", 1, tree=lambda _: small)
    files = sorted(f.relative_to(tmp_path / "whole") for f in (tmp_path / "whole").rglob("*") if f.is_file())
    expected = digests(named_leaves(small))
    rng, found = random.Random(0), {}
    for file in files:
        size = (tmp_path / "whole" / file).stat().st_size
        for how in ["delete", "empty", "cut", *(rng.randrange(size * 8) for _ in range(6))]:
            if how == "cut" and size == 0:
                continue
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
            shutil.copytree(tmp_path / "whole", tmp_path / "copy")
            damage(tmp_path / "copy" / file, how)
            try:
                tree, info = Checkpoints(tmp_path / "copy").restore(small)
            except CheckpointError as error:
                found[file.name, how] = str(error)
            else:
                assert digests(named_leaves(tree)) == expected, f"{file} with {how} read back wrong without a word"
                assert (info.step, info.info) == (1, {"position": 32, "seed": 0})
    assert all("no whole checkpoint" in text and "checkpoint 1 in" in text for text in found.values())
    damaged_files = {name for name, _ in found}
    assert INDEX in damaged_files
    assert len(damaged_files) >= 3
    assert any("'params/stem/kernel'" in text for text in found.values())


def test_the_damaged_array_is_named_and_the_one_before_is_used(tmp_path):
    write(tmp_path, 1, 2, 3, tree=lambda step: {"a": jnp.full(9, 1.0 * step), "b": jnp.full((999,), 7.5 + step)})
    needle = np.full(999, 10.5, np.float32).tobytes()
    files = [f for f in (tmp_path / "00000003").rglob("*") if f.is_file() and needle in f.read_bytes()]
    for file in files:
        data = bytearray(file.read_bytes())
        data[data.index(needle) + 2000] ^= 4
        file.write_bytes(data)
    assert files
    target = {"a": jnp.ones(9), "b": jnp.ones(999)}
    with pytest.warns(
        UserWarning, match=r"checkpoint 3 in .* is damaged: 'b' .*; going back to the checkpoint before it"
    ):
        tree, info = Checkpoints(tmp_path).restore(target)
    assert info.step == 2
    assert (tree["b"] == 9.5).all()
    with pytest.raises(CheckpointError, match=r"checkpoint 3 .* is damaged: 'b'"):
        Checkpoints(tmp_path).restore(target, step=3)
    # The run goes on from 2, comes to 3 again, and the damaged one makes way.
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with pytest.warns(UserWarning, match="damaged"):
            checkpoints.restore(target)
        checkpoints.save(3, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(Checkpoints(tmp_path).restore(target)[0], target)
    assert sorted(os.listdir(tmp_path)) == ["00000002", "00000003"]


@pytest.mark.parametrize(("last", "kept"), [((30,), [28, 30]), ((29, 35), [29, 35])])
def test_a_damaged_checkpoint_stays_until_the_run_has_come_as_far_again(tmp_path, last, kept):
    def go_on(*steps):
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            with pytest.warns(UserWarning, match="checkpoint 30 .* is damaged"):
                checkpoints.restore(state())
            for step in steps:
                checkpoints.save(step, state(step))
        return checkpoints.steps()

    write(tmp_path, 10, 20, 30)
    (tmp_path / "00000030" / INDEX).write_text("{")
    assert go_on(25) == [20, 25, 30]
    assert go_on(27, 28) == [27, 28, 30]
    assert go_on(*last) == kept
    same(Checkpoints(tmp_path).restore(state())[0], state(last[-1]))


def test_none_is_whole(tmp_path):
    write(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / f"0000000{step}" / INDEX).write_text("{")
    with (
        pytest.raises(CheckpointError, match=r"no whole checkpoint in .*checkpoint 2 .*; checkpoint 1 .* is damaged"),
        pytest.warns(UserWarning, match="going back"),
    ):
        Checkpoints(tmp_path).restore(state())


def test_a_sharding_that_does_not_divide_is_no_damage(tmp_path):
    write(tmp_path, 1, 2, tree=lambda _: {"w": jnp.ones((10, 3))})
    sharding = NamedSharding(mesh(8), PartitionSpec("data"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigError, match=r"w is float32\[10,3\] and its sharding does not divide it: .*P\('data'"):
            Checkpoints(tmp_path).restore({"w": jax.ShapeDtypeStruct((10, 3), "float32", sharding=sharding)})


@pytest.mark.parametrize(
    "error", [MemoryError("of the host"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")], ids=str
)
def test_too_little_memory_is_no_damage(tmp_path, monkeypatch, error):
    def read(*_):
        raise error

    write(tmp_path, 1, 2)
    monkeypatch.setattr(orbax_arrays, "read", read)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(type(error), match=str(error)):
            Checkpoints(tmp_path).restore(state())


def test_a_checkpoint_under_a_false_name_or_with_a_false_position(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "00000001").rename(tmp_path / "00000009")
    with pytest.raises(CheckpointError, match=f"{INDEX}: it is that of step 1"):
        Checkpoints(tmp_path).restore(state())
    (tmp_path / "00000009").rename(tmp_path / "00000001")
    file = tmp_path / "00000001" / INDEX
    sealed = json.loads(file.read_text())
    sealed["content"]["info"]["position"] += 1
    file.write_text(json.dumps(sealed))
    with pytest.raises(CheckpointError, match="reads back other"):
        Checkpoints(tmp_path).restore(state())


# Disks and processes


def run(code, *args, **options):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], **options)


LOOP = """
import sys, jax, jax.numpy as jnp
from sapwood.saving.checkpoints import Checkpoints
step_of = jax.jit(lambda t: jax.tree.map(lambda x: x * 1.5 + 1, t), donate_argnums=0)
tree = {f"w{i}": jnp.full((64, 64), float(i)) for i in range(8)}
with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    print("ready", flush=True)
    for step in range(1, 10**6):
        tree = step_of(tree)
        checkpoints.save(step, tree, {"position": step})
        print(step, flush=True)
"""


def follow(step):
    tree = {f"w{i}": jnp.full((64, 64), float(i)) for i in range(8)}
    for _ in range(step):
        tree = jax.jit(lambda t: jax.tree.map(lambda x: x * 1.5 + 1, t))(tree)
    return tree


MOMENTS = [
    *(pytest.param(lines, marks=pytest.mark.slow) for lines in (0, 3)),
    *(pytest.param(lines, marks=pytest.mark.long) for lines in (1, 2, 7)),
]


@pytest.mark.parametrize("lines", MOMENTS)
def test_killed_at_any_moment(tmp_path, lines):
    """Wherever the process has come to in the time that its last line takes to get here."""
    process = run(LOOP, tmp_path / "run", stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    read = [process.stdout.readline() for _ in range(lines)]
    process.send_signal(signal.SIGKILL)
    done = [int(line) for line in [*read, *process.communicate()[0].split()] if line.strip().isdigit()]
    checkpoints = Checkpoints(tmp_path / "run", keep=2)
    steps = checkpoints.steps()
    if not steps:
        assert len(done) <= 1  # the first was still being written
        return
    assert steps[-1] >= max(done, default=1) - 1  # all but the one being written
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # not one of them damaged
        for step in steps:
            tree, info = checkpoints.restore(step=step)
            assert info.info == {"position": step}
            assert tree_digest(tree) == tree_digest(follow(step))
        checkpoints.restore()
        with checkpoints:
            checkpoints.save(steps[-1] + 1, tree)
    assert len(os.listdir(tmp_path / "run")) == 2  # what was half-written is gone


def test_a_file_that_cannot_be_written(tmp_path, small_files, capfd):
    with Checkpoints(tmp_path, keep=5) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(1000)})
        checkpoints.wait()
        with small_files():
            checkpoints.save(2, {"w": jnp.arange(1e6)})
            with pytest.raises(CheckpointError) as caught:
                checkpoints.wait()
            assert checkpoints.restore()[1].step == 1
            checkpoints.save(3, {"w": jnp.ones(500)})
            checkpoints.wait()
    assert Checkpoints(tmp_path).restore()[1].step == 3
    message = str(caught.value)
    assert message.startswith("checkpoint 2 could not be written to")
    assert message.startswith(f"checkpoint 2 could not be written to {tmp_path}: File too large (")
    assert "earlier checkpoints are untouched: make room or choose another directory, and resume" in message
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("error", [ValueError("1/8 params are missing"), FileNotFoundError(2, "No such file")])
def test_a_directory_that_is_moved_while_it_is_written_to(tmp_path, monkeypatch, error):
    wait = orbax_arrays.Writer.wait

    def moved(self):
        wait(self)
        (tmp_path / "run").rename(tmp_path / "moved")
        raise error

    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(3)})
        checkpoints.wait()
        checkpoints.save(2, {"w": jnp.ones(3)})
        with monkeypatch.context() as patch:
            patch.setattr(orbax_arrays.Writer, "wait", moved)
            with pytest.raises(
                CheckpointError, match=r"checkpoint 2 could not be .*/run was removed, or moved, in the"
            ):
                checkpoints.wait()
    assert Checkpoints(tmp_path / "moved").restore()[1].step >= 1


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB, where the tests may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True).returncode
    ):
        pytest.skip("no rights to mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk(small_disk):
    tree = {"w": jnp.arange(200_000.0)}
    with Checkpoints(small_disk, keep=5) as checkpoints:
        checkpoints.save(1, tree)
        checkpoints.wait()
        checkpoints.save(2, {"w": jnp.arange(600_000.0)})
        with pytest.raises(CheckpointError, match=r"checkpoint 2 could not be written to .*No space left.*MB free"):
            checkpoints.wait()
        same(checkpoints.restore(tree)[0], tree)
        checkpoints.save(3, {"w": jnp.arange(1000.0)})  # what the failed one left behind makes way
        checkpoints.wait()
        assert checkpoints.steps() == [1, 3]


def test_a_directory_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("here")
    with (
        pytest.raises(CheckpointError, match=r"checkpoint 1 could not be written to .*(File exists|Not a directory)"),
        Checkpoints(tmp_path / "file") as checkpoints,
    ):
        checkpoints.save(1, state())


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs POSIX users")
def test_an_unwritable_directory():
    tmp_path = Path(tempfile.mkdtemp(dir="/tmp"))
    tmp_path.chmod(0o555)
    checkpoints = Checkpoints(tmp_path / "run")
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint 1 could not be written to .*/run: .*Permission denied"):
            checkpoints.save(1, state())
    finally:
        if root:
            os.seteuid(0)
        tmp_path.rmdir()


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    import pickle

    write(tmp_path, 1)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *_, **__: pytest.fail("a checkpoint was unpickled"))
    Checkpoints(tmp_path).restore(state())
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or not file.read_bytes().startswith(b"\x80\x04")


def test_cost(tmp_path, monkeypatch):
    """30 small arrays: a save comes back before they are written, and takes some tenths of a CPU second."""
    tree = {f"w{i}": jnp.ones((64, 8)) for i in range(30)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree)
        checkpoints.wait()
        events, may, rename, used = [], threading.Event(), os.rename, time.process_time()
        wait = checkpoints._writer.wait

        def held(*args, **options):  # the last thing that a write does, until somebody waits for it
            assert may.wait(600)
            events.append("written")
            return rename(*args, **options)

        def waited():
            events.append("waited for")
            may.set()
            wait()

        monkeypatch.setattr(os, "rename", held)
        monkeypatch.setattr(checkpoints._writer, "wait", waited)
        checkpoints.save(2, tree)
        events.append("came back")
        checkpoints.wait()
        assert events[:3] == ["came back", "waited for", "written"]
        assert time.process_time() - used < 5
    assert sum(f.stat().st_size for f in (tmp_path / "00000002").rglob("*")) < 3 * 30 * 64 * 8 * 4


JOIN = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax, jax.numpy as jnp, numpy as np
number, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from sapwood.saving.checkpoints import Checkpoints
from sapwood.saving.digest import tree_digest
mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
whole = np.arange(64.0, dtype="float32").reshape(16, 4)
def place(x, spec):
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), x.__getitem__)
tree = {"w": place(whole, P("fsdp")), "b": place(whole[0], P()),
        "key": jax.jit(lambda: jax.random.key(0), out_shardings=NamedSharding(mesh, P()))()}
"""


def two_processes(code, *args):
    """What each of two processes, joined by gloo, prints."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [run(JOIN + code, n, port, *args, **pipes) for n in (0, 1)]
    try:
        results = [process.communicate(timeout=1200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], results
    return [out for out, _ in results]


SAVE = """
with Checkpoints(directory, keep=1) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, tree, {"position": step})
back, info = Checkpoints(directory).restore(tree)
assert info.step == 2 and tree_digest(back) == tree_digest(tree)
print("digest", tree_digest(back))
"""


@pytest.mark.slow
def test_two_processes_write_one_checkpoint_and_one_process_reads_it(tmp_path):
    printed = two_processes(SAVE, tmp_path)
    whole = np.arange(64.0, dtype="float32").reshape(16, 4)
    tree = {"w": jnp.asarray(whole), "b": jnp.asarray(whole[0]), "key": jax.random.key(0)}
    back, info = Checkpoints(tmp_path).restore(tree)
    same(back, tree)
    assert info.info == {"position": 2}
    assert all(f"digest {tree_digest(tree)}" in out for out in printed)
    assert os.listdir(tmp_path) == ["00000002"]


HICCUPS = """
import json, warnings
from pathlib import Path
from unittest import mock
from sapwood.saving import checkpoints as module, orbax_arrays
from sapwood.train.record.run_directory import Run

def told(attempt, patch, where=1):
    with warnings.catch_warnings(record=True) as seen, patch if number == where else warnings.catch_warnings():
        warnings.simplefilter("always")
        try:
            result = attempt()
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
    return [result, *(str(w.message) for w in seen)]

def fails(error):
    def read(place, stored, real=orbax_arrays.read):
        if place.name == "00000002":
            raise error
        return real(place, stored)
    return mock.patch.object(orbax_arrays, "read", read)

def restore():
    return Checkpoints(directory).restore(tree)[1].step

def resume():
    with Run(Path(directory).parent, resume=True, keep=3, best=None) as record:
        assert record.newest == 2
        return record.checkpoints.restore(tree)[1].info["position"]

def save():
    checkpoints.save(3, tree)

def index(text, real=module.unseal):
    content = real(text)
    if content["step"] == 2:
        raise ValueError("a hiccup")
    return content

def marks(arrays, *rule, real=module.digests):
    wrong.append(real(arrays, *rule))
    return wrong[0] | {"w": "wrong"} if len(wrong) == 1 else wrong[-1]

wrong = []
with Checkpoints(directory) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, tree, {"position": step})
    checkpoints.wait()
    print(json.dumps({
        "index": told(restore, mock.patch.object(module, "unseal", index)),
        "arrays": told(restore, fails(OSError("a hiccup"))),
        "digests": told(restore, mock.patch.object(module, "digests", marks)),
        "steps": told(restore, mock.patch.object(Checkpoints, "steps", lambda self: [1])),
        "run": told(resume, mock.patch.object(Checkpoints, "steps", lambda self: [])),
        "memory": told(restore, fails(MemoryError("too little"))),
        "room": told(save, mock.patch.object(Path, "mkdir", side_effect=OSError("a hiccup")), where=0),
        "after": told(save, warnings.catch_warnings()),
    }))
"""


@pytest.mark.slow
def test_two_processes_go_the_same_way_when_one_has_a_hiccup(tmp_path):
    first, second = [json.loads(out.splitlines()[-1]) for out in two_processes(HICCUPS, tmp_path / "checkpoints")]
    damaged = {"index": INDEX, "arrays": "'b', 'key', 'w' cannot be read", "digests": "'w' read back other than saved"}
    for what, message in damaged.items():
        assert first[what][0] == second[what][0] == 1, what
        assert first[what][1].startswith("process 1: checkpoint 2 in")
        assert all(message in told[what][1] and "going back" in told[what][1] for told in (first, second))
    assert first["steps"] == second["steps"] == first["run"] == second["run"] == [2]
    assert first["memory"] == ["CheckpointError: process 1: too little"]
    assert second["memory"] == ["MemoryError: too little"]
    assert "could not be written to" in first["room"][0]
    assert second["room"][0].startswith("CheckpointError: process 0: checkpoint 3 could not be written to")
    assert first["after"] == second["after"] == [None]
    assert Checkpoints(tmp_path / "checkpoints").steps() == [1, 2, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a name is text")
def test_a_directory_that_is_no_utf8_is_refused_before_training(tmp_path):
    from sapwood.train.record.run_directory import Run

    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    with pytest.raises(ConfigError, match=r"cannot be written to .*/caf.: rename what is no UTF-8 in it"):
        Run(place, resume=False, keep=1, best=None)
    assert not place.exists()
