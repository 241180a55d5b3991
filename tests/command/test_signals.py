"""What becomes of a command that trains when its reader goes away, when it is told to end, and when it is not alone."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sapwood.saving.checkpoints import Checkpoints
from sapwood.train.loop.dispatch import Sender

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
ENVIRONMENT = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}


def started(words, place, **more):
    """A command as users start it, on one device."""
    options = {"cwd": place, "env": ENVIRONMENT | more.pop("env", {}), "text": True, **more}
    return subprocess.Popen([sys.executable, "-m", "sapwood", *map(str, words)], stderr=subprocess.PIPE, **options)


@posix
@pytest.mark.slow
def test_a_reader_that_goes_away_a_second_writer_and_sigterm(stripes, sapwood, tmp_path):
    words = ("train", stripes, "--run", "r", "--epochs", 1_000_000, "--log-every", 1)
    command = started(words, tmp_path, stdout=subprocess.PIPE)
    assert command.stdout.readline().startswith("epoch 1/1000000  step 1/3000000  loss")
    command.stdout.close()  # as `| head -1` does
    rows = tmp_path / "r" / "metrics.jsonl"
    seen = rows.read_text().count("\n")
    while rows.read_text().count("\n") < seen + 3:  # it goes on
        assert command.poll() is None, command.stderr.read()
        time.sleep(0.01)

    said = sapwood(*words, "--resume").error
    assert f"r is being written by process {command.pid} on {socket.gethostname()}, since" in said

    command.send_signal(signal.SIGTERM)
    err = command.communicate()[1].splitlines()
    assert command.returncode == 143, err
    found = Checkpoints(tmp_path / "r" / "checkpoints")
    step = found.latest()
    assert err[-2] == "sapwood: SIGTERM: ending after this step"
    assert err[-1].startswith(
        f"sapwood: stopped by SIGTERM after step {step} of 3000000, which is saved in r; --resume"
    )
    assert found.restore()[1].info["data"]["position"] == step
    assert not list((tmp_path / "r").glob("writer.*"))
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    ids = {json.loads(line)["run"] for line in rows.read_text().splitlines()}
    assert ids == {found.info(step).info["run"], config.get("content", config)["run"]}
    assert len(ids) == 1


@posix
def test_ctrl_c_during_the_imports_is_a_line(tmp_path):
    code = (
        "import sys, signal, builtins; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.orig_argv = ['python', '-m', 'sapwood', 'recipes']; real = __import__\n"
        "def load(name, *rest):\n"
        "    if name == 'jax': signal.raise_signal(signal.SIGINT)\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = load\n"
        "import sapwood"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nsapwood: stopped\n")


@pytest.mark.costs("trains twice, and may be the first to train")
def test_ctrl_c_saves_and_is_130_and_the_run_goes_on(run, sapwood, stripes, monkeypatch):
    words = ("train", stripes, "--run", "s", "--steps-per-call", 1)
    sent = []

    def send(self, *rest, real=Sender.send):
        sent.append(None)
        if len(sent) == 4:
            signal.raise_signal(signal.SIGINT)
        return real(self, *rest)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # `pytest &` ignores it
    with monkeypatch.context() as patch:
        patch.setattr(Sender, "send", send)
        stopped = sapwood(*words)
    signal.signal(signal.SIGINT, before)
    assert stopped.code == 130
    assert "stopped by Ctrl-C after step 4 of 6, which is saved in s" in "\n".join(stopped.err)
    assert stopped.err[-1] == "sapwood: stopped; --resume goes on from the last checkpoint"
    assert Checkpoints("s/checkpoints").steps() == [4]
    assert sapwood(*words, "--resume").out[-2:] == run.out[-2:]


@pytest.mark.parametrize("word", ["-1", "soon", "inf", "nan"])
def test_a_grace_that_cannot_be(sapwood, stripes, word):
    assert "a number of seconds, at least 0, is expected" in sapwood("train", stripes, f"--grace={word}").error


def test_nobody_reads_the_result(sapwood, stripes, monkeypatch):
    """What stdout does not take is said on stderr."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        done = sapwood("train", stripes, "--run", "r", "--epochs", 1)
    assert (done.code, done.out) == (0, [])
    assert [line.split()[0] for line in done.err] == ["run", "test", "digest"]


JOIN = """
import os, subprocess, sys, jax
from sapwood.train.record import curves
curves.start = lambda *_: subprocess.Popen([sys.executable, "-S", "-c", ""])  # drawing takes 2 s
jax.config.update("jax_cpu_collectives_implementation", "gloo")
if "WORKER" in os.environ:
    jax.distributed.initialize(f"127.0.0.1:{os.environ['PORT']}", 2, int(os.environ["WORKER"]))
"""


@pytest.fixture
def two(stripes, tmp_path):
    """Two processes of one command, joined by gloo, on four devices; they are killed at the end of the test."""
    stripes.write_text(JOIN + stripes.read_text())
    commands = []

    def start(*words):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PORT": port}
        words = ("train", stripes, "--mesh", "data=4", *words)
        for i in range(2):
            commands.append(started(words, tmp_path, stdout=subprocess.PIPE, env=devices | {"WORKER": str(i)}))
        return commands

    yield start
    for command in commands:
        command.kill()


@pytest.mark.slow
def test_the_first_of_two_processes_chooses_the_directory_and_alone_speaks(two, tmp_path):
    commands = two()
    said = [command.communicate(timeout=600) for command in commands]
    assert [command.returncode for command in commands] == [0, 0], said
    out, other = ([line for line in text.splitlines() if "Gloo" not in line] for text, _ in said)
    assert out[-3] == f"run {Path('runs') / 'stripes-001'}"
    assert other == []
    runs = [path.name for path in (tmp_path / "runs").iterdir()]
    assert runs == ["stripes-001"]
    assert Checkpoints(tmp_path / "runs" / "stripes-001" / "checkpoints").steps() == [6]


@posix
@pytest.mark.long
@pytest.mark.parametrize("struck", [0, 1])
def test_a_sigterm_to_one_of_two_processes_ends_both_with_one_checkpoint(two, tmp_path, struck):
    commands = two("--run", "r", "--epochs", 1_000_000)
    rows = tmp_path / "r" / "metrics.jsonl"
    while not (rows.exists() and rows.read_text().count("\n") > 2):
        assert all(command.poll() is None for command in commands)
        time.sleep(0.05)
    commands[struck].send_signal(signal.SIGTERM)
    err = [command.communicate(timeout=600)[1] for command in commands]
    assert [command.returncode for command in commands] == [143, 143], err
    (step,) = Checkpoints(tmp_path / "r" / "checkpoints").steps()
    assert f"stopped by SIGTERM after step {step} of 3000000" in err[0]
    assert "stopped by" not in err[1]
