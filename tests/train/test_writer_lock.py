"""One writer a run directory: who wins, what the others are told, and what a writer that is gone leaves."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pytest

from sapwood import CheckpointError
from sapwood.saving import checksummed_json
from sapwood.saving.checkpoints import Checkpoints
from sapwood.train import Trainer, supervised
from sapwood.train.record import writer_lock
from sapwood.train.record.jsonl import JsonlLog, read_rows
from sapwood.train.record.writer_lock import LOCK, RECORD, DirectoryLock

DATA = {"x": np.eye(4, dtype="float32"), "label": np.arange(4)}
TRAINER = Trainer(supervised(lambda v, x: x @ v.param("w", (4, 4), jax.nn.initializers.zeros), inputs="x"),
                  optax.sgd(0.1))  # fmt: skip
FIT = {"batch_size": 2, "progress": False, "steps_per_call": 1}


@pytest.fixture
def quick(monkeypatch):
    """Beats of a hundredth of a second."""
    monkeypatch.setattr(writer_lock, "BEAT", 0.01)
    monkeypatch.setattr(writer_lock, "PATIENCE", 0.1)


def other_machine(directory, **changes):
    """The record of a writer on another machine."""
    record = {"host": "node-7", "pid": 12, "machine": "another", "token": "t", "since": "2026-01-01"} | changes
    directory.mkdir(exist_ok=True)
    (directory / RECORD).write_text(json.dumps(record))


def test_there_is_one_and_it_leaves_nothing(tmp_path):
    with DirectoryLock(tmp_path / "a" / "run") as first:
        with first, pytest.raises(CheckpointError) as refused:
            DirectoryLock(tmp_path / "a" / "run").__enter__()
        assert f"is being written by process {os.getpid()} on {socket.gethostname()}, since 20" in str(refused.value)
        first.check()  # it is still held: it was entered twice
        assert sorted(os.listdir(first)) == [RECORD, LOCK]
    assert os.listdir(tmp_path / "a") == []
    with first:  # and again
        assert first.directory.exists()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_directory_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="cannot be written: Permission denied; choose another"):
        DirectoryLock(tmp_path / "run").__enter__()


def test_a_record_of_this_machine_without_a_lock_is_of_a_writer_that_was_killed(tmp_path):
    other_machine(tmp_path, machine=writer_lock.machine())
    with DirectoryLock(tmp_path) as mine:
        mine.check()
    assert os.listdir(tmp_path) == []


def test_a_writer_on_another_machine_that_gives_no_sign_is_gone(tmp_path, quick, capsys):
    other_machine(tmp_path)
    with DirectoryLock(tmp_path) as mine:
        mine.check()
    assert "was not closed by process 12 on node-7" in capsys.readouterr().err


def test_a_writer_on_another_machine_that_gives_a_sign_lives(tmp_path, quick, monkeypatch):
    other_machine(tmp_path)
    monkeypatch.setattr(writer_lock.time, "sleep", lambda _: os.utime(tmp_path / RECORD, (1, 1)))
    with pytest.raises(CheckpointError, match="is being written by process 12 on node-7, since 2026-01-01"):
        DirectoryLock(tmp_path).__enter__()
    assert json.loads((tmp_path / RECORD).read_text())["pid"] == 12


def test_it_gives_signs_until_it_ends(tmp_path, quick):
    with DirectoryLock(tmp_path):
        os.utime(tmp_path / RECORD, (1, 1))
        while (tmp_path / RECORD).stat().st_mtime == 1:
            time.sleep(0.001)


def test_who_was_taken_over_or_lost_its_directory_writes_no_more(tmp_path):
    with DirectoryLock(tmp_path) as mine:
        other_machine(tmp_path)
        with pytest.raises(CheckpointError, match="taken over by process 12 on node-7, because this run gave no sign"):
            mine.check()
        (tmp_path / RECORD).unlink()
        with pytest.raises(CheckpointError, match="was removed"):
            mine.check()
        other_machine(tmp_path)
    assert (tmp_path / RECORD).exists()  # another's record is not removed


def test_a_run_that_still_runs_is_neither_resumed_nor_begun_again(tmp_path):
    told = []

    def meanwhile(event, memory):
        for resume in (True, "anyway", False):
            with pytest.raises(CheckpointError, match="is being written by") as refused:
                TRAINER.fit(DATA, epochs=2, run=tmp_path, resume=resume, **FIT)
            told.append(str(refused.value))

    TRAINER.fit(DATA, epochs=1, run=tmp_path, callbacks=[meanwhile], **FIT)
    assert len(told) == 3
    TRAINER.fit(DATA, epochs=1, run=tmp_path, callbacks=[meanwhile], resume=True, **FIT)  # over, so nothing is called
    assert len(told) == 3


def test_a_run_whose_directory_is_removed_says_so(tmp_path):
    remove = lambda event, memory: shutil.rmtree(tmp_path / "r")  # noqa: E731
    with pytest.raises(CheckpointError, match="r was removed, or its"):
        TRAINER.fit(DATA, epochs=2, run=tmp_path / "r", callbacks=[remove], log_every=1, **FIT)


def test_config_rows_and_checkpoints_carry_one_id(tmp_path):
    run = tmp_path / "r"
    TRAINER.fit(DATA, epochs=2, run=run, checkpoint_every=2, **FIT)
    (run / "config.json").write_text("{}")  # what has one is told
    _, history = TRAINER.fit(DATA, epochs=3, run=run, checkpoint_every=2, resume="anyway", **FIT)
    ids = {json.loads(line)["run"] for line in (run / "metrics.jsonl").read_text().splitlines()}
    found = Checkpoints(run / "checkpoints")
    ids |= {found.info(step).info["run"] for step in found.steps()}
    ids |= {checksummed_json.read(run / "config.json")["run"]}
    assert len(found.steps()) == 3
    assert len(ids) == 1
    assert read_rows(run / "metrics.jsonl") == history

    TRAINER.fit(DATA, epochs=2, run=tmp_path / "s", **FIT)
    other = (tmp_path / "s" / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(other)
    with pytest.raises(CheckpointError, match=r"metrics.jsonl holds rows of two runs"):
        TRAINER.fit(DATA, epochs=4, run=run, resume=True, **FIT)
    (run / "config.json").write_text(json.dumps({"run": "another"}))
    with pytest.raises(CheckpointError, match=r"holds two runs: config.json is of another, checkpoint 6 of"):
        TRAINER.fit(DATA, epochs=4, run=run, resume=True, **FIT)


def test_a_log_without_an_id_goes_on_as_one_with(tmp_path):
    for after, run in ((None, None), (1, "a"), (2, "a")):
        with JsonlLog(tmp_path / "log", after=after, run=run) as log:
            log.write({"step": 1 + (after or 0)})
    assert read_rows(tmp_path / "log") == [{"step": 1}, {"step": 2}, {"step": 3}]
    with pytest.raises(CheckpointError, match="rows of two runs, a and b"):
        JsonlLog(tmp_path / "log", after=3, run="b")


# Processes of their own: DirectoryLock needs no more than this file's imports, so many of them start in a moment.
HOLD = """
import sys
from sapwood import CheckpointError
from sapwood.train.record.writer_lock import DirectoryLock
for place in sys.stdin:
    try:
        with DirectoryLock(place.strip()):
            print("won", flush=True)
            sys.stdin.readline()  # held until all have tried
    except CheckpointError as error:
        print("lost", error, flush=True)
        sys.stdin.readline()
    print("done", flush=True)
