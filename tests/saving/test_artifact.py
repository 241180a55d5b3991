"""`sw.save` and `sw.load`: whole models, parts of models, damaged files, and what can be loaded from."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sapwood as sw
from sapwood import layers as L
from sapwood.core.errors import CheckpointError, ConfigError
from sapwood.saving.artifact import ABOUT, WEIGHTS, Artifact, load, save
from sapwood.saving.checkpoints import Checkpoints
from sapwood.saving.digest import digests, named_leaves, tree_digest

X = np.ones((2, 6), "float32")


def network(v, x, width=8, classes=3):
    x = jax.nn.relu(L.Dense(width)(v.encoder.up, x))
    x = L.BatchNorm()(v.encoder.norm, x)
    return L.Dense(classes)(v.head, x)


@functools.cache
def trained():
    """The variables of `network`, which no test changes."""
    return sw.init(network, 5, X)


def written(path, **options):
    params, state = trained()
    return save(path, params, state, **options)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert tree_digest(a) == tree_digest(b)


def test_a_whole_model(tmp_path):
    params, state = trained()
    options = {"preprocessing": {"scale": 1 / 16, "size": [8, 8]}, "extra": {"accuracy": 0.99}}
    path = sw.save(tmp_path / "model", params, state, model=L.Dense(3), classes=["a", "b", "c"], **options)
    assert sorted(os.listdir(path)) == [ABOUT, WEIGHTS]
    artifact = sw.load(path)
    same((artifact.params, artifact.state), (params, state))
    assert artifact.model == L.Dense(3)
    assert artifact.classes == ("a", "b", "c")
    assert {name: getattr(artifact, name) for name in options} == options
    assert artifact.report is None


@pytest.mark.costs("a process of its own, which imports all anew, has to read the model")
def test_it_predicts_in_another_process(tmp_path):
    x = np.random.default_rng(0).normal(size=(2, 6)).astype("float32")
    model = L.Sequential((L.Dense(4), jax.nn.relu, L.Dense(2)))
    params, state = sw.init(model, 0, x)
    save(tmp_path / "model", params, state, model=model)
    code = (
        "import sys, numpy as np, sapwood as sw\n"
        "a = sw.load(sys.argv[1]); x = np.random.default_rng(0).normal(size=(2, 6)).astype('float32')\n"
        "print(sw.apply(a.model, a.params, a.state, x)[0].tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code, tmp_path / "model"], capture_output=True, text=True, check=True)
    np.testing.assert_allclose(json.loads(out.stdout), sw.apply(model, params, state, x)[0], rtol=1e-6)


def test_without_its_model(tmp_path):
    artifact = load(written(tmp_path / "model"))
    with pytest.raises(CheckpointError, match="saved without its model"):
        _ = artifact.model


DTYPES = "bool int8 uint32 float16 bfloat16 float32 complex64 int4 uint2 float8_e4m3fn float8_e8m0fnu float4_e2m1fn"


def test_every_dtype_and_shape(tmp_path):
    params = {name: jnp.asarray(np.arange(6).reshape(2, 3).astype(jnp.dtype(name))) for name in DTYPES.split()}
    params |= {
        "scalar": jnp.float32(-0.0),
        "empty": jnp.zeros((2, 0)),
        "key": jax.random.key(3),
        "t": jnp.ones((3, 2)).T,
    }
    same(load(save(tmp_path / "model", params)).params, params)


def test_safetensors_reads_it_alone(tmp_path):
    from safetensors.numpy import load_file

    tensors = load_file(written(tmp_path / "model") / WEIGHTS)
    assert digests(tensors) == digests(named_leaves(dict(zip(("params", "state"), trained(), strict=True))))


def test_sharded_there_and_sharded_here(tmp_path):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    w = jax.device_put(np.arange(48, dtype="float32").reshape(16, 3), split)
    path = save(tmp_path / "model", {"w": w})
    struct = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=split)
    for target in (w, struct):
        back = load(path, into=({"w": target}, {})).params["w"]
        assert back.sharding.is_equivalent_to(split, 2)
        np.testing.assert_array_equal(back, w)


def test_saving_again_replaces_it_whole(tmp_path):
    written(tmp_path / "model")
    save(tmp_path / "model", {"w": jnp.ones(2)})
    assert load(tmp_path / "model").params["w"].shape == (2,)
    assert os.listdir(tmp_path) == ["model"]
    (tmp_path / "model" / "notes").write_text("mine")
    (tmp_path / "model" / ABOUT).unlink()
    with pytest.raises(ConfigError, match="is there and is no saved model"):
        written(tmp_path / "model")
    assert (tmp_path / "model" / "notes").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_a_write_that_ends_between_its_renames_leaves_the_old_model(tmp_path, monkeypatch, error):
    path, rename = written(tmp_path / "model"), Path.rename

    def fails(self, target):
        if self.suffix == ".part":
            raise error
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails)
        with pytest.raises((CheckpointError, KeyboardInterrupt)):
            save(path, {"w": jnp.ones(3)})
    same(load(path).params, trained()[0])
    path.rename(tmp_path / "model.old")  # as a kill there leaves it
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(CheckpointError):
            save(path, {"w": jnp.ones(3)})
    same(load(path).params, trained()[0])
    assert os.listdir(tmp_path) == ["model"]


# Parts


def test_into_a_spec_what_is_not_loaded_is_drawn(tmp_path):
    def other(v, x):
        x = L.BatchNorm()(v.backbone.norm, jax.nn.relu(L.Dense(8)(v.backbone.up, x)))
        return L.Dense(7)(v.new_head, x)

    params, state = trained()
    artifact = load(written(tmp_path / "model"), into=sw.spec(other, X), match={"encoder/**": "backbone/**"}, key=1)
    fresh, fresh_state = sw.init(other, 1, X)
    same(artifact.params, fresh | {"backbone": params["encoder"]})
    same(artifact.state, {"backbone": state["encoder"]})
    assert jax.tree.structure(fresh_state) == jax.tree.structure(artifact.state)
    assert artifact.report.loaded["backbone/up/kernel"] == "encoder/up/kernel"
    assert sorted(artifact.report.fresh) == ["new_head/bias", "new_head/kernel"]
    assert sorted(artifact.report.unused) == ["head/bias", "head/kernel"]
    assert "fresh: new_head/bias, new_head/kernel" in repr(artifact.report)
    jax.eval_shape(functools.partial(sw.apply, other), artifact.params, artifact.state, X)


def test_into_arrays_what_is_not_loaded_stays(tmp_path):
    params, state = trained()
    mine = jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + 100), (params, state))
    artifact = load(written(tmp_path / "model"), into=mine, match={"head/**": None, "**": "**"})
    same(artifact.params, {"encoder": params["encoder"], "head": mine[0]["head"]})
    assert sorted(artifact.report.unused) == ["head/bias", "head/kernel"]


def test_into_a_model_with_no_name_in_common_is_an_error(tmp_path):
    other = sw.spec(lambda v, x: L.Dense(3)(v.logits, x), X)
    path = written(tmp_path / "model")
    with pytest.raises(
        ConfigError, match=r"has a name of into=: it has encoder/.*into= has logits/bias, logits/kernel"
    ):
        load(path, into=other)
    report = load(path, into=other, match={"**": None}).report  # as said
    assert (report.loaded, sorted(report.fresh)) == ({}, ["logits/bias", "logits/kernel"])
    with pytest.raises(ConfigError, match=r"'head/\*\*' does nothing"):
        load(path, into=trained(), match={"**": "**", "head/**": None})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a/b": np.ones(2)}, "params cannot hold the name 'a/b'"),
        ({"a": {1: np.ones(2)}}, "params/a cannot hold the name 1"),
        ({"a": {"": np.ones(2)}}, "params/a cannot hold the name ''"),
        ({"a": [np.ones(2)]}, "params/a is of type list; nested dicts of arrays are expected"),
        ({"a": None, "b": np.ones(2)}, "params/a is of type NoneType"),
    ],
)
def test_what_would_come_back_as_another_tree_is_refused(tmp_path, params, message):
    with pytest.raises(ConfigError, match=message):
        save(tmp_path / "model", params)
    with pytest.raises(ConfigError, match=message.replace("params", r"into= \(params\)", 1)):
        load(written(tmp_path / "whole"), into=(params, {}))


def test_the_users_home_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert written("~/model") == tmp_path / "model"
    same(load("~/model").params, trained()[0])
    with Checkpoints("~/run/checkpoints") as checkpoints:
        checkpoints.save(1, {"params": {"w": jnp.ones(2)}})
    assert load("~/run").extra == {"step": 1}
    assert sorted(os.listdir(tmp_path)) == ["model", "run"]


def test_floating_values_take_the_models_dtype(tmp_path):
    path = save(tmp_path / "model", {"w": np.arange(4).astype(jnp.bfloat16), "n": np.arange(2, dtype="int32")})
    artifact = load(path, into=({"w": jnp.zeros(4), "n": jnp.zeros(2, int)}, {}))
    assert artifact.params["w"].dtype == jnp.float32
    assert artifact.params["w"].tolist() == [0, 1, 2, 3]
    with pytest.raises(CheckpointError, match=r"n is int32\[2\] there and n is float32\[2\] here"):
        load(path, into=({"w": jnp.zeros(4), "n": jnp.zeros(2)}, {}))


def test_a_shape_that_differs_is_an_error(tmp_path):
    into = sw.spec(lambda v, x: network(v, x, classes=5), X)
    path = written(tmp_path / "model")
    with pytest.raises(CheckpointError) as error:
        load(path, into=into)
    assert "head/kernel is float32[8,3] there and head/kernel is float32[8,5] here" in str(error.value)
    assert "match={path: None, '**': '**'}" in str(error.value)
    artifact = load(path, into=into, match={"head/**": None, "**": "**"})
    assert artifact.params["head"]["kernel"].shape == (8, 5)


def test_wrong_use(tmp_path):
    path = written(tmp_path / "model")
    with pytest.raises(ConfigError, match="give into= too"):
        load(path, match={"a": "b"})
    with pytest.raises(ConfigError, match=r"nothing is loaded into other, and into= has no value for it"):
        load(path, into=({"other": jax.ShapeDtypeStruct((2,), "float32")}, {}))
    with pytest.raises(ConfigError, match=r"nothing in the file fits 'encodr/\*\*'; did you mean 'encoder/\*\*'"):
        load(path, into=trained(), match={"encodr/**": "**"})
    with pytest.raises(ConfigError, match="nested dicts"):
        save(tmp_path / "x", jnp.ones(3))
    with pytest.raises(ConfigError, match="must be what JSON can hold"):
        save(tmp_path / "x", {"w": jnp.ones(3)}, extra=object())
    with pytest.raises(ConfigError, match="cannot be imported by that name"):
        save(tmp_path / "x", {"w": jnp.ones(3)}, model=lambda v, x: x)
    assert not (tmp_path / "x").exists()


# Runs and checkpoints


def times(params, n):
    """The parameters times a number."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x) * np.float32(n)), params)


