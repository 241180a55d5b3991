"""Eight simulated devices against one: the same losses, the same accuracy, and checkpoints that each reads."""

import pytest

from sapwood.recipes.language.text import NOVEL
from sapwood.train.record.jsonl import read_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def losses():
    return lambda path, count: [row["loss"] for row in read_rows(path / "metrics.jsonl")][:count]


def accuracy(done) -> float:
    assert done.code == 0, done.err
    return next(float(line.split()[2]) for line in done.out if line.startswith("test accuracy"))


def test_digits_on_eight_devices_as_on_one(sapwood, losses, tmp_path, recwarn):
    words = ("train", "digits", "--epochs", 4, "--log-every", 1, "--steps-per-call", 1)
    one = sapwood(*words, "--run", "one")
    eight = sapwood(*words, "--run", "eight", "--mesh", "data=4,fsdp=2")
    assert abs(accuracy(one) - accuracy(eight)) <= 0.005
    assert eight.err == []
    assert [w.message for w in recwarn if w.category.__module__.startswith("sapwood")] == []
    few, many = losses(tmp_path / "one", 20), losses(tmp_path / "eight", 20)
    assert len(few) == len(many) == 20
    assert many == pytest.approx(few, rel=1e-4)
    for place in ((), ("--mesh", "data=2,fsdp=4")):  # either checkpoint on any mesh
        assert accuracy(sapwood("evaluate", "eight", *place)) == accuracy(eight)
        assert accuracy(sapwood("evaluate", "one", *place)) == accuracy(one)


def test_text_on_eight_devices_as_on_one(sapwood, losses, tmp_path):
    """Ten steps of the recipe as it is, on the novel's beginning."""
    (tmp_path / "beginning.txt").write_text(NOVEL.read_text(encoding="utf-8")[:12_500], encoding="utf-8")
    words = ("train", "text", "--file", "beginning.txt", "--log-every", 1, "--steps-per-call", 1, "--sample", 1)
    one = sapwood(*words, "--run", "one")
    eight = sapwood(*words, "--run", "eight", "--mesh", "fsdp=2,tensor=2,sequence=2")
    assert (one.code, eight.code) == (0, 0), eight.err
    few, many = losses(tmp_path / "one", 10), losses(tmp_path / "eight", 10)
    assert len(few) == len(many) == 10
    assert many == pytest.approx(few, rel=1e-4)


def test_a_run_goes_on_on_another_mesh(sapwood, process, losses, stripes, tmp_path):
    """Begun on eight devices and gone on with on one: the numbers of a run that stayed. Where there are but two, it is
    evaluated on those."""
    words = ("train", stripes, "--epochs", 8, "--checkpoint-every", 12)
    whole = sapwood(*words, "--run", "whole", "--mesh", "data=2,fsdp=4")
    again = sapwood(*words, "--run", "moved", "--mesh", "data=2,fsdp=4")
    assert whole.digest == again.digest
    moved = tmp_path / "moved" / "checkpoints"
    for path in sorted((moved / "00000024").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (moved / "00000024").rmdir()
    resumed = sapwood(*words, "--run", "moved", "--resume")
    assert accuracy(resumed) == accuracy(whole)
    assert losses(tmp_path / "moved", 8) == pytest.approx(losses(tmp_path / "whole", 8), rel=1e-4)
    assert accuracy(process("evaluate", "whole", "--devices", 2, "--mesh", "fsdp=2")) == accuracy(whole)
