"""Ctrl-C and SIGTERM while a run trains: a request to end after the step, not in the middle of it.

The first Ctrl-C lets the step under way end, and what was trained be saved and handed back; the second is a
`KeyboardInterrupt` at once. SIGTERM, by which schedulers take a machine back, does as the first one; the process then
ends with exit code 143, after `grace` seconds at the latest. So it is with SIGHUP, when a terminal is closed, and 129.

Handlers are set in the main thread alone, Python allows no other, and put back after the block. Somebody else's handler
is not lost: it gets the signal when all is saved. A signal that is ignored (``nohup``) stays ignored.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

from sapwood.core.errors import ConfigError
from sapwood.runtime.terminal import say

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
if hasattr(signal, "SIGHUP"):  # the terminal was closed; Windows has no such signal
    NAMES[signal.SIGHUP] = "SIGHUP"


class Interrupts:
    """A context manager around the steps of a run. ``asked`` is the signal that came, 0 while none has.

    ``grace`` is how many seconds after a SIGTERM the process ends in any case, None for as long as it takes.

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
        """What asked for the end, in words; None where nothing has."""
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
        say(f"sapwood: the step and its checkpoint took longer than the {self.grace:g} s of grace; ends without them")
        os._exit(128 + number)

    def hand_on(self) -> None:
        """Deliver the signal that came to whom it was meant for, now that all is saved: see this file's head."""
        if self._timer is not None:
            self._timer.cancel()
        before = self._before.get(self.asked)
        if not self.asked or before is signal.default_int_handler:
            return
        if callable(before):
            signal.raise_signal(self.asked)
        elif self.asked != signal.SIGINT:  # also where another process got it
            raise SystemExit(128 + self.asked)