def test_from_a_run_and_its_checkpoints(tmp_path):
    params, state = trained()
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        for step in (1, 2):
            tree = {"step": jnp.int32(step), "params": times(params, step), "state": state}
            checkpoints.save(step, tree, {"position": step * 8})
    run = tmp_path / "run"
    for path, step in ((run, 2), (run / "checkpoints", 2), (run / "checkpoints" / "00000001", 1)):
        artifact = load(path)
        same(artifact.params, times(params, step))
        same(artifact.state, state)
        assert artifact.extra == {"step": step, "position": step * 8}
    part = load(run, into=({"up": {"kernel": jnp.zeros((6, 8))}}, {}), match={"encoder/up/kernel": "up/kernel"})
    same(part.params["up"]["kernel"], times(params, 2)["encoder"]["up"]["kernel"])
    first = run / "checkpoints" / "00000001"
    first.rename(first.with_suffix(".replaced"))  # as a run that is killed while it writes this step anew leaves it
    assert load(first).extra["step"] == 1
    written(run / "model", model=L.Dense(3))
    assert load(run).model == L.Dense(3)


def test_of_a_run_with_running_means_those_are_read(tmp_path):
    params, state = trained()
    wide = {"encoder": {"up": times(params["encoder"]["up"], 3)}}  # what was frozen has none
    tree = {"params": jax.tree.map(lambda x: x.astype("bfloat16"), params), "state": state, "ema": wide,
            "ema_state": times(state, 2)}  # fmt: skip
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, tree)
    found = load(tmp_path)
    narrow = functools.partial(jax.tree.map, lambda x: x.astype("bfloat16"))
    same(found.params["encoder"]["up"], narrow(wide["encoder"]["up"]))
    same(found.params["head"], narrow(params["head"]))
    same(found.state, times(state, 2))
    same(load(tmp_path, into=(params, state)).params["encoder"]["up"], jax.tree.map(
        lambda x: x.astype("bfloat16").astype("float32"), wide["encoder"]["up"]))  # fmt: skip


