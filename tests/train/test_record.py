"""The logs on disk: alive after every row, whole after a kill, and one log after any number of resumes."""

import json
import math
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from sapwood.core.errors import DataError
from sapwood.train.record.jsonl import JsonlLog, read_rows
from sapwood.train.record.tensorboard import TensorBoardLog

ROWS = [{"step": step, "loss": 1 / step, "accuracy": 0.1 * step} for step in range(1, 8)]


def log(path, rows, after=None):
    with JsonlLog(path, after=after) as out:
        for row in rows:
            out.write(row)


def test_every_row_is_on_disk_at_once(tmp_path):
    out = JsonlLog(tmp_path / "run" / "metrics.jsonl")
    for n, row in enumerate(ROWS, 1):
        out.write(row)
        assert read_rows(out.path) == ROWS[:n]
    out.close()
    out.close()


@pytest.mark.parametrize("step", [0, 3, 6, 7, 99])
@pytest.mark.parametrize("torn", [b"", b'{"step": 8, "lo', b'{"step": 8}'])
def test_a_resumed_log_is_that_of_an_unbroken_run(tmp_path, step, torn):
    log(tmp_path / "whole", ROWS)
    log(tmp_path / "broken", ROWS)
    with open(tmp_path / "broken", "ab") as file:
        file.write(torn)
    assert read_rows(tmp_path / "broken") == ROWS
    log(tmp_path / "broken", ROWS[step:], after=step)
    assert (tmp_path / "broken").read_bytes() == (tmp_path / "whole").read_bytes()


def test_several_rows_of_the_resumed_step_stay(tmp_path):
    log(tmp_path / "log", [{"step": 2, "a": 1}, {"step": 2, "b": 1}, {"step": 3, "a": 2}])
    log(tmp_path / "log", [], after=2)
    assert read_rows(tmp_path / "log") == [{"step": 2, "a": 1}, {"step": 2, "b": 1}]


def test_without_a_step_to_resume_from_the_log_starts_anew(tmp_path):
    log(tmp_path / "log", ROWS)
    log(tmp_path / "log", ROWS[:1])
    assert read_rows(tmp_path / "log") == ROWS[:1]


def test_numbers_of_any_kind(tmp_path):
    row = {"step": jnp.int32(3), "a": jnp.float32(0.1), "b": np.float64(2), "n": math.nan, "i": -math.inf, "s": "x"}
    row |= {"list": [0.5, math.nan, [math.inf]], "dict": {"a": np.float32(0.5), "b": math.nan}}
    log(tmp_path / "log", [row | {"ok": np.bool_(True), "bf": jnp.bfloat16(1.5)}])
    text = (tmp_path / "log").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    back = read_rows(tmp_path / "log")[0]
    assert back["step"] == 3
    assert (back["list"], back["dict"]) == ([0.5, "NaN", ["Infinity"]], {"a": 0.5, "b": "NaN"})
    assert back["ok"] is True
    assert np.float32(back["a"]) == np.float32(0.1)
    assert math.isnan(float(back["n"]))
    assert float(back["i"]) == -math.inf
    assert (back["s"], back["bf"]) == ("x", 1.5)


def test_arrays_and_numbers_too_large(tmp_path):
    row = {"step": 1, "loss": 0.5, "hits": np.arange(3), "f1": jnp.ones(2), "n": 10**400, "ok": np.bool_(True)}
    log(tmp_path / "log", [row])
    assert read_rows(tmp_path / "log") == [row | {"hits": [0, 1, 2], "f1": [1.0, 1.0], "ok": True}]
    with TensorBoardLog(tmp_path / "events") as out:
        out.write(row)
    assert scalars(tmp_path / "events") == {"loss": [(1, 0.5)], "n": [(1, math.inf)]}


def test_a_row_that_does_not_fit_on_the_disk_leaves_nothing_behind(tmp_path):
    resource = pytest.importorskip("resource")
    out = JsonlLog(tmp_path / "log")
    out.write({"step": 1, "loss": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            out.write({"step": 2, "loss": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    out.write({"step": 3, "loss": 1})
    out.close()
    assert read_rows(tmp_path / "log") == [{"step": 1, "loss": 1}, {"step": 3, "loss": 1}]


def test_a_bad_line_is_named(tmp_path):
    (tmp_path / "log").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"log, line 2: .*nonsense"):
        read_rows(tmp_path / "log")


@pytest.mark.costs("a process of its own, which imports all anew, has to be killed")
def test_killed_while_writing(tmp_path):
    """A process that writes without pause is killed; all complete lines are there, and resuming gives the same log."""
    path = tmp_path / "log"
    code = (
        "import sys; from sapwood.train.record.jsonl import JsonlLog\n"
        f"log = JsonlLog({str(path)!r})\n"
        "for step in range(1, 10**9):\n    log.write({'step': step, 'loss': 1 / step})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    while not path.exists() or path.stat().st_size < 20_000:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = read_rows(path)
    assert rows == [{"step": step, "loss": 1 / step} for step in range(1, len(rows) + 1)]
    log(path, [{"step": 101, "loss": 1 / 101}], after=100)
    assert [row["step"] for row in read_rows(path)] == list(range(1, 102))


def scalars(directory):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(os.fspath(directory))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_it_while_it_is_written(tmp_path):
    out = TensorBoardLog(tmp_path)
    for n, row in enumerate(ROWS, 1):
        out.write(row | {"note": "no number", "rate": jnp.float32(0.25)})
        if n in (1, 7):
            assert scalars(tmp_path) == {
                "loss": [(r["step"], pytest.approx(r["loss"])) for r in ROWS[:n]],
                "accuracy": [(r["step"], pytest.approx(r["accuracy"])) for r in ROWS[:n]],
                "rate": [(r["step"], 0.25) for r in ROWS[:n]],
            }
    out.close()


def test_tensorboard_drops_what_a_resumed_run_does_again(tmp_path):
    for after, rows in ((None, ROWS[:5]), (3, ROWS[3:6]), (5, ROWS[5:])):
        with TensorBoardLog(tmp_path, after=after) as out:
            for row in rows:
                out.write(row | {"after": float(after or 0)})
    assert [step for step, _ in scalars(tmp_path)["loss"]] == list(range(1, 8))
    assert [value for _, value in scalars(tmp_path)["after"]] == [0, 0, 0, 3, 3, 5, 5]


def test_large_steps_and_odd_numbers(tmp_path):
    with TensorBoardLog(tmp_path) as out:
        out.write({"step": 3_000_000_000, "x/y z": math.inf, "ä": 1e-30})
        out.write({"step": 3_000_000_001})
        out.write({"step": 3_000_000_002, "ä": 1e39, "x/y z": -1e39})
    large, odd = (
        [(3_000_000_000 + 2 * i, x) for i, x in enumerate(xs)] for xs in ((math.inf, -math.inf), (1e-30, math.inf))
    )
    assert scalars(tmp_path) == {"x/y z": large, "ä": [(step, pytest.approx(x)) for step, x in odd]}
