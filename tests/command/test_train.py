"""`sapwood train`: what it prints, what a run directory holds, and how a run goes on or is refused."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import sapwood as sw
from sapwood.command.train import own_directory
from sapwood.experiment.experiment import Experiment
from sapwood.experiment.finding import find
from sapwood.saving import checksummed_json
from sapwood.saving.digest import tree_digest
from sapwood.train.record.jsonl import read_rows


@pytest.fixture
def config():
    """What a run wrote down."""
    return lambda run: checksummed_json.read(Path(run) / "config.json")


def test_the_last_three_lines_and_what_the_run_holds(run, sapwood, stripes, config):
    name, accuracy, digest = run.out[-3:]
    assert name == "run r"
    assert re.fullmatch(r"test accuracy [01]\.\d{4}", accuracy)
    assert re.fullmatch(r"digest [0-9a-f]{32}", digest)

    found = {path.name for path in Path("r").iterdir()}
    assert found == {"config.json", "metrics.jsonl", "tensorboard", "checkpoints", "curves.png", "model"}
    assert config("r")["recipe"] == str(stripes)
    assert config("r")["options"] == {
        "epochs": 2, "batch_size": 16, "seed": 0, "policy": "float32", "validation": 0.0, "hidden": 8,
        "learning_rate": 0.01,
    }  # fmt: skip
    rows = read_rows("r/metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 6]  # 48 examples in batches of 16
    assert all({"epoch", "loss", "accuracy", "steps_per_second"} <= row.keys() for row in rows)
    assert Path("r/curves.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list(Path("r/tensorboard").glob("events.*"))) == 1
    assert [path.name for path in Path("r/checkpoints").iterdir()] == ["00000006"]
    assert sapwood("evaluate", "r").out[0] == accuracy


def test_the_same_command_has_the_same_digest(run, sapwood, stripes):
    again = sapwood("train", stripes, "--run", "s")
    assert again.out[-2:] == run.out[-2:]


def test_the_model_of_a_run_is_loaded_as_it_was_tested(run, tmp_path):
    model = sw.load(tmp_path / "r")
    assert tree_digest(model.params) == run.digest
    assert model.classes == ("lying", "standing")
    assert (model.features["image"].shape, model.features["image"].dtype) == ((4, 4, 1), "uint8")
    assert (
        sw.load(tmp_path / "r" / "model").features == model.features == sw.load(tmp_path / "r" / "checkpoints").features
    )
    assert model.extra["options"]["hidden"] == 8


@pytest.mark.slow
def test_a_built_in_recipes_model_comes_with_its_weights(tmp_path):
    from sapwood.recipes.vision.digits_mlp import DigitsMLP

    recipe = DigitsMLP(epochs=1, hidden=4, batch_size=512)
    experiment = Experiment("digits-mlp", recipe, tmp_path)
    state = experiment.train()
    images = experiment.data[1].gather(np.arange(5))["image"]
    loaded = sw.load(experiment.save(state))
    assert loaded.model.__self__ == recipe
    found, _ = sw.apply(loaded.model, loaded.params, loaded.state, images)
    np.testing.assert_array_equal(found, experiment.trainer.predict(state, {"image": images}))


def test_the_model_of_a_recipe_of_ones_own_is_found_again(run, sapwood, stripes, tmp_path, monkeypatch):
    experiment = Experiment.open(tmp_path / "r")
    state = experiment.restore()
    image = {"image": experiment.data[1].gather(np.arange(5))["image"]}
    expected = experiment.trainer.predict(state, image)
    loaded = sw.load(experiment.save(state))
    found, _ = sw.apply(loaded.model, loaded.params, loaded.state, image["image"])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert (loaded.reference["file"], loaded.reference["method"]) == (str(stripes), "model")

    # Another program: reading a model runs no file that it names, however it is named there.
    monkeypatch.delitem(sys.modules, "sapwood_recipe_stripes")
    with pytest.raises(
        sw.CheckpointError, match=r"recipe file .*stripes.py, which .* does not run; .*experiment.find\('/"
    ):
        _ = sw.load(tmp_path / "r").model
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "stripes.py"
    other.write_text(stripes.read_text())
    sw.experiment.find(str(other))
    with pytest.raises(sw.CheckpointError, match=r"experiment.find\('/"):
        _ = sw.load(tmp_path / "r").model
    assert sw.experiment.find(str(stripes))() == sw.load(tmp_path / "r").model.__self__

    # A file in a package has the name of its module, which any program finds.
    package = tmp_path / "lab_of_stripes"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "mine.py").write_text(stripes.read_text())
    assert sw.experiment.find(str(package / "mine.py")).__module__ == "sapwood_recipe_mine"  # it is not installed
    monkeypatch.setattr("sapwood.experiment.finding._BESIDE", set())
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = sw.experiment.find(str(package / "mine.py"))()
    moved = Experiment(str(package / "mine.py"), recipe, tmp_path / "r")
    assert sw.load(moved.save(state)).reference["name"] == "lab_of_stripes.mine:Stripes"
    with pytest.raises(sw.CheckpointError, match="trust='lab_of_stripes'"):
        _ = sw.load(tmp_path / "r").model
    assert sw.load(tmp_path / "r", trust="lab_of_stripes").model.__self__ == recipe


def test_a_run_is_not_written_over(run, sapwood, stripes):
    before = {path: path.stat().st_mtime_ns for path in Path("r").rglob("*")}
    error = sapwood("train", stripes, "--run", "r", "--hidden", 9).error
    assert error == (
        "r already holds a run (newest checkpoint: step 6); --resume goes on with it, --run chooses another directory"
    )
    assert {path: path.stat().st_mtime_ns for path in Path("r").rglob("*")} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("stripes.py --hidden 9", "hidden was 8 and is now 9; --resume anyway goes on all the same"),
        (
            "stripes.py --epochs 3 --seed 1",
            "epochs was 2 and is now 3, seed was 0 and is now 1; --resume anyway goes on all the same",
        ),
        ("digits-mlp", "it is of the recipe {stripes}, not of digits-mlp"),
    ],
)
def test_a_run_does_not_go_on_as_another(run, sapwood, stripes, words, message):
    error = sapwood("train", *words.split(), "--run", "r", "--resume").error
    assert error == f"r cannot go on as another run: {message.format(stripes=stripes)}"


@pytest.mark.slow
def test_a_run_is_lengthened_by_intent_and_says_from_where_it_goes_on(run, sapwood, stripes, config):
    before = config("r")
    whole = sapwood("train", stripes, "--run", "s", "--epochs", 3, "--resume")
    assert whole.err == ["sapwood: s has no checkpoint: from the beginning"]
    done = sapwood("train", stripes, "--run", "r", "--epochs", 3, "--resume", "anyway")
    assert done.err == [
        "sapwood: r goes on, although epochs was 2 and is now 3",
        "sapwood: r goes on from step 6 of 9 (epoch 2 of 3)",
    ]
    assert done.digest == whole.digest
    assert (before["options"]["epochs"], config("r")["options"]["epochs"]) == (2, 3)
    over = sapwood("train", stripes, "--run", "r", "--epochs", 3, "--resume")
    assert (over.out, over.err) == (done.out[-3:], ["sapwood: r is over, at step 9 of 9 (epoch 3 of 3)"])
    refused = sapwood("train", stripes, "--run", "r", "--epochs", 3, "--hidden", 9, "--resume", "anyway")
    assert "is of another model" in refused.err[-1]
    assert config("r")["options"]["hidden"] == 8  # it did not go on


def test_a_run_that_goes_on_keeps_the_numbers_of_its_classes(run, sapwood, stripes, config):
    """Its data has them in another order meanwhile; `fit` holds that to what the state learned."""
    text = stripes.read_text().replace('"label": standing', '"label": 1 - standing')
    stripes.write_text(text.replace('("lying", "standing")', '("standing", "lying")'))
    experiment = Experiment(str(stripes), find(str(stripes))(epochs=3), Path("r"))
    assert experiment.data[0].features["label"].classes == ("standing", "lying")
    assert not experiment.begin("anyway")
    assert (config("r")["options"]["epochs"], config("r")["features"]["label"]["classes"]) == (3, ["lying", "standing"])
    state = experiment.restore()
    said = config("r")
    said["features"]["label"]["classes"].reverse()  # the state has the last word
    checksummed_json.write(Path("r/config.json"), said)
    experiment.__dict__.pop("features", None)
    assert experiment.features["label"].classes == ("standing", "lying")
    assert sw.load(experiment.save(state)).classes == ("lying", "standing")


@pytest.mark.costs("compiles a training")
def test_a_recipe_whose_file_has_changed_is_another_run(run, sapwood, stripes):
    stripes.write_text(stripes.read_text().replace("jax.nn.relu(", "jax.nn.gelu("))
    error = sapwood("train", stripes, "--run", "r", "--resume").error
    assert "r cannot go on as another run: objective: the code of Stripes.model is another." in error


def test_a_run_that_is_over_says_its_result_again(run, sapwood, stripes):
    rows = read_rows("r/metrics.jsonl")
    assert sapwood("train", stripes, "--run", "r", "--resume").out == run.out[-3:]
    assert read_rows("r/metrics.jsonl") == rows


def test_where_nothing_was_saved_resume_starts_afresh_with_any_options(run, sapwood, stripes, config, rewrite):
    shutil.rmtree("r/checkpoints")  # as in a run that was killed before its first checkpoint
    rewrite("r", '"hidden": 8', '"hidden": 9')
    assert sapwood("train", stripes, "--run", "r", "--resume").digest == run.digest
    assert config("r")["options"]["hidden"] == 8
    assert [row["step"] for row in read_rows("r/metrics.jsonl")] == [3, 6]
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator("r/tensorboard")
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [3, 6]  # the killed run's are taken back


def test_directories_of_their_own(run, stripes, tmp_path, monkeypatch, capsys, rewrite):
    from sapwood.experiment.finding import find

    monkeypatch.chdir(tmp_path)
    recipe = find("stripes.py")

    def choose(resume: bool, **options: int) -> str:
        return str(own_directory(Experiment(str(stripes), recipe(**options), Path(".")), resume))

    assert choose(resume=True) == "runs/stripes-001"  # none yet
    assert choose(resume=True) == "runs/stripes-001"  # one that was killed before it wrote anything
    assert choose(resume=False) == "runs/stripes-002"
    for number in (1, 2):
        shutil.copy("r/config.json", f"runs/stripes-00{number}")
    assert choose(resume=True) == "runs/stripes-002"  # the newest of these hyper-parameters
    Path("runs/stripes-003").mkdir()
    shutil.copy("r/config.json", "runs/stripes-003")
    rewrite("runs/stripes-003", '"hidden": 8', '"hidden": 9')
    assert capsys.readouterr().err == ""
    assert choose(resume=True) == "runs/stripes-002"  # never that of others
    assert capsys.readouterr().err == "runs/stripes-003 is another run: hidden was 9 and is now 8\n"
    assert choose(resume=True, hidden=9) == "runs/stripes-003"
    assert choose(resume=True, hidden=10) == "runs/stripes-004"
    Path("runs/stripes-old").mkdir()
    Path("runs/stripes-1000").mkdir()
    assert choose(resume=False) == "runs/stripes-1001"


def test_the_directory_is_named_after_the_recipe(sapwood, stripes):
    assert sapwood("train", stripes, "--epochs", 1).out[-3] == "run runs/stripes-001"


def test_a_run_is_found_again_from_anywhere(run, sapwood, stripes, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    assert sapwood("evaluate", tmp_path / "r").out[0] == run.out[-2]
    stripes.rename(tmp_path / "gone.py")
    error = sapwood("evaluate", tmp_path / "r").error
    assert error == f"there is no recipe file {stripes}; --trust says where it lies now (in Python: trust=)"


def test_a_run_goes_on_with_its_recipe_where_that_lies_now(run, sapwood, stripes, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "sapwood_recipe_stripes", raising=False)
    moved = tmp_path / "other" / "stripes.py"
    moved.parent.mkdir()
    moved.write_text(stripes.read_text() + "\n")
    assert sapwood("train", moved, "--run", "r", "--resume").error == (  # two recipes of one name
        f"r cannot go on as another run: it is of the recipe {stripes}, not of {moved}"
    )
    stripes.rename(moved)
    done = sapwood("train", moved, "--run", "r", "--resume")
    assert (done.code, done.out[-1]) == (0, run.out[-1])
    assert sapwood("evaluate", "r").out[0] == run.out[-2]
    moved.rename(stripes)
    recipe = sw.experiment.find(str(stripes))()
    assert sw.load("r").model.__self__ == recipe


def test_numbers_of_other_code_than_the_trained_are_told_of(run, sapwood, stripes, tmp_path):
    stripes.write_text(stripes.read_text().replace("L.flatten(v", "scaled(v") + "\nfrom shades import scaled\n")
    shades = "import sapwood.layers as L\ndef scaled(x):\n    return L.flatten(x)\n"
    (tmp_path / "shades.py").write_text(shades)
    try:
        with pytest.warns(UserWarning, match=r"r was trained by other code.*the code of Stripes.model.*scaled is new"):
            done = sapwood("evaluate", "r", "--trust", "stripes.py")
    finally:
        sys.modules.pop("shades", None)
        sys.path.remove(str(tmp_path))
    assert done.out[0] == run.out[-2]  # it does the same


def test_a_recipe_that_has_changed(run, sapwood, stripes):
    source = stripes.read_text()
    stripes.write_text(source.replace("hidden", "units"))
    assert sapwood("evaluate", "r").error == (
        f"r is of the recipe file {stripes}, which you have not run as it is now, so it is not run because a directory "
        f"names it; look at it, and if you trust it: --trust {stripes} (in Python: trust=)"
    )
    assert sapwood("evaluate", "r", "--trust", stripes).error == (
        f"r is a run of another version of the recipe {stripes}: Stripes.__init__() got an unexpected keyword argument "
        "'hidden'"
    )
    error = sapwood("train", stripes, "--run", "r", "--resume").error
    assert error.startswith(
        "r cannot go on as another run: hidden was 8 and is now not there, units was not there and is now 8; "
    )
    stripes.write_text(source.replace("v.hidden", "v.units"))
    error = sapwood("evaluate", "r", "--trust", "stripes.py").error
    assert "checkpoint 6 in " in error
    assert "is of another model: it lacks " in error
    assert "'params/units/bias', 'params/units/kernel'" in error


def test_another_model_in_the_checkpoint_names_the_shapes(run, sapwood, stripes):
    stripes.write_text(stripes.read_text().replace("Dense(self.hidden)", "Dense(2 * self.hidden)"))
    for words in (("evaluate", "r", "--trust", stripes), ("train", stripes, "--run", "r", "--resume")):
        error = sapwood(*words).error
        assert "is of another model" in error
        assert "params/hidden/kernel is float32[16,8] there and float32[16,16] here" in error


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "bert"}', "\x00"])
def test_a_config_that_is_no_runs(sapwood, stripes, text):
    Path("r").mkdir()
    Path("r/config.json").write_text(text)
    for words in (("evaluate", "r"), ("train", stripes, "--run", "r"), ("train", stripes, "--run", "r", "--resume")):
        assert re.match(r"r/config\.json (cannot be read: |is not the config of a run)", sapwood(*words).error)
    assert Path("r/config.json").read_text() == text


def test_a_run_directory_that_cannot_be(sapwood, stripes):
    Path("file").write_text("here")
    for run in ("file", "file/r"):
        error = sapwood("train", stripes, "--run", run).error
        assert re.match(rf"the run directory {run} cannot be written: (File exists|Not a directory); choose", error)
    assert Path("file").read_text() == "here"
    assert "not to gs:/bucket/r; mount the bucket" in sapwood("train", stripes, "--run", "gs://bucket/r").error
    assert not Path("gs:").exists()


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs POSIX users")
def test_an_unwritable_run_directory(sapwood, stripes):
    place = Path(tempfile.mkdtemp(dir="/tmp"))  # the parents of tmp_path are closed to others
    shutil.copy(stripes, place)
    place.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        error = sapwood("train", place / "stripes.py", "--run", place / "r").error
    finally:
        if root:
            os.seteuid(0)
        place.chmod(0o755)
        shutil.rmtree(place)
    assert error.startswith(f"the run directory {place}/r cannot be written: Permission denied; choose another")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB, where the tests may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no rights to mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk(sapwood, stripes, small_disk):
    whole = sapwood("train", stripes, "--run", "whole", "--hidden", 1500)
    run = small_disk / "r"
    error = sapwood("train", stripes, "--run", run, "--hidden", 1500).error  # 342 kB in all: parameters, Adam's moments
    assert error.startswith(f"checkpoint 6 could not be written to {run}/checkpoints: ")
    assert "No space left on device" in error
    assert "make room or choose another directory, and resume" in error
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    assert sapwood("train", stripes, "--run", run, "--hidden", 1500, "--resume").digest == whole.digest


def test_a_batch_that_does_not_fit_the_mesh(sapwood, stripes):
    error = sapwood("train", stripes, "--mesh", "data=4,fsdp=2", "--batch-size", 4).error
    assert error.startswith("batch size 4 is smaller than the 8 shards of mesh")
    assert not Path("runs").exists()


def test_epochs_below_one(sapwood, stripes):
    assert sapwood("train", stripes, "--epochs", 0).error == "epochs is 0; at least 1 is expected"


def test_an_empty_data_set(sapwood, stripes):
    stripes.write_text(stripes.read_text().replace("return data[:48]", "return data[:0]"))
    assert "empty" in sapwood("train", stripes).error


@pytest.mark.slow
def test_a_run_ends_with_the_best_checkpoint_and_all_that_read_it_take_that(sapwood, stripes, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    stopping = "    def callbacks(self):\n        return [sw.train.EarlyStopping(patience=2, restore=self.restores)]\n"
    text = stripes.read_text().replace("hidden: int = 8\n", "hidden: int = 8\n    restores: bool = False\n")
    stripes.write_text(text + "\n" + stopping)
    words = ("--validation", 0.25, "--epochs", 9, "--keep", 1, "--learning-rate", 2)
    done = sapwood("train", stripes, "--run=~/r", "--best", "min:validation_loss", *words)
    assert re.fullmatch(r"sapwood: ends with step \d+, the best by min:validation_loss; the last is \d+", done.err[0])
    losses = {row["step"]: row["validation_loss"] for row in read_rows("r/metrics.jsonl")}
    last, best = max(losses), min(losses, key=losses.__getitem__)
    assert best < last == best + 6 < 27  # stopped by the recipe's callback
    assert {int(path.name) for path in Path("r/checkpoints").iterdir()} == {last, best}
    said = f"sapwood: the checkpoint of step {best}, the best by min:validation_loss; --step last is {last}"
    found = sapwood("evaluate", "r")
    assert (found.out[0], found.err) == (done.out[-2], [said])
    assert sapwood("evaluate", "r", "--step", "best").out == found.out
    assert sapwood("evaluate", "r", "--step", best).out == found.out
    later = sapwood("evaluate", "~/r", "--step", "last")
    assert (later.err, later.out != found.out) == ([], True)
    assert tree_digest(sw.load("r").params) == done.digest == tree_digest(sw.load("r", step="best").params)
    assert tree_digest(sw.load("r", step="last").params) != done.digest
    assert sapwood("train", stripes, "--run", "s", "--restores", *words).digest == done.digest
    assert "but the metrics are" in sapwood("train", stripes, "--run", "t", "--best", "max:acuracy", *words).error
    error = sapwood("train", stripes, "--run", "t", "--restores", "--best", "max:accuracy", *words).error
    assert 'want "max:accuracy" and "min:validation_loss"' in error
    assert "no checkpoint of step 4; it has" in sapwood("evaluate", "r", "--step", 4).error
    assert "step, best or last is expected, not 'newest'" in sapwood("evaluate", "r", "--step", "newest").error


@pytest.mark.slow
def test_every_step_eagerly_gives_the_same(sapwood, stripes):
    sapwood("train", stripes, "--run", "jit", "--epochs", 1)
    sapwood("train", stripes, "--run", "eager", "--epochs", 1, "--eager")
    fast, slow = (read_rows(f"{run}/metrics.jsonl")[-1]["loss"] for run in ("jit", "eager"))
    assert slow == pytest.approx(fast, rel=1e-5)


def test_devices_after_jax_has_them(sapwood, tmp_path):
    source = "import jax.numpy as jnp, sapwood as sw\nX = jnp.zeros(3)\nclass A(sw.Recipe): pass\n"
    (tmp_path / "mine.py").write_text(source)
    error = sapwood("train", "mine.py", "--devices", 4).error
    assert error.startswith("--devices 4: JAX has its devices already, because the recipe's file uses it while")


@pytest.mark.slow
def test_text_is_written_before_the_last_three_lines(process, sapwood, tmp_path):
    (tmp_path / "line.txt").write_text(60 * "the sea is deep and the sky is wide, ")
    small = ("--depth", 1, "--width", 32, "--heads", 2, "--length", 32, "--stride", 8, "--sample", 20)
    words = ("train", "text", "--file", "line.txt", "--epochs", 3, "--prompt", "the sea", *small)
    done = process(*words, "--run", "r")
    assert (done.code, done.err) == (0, [])
    assert re.fullmatch("the sea.{20}", done.out[-4])
    losses = [row["loss"] for row in read_rows(tmp_path / "r" / "metrics.jsonl")]
    assert losses[-1] < 0.7 * losses[0]
    assert sapwood("evaluate", "r").out[0] == done.out[-2]
    assert sapwood(*words, "--run", "r", "--resume").out == done.out[-4:]
    assert process(*words, "--run", "s").digest == done.digest
    error = sapwood("predict", "r", "line.txt").error
    assert error == "r is no image classifier: its model takes tokens"


@pytest.mark.costs("compiles a training of three steps a call")
def test_steps_per_call_are_chosen_and_written_down(sapwood, stripes, config, run):
    done = sapwood("train", stripes, "--run", "s", "--steps-per-call", 3)
    assert done.digest == run.digest
    assert config("s")["steps_per_call"] == 3
    for wrong in ("0", "2.5", "fast"):
        error = sapwood("train", stripes, "--run", "t", "--steps-per-call", wrong).error
        assert f"a whole number, at least 1, or auto is expected, not '{wrong}'" in error


@pytest.mark.fresh_compile
@pytest.mark.costs("compiles a training twice")
def test_programs_are_kept_for_the_next_start_unless_told_otherwise(sapwood, stripes, tmp_path, monkeypatch):
    monkeypatch.setenv("SAPWOOD_CACHE", str(tmp_path / "cache"))
    words = ("--epochs", 1, "--steps-per-call", 1)
    without = sapwood("train", stripes, "--run", "s", "--no-compile-cache", *words)
    assert without.code == 0, without.err
    assert not (tmp_path / "cache").exists()
    assert sapwood("train", stripes, "--run", "t", *words).digest == without.digest
    assert list((tmp_path / "cache").glob("xla/*/*train_step*-cache"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--seed -1", "a seed is an integer"),
        ("--keep 0", "keep=0"),
        ("--checkpoint-every 0", "checkpoint_every=0"),
        ("--log-every 0", "log_every=0"),
        ("--best min:validation_loss", "needs fit(validation=...)"),
        ("--hidden 0", "features must be an integer above 0"),
    ],
)
def test_a_run_that_is_refused_leaves_nothing_behind(sapwood, stripes, words, said):
    for run in ((), ("--run", "r")):
        assert said in sapwood("train", stripes, *run, *words.split()).error
        assert not Path("runs").exists()
        assert not Path("r").exists()


def test_a_run_that_is_refused_to_go_on_stays_as_it_is(run, sapwood, stripes, config):
    before = config("r")
    Path("r/metrics.jsonl").unlink()
    assert "keep=0" in sapwood("train", stripes, "--run", "r", "--resume", "--keep", 0).error
    assert config("r") == before


def test_a_model_is_not_written_over(run, sapwood, stripes, config):
    shutil.rmtree("r/checkpoints")  # to have the room
    rows = read_rows("r/metrics.jsonl")
    error = sapwood("train", stripes, "--run", "r", "--hidden", 9).error
    assert error == "r already holds a model; --run chooses another directory"
    assert (config("r")["options"]["hidden"], read_rows("r/metrics.jsonl")) == (8, rows)


@pytest.mark.parametrize(
    ("key", "value"), [("options", [1]), ("options", None), ("recipe", 5), ("features", None), ("features", ["image"])]
)
def test_a_config_with_parts_of_another_kind(run, sapwood, stripes, config, key, value):
    checksummed_json.write(Path("r/config.json"), {**config("r"), key: value})
    for words in (("evaluate", "r"), ("predict", "r", "x.png"), ("train", stripes, "--run", "r", "--resume")):
        assert sapwood(*words).error == "r/config.json is not the config of a run of Sapwood"


def test_a_number_that_is_none_goes_on_as_itself(sapwood, stripes):
    stripes.write_text(stripes.read_text().replace("hidden: int = 8", "hidden: int = 8\n    clip: float = 1.0"))
    done = sapwood("train", stripes, "--run", "r", "--clip", "nan")
    assert sapwood("train", stripes, "--run", "r", "--clip", "nan", "--resume").digest == done.digest
    error = sapwood("train", stripes, "--run", "r", "--resume").error
    assert error.startswith("r cannot go on as another run: clip was nan and is now 1.0; ")


def test_what_a_recipe_makes_of_its_fields_is_no_option(sapwood, stripes):
    lines = "hidden: int = 8\n    twice: int = field(init=False, default=0)\n\n    def __post_init__(self):\n"
    lines += "        object.__setattr__(self, 'twice', 2 * self.hidden)\n"
    text = (
        stripes.read_text()
        .replace("    hidden: int = 8\n", "")
        .replace("import dataclass\n", "import dataclass, field\n")
    )
    stripes.write_text(text.replace("learning_rate: float = 0.01\n", f"learning_rate: float = 0.01\n    {lines}"))
    done = sapwood("train", stripes, "--run", "r")
    assert done.code == 0, done.err
    assert "twice" not in checksummed_json.read(Path("r/config.json"))["options"]
    assert sapwood("evaluate", "r").out[0] == done.out[-2]
    assert "there is no option '--twice'" in sapwood("train", stripes, "--twice", 3).error


def test_data_may_be_what_load_takes(sapwood, stripes):
    text = stripes.read_text()
    whole = "return data[:48], data[48:]"
    stripes.write_text(
        text.replace(whole, "return tuple({'image': image[i::2], 'label': standing[i::2]} for i in (0, 1))")
    )
    done = sapwood("train", stripes, "--run", "r")
    assert done.code == 0, done.err
    assert "hidden" in "\n".join(sapwood("summary", stripes).out)
    stripes.write_text(text.replace(whole, "return data"))
    for command in ("train", "summary", "graph", "profile"):
        error = sapwood(command, stripes).error
        assert error == (
            "data() of the recipe Stripes gives a Dataset; the data to train on and the data to test on are expected: "
            "return train, test"
        )


def test_the_runs_of_a_recipe_whose_name_is_a_pattern(run, stripes, tmp_path, monkeypatch, rewrite):
    from sapwood.experiment.finding import find

    monkeypatch.chdir(tmp_path)
    path = stripes.rename(tmp_path / "stripes[1].py")
    Path("runs/stripes[1]-001").mkdir(parents=True)
    shutil.copy("r/config.json", "runs/stripes[1]-001")
    rewrite("runs/stripes[1]-001", str(stripes), str(path))
    experiment = Experiment(str(path), find("stripes[1].py")(), Path("."))
    assert own_directory(experiment, resume=True) == Path("runs/stripes[1]-001")


def test_a_link_to_runs_that_is_broken(stripes, tmp_path, monkeypatch):
    from sapwood.experiment.finding import find

    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to("not/mounted")
    monkeypatch.setattr("itertools.count", lambda first: range(first, first + 9))  # it was tried for ever
    with pytest.raises(FileExistsError):
        own_directory(Experiment(str(stripes), find("stripes.py")(), Path(".")), False)
