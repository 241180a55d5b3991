"""Progress: plain lines without a terminal, a bar with one."""

import io
import sys

import pytest

from sapwood.runtime.terminal import say
from sapwood.train.record.progress import Progress, clock, describe, number

ROW = {"step": 45, "epoch": 1, "loss": 1.2345678, "accuracy": 0.5, "steps_per_second": 30.0}


def test_plain_lines_say_where_what_how_fast_and_how_long():
    out = io.StringIO()
    with Progress(135, epochs=3, out=out) as progress:
        progress.advance(1)
        progress.row(ROW)
        progress.row({**ROW, "step": 135, "epoch": 3})
    first, last = out.getvalue().splitlines()
    assert first == "epoch 1/3  step 45/135  loss 1.235  accuracy 0.5  30 steps/s  ETA 0:03"
    assert last.endswith("ETA 0:00")


def test_a_terminal_gets_a_bar_and_the_same_rows():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    with Progress(135, epochs=3, out=out) as progress:
        progress.advance(45)
        progress.row(ROW)
    text = out.getvalue()
    assert "loss 1.235" in text
    assert "45/135" in text
    assert "\x1b[?25h" in text  # the cursor is shown again


def test_quiet_says_nothing():
    out = io.StringIO()
    with Progress(10, out=out, quiet=True) as progress:
        progress.row(ROW)
    assert out.getvalue() == ""


def test_numbers_and_clocks():
    assert [number(x) for x in (0.0, 1e-9, 123456.7, 7)] == ["0", "1e-09", "123457", "7"]
    assert [clock(x) for x in (0, 59.6, 3600)] == ["0:00", "1:00", "1:00:00"]
    assert describe(ROW) == "loss 1.235  accuracy 0.5"


class Gone(io.StringIO):
    """A pipe whose reader went away, or a terminal that was closed."""

    def __init__(self, error, terminal):
        super().__init__()
        self.error, self.terminal = error, terminal

    def isatty(self):
        return self.terminal

    def write(self, text):
        raise self.error


class Bare:
    """What some programs put in place of stdout."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(5, "Input/output error"), ValueError("closed file")])
def test_where_nobody_reads_all_goes_on(error, terminal):
    with Progress(9, start=0, out=Gone(error, terminal)) as progress:
        for step in range(1, 10):
            progress.advance(step)
            progress.row({"step": step, "loss": 0.5})


def test_a_stdout_that_is_none_closed_or_bare(monkeypatch, capsys):
    bare, closed = Bare(), io.StringIO()
    closed.close()
    for out in (None, closed, bare):
        monkeypatch.setattr(sys, "stdout", out)
        with Progress(9, start=0) as progress:
            progress.row({"step": 1, "loss": 0.5})
    assert bare.text == "step 1/9  loss 0.5  0 steps/s\n"
    monkeypatch.setattr(sys, "stderr", None)
    assert not say("nothing hears this")
