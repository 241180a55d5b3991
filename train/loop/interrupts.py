"""Ctrl-C, SIGTERM and SIGHUP during a run: requests to end after the step under way, not in the middle of it.

After the first Ctrl-C, the step under way ends, and the state so far is saved and returned. A second Ctrl-C raises
`KeyboardInterrupt` at once. SIGTERM, which schedulers send to take a machine back, acts like the first Ctrl-C; then the
process ends with exit code 143, after `grace` seconds at the latest. SIGHUP, sent when a terminal is closed, acts like
SIGTERM, with exit code 129.

Handlers are set only in the main thread, as Python requires, and the earlier handlers are restored after the block. An
earlier handler of other code gets the signal after everything is saved. An ignored signal (``nohup``) stays ignored.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

from sapwood.core.errors import ConfigError
from sapwood.runtime.terminal import say

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
if hasattr(signal, "SIGHUP"):  # sent when the terminal is closed; Windows has no such signal
    NAMES[signal.SIGHUP] = "SIGHUP"


class Interrupts:
    """A context manager around the steps of a run, which catches the signals that ask for its end.

    Attributes:
        asked: number of the first signal that came; 0 if there was none.
        grace: seconds from a SIGTERM or SIGHUP until the process ends in any case; None sets no limit. There is no
            limit either if other code had set a handler for the signal.

    Raises:
        ConfigError: ``grace`` is negative or too large for a timer.

    >>> with Interrupts(None) as interrupts:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     interrupts.name
    'SIGTERM'
    """

    def __init__(self, grace: float | None):
        if grace is not None and not 0 <= grace < threading.TIMEOUT_MAX:
            raise ConfigError(f"fit(grace={grace}): seconds from 0 on are expected, or None for as long as it takes")
        self.grace, self.asked = grace, 0
        self._before: dict[int, Any] = {}
        self._timer: threading.Timer | None = None

    @property
    def name(self) -> str | None:
        """Name of the signal that came, such as "Ctrl-C"; None if there was none."""
        return NAMES[signal.Signals(self.asked)] if self.asked else None

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in NAMES:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. A second Ctrl-C raises `KeyboardInterrupt`."""
        before = self._before[number]
        if number == signal.SIGINT and self.asked:
            if callable(before):
                before(number, frame)
            raise KeyboardInterrupt
        ends = number != signal.SIGINT and before is signal.SIG_DFL
        if ends and not self.asked and self.grace is not None:
            self._timer = threading.Timer(self.grace, self._give_up, [number])
            self._timer.daemon = True
            self._timer.start()
        self.asked = self.asked or number
        again = "; again to stop at once" if number == signal.SIGINT else ""
        say(f"\nsapwood: {NAMES[signal.Signals(number)]}: ending after this step{again}")

    def _give_up(self, number: int) -> None:
        """End the process at once, after `grace` seconds."""
        say(f"sapwood: the step and its checkpoint took longer than the {self.grace:g} s of grace; ends without them")
        os._exit(128 + number)

    def hand_on(self) -> None:
        """Pass the signal on, after everything is saved.

        It goes to the handler that was set before the block. If there was none, SIGTERM and SIGHUP raise `SystemExit`
        with 128 plus their number, and Ctrl-C does nothing more.
        """
        if self._timer is not None:
            self._timer.cancel()
        before = self._before.get(self.asked)
        if not self.asked or before is signal.default_int_handler:
            return
        if callable(before):
            signal.raise_signal(self.asked)
        elif self.asked != signal.SIGINT:  # also if only another process got the signal
            raise SystemExit(128 + self.asked)