"""


@pytest.fixture
def writers():
    """Processes that each try to hold the directory they are told."""
    with contextlib.ExitStack() as stack:

        def start(count):
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            found = [subprocess.Popen([sys.executable, "-c", HOLD], **pipes) for _ in range(count)]
            for process in found:
                stack.callback(process.wait)
                stack.callback(process.kill)
            return found

        yield start


def tell(processes, line):
    for process in processes:
        process.stdin.write(f"{line}\n")
    for process in processes:
        process.stdin.flush()


def tries(processes, root, count):
    """How many tries had not one winner, whom all others name."""
    wrong = []
    for i in range(count):
        tell(processes, root / f"{i}" / "run")
        said = {process.pid: process.stdout.readline() for process in processes}
        won = [pid for pid, line in said.items() if line == "won\n"]
        named = [f"is being written by process {won[0]} on " in line for pid, line in said.items() if pid not in won]
        tell(processes, "")
        assert [process.stdout.readline() for process in processes] == ["done\n"] * len(processes)
        left = [path for path in (root / f"{i}").rglob("*") if path.is_file()]  # who lost may have made the directory
        if len(won) != 1 or not all(named) or left:
            wrong.append((i, said, left))
    return wrong


class Here:
    """This process as one of `writers`, which imports nothing anew: a line counts once it is flushed, as in a pipe."""

    pid = os.getpid()

    def __init__(self):
        self.stdin = self.stdout = self
        self.held, self.told, self.said = contextlib.ExitStack(), "", []

    def write(self, line):
        self.told = line.strip()

    def flush(self):
        if not self.told:
            self.held.close()
            self.said.append("done\n")
            return
        try:
            self.held.enter_context(DirectoryLock(self.told))
            self.said.append("won\n")
        except CheckpointError as error:
            self.said.append(f"lost {error}\n")

    def readline(self):
        return self.said.pop(0)


@pytest.mark.slow
def test_of_two_one_wins(writers, tmp_path):
    assert tries([*writers(1), Here()], tmp_path, 6) == []  # the other still imports during the first


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 3])
def test_of_two_and_three_one_wins_in_each_of_thirty_tries(writers, tmp_path, count):
    wrong = tries(writers(count), tmp_path, 30)
    print(f"\n{count} writers: 30 tries, {len(wrong)} without one winner whom the others name")
    assert wrong == []


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_writer_is_followed_at_once_in_each_of_thirty_tries(writers, tmp_path):
    wrong = []
    for i in range(10):
        holder, *others = writers(3)
        tell([holder], tmp_path)
        assert holder.stdout.readline() == "won\n"
        for process in others:  # 20 refusals of a live one
            tell([process], tmp_path)
            line = process.stdout.readline()
            if f"is being written by process {holder.pid} on " not in line:
                wrong.append((i, line))
            tell([process], "")
            assert process.stdout.readline() == "done\n"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        tell(others[:1], tmp_path)  # 10 followed ones
        if (line := others[0].stdout.readline()) != "won\n":
            wrong.append((i, line))
        tell(others[:1], "")
        assert others[0].stdout.readline() == "done\n"
    print(f"\nkilled writers: 10 followed and 20 refusals before, {len(wrong)} wrong")
    assert wrong == []


@pytest.mark.long
def test_thirty_records_of_other_machines(tmp_path, quick, monkeypatch):
    """Half of them live; each is told from the dead."""
    wrong = []
    for i in range(30):
        place, lives = tmp_path / str(i), i % 2
        other_machine(place, host=f"node-{i}", pid=i)
        with monkeypatch.context() as patch:
            touch = (lambda _, place=place: os.utime(place / RECORD, (1, 1))) if lives else (lambda _: None)
            patch.setattr(writer_lock.time, "sleep", touch)
            try:
                with DirectoryLock(place):
                    found = "won"
            except CheckpointError as error:
                found = str(error)
        if not (f"is being written by process {i} on node-{i}" in found if lives else found == "won"):
            wrong.append((i, found))
    print(f"\nrecords of other machines: 30, {len(wrong)} mistaken")
    assert wrong == []
