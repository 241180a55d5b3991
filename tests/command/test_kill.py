"""A training that is killed at any moment and started again with ``--resume`` ends as an unbroken one, bit for bit."""

import importlib.util
import signal
import sys

import pytest

pytestmark = [
    pytest.mark.fresh_compile,  # the run's own cache of programs is killed with it
    pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals"),
]
COMMAND = ["digits-mlp", "--epochs", "40", "--checkpoint-every", "400", "--validation", "0.1"]


@pytest.fixture(scope="module")
def kill(root):
    spec = importlib.util.spec_from_file_location("kill", root / "benchmarks" / "kill.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def unbroken(kill, tmp_path_factory):
    """The place and the run that nothing happened to."""
    at = kill.place(tmp_path_factory.mktemp("unbroken"), COMMAND)
    run = at.start()
    assert run.code == 0, run.err
    assert len(at.rows()) == 44  # 40 epochs of 41 steps, and a row at each of the four checkpoints between
    return at, run


def same(at, run, unbroken):
    assert run.code == 0, run.err
    assert run.digest == unbroken[1].digest
    assert run.out.splitlines()[-2] == unbroken[1].out.splitlines()[-2]  # the test accuracy
    assert at.rows() == unbroken[0].rows()
    assert {"curves.png", "model", "tensorboard", "checkpoints"} <= {path.name for path in at.run.iterdir()}


@pytest.mark.long
@pytest.mark.parametrize("fraction", [0.25, 0.55, 0.85])
def test_at_a_fraction_of_its_time(kill, unbroken, tmp_path, fraction):
    at, _ = kill.killed(tmp_path, COMMAND, fraction, unbroken[1].seconds)
    same(at, at.start("--resume"), unbroken)


def checkpoints(at):
    return [path.name for path in (at.run / "checkpoints").glob("*")]


MOMENTS = {
    "importing": lambda at: True,
    "preparing the data": lambda at: any((at.root / "data").glob("*/incomplete.*/*")),
    "compiling": lambda at: (at.run / "config.json").exists(),
    "its first steps": lambda at: (at.run / "metrics.jsonl").exists(),
    "writing a checkpoint": lambda at: any("tmp" in name for name in checkpoints(at)),
    "after a checkpoint": lambda at: "00000400" in checkpoints(at),
    "after the last step": lambda at: "00001640" in checkpoints(at),
    "drawing and saving the model": lambda at: (at.run / "model.part").exists() or (at.run / "model").exists(),
}


def struck(kill, root, happens, **options):
    """A command that got a signal at its moment, and the place it left. A moment may pass unseen: then again."""
    for attempt in range(5):
        at = kill.place(root / str(attempt), COMMAND)
        run = at.start(kill=lambda at=at: happens(at), **options)
        if run.code:
            return at, run
    raise AssertionError("five commands ended without their moment")


ONE = "after a checkpoint"


@pytest.mark.parametrize(
    "moment", [pytest.param(m, marks=pytest.mark.slow if m == ONE else pytest.mark.long) for m in MOMENTS]
)
def test_while(kill, unbroken, tmp_path, moment):
    at, run = struck(kill, tmp_path, MOMENTS[moment])
    assert run.code == -signal.SIGKILL, run.err
    same(at, at.start("--resume"), unbroken)


@pytest.mark.long
def test_again_and_again_in_a_directory_of_its_own(kill, unbroken, tmp_path):
    at = kill.place(tmp_path, COMMAND, None)
    assert at.start(kill=lambda: MOMENTS["compiling"](at)).code == -signal.SIGKILL
    for step in ("00000400", "00000800"):
        run = at.start("--resume", kill=lambda step=step: step in checkpoints(at))
        assert run.code == -signal.SIGKILL
    same(at, at.start("--resume"), unbroken)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["digits-mlp-001"]


@pytest.mark.long
def test_an_interrupt_leaves_a_run_that_goes_on(kill, unbroken, tmp_path):
    at, stopped = struck(kill, tmp_path, MOMENTS["after a checkpoint"], by=signal.SIGINT)
    assert stopped.code == 130
    assert "Traceback" not in stopped.err
    assert stopped.err.splitlines()[-1] == "sapwood: stopped; --resume goes on from the last checkpoint"
    same(at, at.start("--resume"), unbroken)
