"""`sapwood predict` on real image files, and on what is none."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import sapwood as sw
from sapwood.data import Feature
from sapwood.experiment.experiment import Experiment
from sapwood.experiment.finding import find
from sapwood.losses.classification import softmax_cross_entropy

PIXELS = Feature((4, 4, 1), "uint8")


@pytest.fixture
def images(tmp_path):
    """Image files of lines that lie and stand, as grey PNG, colour JPEG, PNG with alpha, and larger than trained."""
    lying, standing = np.zeros((2, 4, 4), "uint8")
    lying[1], standing[:, 2] = 255, 255
    Image.fromarray(lying).save(tmp_path / "grey.png")
    Image.fromarray(standing).resize((64, 64), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    Image.fromarray(standing).convert("RGB").resize((32, 32), Image.Resampling.NEAREST).save(tmp_path / "colour.jpg")
    Image.fromarray(lying).convert("RGBA").save(tmp_path / "alpha.png")
    Image.fromarray(255 - lying).save(tmp_path / "inverted.png")
    return {"grey.png": "lying", "large.png": "standing", "colour.jpg": "standing", "alpha.png": "lying"}


@pytest.mark.costs("trains for forty epochs, and may be the first to train")
def test_class_and_probability_of_each_file_in_order(sapwood, stripes, images):
    sapwood("train", stripes, "--run", "s", "--epochs", 40)
    done = sapwood("predict", "s", *images)
    assert (done.code, done.err) == (0, [])
    rows = [line.split("\t") for line in done.out]
    assert [row[:2] for row in rows] == [list(pair) for pair in images.items()]
    assert all(re.fullmatch(r"(0\.[5-9]\d{3}|1\.0000)", row[2]) for row in rows)
    assert sapwood("predict", "s", "inverted.png", "--invert").out[0].split("\t")[1:] == rows[0][1:]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("missing.png", "there is no file missing.png"),
        ("text.png", "text.png is not an image that can be read"),
        ("empty.png", "empty.png is not an image that can be read"),
        ("cut.png", "cut.png is not an image that can be read"),
        ("folder", "folder is no file"),
    ],
)
def test_what_is_no_image(run, sapwood, images, file, message):
    Path("text.png").write_text("no image")
    Path("empty.png").touch()
    Path("cut.png").write_bytes(Path("grey.png").read_bytes()[:45])
    Path("folder").mkdir()
    done = sapwood("predict", "r", "grey.png", file)
    assert done.error.startswith(message)
    assert done.out == []
    shown = sapwood("predict", "r", "grey.png", file, "--debug")
    assert (shown.code, shown.err[0]) == (2, "Traceback (most recent call last):")


def test_an_unknown_run_names_those_there_are(run, sapwood, images):
    Path("runs").mkdir()
    Path("r").rename("runs/stripes-001")
    error = sapwood("predict", "r", "grey.png").error
    assert error == "r is no run: it has no config.json (runs here: runs/stripes-001)"


def test_a_run_without_a_checkpoint(run, sapwood, images, tmp_path):
    for path in Path("r/checkpoints").rglob("*"):
        if path.is_file():
            path.unlink()
    assert "no whole checkpoint in" in sapwood("predict", "r", "grey.png").error
    Path("r/checkpoints").rename("elsewhere")
    assert sapwood("predict", "r", "grey.png").error == f"no checkpoint in {tmp_path}/r/checkpoints"


def test_a_damaged_checkpoint(run, sapwood, images):
    for path in [path for path in Path("r/checkpoints").rglob("*") if path.is_file()]:
        data = bytearray(path.read_bytes())
        data[len(data) // 2 :: 100] = bytes(len(data[len(data) // 2 :: 100]))
        path.write_bytes(data)
    error = sapwood("predict", "r", "grey.png").error
    assert error.startswith("no whole checkpoint in ")
    assert "checkpoint 6 in " in error
    assert "is damaged" in error


def test_a_run_that_is_no_image_classifier(sapwood, stripes, images):
    source = stripes.read_text().replace('"image"', '"pixels"').replace("image.astype", "pixels.astype")
    source = source.replace("def model(self, v, image)", "def model(self, v, pixels)")
    source += '\n    def objective(self):\n        return sw.supervised(self.model, inputs="pixels")\n'
    stripes.write_text(
        source.replace("image = np", "image = pixels = np").replace('"pixels": image', '"pixels": image[..., 0]')
    )
    Experiment(str(stripes), find("stripes.py")(), Path("s")).begin(resume=False)
    assert sapwood("predict", "s", "grey.png").error == "s is no image classifier: its model takes pixels"


@pytest.fixture
def pretend(monkeypatch):
    """``pretend(feature, outputs, loss)``: a run that was never trained. Gives the list of what it is to predict."""

    def run(feature=PIXELS, outputs=(0.0, 2.0), loss="softmax_cross_entropy", learned=None):
        seen = []
        trainer = SimpleNamespace(
            objective=sw.supervised(lambda v, image: image, loss),
            predict=lambda state, data: seen.append(data["image"]) or np.array([outputs] * len(data["image"])),
        )
        features = {"image": feature, "label": Feature((), "int32", classes=("lying", "standing"))}
        made = SimpleNamespace(
            trainer=trainer, features=features, restore=lambda step: SimpleNamespace(features=learned)
        )
        monkeypatch.setattr(Experiment, "open", lambda *_: made)
        return seen

    return run


def test_the_limits_of_an_input_are_the_declared_ones(sapwood, images, pretend):
    feature = Feature((4, 4, 1), "float32", low=-1, high=3)
    seen = pretend(feature, loss=partial(softmax_cross_entropy, label_smoothing=0.1))
    assert sapwood("predict", "r", "grey.png").out == ["grey.png\tstanding\t0.8808"]
    assert (seen[0].dtype, seen[0].min(), seen[0].max()) == (np.float32, -1, 3)


def test_classes_are_those_that_the_state_learned(sapwood, images, pretend):
    pretend(learned={"label": Feature((), "int32", classes=("standing", "lying"))})
    assert sapwood("predict", "r", "grey.png").out == ["grey.png\tlying\t0.8808"]


def test_an_output_to_spare_has_no_class(sapwood, images, pretend):
    """A model of three outputs, of which two have a name."""
    pretend(outputs=(0.0, 0.0, 2.0))
    assert sapwood("predict", "r", "grey.png").out == ["grey.png\t2\t0.7870"]


@pytest.mark.parametrize(("dtype", "given"), [("float32", {}), ("float32", {"low": 0}), ("int32", {"high": 1})])
def test_an_input_whose_limits_nothing_says(sapwood, images, pretend, dtype, given):
    seen = pretend(Feature((4, 4, 1), dtype, **given))
    error = sapwood("predict", "r", "grey.png").error
    assert error.startswith(f"nothing says which values of image, {dtype}, are black and white")
    assert f"data.declare(image=sw.data.Feature((4, 4, 1), '{dtype}', low=0, high=1))" in error
    assert seen == []


@pytest.mark.parametrize("shape", [(None, None, 3), (4, 4, 4)])
def test_an_input_that_no_file_can_be_made_to_fit(sapwood, images, pretend, shape):
    pretend(Feature(shape, "uint8"))
    error = sapwood("predict", "r", "grey.png").error
    assert error == f"the model takes images {shape}; one size, and 1 or 3 channels are expected"


@pytest.mark.parametrize(("outputs", "shape"), [((2.0,), "(1,)"), (2.0, "()"), (((2.0, 1.0),) * 2, "(2, 2)")])
def test_a_model_whose_outputs_are_no_classes(sapwood, images, pretend, outputs, shape):
    pretend(outputs=outputs)
    done = sapwood("predict", "r", "grey.png")
    assert done.error.startswith(f"r is no image classifier: its model gives an output of shape {shape} for an image")
    assert done.out == []


@pytest.mark.parametrize("loss", ["sigmoid_cross_entropy", "squared_error"])
def test_a_loss_without_a_softmax(sapwood, images, pretend, loss):
    pretend(loss=loss)
    assert f"under its loss {loss} the softmax of its outputs" in sapwood("predict", "r", "grey.png").error


@pytest.mark.slow
def test_digits_as_png_files(sapwood, tmp_path):
    """The test images, written as PNG and read back, give the accuracy that the training printed."""
    trained = sapwood("train", "digits", "--epochs", 4, "--run", "r")
    assert trained.code == 0, trained.err
    test = sw.data.load("digits", "test").gather(np.arange(360))
    names = [f"{i}.png" for i in range(len(test["label"]))]
    for name, image in zip(names, test["image"], strict=True):
        Image.fromarray(np.rint(image[..., 0] * (255 / 16)).astype("uint8")).save(tmp_path / name)
    done = sapwood("predict", "r", *names)
    assert (done.code, done.err) == (0, [])
    rows = [line.split("\t") for line in done.out]
    assert [row[0] for row in rows] == names
    right = np.mean([int(row[1]) == label for row, label in zip(rows, test["label"], strict=True)])
    assert trained.out[-2] == f"test accuracy {right:.4f}"
    assert right > 0.9
    assert min(float(row[2]) for row in rows) > 0.1
    for files, message in [
        (["0.png", "config.json"], "config.json is not an image that can be read"),
        (["gone.png"], "there is no file gone.png"),
    ]:
        (tmp_path / "config.json").write_text("{}")
        assert sapwood("predict", "r", *files).error.startswith(message)
    assert sapwood("predict", "nowhere", "0.png").error.startswith("nowhere is no run: it has no config.json")