def test_from_a_run_whose_newest_checkpoint_is_damaged(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"params": {"w": jnp.full(3, float(step))}})
    (tmp_path / "checkpoints" / "00000002" / "manifest.ocdbt").unlink()
    with pytest.warns(UserWarning, match=r"checkpoint 2 .* is damaged"):
        found = load(tmp_path)
    assert (found.params["w"].tolist(), found.extra["step"]) == ([1, 1, 1], 1)


def test_a_model_that_its_run_has_gone_on_from_is_not_read(tmp_path):
    written(tmp_path / "model", extra={"step": 2})

    def go_on(step, loss):
        checkpoints.save(step, {"params": {"w": jnp.full(3, float(step))}}, metrics={"loss": loss})
        checkpoints.wait()

    with Checkpoints(tmp_path / "checkpoints", best="min:loss") as checkpoints:
        go_on(2, 0.5)
        assert load(tmp_path).extra == {"step": 2}
        go_on(4, 0.7)
        assert load(tmp_path).extra == {"step": 2}  # the best is still this one
        go_on(6, 0.3)
        with pytest.warns(UserWarning, match=r"model is of step 2 and the run has gone on to step 6: its checkpoints"):
            assert load(tmp_path).params["w"].tolist() == [6, 6, 6]
        written(tmp_path / "model", extra={"step": 6})
        assert "encoder" in load(tmp_path).params


