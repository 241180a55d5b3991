"""Bad input, all the way through `Trainer.fit`: each is an error that names the entry, the feature or the layer.

JAX's indexing clamps or gives NaN out of range, so most of these train on in silence elsewhere.
"""

import dataclasses
import errno
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.data import Feature

IMAGES = np.random.default_rng(0).random((24, 6, 6, 1), "float32")
LABELS = np.arange(24) % 4
TOKENS = np.random.default_rng(1).integers(0, 10, (24, 5)).astype("int32")


def convolutional(v, image):
    x = jax.nn.relu(L.Conv(3, (3, 3))(v.stem.conv, image))
    return L.Dense(4)(v.logits, x.mean((1, 2)))


def small(v, image):
    """A model of images with as little to compile as there is, for what has nothing to do with its layers."""
    return L.Dense(4)(v.logits, image.mean((1, 2)))


def textual(v, tokens):
    return L.Dense(4)(v.logits, L.Embed(10, 6)(v.embed.table, tokens).mean(1))


def images(image=IMAGES, label=LABELS, classes=None):
    return sw.data.load({"image": image, "label": label}, target="label", classes=classes)


def tokens(tokens=TOKENS, vocabulary=None):
    data = sw.data.load({"tokens": tokens, "label": LABELS})
    return data if vocabulary is None else data.declare(tokens=Feature((5,), "int32", vocabulary=vocabulary))


def fit(data, model=small, inputs="image", batch_size=8, mesh=None, policy=None, **options):
    trainer = sw.Trainer(sw.supervised(model, inputs=inputs), optax.sgd(0.1), mesh=mesh, policy=policy)
    return trainer.fit(data, steps=3, batch_size=batch_size, progress=False, **options)


def put(array, place, value):
    """A copy of an array with one value replaced."""
    array = array.copy()
    array[place] = value
    return array


def one_mesh():
    return sw.mesh("data=4,fsdp=2")


@dataclasses.dataclass(frozen=True)
class Bad:
    """What is wrong, what is done, the error it raises, what that says, and what its first note says."""

    what: str
    run: Callable[[], object]
    error: type[Exception]
    says: str
    note: str = ""


