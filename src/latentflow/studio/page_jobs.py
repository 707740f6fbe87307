"""The jobs of the page: drawn part by part in the drawing thread, watched and stopped from others."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from latentflow.api import LatentFlow
from latentflow.errors import ConfigError, LatentFlowError
from latentflow.sampling.samples import Samples
from latentflow.studio.page_tasks import Found, JobPlan

State = Literal["waiting", "drawing", "done", "stopped", "failed"]

MOST_KEPT = 200
"""Jobs whose pictures are kept; the oldest that have ended are forgotten first."""
MOST_WAITING = 64
"""Jobs that have not ended."""

Submit = Callable[[Callable[[], None]], None]
"""Calls a function in the drawing thread, after those that were submitted before."""


class _Halted(Exception):
    """A job was stopped while one of its parts was drawn."""


class Speeds:
    """Seconds per network call and picture of each model, measured whenever it draws."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def learn(self, model: str, seconds: float, calls: float) -> None:
        """Take in a part that took `seconds` for `calls` network calls, over all its pictures."""
        if calls:
            own = seconds / calls
            self._seconds[model] = own if model not in self._seconds else 0.5 * (own + self._seconds[model])

    def seconds(self, model: str, calls: float) -> float | None:
        """Expected seconds of so many calls; None: nothing was drawn yet."""
        return None if model not in self._seconds else self._seconds[model] * calls


class PageJob:
    """Pictures that are drawn part after part.

    Attributes:
        key: of the job.
        asked: what was asked for: model, task and request.
        pictures: (samples, row) of each picture so far.
        numbers: what was measured.
        noise: of an inversion.
    """

    def __init__(self, asked: dict[str, Any], model: LatentFlow, plan: JobPlan):
        self.key = secrets.token_hex(8)
        self.asked, self.model, self.plan = asked, model, plan
        self.pictures: list[tuple[Samples, int]] = []
        self.numbers: dict[str, float] = {}
        self.noise: Tensor | None = None
        self.state: State = "waiting"
        self.error = ""
        self.seconds = 0.0
        self.calls = 0
        self._stop = threading.Event()

    @property
    def has_ended(self) -> bool:
        return self.state in ("done", "stopped", "failed")

    def stop(self) -> None:
        """Stop it; a part that is being drawn ends at its next network call."""
        self._stop.set()
        if self.state == "waiting" and not self.pictures:
            self.state = "stopped"

    @property
    def progress(self) -> float:
        """From 0 to 1: pictures that are there, and network calls of those that are being drawn."""
        parts = len(self.plan.parts)
        within = min(self.calls / max(self.plan.calls, 1), 1) / parts if self.state == "drawing" else 0
        return min(len(self.pictures) / self.plan.total + within * 0.98, 1.0)

    def draw_part(self, number: int) -> None:
        """Draw one part; errors end the job with one line."""
        if self._stop.is_set():
            self.state = "stopped"
            return
        self.state, self.calls, began = "drawing", 0, time.perf_counter()
        try:
            with counting_calls(self.model.network, self._count):
                found = self.plan.parts[number]()
        except _Halted:
            self.state = "stopped"
        except LatentFlowError as error:
            self.state, self.error = "failed", str(error)
        except Exception as error:  # the page goes on
            self.state, self.error = "failed", one_line(error)
        else:
            self._take(found)
        self.seconds += time.perf_counter() - began
        if number + 1 == len(self.plan.parts) and self.state == "drawing":
            self.state = "done"

    def _take(self, found: Found) -> None:
        self.pictures += [(found.samples, row) for row in range(len(found.samples.pixels))]
        self.numbers |= found.numbers
        self.noise = found.noise if found.noise is not None else self.noise

    def _count(self) -> None:
        self.calls += 1
        if self._stop.is_set():
            raise _Halted


@contextmanager
def counting_calls(network: nn.Module, count: Callable[[], None]) -> Iterator[None]:
    """Call `count` before every call of a network."""
    handle = network.register_forward_pre_hook(lambda module, given: count())
    try:
        yield
    finally:
        handle.remove()


def one_line(error: BaseException) -> str:
    """What went wrong, where it is no error that the user can mend."""
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return "the machine is out of memory; draw fewer or smaller images at a time, or close other programs"
    reason = str(error).strip().splitlines()
    return f"unexpected {type(error).__name__}" + (f": {reason[0]}" if reason else "")


class PageJobs:
    """All jobs of a page.

    Args:
        submit: see `Submit`. A job submits one part at a time, so that jobs take turns.
    """

    def __init__(self, submit: Submit):
        self._submit = submit
        self._jobs: OrderedDict[str, PageJob] = OrderedDict()
        self._lock = threading.Lock()
        self.speeds = Speeds()

    def add(self, job: PageJob) -> None:
        """Begin a job.

        Raises:
            ConfigError: too many are waiting.
        """
        with self._lock:
            if sum(not one.has_ended for one in self._jobs.values()) >= MOST_WAITING:
                raise ConfigError(f"{MOST_WAITING} jobs are waiting; stop some, or wait until they have ended")
            self._jobs[job.key] = job
            self._forget()
        self._submit(lambda: self._draw(job, 0))

    def find(self, key: str) -> PageJob:
        """A job by its key.

        Raises:
            ConfigError: there is none.
        """
        with self._lock:
            if key not in self._jobs:
                raise ConfigError("these pictures are no longer there; draw them again")
            return self._jobs[key]

    def before(self, job: PageJob) -> int:
        """Jobs that were asked for earlier and have not ended."""
        with self._lock:
            earlier = list(self._jobs.values())[: list(self._jobs).index(job.key)] if job.key in self._jobs else []
            return sum(not one.has_ended for one in earlier)

    def stop_all(self) -> None:
        """Stop every job, so that the drawing thread comes to an end."""
        with self._lock:
            jobs = list(self._jobs.values())
        for job in jobs:
            job.stop()

    def _draw(self, job: PageJob, number: int) -> None:
        before, drawn = job.seconds, len(job.pictures)
        job.draw_part(number)
        self.speeds.learn(job.asked["model"], job.seconds - before, job.plan.calls * (len(job.pictures) - drawn))
        if job.state == "drawing":
            self._submit(lambda: self._draw(job, number + 1))

    def _forget(self) -> None:
        ended = [key for key, job in self._jobs.items() if job.has_ended]
        for key in ended[: max(len(self._jobs) - MOST_KEPT, 0)]:
            del self._jobs[key]


class DrawingThread:
    """Calls functions one after another in a thread of its own."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="drawing", daemon=True)
        self._thread.start()

    def submit(self, run: Callable[[], None]) -> None:
        """See `Submit`."""
        with self._changed:
            self._waiting.append(run)
            self._changed.notify()

    def close(self) -> None:
        """End the thread after what it is doing."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                run = self._waiting.pop(0)
            run()
