"""Files of strangers: none runs code, hangs, floods the memory or ends in a traceback.

`pytest -m long tests/command/test_hostile_files.py -s` measures each and prints the table.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

import sapwood as sw
from sapwood.core.errors import SapwoodError
from sapwood.experiment import consent

_spec = importlib.util.spec_from_file_location("hostile", Path(__file__).with_name("hostile.py"))
assert _spec is not None
assert _spec.loader is not None
hostile = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hostile)
CASES, MARK, opened = hostile.CASES, hostile.MARK, hostile.opened

COSTLY = ("1 GB", "10^8 zeros", "70 MB", "40 MB", "13,000 x", "10^6 columns")


@pytest.fixture(scope="module")
def base(first_run, tmp_path_factory) -> Path:
    """What the makers copy from: a run, an artifact, a prepared data set, a picture."""
    from PIL import Image

    place = tmp_path_factory.mktemp("base")
    shutil.copytree(first_run / "r", place / "r")
    consent.remember(first_run / "stripes.py", (first_run / "stripes.py").read_bytes())
    layer = sw.layers.Dense(3)
    sw.save(place / "model", {"kernel": np.ones((2, 3), "float32"), "bias": np.ones(3, "float32")}, model=layer)
    sw.data.load("digits", data_dir=place / "tfds")
    (info,) = (place / "tfds").rglob("dataset_info.json")
    shutil.copytree(info.parent, place / "data")
    Image.new("L", (8, 8)).save(place / "grey.png")
    return place


def end(name: str, folder: Path, base: Path) -> str:
    """How opening a case ends: "opened", "refused", or what went wrong."""
    opener, make = CASES[name]
    path = make(folder, base)
    try:
        code = opened(opener, path, base)
        return "refused" if isinstance(code, int) and code == 2 else "opened"
    except SapwoodError:
        return "refused"
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"


HONEST = {"artifact: extra is a list", "cache: an entry that is a pipe", "cache: an entry that is noise",
          "cache: a note that is a folder"}  # fmt: skip
"""What may be opened: `extra` is the user's own, and a program that cannot be read is compiled anew."""


@pytest.mark.parametrize("name", [name for name in CASES if not any(word in name for word in COSTLY)])
def test_a_hostile_file_is_refused_in_one_line(name, base, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    found: list[str] = []

    def run() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(end(name, tmp_path, base))

    thread = threading.Thread(target=run, daemon=True)  # to be left behind where it hangs
    thread.start()
    thread.join(timeout=30)
    assert found == ["opened" if name in HONEST else "refused"]
    assert not list(tmp_path.rglob(MARK))
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 2


CHILD = """
import json, os, sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1], "."]
import jax, pyarrow.parquet, PIL.Image, sapwood.data, sapwood.saving.artifact, tensorflow_datasets, orbax.checkpoint
import sapwood.experiment.experiment
from test_hostile_files import CASES, end
from sapwood.data.sources import tfds

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

base, *folders = map(Path, sys.argv[2:])
for folder in folders:
    name = (folder / "name").read_text()
    opener, make = CASES[name]
    os.chdir(folder)
    path = make(folder, base)
    CASES[name] = (opener, lambda folder, base, path=path: path)
    open("/proc/self/clear_refs", "w").write("5")
    before, begun = peak(), time.perf_counter()
    found = end(name, folder, base)
    (folder / "found").write_text(json.dumps([found, time.perf_counter() - begun, peak() - before]))
"""
TOGETHER = 10  # cases of one process


@pytest.mark.long
def test_the_table_of_hostile_files(base, tmp_path):
    """The end of each, its seconds, and the MB that its process took beside: Linux alone counts them so."""
    names, rows, wrong = list(CASES), [], []
    for start in range(0, len(names), TOGETHER):
        folders = [tmp_path / str(i) for i in range(start, min(start + TOGETHER, len(names)))]
        for folder in folders:
            folder.mkdir()
            (folder / "name").write_text(names[int(folder.name)])
        clean = {key: x for key, x in os.environ.items() if key != "XLA_FLAGS"}
        command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(base), *map(str, folders)]
        try:
            err = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=300).stderr
        except subprocess.TimeoutExpired:
            err = "hung"
        for folder in folders:
            name, said = names[int(folder.name)], folder / "found"
            found, seconds, megabytes = json.loads(said.read_text()) if said.exists() else (err[-200:], 0, 0)
            ran = bool(list(folder.rglob(MARK)))
            rows.append((name, found, seconds, megabytes, ran))
            wanted = "opened" if name in HONEST else "refused"
            if found != wanted or ran or seconds > 5 or megabytes > 500 or "Traceback" in err:
                wrong.append(rows[-1])
            print(f"{name:60} {found:9.60} {seconds:6.2f} s {megabytes:6.0f} MB{' RAN CODE' * ran}", flush=True)
    seconds, megabytes = (max(rows, key=lambda row, i=i: row[i]) for i in (2, 3))
    print(f"{len(rows)} files, {len(wrong)} wrong")
    print(f"longest {seconds[2]:.2f} s ({seconds[0]}), most {megabytes[3]:.0f} MB ({megabytes[0]})")
    assert len(rows) >= 40
    assert not wrong
