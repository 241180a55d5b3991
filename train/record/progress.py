"""Progress: one line per row of metrics, and in a terminal a live bar with loss, metrics, steps/s and time left.

The bar is drawn by rich, which is imported only if there is a terminal. If the terminal goes away, the run continues
without a bar.
"""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import numpy as np

from sapwood.runtime.terminal import is_terminal, say


def number(x: Any) -> str:
    """Format a metric.

    A float has four significant digits, or is a whole number from 10000 up to 1e7. An integer is shown in full, an
    array as its shape.

    >>> number(0.123456), number(1e-5), number(12345.6), number(3), number(np.zeros((2, 2)))
    ('0.1235', '1e-05', '12346', '3', 'array(2, 2)')
    """
    if isinstance(x, np.ndarray):
        return f"array{x.shape}"
    if isinstance(x, int):
        return str(x)
    return f"{x:.0f}" if 10000 <= abs(x) < 1e7 else f"{x:.4g}"


def clock(seconds: float) -> str:
    """Format seconds as ``m:ss`` or ``h:mm:ss``.

    >>> clock(75), clock(3675)
    ('1:15', '1:01:15')
    """
    minutes, second = divmod(int(seconds + 0.5), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


_PLACE = ("step", "epoch", "steps_per_second")  # shown beside the metrics, not among them


def describe(row: Mapping[str, Any]) -> str:
    """Format the metrics of a row, in the order of the row, without step, epoch and rate.

    >>> describe({"step": 3, "loss": 0.5, "accuracy": 0.75})
    'loss 0.5  accuracy 0.75'
    """
    return "  ".join(f"{name} {number(x)}" for name, x in row.items() if name not in _PLACE)


class Progress:
    """Reports the progress of a run: `advance` is called as steps are sent, `row` as metrics arrive.

    In a terminal rich draws a bar below the rows. Elsewhere each row is one plain line, so logs stay readable. Use it
    as a context manager, so that the bar is removed also after an error.

    Args:
        steps: number of steps of the run.
        epochs: number of epochs, shown in each line; None shows no epoch.
        start: number of steps done before, in a resumed run.
        out: stream that is written to; None is `sys.stdout`.
        quiet: True shows nothing.

    >>> import io
    >>> out = io.StringIO()
    >>> with Progress(90, epochs=2, start=0, out=out) as progress:
    ...     progress.row({"step": 45, "epoch": 1, "loss": 0.5, "steps_per_second": 45.0})
    >>> out.getvalue()
    'epoch 1/2  step 45/90  loss 0.5  45 steps/s  ETA 0:01\\n'
    """

    def __init__(self, steps: int, *, epochs: int | None = None, start: int = 0, out: TextIO | None = None,
                 quiet: bool = False):  # fmt: skip
        self.steps, self.epochs, self.start, self.quiet = steps, epochs, start, quiet
        self.out = out or sys.stdout
        self.bar: Any = None
        self.text = ""
        self.drawn = 0.0

    def __enter__(self) -> "Progress":
        if not self.quiet and is_terminal(self.out):
            self.bar = _bar(self.out)
            self.task = self.bar.add_task("", total=self.steps, completed=self.start, text="compiling")
            self._draw(lambda bar: bar.start())
        return self

    def __exit__(self, *_: object) -> None:
        self._draw(lambda bar: bar.stop())

    def _draw(self, what: Callable[[Any], Any]) -> None:
        """Call ``what`` with the bar, if there is one. The bar is dropped if its terminal is gone."""
        try:
            if self.bar is not None:
                what(self.bar)
        except (OSError, ValueError):
            self.bar = None

    def advance(self, step: int) -> None:
        """Note that ``step`` steps were sent to the device.

        The bar is redrawn at most every 0.1 seconds; other calls cost one comparison.
        """
        if self.bar is not None and (now := time.monotonic()) - self.drawn > 0.1:
            self.drawn = now
            self._draw(lambda bar: bar.update(self.task, completed=step, text=self.text))

    def say(self, text: str) -> None:
        """Print a message about the run that is not one of its rows."""
        if not self.quiet:
            say(f"sapwood: {text}")

    def row(self, row: Mapping[str, Any]) -> None:
        """Show one row of metrics."""
        if self.quiet:
            return
        epoch = f"epoch {row['epoch']}/{self.epochs}  " if self.epochs else ""
        rate = row.get("steps_per_second", 0.0)
        line = f"{epoch}step {row['step']}/{self.steps}  {describe(row)}"
        if self.bar is not None:
            self.text = describe(row)
            self._draw(lambda bar: bar.update(self.task, completed=row["step"], text=self.text))
            self._draw(lambda bar: bar.print(line, highlight=False, markup=False))
            return
        left = f"  ETA {clock((self.steps - row['step']) / rate)}" if rate else ""
        if self.out is not None:
            say(f"{line}  {number(rate)} steps/s{left}", self.out)


def _bar(out: TextIO) -> Any:
    """Make a progress bar of rich. rich is imported here because a run without a terminal never needs it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn

    class Screen(Console):
        def on_broken_pipe(self) -> None:  # rich's own method ends the program
            raise BrokenPipeError

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Any:
            from rich.text import Text

            return Text(f"{number(task.speed)} steps/s" if task.speed else "")

    from rich.progress import Progress as Bar

    text = TextColumn("{task.fields[text]}")
    columns = BarColumn(bar_width=24), MofNCompleteColumn(), Rate(), TimeRemainingColumn(), text
    # Four redraws a second: the drawing thread shares a processor with the thread that sends steps.
    return _WithPrint(Bar(*columns, console=Screen(file=out), refresh_per_second=4))


class _WithPrint:
    """A bar of rich with a method `print` that writes above it."""

    def __init__(self, bar: Any):
        self.bar = bar
        self.print = bar.console.print

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bar, name)
