import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from sapwood.core.errors import DataError
from sapwood.data import Feature, load
from sapwood.data.sources import digits as module
from sapwood.data.sources.digits import digits, prepare


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    prepare(place)
    return place


@pytest.fixture(scope="module")
def reference():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)
    return {"train": (train, train_labels), "test": (test, test_labels)}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("array_record", [True, False])
def test_both_ways_give_scikit_learns_split(place, reference, split, array_record, monkeypatch):
    if not array_record:
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    data = load("digits", split, data_dir=place)
    batch = data.gather(np.arange(len(data)))
    images, labels = reference[split]
    np.testing.assert_array_equal(batch["image"].reshape(-1, 64), images)
    np.testing.assert_array_equal(batch["label"], labels)
    assert (batch["image"].dtype, batch["label"].dtype) == (np.uint8, np.int32)
    assert data.features["image"] == Feature((8, 8, 1), "uint8", low=0, high=16)
    assert data.features["label"].classes == tuple("0123456789")
    assert len(data) == {"train": 1437, "test": 360}[split]


@pytest.mark.parametrize("split", ["train[:10%]", "test+train[1400:]"])
def test_slices_of_splits_are_the_same_both_ways(place, split, monkeypatch):
    stored = load("digits", split, data_dir=place)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    kept = load("digits", split)
    assert len(stored) == len(kept)
    np.testing.assert_array_equal(stored.column("image"), kept.column("image"))


def test_an_unknown_split(place, monkeypatch):
    with pytest.raises(DataError, match="digits has no split 'dev'; it has train, test"):
        load("digits", "dev", data_dir=place)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="digits has no split 'dev'; it has train, test"):
        load("digits", "dev")


def test_it_is_a_tfds_set_like_any_other(place):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(place / "digits" / "1.0.0"))
    assert builder.info.splits["train"].num_examples == 1437
    assert builder.as_data_source("test")[0]["image"].shape == (8, 8, 1)
    assert sorted(p.name for p in place.iterdir()) == ["digits"]


def test_a_directory_that_cannot_be_written_falls_back_to_memory_and_says_so(tmp_path, reference):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"digits cannot be prepared in .*file .*set SAPWOOD_DATA_DIR"):
        source = digits("test", tmp_path / "file")
    np.testing.assert_array_equal(source.column("label"), reference["test"][1])


def test_a_damaged_file_is_noticed_and_scikit_learn_stands_in(place, tmp_path, reference):
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "digits" / module.VERSION
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    assert len(whole) == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        digits("test", tmp_path)
    for path, data in whole.items():
        path.write_bytes(bytes([data[0] ^ 1, *data[1:]]))
        with pytest.warns(
            UserWarning, match=f"digits in .* are damaged .*{path.name if path.name != module.SUMS else ''}"
        ):
            source = digits("test", tmp_path)
        np.testing.assert_array_equal(source.column("label"), reference["test"][1])
        assert source.features["label"].classes == tuple("0123456789")
        path.write_bytes(data)
    (folder / module.SUMS).unlink()  # as 0.1 prepared them
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        digits("test", tmp_path)


def test_what_a_killed_preparation_left_is_swept_when_old(tmp_path):
    old, young = tmp_path / "digits" / "incomplete.old", tmp_path / "digits" / "incomplete.young"
    for left in (old, young):
        left.mkdir(parents=True)
        (left / "file").write_text("half")
    os.utime(old, (time.time() - 7200,) * 2)
    prepare(tmp_path)
    assert sorted(p.name for p in (tmp_path / "digits").iterdir()) == ["1.0.0", "incomplete.young"]


