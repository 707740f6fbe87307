"""The queue before a device: requests of many users, drawn in turn by one thread.

    submit  ->  waiting  ->  a piece of each in turn, joined where that changes no picture  ->  result, or its error

The first of the waiting requests gives the next batch; others that fit fill it up. A request of more images than one
batch holds gives one piece, and goes to the end of the queue: nobody waits for all of it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from weakref import WeakKeyDictionary

from torch import Tensor

from latentflow.errors import LatentFlowError, NonFiniteError
from latentflow.flow.guidance import VelocityFunction
from latentflow.flow.solvers import expected_evaluations, is_adaptive
from latentflow.model.flow_model import FlowModel
from latentflow.sampling.captured_calls import Calls, calls_for
from latentflow.sampling.drawing import Drawing
from latentflow.sampling.pipeline import Given, Prepared, draw_batches
from latentflow.sampling.samples import Samples, join_samples
from latentflow.shapes import Condition
from latentflow.studio.joining import EqualBits, Piece, in_one_batch, parted
from latentflow.studio.piecewise import PiecewiseModel

_DEVICE_LOST = ("CUDA error", "device-side assert", "AcceleratorError")
"""In messages of errors after which a device computes nothing more."""


class QueueFull(LatentFlowError):
    """As many requests are waiting as may wait.

    Attributes:
        seconds: after which there may be room.
    """

    exit_code = 1

    def __init__(self, waiting: int, seconds: float):
        super().__init__(f"{waiting} requests are waiting, and no more may; try again in {seconds:.0f} s")
        self.seconds = seconds


class QueueClosed(LatentFlowError):
    """The queue takes no more requests: it is being closed, or its device failed."""

    exit_code = 1


class Stopped(LatentFlowError):
    """A request was stopped before it was drawn."""

    exit_code = 1


@dataclass(frozen=True)
class JobProgress:
    """How far a request is.

    Attributes:
        state: "waiting", "drawing", "done", "failed" or "stopped".
        ahead: requests that are drawn before it begins.
        images: that are drawn.
        total: images of the request.
        share: of its work, in [0, 1]; counts network calls.
    """

    state: str
    ahead: int
    images: int
    total: int
    share: float


class DrawingJob:
    """A request in the queue. `result` waits for it; `stop` gives it up.

    Attributes:
        future: the samples, or the error.
        parts: the samples that were drawn so far, in the order of their images; not yet finished as `Prepared` says.
    """

    def __init__(
        self, queue: DrawingQueue, model: FlowModel, prepared: Prepared, on_change: Callable[[DrawingJob], None]
    ):
        self.model, self.prepared, self.future = model, prepared, Future()
        self.parts: list[Samples] = []
        self._queue, self._on_change = queue, on_change
        self._given: Given | None = None
        self._calls, self._is_stopped, self._began = 0, False, False
        self.submitted = time.monotonic()

    @property
    def total(self) -> int:
        """Images of the request."""
        return len(self.prepared.drawing.seeds)

    @property
    def images(self) -> int:
        """Images that are drawn."""
        return sum(len(part.pixels) for part in list(self.parts))

    def result(self, timeout: float | None = None) -> Samples:
        """Wait for the samples.

        Raises:
            Stopped, QueueClosed, NonFiniteError, TimeoutError: there are none.
        """
        return self.future.result(timeout)

    def stop(self) -> None:
        """Give the request up: it is not drawn, or not further; a batch that is for it alone ends at its next step."""
        self._is_stopped = True
        self.fail(Stopped("the request was stopped"))

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be drawn for it."""
        return self._is_stopped or self.future.done()

    @property
    def progress(self) -> JobProgress:
        """How far it is; may be asked for by any thread."""
        drawing, images = self.prepared.drawing, self.images
        if self._is_stopped:
            state = "stopped"
        elif self.future.done():
            state = "failed" if self.future.exception() else "done"
        else:
            state = "drawing" if self._began else "waiting"
        sampling = drawing.sampling
        calls = max(expected_evaluations(sampling.solver, sampling.steps, sampling.rtol), 1)
        now = min(self._calls / calls, 0.99) * min(self._queue.batch_size, self.total - images) if self._calls else 0
        share = 1.0 if state == "done" else (images + now) / self.total
        return JobProgress(state, self._queue.ahead_of(self), images, self.total, share)

    def next_piece(self) -> Piece:
        """The images to be drawn next; called by the drawing thread alone, which computes here what is given."""
        if self._given is None:
            self._given = self.prepared.given()
        together = min(self.prepared.together, self._queue.batch_size)
        rows = slice(self.images, min(self.images + together, self.total))
        return Piece(
            self, self._queue.number_of(self.model), rows, self.prepared.drawing.at(rows), self._given.at(rows)
        )

    def begin(self) -> None:
        """A piece of it is being drawn."""
        self._began, self._calls = True, 0
        self.tell()

    def called(self) -> None:
        """The network was called for a piece of it."""
        self._calls += 1
        self.tell()

    def take(self, part: Samples) -> None:
        """Add what was drawn; the last part completes the result."""
        self.parts.append(part)
        self._calls = 0
        if self.images == self.total and not self.is_over:
            try:
                samples = self.parts[0] if len(self.parts) == 1 else join_samples(self.parts)
                self._settle(self.prepared.finish(samples), None)
            except Exception as error:
                self.fail(error)
        self.tell()

    def fail(self, error: BaseException) -> None:
        """End it with an error, unless it has ended."""
        self._settle(None, error)
        self.tell()

    def _settle(self, samples: Samples | None, error: BaseException | None) -> None:
        with self._queue.settling:  # two threads may end it
            if self.future.done():
                return
            self.future.set_exception(error) if error is not None else self.future.set_result(samples)

    def tell(self) -> None:
        self._on_change(self)


