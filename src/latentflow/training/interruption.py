"""How a run ends: by itself, or by a signal that leaves it time to save."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
        step: optimizer steps done in all.
        finished: false where a signal ended the run early; repeating the command goes on.
        signal: the signal's number, or None.
    """

    step: int
    finished: bool
    signal: int | None = None


@contextmanager
def collected_signals() -> Iterator[list[int]]:
    """Collect the first SIGTERM, SIGINT or SIGHUP: the step at hand is finished and saved; the second one kills.

    A SIGHUP that is ignored, as nohup asks for, stays ignored. Outside the main thread none can be collected.
    """
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        numbers = ()
    before = {number: signal.getsignal(number) for number in numbers}
    if before.get(signal.SIGHUP) is signal.SIG_IGN:
        del before[signal.SIGHUP]

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: object) -> None:
        received.append(number)
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        restore()