def test_nothing_to_load(tmp_path):
    with pytest.raises(CheckpointError, match="is not there"):
        load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is neither a saved model, a run nor a checkpoint"):
        load(tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(1)})
    with pytest.raises(CheckpointError, match="hold no params"):
        load(tmp_path)


# Damage


def test_each_byte_counts_or_does_no_harm(tmp_path):
    path, expected, found = written(tmp_path / "model", extra={"n": 1}), trained(), 0
    rng = np.random.default_rng(0)
    for name in (ABOUT, WEIGHTS):
        whole = (path / name).read_bytes()
        for place in [*rng.integers(0, len(whole), 40).tolist(), 0, len(whole) - 1, "cut", "gone"]:
            data = bytearray(whole)
            if isinstance(place, int):
                data[place] ^= 1 << place % 8
            (path / name).write_bytes(data[: len(data) // 2] if place == "cut" else data)
            if place == "gone":
                (path / name).unlink()
            try:
                artifact = load(path)
            except CheckpointError:
                found += 1
            else:
                same((artifact.params, artifact.state), expected)
                assert artifact.extra == {"n": 1}
        (path / name).write_bytes(whole)
    assert found > 60
    assert isinstance(load(path), Artifact)


def test_the_damaged_array_is_named(tmp_path):
    path = written(tmp_path / "model")
    data = bytearray((path / WEIGHTS).read_bytes())
    at = data.index(np.asarray(trained()[0]["head"]["kernel"]).tobytes())
    data[at + 5] ^= 1
    (path / WEIGHTS).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is damaged: params/head/kernel read back other than saved"):
        load(path)


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    path = written(tmp_path / "model")
    monkeypatch.setattr(
        "safetensors.numpy.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(CheckpointError, match=r"model could not be written: .*No space left"):
        save(path, {"w": jnp.ones(3)})
    same(load(path).params, trained()[0])
    assert os.listdir(tmp_path) == ["model"]
    shutil.rmtree(path)


def test_weights_may_be_read_by_who_may_read_the_rest(tmp_path):
    path = written(tmp_path / "model")
    assert (path / WEIGHTS).stat().st_mode == (path / ABOUT).stat().st_mode


def test_what_stands_beside_the_weights_is_not_larger_than_what_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("sapwood.saving.checksummed_json.MOST", 10_000)
    with pytest.raises(ConfigError, match="at most 10,000 are read back"):
        written(tmp_path / "model", extra="x" * 10_000)
    assert not (tmp_path / "model").exists()


def test_a_model_of_another_package_is_made_where_that_is_trusted(tmp_path, monkeypatch):
    (tmp_path / "lab_of_nets.py").write_text("def network(v, x, width=3):\n    return x * width\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = written(tmp_path / "model", model="lab_of_nets:network", options={"width": 5})
    with pytest.raises(CheckpointError, match=r"nothing is imported from 'lab_of_nets' .*sw.load\(..., trust='lab_of"):
        _ = load(path).model
    assert load(path, trust="lab_of_nets").model(None, 2) == 10
    assert load(path, trust=[sys.modules["lab_of_nets"]]).model(None, 2) == 10
    with pytest.raises(ConfigError, match="the name of a package"):
        load(path, trust="./lab_of_nets.py")