class DrawingQueue:
    """Draws requests in one thread, for one device.

    Args:
        batch_size: images drawn together at most.
        most_waiting: requests that may wait, those that are being drawn included.
    """

    def __init__(self, *, batch_size: int = 16, most_waiting: int = 64):
        self.batch_size, self.most_waiting = batch_size, most_waiting
        self.settling = threading.RLock()
        self.images_drawn, self.batches_drawn, self.seconds_drawing = 0, 0, 0.0
        self.fault = ""
        """Why the device draws nothing more; empty: it does."""
        self._jobs: deque[DrawingJob] = deque()
        self._change = threading.Condition()
        self._is_closed = False
        self._bits = EqualBits()
        self._calls: WeakKeyDictionary[FlowModel, dict[bool, Calls]] = WeakKeyDictionary()
        self._piecewise: WeakKeyDictionary[FlowModel, PiecewiseModel] = WeakKeyDictionary()
        self._numbers: WeakKeyDictionary[FlowModel, int] = WeakKeyDictionary()
        self._count = count()
        self._thread = threading.Thread(target=self._run, name="drawing", daemon=True)
        self._thread.start()

    def number_of(self, model: FlowModel) -> int:
        """A number of its own for each model, which no later one has."""
        return self._numbers.setdefault(model, next(self._count))

    def submit(
        self, model: FlowModel, prepared: Prepared, *, on_change: Callable[[DrawingJob], None] = lambda job: None
    ) -> DrawingJob:
        """Add a request; returns at once.

        Args:
            on_change: called, mostly by the drawing thread, whenever the job's progress changes; must be quick.

        Raises:
            QueueFull, QueueClosed: it was not added.
        """
        job = DrawingJob(self, model, prepared, on_change)
        with self._change:
            if self.fault:
                raise QueueClosed(self.fault)
            if self._is_closed:
                raise QueueClosed("the server is being closed")
            waiting = sum(not one.is_over for one in self._jobs)
            if waiting >= self.most_waiting:
                raise QueueFull(waiting, self._seconds_left())
            self._jobs.append(job)
            self._change.notify_all()
        return job

    @property
    def waiting(self) -> int:
        """Requests that are not over, those that are being drawn included."""
        with self._change:
            return sum(not job.is_over for job in self._jobs)

    def ahead_of(self, job: DrawingJob) -> int:
        """Requests before a job."""
        with self._change:
            jobs = [one for one in self._jobs if not one.is_over]
            return jobs.index(job) if job in jobs else 0

    @property
    def is_closed(self) -> bool:
        """Whether no request is taken any more."""
        return self._is_closed or bool(self.fault)

    def close(self, *, wait: bool = True) -> None:
        """Refuse all that is waiting, and finish the batch that is being drawn.

        Args:
            wait: until it is drawn.
        """
        self._is_closed = True
        with self._change:
            self._change.notify_all()
        if wait and threading.current_thread() is not self._thread:
            self._thread.join()

    def begin_to_close(self) -> None:
        """Take no more; may be called by a signal handler, since it waits for no lock."""
        self._is_closed = True
        threading.Thread(target=self.close, kwargs={"wait": False}, daemon=True).start()

    def _seconds_left(self) -> float:
        """An estimate of the time until there is room, of at least a second."""
        images = sum(job.total - job.images for job in self._jobs if not job.is_over)
        each = self.seconds_drawing / self.images_drawn if self.images_drawn else 1.0
        return min(max(images * each / max(len(self._jobs), 1), 1.0), 600.0)

    def _run(self) -> None:
        while (pieces := self._next()) is not None:
            if pieces:
                self._draw(pieces)
        reason = self.fault or "the server is being closed"
        with self._change:
            left = list(self._jobs)
            self._jobs.clear()
        for job in left:
            job.fail(QueueClosed(reason))

    def _next(self) -> list[Piece] | None:
        """The pieces of the next batch; None: the queue is closed."""
        with self._change:
            while True:
                self._jobs = deque(job for job in self._jobs if not job.is_over)
                if self.is_closed:
                    return None
                if self._jobs:
                    break
                self._change.wait()
            jobs = list(self._jobs)
        pieces = self._fitting(jobs)
        drawn = {id(piece.job) for piece in pieces}
        with self._change:  # those that are not done stand behind the others
            kept = [job for job in self._jobs if id(job) not in drawn]
            self._jobs = deque([*kept, *(piece.job for piece in pieces)])
        return pieces

    def _fitting(self, jobs: Sequence[DrawingJob]) -> list[Piece]:
        """A piece of the first job, and pieces of others that fit into the same batch."""
        pieces: list[Piece] = []
        for job in jobs:
            if pieces and not self._may_fit(pieces[0], job):
                continue
            piece = self._piece_of(job)
            if piece is None:
                continue
            if not pieces:
                pieces.append(piece)
                continue
            room = min(self.batch_size, job.prepared.together) - sum(one.num for one in pieces)
            if piece.kind == pieces[0].kind and piece.num <= room:
                pieces.append(piece)
            if sum(one.num for one in pieces) >= self.batch_size:
                break
        return pieces[: self._how_many(pieces)]

    def _how_many(self, pieces: Sequence[Piece]) -> int:
        """How many of the pieces to draw in one batch.

        As many as are known to change no picture. To find out about more takes twice the time, so this is done for full
        batches and for those that are twice as large.
        """

        def images(count: int) -> int:
            return sum(piece.num for piece in pieces[:count])

        verdicts = [self._bits.allows(pieces[:count]) for count in range(1, len(pieces) + 1)]
        known = max((count for count, verdict in enumerate(verdicts, 1) if verdict), default=len(pieces[:1]))
        unknown = max((count for count, verdict in enumerate(verdicts, 1) if verdict is None), default=0)
        is_worth_it = images(unknown) == self.batch_size or images(unknown) >= 2 * images(known)
        return unknown if unknown > known and is_worth_it else known

    @staticmethod
    def _may_fit(first: Piece, job: DrawingJob) -> bool:
        """Quickly, before anything is computed for the job."""
        one, other = first.drawing, job.prepared.drawing
        return first.joins_others and job.model is first.model and one.task == other.task and one.told == other.told

    def _piece_of(self, job: DrawingJob) -> Piece | None:
        try:
            return job.next_piece()
        except Exception as error:
            self._blame(job, error)
            return None

    def _draw(self, pieces: Sequence[Piece]) -> None:
        """Draw pieces in one batch, or each in its own where that is not known to be the same."""
        for piece in pieces:
            piece.job.begin()
        try:
            allowed = self._bits.allows(pieces)
            together = self._drawn(pieces)
            if not allowed:
                apart = [self._drawn([piece])[0] for piece in pieces]
                self._bits.learn(pieces, together, apart)
                together = apart
        except Stopped:
            return
        except Exception as error:
            if len(pieces) == 1:
                self._blame(pieces[0].job, error)
            else:  # one of them is to blame; the others are not harmed
                for piece in pieces:
                    self._draw([piece])
            return
        for piece, samples in zip(pieces, together, strict=True):
            piece.job.take(samples)

    def _drawn(self, pieces: Sequence[Piece]) -> list[Samples]:
        model, began = pieces[0].model, time.perf_counter()
        if len(pieces) > 1 and model.device.type == "cpu":
            if model not in self._piecewise:
                self._piecewise[model] = PiecewiseModel(model)
            model = self._piecewise[model].of([piece.num for piece in pieces])
        drawing, given = in_one_batch(pieces)
        (samples,) = draw_batches(model, [(drawing, given)], self.batch_size, self._watched(pieces, drawing))
        self.images_drawn += len(drawing.seeds)
        self.batches_drawn += 1
        self.seconds_drawing += time.perf_counter() - began
        return parted(samples, pieces)

    def _watched(self, pieces: Sequence[Piece], drawing: Drawing) -> Calls:
        """Network calls that are counted, and end when nobody waits for the pictures any more."""
        model = pieces[0].model
        of_model = self._calls.setdefault(model, {})
        calls = of_model.setdefault(is_adaptive(drawing.sampling.solver), calls_for(model.device, drawing))

        def watched(flow: FlowModel) -> VelocityFunction:
            velocity = calls(flow)

            def call(latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
                if all(piece.job.is_over for piece in pieces):
                    raise Stopped("nobody waits for these pictures")
                for piece in pieces:
                    piece.job.called()
                return velocity(latents, time, condition)

            return call

        return watched

    def _blame(self, job: DrawingJob, error: Exception) -> None:
        """End a job with its error; a device that is lost ends the queue."""
        text = str(error)
        if not isinstance(error, LatentFlowError | NonFiniteError) and any(word in text for word in _DEVICE_LOST):
            self.fault = f"the device failed ({text.splitlines()[0]}); start the server again"
        job.fail(error)
