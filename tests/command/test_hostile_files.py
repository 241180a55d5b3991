"""Files of strangers: none runs code, hangs, floods the memory or ends in a traceback.

`pytest -m long tests/command/test_hostile_files.py -s` measures each in a process of its own and prints the table.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

import sapwood as sw
from sapwood.core.errors import SapwoodError
from sapwood.recipes import consent

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
    thread.join(timeout=120)
    assert found == ["opened" if name in HONEST else "refused"]
    assert not list(tmp_path.rglob(MARK))
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 2


CHILD = """
import json, sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1], "."]
import jax, pyarrow.parquet, PIL.Image, sapwood.data, sapwood.train.artifact, tensorflow_datasets, orbax.checkpoint
import sapwood.recipes.experiment
from test_hostile_files import CASES, end
from sapwood.data.sources import catalog
name, folder, base = sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) << 10
opener, make = CASES[name]
path = make(folder, base)
CASES[name] = (opener, lambda folder, base: path)
open("/proc/self/clear_refs", "w").write("5")
before, begun = peak(), time.perf_counter()
found = end(name, folder, base)
print("FOUND " + json.dumps([found, time.perf_counter() - begun, (peak() - before) / 2**20]))
"""


@pytest.mark.long
def test_the_table_of_hostile_files(base, tmp_path):
    """Each in a process of its own: its end, seconds, and MB of memory at its peak."""
    rows, wrong = [], []
    for number, name in enumerate(CASES):
        folder = tmp_path / str(number)
        folder.mkdir()
        command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), name, str(folder), str(base)]
        begun = time.perf_counter()
        clean = {key: x for key, x in os.environ.items() if key != "XLA_FLAGS"}
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, timeout=180)
            said = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
            found, seconds, megabytes = json.loads(said[0][6:]) if said else (f"died: {done.stderr[-300:]}", 0, 0)
            traced = "Traceback" in done.stderr
        if time.perf_counter() - begun > 179:
            found, seconds, megabytes, traced = "hung", 180, 0, False
        ran = bool(list(folder.rglob(MARK)))
        ok = found == ("opened" if name in HONEST else "refused") and not ran and not traced
        rows.append((name, found, seconds, megabytes, ran))
        if not ok or seconds > 5 or megabytes > 500:
            wrong.append(rows[-1])
        print(f"{name:60} {found:40.40} {seconds:6.2f} s {megabytes:7.0f} MB{' RAN CODE' * ran}", flush=True)
    print(f"{len(rows)} files, {len(wrong)} wrong")
    assert len(rows) >= 40
    assert not wrong