NAN, INF = np.float32("nan"), np.float32("inf")
TABLE = [
    # labels outside the classes: where the data declares them, in the pipeline; elsewhere on the device
    Bad("label 9 of 4 declared classes", lambda: fit(images(label=put(LABELS, 5, 9), classes=4)),
        sw.DataError, r"^label of example 5 is 9; classes are 0\.\.3$"),
    Bad("label -1 of 4 declared classes", lambda: fit(images(label=put(LABELS, 5, -1), classes=4)),
        sw.DataError, r"^label of example 5 is -1; classes are 0\.\.3$"),
    Bad("label 9 of 4 logits", lambda: fit({"image": IMAGES, "label": put(LABELS, 5, 9)}),
        sw.CheckError, r"label outside the 4 classes 0 to 3 at entry \d", r"in step \d \(epoch 1\)"),
    Bad("label 9 of 4 logits, on a mesh", lambda: fit({"image": IMAGES, "label": put(LABELS, 5, 9)}, mesh=one_mesh()),
        sw.CheckError, r"label outside the 4 classes 0 to 3 at entry \d", r"in step \d \(epoch 1\)"),
    Bad("label 9 in the validation data",
        lambda: fit({"image": IMAGES, "label": LABELS}, validation={"image": IMAGES, "label": put(LABELS, 5, 9)}),
        sw.CheckError, r"label outside the 4 classes 0 to 3 at entry 5", r"in batch 0 of the validation data"),
    Bad("a label that is no whole number", lambda: fit({"image": IMAGES, "label": LABELS + np.float32(0.5)}),
        sw.DataError, r"need integer labels of shape \(8,\) or probabilities of shape \(8, 4\), got float32\[8\]"),
    # token ids outside the vocabulary
    Bad("an id outside the declared vocabulary",
        lambda: fit(tokens(put(TOKENS, (3, 2), 12), tuple("abcdefghij")), textual, "tokens"),
        sw.DataError, r"^tokens of example 3 is 12 at 2; the vocabulary has ids 0\.\.9$"),
    Bad("an id outside the table", lambda: fit(tokens(put(TOKENS, (3, 2), 12)), textual, "tokens"),
        sw.CheckError, r"id outside \[0, 10\) at entry \d, 2", r"in embed/table: Embed\("),
    Bad("a negative id", lambda: fit(tokens(put(TOKENS, (3, 2), -1)), textual, "tokens"),
        sw.CheckError, r"id outside \[0, 10\) at entry \d, 2", r"in embed/table: Embed\("),
    Bad("an id that is no whole number", lambda: fit(tokens(TOKENS.astype("float32")), textual, "tokens"),
        sw.SapwoodError, r"integer", r"in embed/table: Embed\("),
    # what is not finite
    *(
        Bad(f"{value} in an image", lambda value=value: fit(images(put(IMAGES, (7, 1, 2, 0), value))),
            sw.DataError, rf"^image of example 7 is {value} at \(1, 2, 0\); finite numbers are expected$")
        for value in (NAN, INF, -INF)
    ),
    Bad("nan where the data does not look",
        lambda: fit(images(put(IMAGES, (7, 1, 2, 0), NAN)).declare(image=Feature((6, 6, 1), "float32", finite=False))),
        sw.CheckError, r"input 'image' of the batch is nan at entry \d, position 1, 2, 0; 1 of 8", r"in step \d"),
    Bad("nan in a prediction's images", lambda: predict(put(IMAGES, (7, 1, 2, 0), NAN)),
        sw.DataError, r"^image of example 7 is nan at \(1, 2, 0\); finite numbers are expected$"),
    # shapes
    Bad("images without channels", lambda: fit(images(IMAGES[..., 0]), convolutional),
        sw.SapwoodError, r"Conv.*\(batch, .*float32\[8,6,6\]", r"in stem/conv: Conv\("),
    Bad("images in a dimension too many", lambda: fit(images(IMAGES[..., None]), convolutional),
        sw.SapwoodError, r"Conv.*\(batch, .*float32\[8,6,6,1,1\]", r"in stem/conv: Conv\("),
    Bad("images of two sizes", lambda: fit([{"image": IMAGES[0], "label": 0}, {"image": IMAGES[1, 1:], "label": 1}]),
        sw.DataError, r"image of example 1 has shape \(5, 6, 1\), but example 0 has \(6, 6, 1\)"),
    Bad("other images than it was trained on", lambda: predict(np.zeros((8, 6, 6, 3), "float32"), convolutional),
        sw.SapwoodError, r"stem/conv/kernel.*\(3, 3, 1, 3\)", r"in stem/conv: Conv\("),
    Bad("fewer labels than images", lambda: fit(images(label=LABELS[:20])),
        sw.DataError, r"image.*24.*label.*20|label.*20.*image.*24"),
    # dtypes and their names
    Bad("text where numbers are expected", lambda: fit({"image": np.array(["a", "b"] * 12), "label": LABELS}),
        sw.DataError, r"image holds text, which no device takes; use `map` to make it numbers"),
    Bad("a precision that is none", lambda: fit(images(), policy="flaot16"),
        sw.ConfigError, r"a precision must be a floating dtype such as 'float32', .*, not 'flaot16'"),
    Bad("a precision that is not floating", lambda: fit(images(), policy="int8"),
        sw.ConfigError, r"a precision must be a floating dtype .*, not 'int8'"),
    Bad("a feature's dtype that is none", lambda: Feature((), "flaot32"),
        sw.ConfigError, r"^'flaot32' is no dtype; say e\.g\. 'float32'"),
    Bad("a parameter's dtype that is none",
        lambda: fit(images(), lambda v, x: L.Dense(4)(v.a, x.mean((1, 2))) * v.b.param("s", (), np.ones, dtype="flot")),
        sw.SapwoodError, r"flot"),
    # how much of it there is
    Bad("no data to train on", lambda: fit(images()[:0]), sw.DataError, r"^the data set is empty"),
    Bad("no data in the arrays", lambda: fit({"image": IMAGES[:0], "label": LABELS[:0]}), sw.DataError, r"empty|no ex"),
    Bad("no data to validate on", lambda: fit(images(), validation=images()[:0]), sw.DataError, r"data set is empty"),
    Bad("no images to predict", lambda: predict(IMAGES[:0]), sw.DataError, r"empty|no ex"),
    Bad("a batch smaller than the mesh", lambda: fit(images(), batch_size=4, mesh=one_mesh()),
        sw.ConfigError, r"^batch size 4 is smaller than the 8 shards of mesh .*; use 8, or a smaller mesh$"),
    Bad("a batch that does not divide over the mesh", lambda: fit(images(), batch_size=12, mesh=one_mesh()),
        sw.ConfigError, r"^batch size 12 does not divide over the 8 shards of mesh .*; use 8 or 16, or a smaller"),
    Bad("a mesh of other than all devices", lambda: sw.mesh("data=3,fsdp=2"),
        sw.ConfigError, r"the sizes multiply to 6, the number of devices is 8; write -1 for one axis"),
    Bad("a mesh that the devices do not divide by", lambda: sw.mesh("data=-1,fsdp=3"),
        sw.ConfigError, r"the number of devices, 8, does not divide by 3, so no size for 'data' fits"),
]  # fmt: skip


