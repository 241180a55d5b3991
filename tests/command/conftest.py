"""Commands run in this process on a recipe that compiles in a moment, or as processes of their own."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sapwood.__main__ import main
from sapwood.experiment import consent
from sapwood.saving import checksummed_json

STRIPES = '''
from dataclasses import dataclass

import jax, numpy as np, optax
import sapwood as sw
from sapwood import layers as L


@dataclass(frozen=True)
class Stripes(sw.Recipe):
    """Whether a line lies or stands."""

    epochs: int = 2
    batch_size: int = 16
    hidden: int = 8
    learning_rate: float = 0.01

    def data(self):
        standing = np.arange(64) % 2
        image = np.random.default_rng(0).integers(0, 60, (64, 4, 4, 1)).astype("uint8")
        for i in range(64):
            image[(i, slice(None), i // 2 % 4) if standing[i] else (i, i // 2 % 4)] = 255
        data = sw.data.load({"image": image, "label": standing}, classes=("lying", "standing"), target="label")
        return data[:48], data[48:]

    def model(self, v, image):
        x = L.flatten(v.policy.cast(image.astype("float32") / 255))
        return L.Dense(2)(v.logits, jax.nn.relu(L.Dense(self.hidden)(v.hidden, x)))

    def optimizer(self, steps):
        return optax.adam(self.learning_rate)
'''


@dataclasses.dataclass(frozen=True)
class Done:
    """What a command gave: its exit code and the lines it printed."""

    code: int
    out: list[str]
    err: list[str]

    @property
    def error(self) -> str:
        """The one line of an expected error: nothing else was printed to stderr, and the exit code is 2."""
        assert self.code == 2, self
        assert len(self.err) == 1, self.err
        assert self.err[0].startswith("sapwood: error: "), self.err
        return self.err[0].removeprefix("sapwood: error: ")

    @property
    def digest(self) -> str:
        """The digest of a training's last line."""
        assert self.code == 0, self.err
        return self.out[-1].removeprefix("digest ")


@pytest.fixture
def rewrite():
    """``rewrite(run, old, new)`` puts other text into a run's config."""
    return _rewrite


def _rewrite(run: str, old: str, new: str, *, place: Path = Path()) -> None:
    """Put other text into a run's config, under a seal that fits."""
    path = place / run / "config.json"
    text = json.dumps(checksummed_json.read(path))
    assert old in text
    checksummed_json.write(path, json.loads(text.replace(old, new)))


@pytest.fixture
def sapwood(capfd, tmp_path, monkeypatch):
    """``sapwood("train", ...)`` in this process, in an empty working directory. It draws no curves: that takes 2 s."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sapwood.train.record.curves.start", _nothing)

    def run(*words: object) -> Done:
        capfd.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:  # how argparse ends --help
            code = int(end.code or 0)
        out, err = capfd.readouterr()
        return Done(code, out.splitlines(), err.splitlines())

    return run


@pytest.fixture
def process(tmp_path):
    """``process("train", ...)`` as a command of its own on one device, in an empty working directory."""

    def run(*words: object, **environment: str) -> Done:
        clean = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
        command = [sys.executable, "-m", "sapwood", *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, env=clean | environment, capture_output=True, text=True)
        return Done(done.returncode, done.stdout.splitlines(), done.stderr.splitlines())

    return run


@pytest.fixture
def stripes(tmp_path) -> Path:
    """The file of a small recipe."""
    path = tmp_path / "stripes.py"
    path.write_text(STRIPES)
    return path


@pytest.fixture(scope="session")
def first_run(tmp_path_factory) -> Path:
    """Where a run ``r`` of ``stripes.py`` is, with what it printed in ``r/out``."""
    place = tmp_path_factory.mktemp("first")
    (place / "stripes.py").write_text(STRIPES)
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(place)
        patch.setattr("sapwood.train.record.curves.start", _drawn)
        code = main(["train", "stripes.py", "--run", "r"])
    assert (code, err.getvalue()) == (0, "")
    (place / "r" / "out").write_text(out.getvalue())
    return place


def _drawn(metrics: Path, title: str) -> subprocess.Popen:
    """The curves, drawn in this process; to wait for is one that does nothing."""
    from sapwood.train.record import curves

    curves.draw(metrics, title=title)
    return _nothing()


def _nothing(*_: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-S", "-c", ""])


@pytest.fixture
def run(first_run, stripes, tmp_path) -> Done:
    """A run ``r`` of ``stripes`` of this test's own, and what the training printed."""
    shutil.copytree(first_run / "r", tmp_path / "r")
    out = (tmp_path / "r" / "out").read_text()
    (tmp_path / "r" / "out").unlink()
    _rewrite("r", str(first_run), str(tmp_path), place=tmp_path)
    consent.remember(stripes, stripes.read_bytes())
    return Done(0, out.splitlines(), [])