# What takes a process of its own: one for all, which imports what is heavy once, and forks. A reader before anything
# heavy is there, preparations that are killed, each at another moment, and three at once.
PROCESSES = """
import json, os, signal, sys, time, traceback
from pathlib import Path
import sapwood.data
from sapwood.data.sources import digits as module

prepared, killed, shared = (Path(word) for word in sys.argv[1:])
final = killed / "digits" / "1.0.0"
die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)

def forked(work):
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child

def reading():
    data = sapwood.data.load("digits", data_dir=prepared)
    next(sapwood.data.batches(data, 32, process_index=0, process_count=1))
    found = [m for m in ("sklearn", "tensorflow", "grain", "pandas") if m in sys.modules]
    (shared / "imported").write_text(json.dumps(found))

def before_write(): module._write = die
def in_sklearn(): module._from_sklearn = die
def in_the_examples():
    original, counted = module._builder_class()._generate_examples, []
    def some(self, images, labels):
        for item in original(self, images, labels):
            counted.append(1)
            if len(counted) == 700: die()
            yield item
    module._builder_class()._generate_examples = some
def between_the_files():
    os.fsync = die
def before_the_rename():
    rename = os.rename
    os.rename = lambda a, b: die() if Path(b) == final else rename(a, b)
def after_the_rename():
    rename = os.rename
    os.rename = lambda a, b: (rename(a, b), Path(b) == final and die())

def kills():
    for moment in (before_write, in_sklearn, in_the_examples, between_the_files, before_the_rename, after_the_rename):
        _, status = os.waitpid(forked(lambda: (moment(), module.prepare(killed))), 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment.__name__, status)
        assert final.exists() == (moment is after_the_rename), moment.__name__
    return len(list((killed / "digits").glob("incomplete.*")))

def meet():
    write = module._write
    def slowly(work):
        made = write(work)
        (shared / f"ready.{os.getpid()}").touch()
        while len(list(shared.glob("ready.*"))) < 3: time.sleep(0.01)  # all three are about to rename
        return made
    module._write = slowly
    module.prepare(shared)

def together():
    children = [forked(meet) for _ in range(3)]
    return max(os.waitpid(child, 0)[1] for child in children)

def answer(work):
    try:
        return work()
    except BaseException:
        return traceback.format_exc()

answers = {"reading": answer(lambda: os.waitpid(forked(reading), 0)[1])}
import sklearn.datasets, sklearn.model_selection, tensorflow_datasets
print(json.dumps({**answers, "kills": answer(kills), "together": answer(together)}))
"""


class Processes(NamedTuple):
    """The answers of `PROCESSES`, a number or a traceback each; where it prepared; and what it printed of errors."""

    answers: dict
    killed: Path
    shared: Path
    errors: str


@pytest.fixture(scope="session")
def processes(place, tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("forks")
    killed, shared = (tmp_path_factory.mktemp(name) for name in ("killed", "shared"))
    command = [sys.executable, "-c", PROCESSES, *map(str, (place, killed, shared))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return Processes(json.loads(done.stdout.splitlines()[-1]), killed, shared, done.stderr)


@pytest.mark.costs("imports scikit-learn and TFDS in a process that can be killed, for this and the next two")
def test_a_killed_preparation_leaves_nothing_that_is_trusted(processes, place):
    left = processes.answers["kills"]
    assert isinstance(left, int), left
    assert left > 0  # what the killed left behind is there, and is not mistaken for data
    folder = processes.killed / "digits" / "1.0.0"
    whole = place / "digits" / "1.0.0"
    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}
    data, expected = (load("digits", data_dir=d) for d in (processes.killed, place))
    np.testing.assert_array_equal(data.column("image"), expected.column("image"))


@pytest.mark.costs("its process may be the first to be asked for")
def test_several_processes_preparing_at_once(processes):
    assert processes.answers["together"] == 0, processes.errors
    assert [p.name for p in (processes.shared / "digits").iterdir()] == ["1.0.0"]
    assert len(load("digits", data_dir=processes.shared)) == 1437


@pytest.mark.costs("its process may be the first to be asked for")
def test_reading_it_again_imports_neither_scikit_learn_nor_tensorflow_nor_grain(processes):
    assert processes.answers["reading"] == 0, processes.errors
    assert json.loads((processes.shared / "imported").read_text()) == []
