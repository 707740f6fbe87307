"""How a run ends: after its last step, or by a signal that leaves it time to save."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor

from latentflow.console import say
from latentflow.runtime import Runtime

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
        step: optimizer steps done in total.
        finished: false if a signal ended the run early; repeat the command to resume.
        signal: the signal's number, or None.
    """

    step: int
    finished: bool
    signal: int | None = None


@contextmanager
def collected_signals() -> Iterator[list[int]]:
    """Collect the first SIGTERM, SIGINT or SIGHUP, to finish and save the current step; the second one kills.

    A SIGHUP that is ignored, as under nohup, stays ignored. Outside the main thread no signals can be collected.
    """
    received: list[int] = []
    numbers = _SIGNALS if threading.current_thread() is threading.main_thread() else ()
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


class SharedStop:
    """Whether a signal has reached any process of a run; all processes find out at the same step.

    In each step the processes start to sum the number of their signals, and read the sum of the step before, which has
    arrived meanwhile. Neither hosts nor devices wait, and all processes stop at the second step after a signal.

    Args:
        received: of this process, by `collected_signals`.
    """

    def __init__(self, runtime: Runtime, received: list[int]):
        self.runtime, self.received = runtime, received
        self._sum: Callable[[], Tensor] | None = None

    def is_due(self) -> bool:
        """Whether to stop after this step; to be called once per step in every process."""
        if self.runtime.world == 1:
            return bool(self.received)
        if self._sum is not None and self._sum().any():
            return True
        self._sum = self.runtime.sum_later(torch.tensor([len(self.received)]))
        return False


class _EndedAtOnce(KeyboardInterrupt):
    """A signal in a block that may be left anywhere; like Ctrl-C, it passes through `except Exception`."""


@contextmanager
def ended_at_once(doing: str, *, seconds: float = 3.0) -> Iterator[None]:
    """A block that a signal ends within seconds, without an exception; used inside `collected_signals`.

    It is for the first step of a compiled network, which takes up to minutes and of which nothing needs to be saved.
    After the block, the caller must check what was received, and then neither continue nor save.

    Python handles a signal between two bytecode instructions. A compiler or a backward pass may be far from the next
    one, so a thread waits for the signal, too: if the block has not ended after `seconds`, it ends the process.

    Args:
        doing: what the block does, for the message in that case.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    ended, inside, came = threading.Event(), True, False
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        handlers[number](number, frame)
        if inside:
            raise _EndedAtOnce

    def watch() -> None:
        while received := reader.recv(1):  # the interpreter writes there as soon as a signal arrives
            if received[0] in handlers and not ended.wait(seconds):
                say(f"stopped by a signal while {doing}; nothing is lost, repeat the command to go on")
                with suppress(OSError, ValueError):
                    sys.stdout.flush()
                os._exit(128 + received[0])

    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, name="signals", daemon=True)
    watcher.start()
    for number in handlers:
        signal.signal(number, note)
    try:
        yield
    except _EndedAtOnce:
        pass
    except Exception:
        if not came:  # a compiler's processes get the signal, too, and it raises when they are gone
            raise
    finally:
        inside = False
        ended.set()
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            if signal.getsignal(number) is note:  # none came
                signal.signal(number, handler)
        writer.close()
        watcher.join()
        reader.close()