@functools.cache
def born(model):
    """A trainer of images, and its first state."""
    trainer = sw.Trainer(sw.supervised(model), optax.sgd(0.1))
    return trainer, trainer.init(0, {"image": IMAGES[:8], "label": LABELS[:8]})


def predict(found, model=small):
    """Be born for `IMAGES` and predict others."""
    trainer, state = born(model)
    return trainer.predict(state, {"image": found})


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.what.replace(" ", "-"))
def test_it_is_named(bad):
    with pytest.raises(bad.error) as caught:
        bad.run()
    assert caught.match(bad.says)
    if bad.note:
        notes = getattr(caught.value, "__notes__", [])
        assert any(re.match(bad.note, note) for note in notes), notes


def test_good_input_raises_nothing():
    fit(images(classes=4), convolutional, validation=images(classes=4))
    fit(images(classes=4), mesh=one_mesh())
    fit(tokens(vocabulary=tuple("abcdefghij")), textual, "tokens")
    assert predict(IMAGES).shape == (24, 4)


def test_a_checkpoint_of_another_model(tmp_path):
    fit(images(), convolutional, run=tmp_path)
    with pytest.raises(sw.CheckpointError) as caught:
        fit(images(), lambda v, image: L.Dense(4)(v.logits, L.flatten(image)), run=tmp_path, resume=True)
    assert caught.match(r"checkpoint 3 in .* is of another model: it has 'params/stem/conv/bias', .* in addition")
    assert caught.match(r"params/logits/kernel is float32\[3,4\] there and float32\[36,4\] here")


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_run_directory_that_is_a_file(tmp_path, below):
    (tmp_path / "file").write_text("here")
    with pytest.raises(sw.CheckpointError) as caught:
        fit(images(), run=Path(tmp_path / "file" / below))
    said = rf"the run directory {tmp_path}/file.* cannot be written: (Not a directory|File exists); choose another"
    assert caught.match(said)


def test_a_log_that_cannot_grow(tmp_path, monkeypatch):
    """The disk is full when the first row is to be written."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sapwood.train.record.jsonl.JsonlLog.write", full)
    with pytest.raises(sw.CheckpointError) as caught:
        fit(images(), run=tmp_path)
    assert caught.match(rf"^the run directory {tmp_path} cannot be written: No space left on device; make room and res")
