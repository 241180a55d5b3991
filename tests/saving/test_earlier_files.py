"""Files of Sapwood 0.1 before its modules moved: artifacts open and predict, references resolve, a run goes on."""

import importlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

import sapwood as sw
from sapwood.__main__ import main
from sapwood.saving import model_reference

ZIP = Path(__file__).parents[1] / "goldens" / "earlier.zip"


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("earlier")
    with zipfile.ZipFile(ZIP) as file:
        file.extractall(place)
    return place


@pytest.fixture(scope="module")
def expected(earlier) -> dict:
    return json.loads((earlier / "expected.json").read_text())


def inputs() -> dict[str, np.ndarray]:
    """The inputs of `goldens/earlier_files.py`, drawn in the same order."""
    rng = np.random.default_rng(17)
    image = rng.normal(size=(2, 6, 6, 1)).astype("float32")
    text = rng.integers(0, 11, (2, 5))
    return {"image": image, "text": text, "ended": rng.integers(0, 16, (4, 8, 8, 1)).astype("uint8")}


def test_every_name_that_was_written_is_found(expected):
    assert len(expected["names"]) > 50
    for public, written in expected["names"].items():
        kind = model_reference.MOVED.get(written.split(":")[0], written.split(":")[0])
        found = getattr(importlib.import_module(kind), written.split(":")[1])
        if ":" in public:
            room, _, name = public.partition(":")
            assert found is getattr(importlib.import_module(room), name)


def test_what_a_file_names_is_a_public_name():
    assert model_reference.write(sw.layers.Dense(3))["name"] == "sapwood.layers:Dense"
    assert model_reference.write(sw.layers.flatten)["name"] == "sapwood.layers:flatten"
    assert model_reference.write(sw.initializers.normal(0.1))["name"] == "sapwood.core.initializers:normal"


@pytest.mark.parametrize("name", ["image", "text", "ended"])
def test_an_artifact_opens_and_predicts_the_same(earlier, expected, name):
    artifact = sw.load(earlier / name)
    outputs, _ = sw.apply(artifact.model, artifact.params, artifact.state, inputs()[name])
    wanted = expected["digits" if name == "ended" else name]
    np.testing.assert_allclose(outputs, np.float32(wanted), rtol=2e-5, atol=2e-6)


@pytest.mark.costs("it trains two epochs of a small network")
def test_a_run_that_was_stopped_goes_on(earlier, expected, capsys):
    run = earlier / "run"
    assert main(["train", "digits-mlp", *OPTIONS, "--run", str(run), "--resume"]) == 0
    assert capsys.readouterr().out.split()[-2] == "digest"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [row["step"] for row in expected["rows"]]
    for row, old in zip(rows, expected["rows"], strict=True):
        assert row["loss"] == pytest.approx(old["loss"], rel=1e-4)
        assert row["run"] == old["run"]


OPTIONS = ["--hidden", "4", "--epochs", "3", "--validation", "0.2", "--best", "max:validation_accuracy"]
