# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C, SIGTERM, as a scheduler sends it, and SIGHUP, as a lost connection does, heeded where work can be saved."""

import math
import os
import signal
import sys
import time
from multiprocessing import parent_process
from types import FrameType
from typing import Any

_HEEDED = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]  # Windows has none
_SAME_KEYSTROKE = 1.0  # Seconds: a launcher passes on to its processes what the terminal has sent them already.


def shield_worker(worker_id: int = 0) -> None:
    """`worker_init_fn` of a `DataLoader`: shields its workers from signals sent to the whole process group, since without
    them the process could not end its step. They still end when it does."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    else:  # Windows, where Ctrl-C goes to all processes of the console
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def interrupt_by_signals() -> None:
    """From now on SIGTERM and SIGHUP end this process as Ctrl-C does, so that it deletes what is half written: with
    `KeyboardInterrupt`, whose `number` is the signal's, and in one that was started for a pool with `SystemExit`, of which
    it says nothing."""
    last = -math.inf

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before <= _SAME_KEYSTROKE:
            return
        if parent_process() is not None:
            sys.exit(128 + number)
        error = KeyboardInterrupt()
        error.number = number
        raise error

    for number in _HEEDED:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, interrupt)


class Interrupted(Exception):  # noqa: N818  Not an error.
    """Asked to stop by the signal `number`."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class InterruptionRequest:
    """Within `with`, the first SIGINT, SIGTERM or SIGHUP is only kept, in `number`; a second Ctrl-C ends the program as ever.

    ```python
    with InterruptionRequest() as request:
        while not request.number:
            step()
    save()
    ```
    """

    number: int = 0
    """Of the signal, 0 while there was none."""

    def __enter__(self) -> "InterruptionRequest":
        # What is ignored stays so: a shell has its background jobs ignore Ctrl-C, and nohup has them ignore SIGHUP.
        heeded = [number for number in _HEEDED if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._keep) for number in heeded}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _keep(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._time = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._time > _SAME_KEYSTROKE:
            raise KeyboardInterrupt
