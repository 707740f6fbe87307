"""The jobs of the page: requests in the drawing queue, whose pictures are shown as they come."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from typing import Any

from latentflow.api import LatentFlow
from latentflow.errors import ConfigError, LatentFlowError
from latentflow.sampling.drawing import make_drawing
from latentflow.sampling.pipeline import Prepared
from latentflow.sampling.request import SampleRequest
from latentflow.sampling.samples import Samples
from latentflow.studio.page_tasks import PageTask
from latentflow.studio.queue import DrawingJob, DrawingQueue
from latentflow.studio.refusals import refusal_of

_LOG = logging.getLogger("latentflow.studio")

MOST_KEPT, MOST_BYTES = 200, 2 * 2**30
"""Jobs, and bytes of their pictures, that are kept; the oldest that have ended are forgotten first."""


class Speeds:
    """Seconds per network call and picture of each model, measured whenever it draws."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}  # of seconds and of calls

    def learn(self, model: str, seconds: float, calls: float) -> None:
        """Take in what took `seconds` for `calls` network calls, over all its pictures."""
        if calls:
            before = self._sums.get(model, (0.0, 0.0))  # counts half: a machine may be busier than it was
            self._sums[model] = before[0] / 2 + seconds, before[1] / 2 + calls

    def seconds(self, model: str, calls: float) -> float | None:
        """Expected seconds of so many calls; None: nothing was drawn yet."""
        if model not in self._sums:
            return None
        total, counted = self._sums[model]
        return calls * total / counted


class PageJob:
    """A request of the page in the queue.

    Attributes:
        key: of the job.
        model: the key of its model.
        task: what is drawn.
        drawn: in the queue.
    """

    def __init__(self, model: str, task: PageTask):
        self.key = secrets.token_hex(8)
        self.model, self.task = model, task
        self.drawn: DrawingJob | None = None
        self.began = 0.0
        self._finished: list[Samples] = []
        self._lock = threading.Lock()

    @property
    def pictures(self) -> list[tuple[Samples, int]]:
        """(samples, row) of each picture so far, as it was asked for: an image with its hole filled."""
        with self._lock:
            for part in list(self.drawn.parts)[len(self._finished) :]:
                self._finished.append(self.task.prepared.finish(part))
            return [(samples, row) for samples in self._finished for row in range(len(samples.pixels))]

    @property
    def num_bytes(self) -> int:
        """That its pictures take in memory."""
        return sum(part.pixels.nbytes + part.latents.nbytes for part in [*self.drawn.parts, *self._finished])

    @property
    def seconds(self) -> float:
        """That its batches took."""
        return sum(part.seconds for part in list(self.drawn.parts))

    @property
    def left(self) -> float | None:
        """Seconds until it is done, by its own progress; None: too early to say."""
        share = self.drawn.progress.share
        return (time.monotonic() - self.began) * (1 - share) / share if self.began and share > 0.02 else None

    @property
    def error(self) -> str:
        """Why it failed, in one line; empty: it did not."""
        future = self.drawn.future
        if self.drawn.progress.state != "failed" or not future.done():
            return ""
        error = future.exception()
        return str(error) if isinstance(error, LatentFlowError) else str(refusal_of(error))


class PageJobs:
    """All jobs of a page.

    Args:
        queue: that draws them; closed by the caller.
    """

    def __init__(self, queue: DrawingQueue):
        self.queue = queue
        self.speeds = Speeds()
        self._jobs: OrderedDict[str, PageJob] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self, key: str, model: LatentFlow, task: PageTask) -> PageJob:
        """Hand a request to the queue.

        Args:
            key: of the model.

        Raises:
            QueueFull, QueueClosed: it takes no more.
        """
        job = PageJob(key, task)

        def on_change(drawn: DrawingJob) -> None:
            job.began = job.began or time.monotonic()
            if drawn.future.done() and (error := drawn.future.exception()) and not isinstance(error, LatentFlowError):
                _LOG.error("%s failed", task.prepared.drawing.task, exc_info=error)
            if drawn.images == drawn.total and drawn.parts:
                self.speeds.learn(key, sum(part.seconds for part in drawn.parts), task.calls * drawn.total)

        job.drawn = self.queue.submit(model, task.prepared, on_change=on_change)
        with self._lock:
            self._jobs[job.key] = job
            self._forget()
        return job

    def stop_all(self) -> None:
        """Stop every job, so that the queue comes to an end at its next network call."""
        with self._lock:
            jobs = list(self._jobs.values())
        for job in jobs:
            job.drawn.stop()

    def _forget(self) -> None:
        """Forget the oldest jobs while there are too many; called with the lock held."""
        held = sum(job.num_bytes for job in self._jobs.values())
        for key in [key for key, job in self._jobs.items() if job.drawn.is_over]:
            if len(self._jobs) <= MOST_KEPT and held <= MOST_BYTES:
                return
            held -= self._jobs.pop(key).num_bytes

    def measure(self, key: str, model: LatentFlow) -> None:
        """Draw a picture that nobody sees, so that the first estimate of a model has a time.

        A model that draws nothing without an input is left out.
        """
        if self.speeds.seconds(key, 1) is None:
            with suppress(LatentFlowError):
                asked = SampleRequest(num=1, solver="euler", steps=2, guidance=1.0)
                self.begin(key, model, PageTask(Prepared(make_drawing(model, asked)), 2, None))

    def find(self, key: str) -> PageJob:
        """A job by its key.

        Raises:
            ConfigError: there is none.
        """
        with self._lock:
            if key not in self._jobs:
                raise ConfigError("these pictures are no longer there; draw them again")
            return self._jobs[key]


def job_facts(job: PageJob) -> dict[str, Any]:
    """How far a job is, without its pictures."""
    progress = job.drawn.progress
    counts = [float(samples.evaluations[row]) for samples, row in job.pictures]
    inverting = job.task.inverting
    return {
        "state": progress.state,
        "total": progress.total,
        "before": progress.ahead,
        "progress": progress.share,
        "seconds": job.seconds,
        "left": job.left,
        "evaluations": sum(counts) / len(counts) if counts else None,
        "error": job.error,
        "numbers": inverting.numbers if inverting else {},
    }
