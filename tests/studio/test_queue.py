"""The queue: every picture as it is drawn alone, bit for bit; order, limits, stopping, failing, closing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from latentflow.api import LatentFlow
from latentflow.errors import NonFiniteError
from latentflow.sampling.drawing import make_drawing
from latentflow.sampling.pipeline import Prepared
from latentflow.sampling.request import SampleRequest
from latentflow.studio import queue as queues
from latentflow.studio.queue import DrawingQueue, QueueClosed, QueueFull, Stopped
from tests import tiny


@pytest.fixture(scope="module")
def model(kl) -> LatentFlow:
    return tiny.model(kl, time_scale=20.0)


@pytest.fixture
def queue() -> Iterator[DrawingQueue]:
    made = DrawingQueue(batch_size=8)
    yield made
    made.close()


def prepared(model: LatentFlow, **request) -> Prepared:
    return Prepared(make_drawing(model, SampleRequest(**{"num": 1, **request})))


@contextmanager
def held(queue: DrawingQueue, model: LatentFlow) -> Iterator[Callable[[], None]]:
    """The thread is kept busy by a request until the block ends, or until the function is called."""
    drawing, go = threading.Event(), threading.Event()

    def on_change(job) -> None:
        drawing.set()
        assert go.wait(30)

    job = queue.submit(model, prepared(model, seed=10_000), on_change=on_change)
    assert drawing.wait(30)
    try:
        yield go.set
    finally:
        go.set()
        job.result(30)


def equals_direct(model: LatentFlow, samples, batch_size: int = 8, **request) -> None:
    direct = model.sample(**{"num": 1, **request}, batch_size=batch_size)
    assert torch.equal(samples.pixels, direct.pixels)
    assert torch.equal(samples.latents, direct.latents)
    assert torch.equal(samples.evaluations, direct.evaluations)
    assert samples.drawing == direct.drawing


REQUESTS = [
    {"seed": 0},
    {"seed": 7, "classes": ["berry"]},
    {"seed": 3, "num": 4},
    {"seed": 20, "num": 4, "classes": ["apple", "cherry"]},
    {"seed": 5, "num": 2, "guidance": 2.0, "classes": ["apple"]},
    {"seed": 5, "num": 2, "guidance": 2.0, "classes": ["cherry"]},
    {"seed": 50, "num": 19},
    {"seed": 8, "classes": "none"},
    {"seed": 9, "solver": "dopri5"},
    {"seed": 1, "steps": 3},
]


def test_pictures_are_those_of_direct_calls_bit_for_bit(queue, model):
    for _ in range(2):  # first it is seen which batches change nothing, then they are used
        with held(queue, model):
            jobs = [queue.submit(model, prepared(model, **request)) for request in REQUESTS]
        for job, request in zip(jobs, REQUESTS, strict=True):
            equals_direct(model, job.result(60), **request)


@pytest.mark.parametrize("more", [{}, {"guidance": 2.0}, {"num": 2}, {"num": 3, "guidance": 2.0, "classes": "apple"}])
def test_requests_that_fit_share_batches(queue, model, more):
    """Single pictures as well, although libraries round them in another way than larger batches."""
    requests = [{"seed": seed, **more} for seed in (0, 100)]

    def drawn() -> int:
        before = queue.batches_drawn
        with held(queue, model):
            jobs = [queue.submit(model, prepared(model, **request)) for request in requests]
        for job, request in zip(jobs, requests, strict=True):
            equals_direct(model, job.result(60), **request)
        return queue.batches_drawn - before

    drawn()
    assert drawn() == 2  # that of `held` and one for both


def test_a_batch_that_changes_a_picture_is_not_drawn_again(queue, model, monkeypatch):
    sizes = []
    draw = queues.draw_batches

    def other_bits_for_eight(model, batches, size, calls):
        for samples in draw(model, batches, size, calls):
            sizes.append(len(samples.pixels))
            nudge = 1e-6 if len(samples.pixels) == 8 else 0
            yield replace(samples, latents=samples.latents.clone() + nudge)

    monkeypatch.setattr(queues, "draw_batches", other_bits_for_eight)
    for wanted in ([1, 8, 4, 4], [1, 4, 4]):
        sizes.clear()
        with held(queue, model):
            jobs = [queue.submit(model, prepared(model, seed=seed, num=4)) for seed in (0, 100)]
        for job, seed in zip(jobs, (0, 100), strict=True):
            equals_direct(model, job.result(60), seed=seed, num=4)
        assert sizes == wanted


def test_few_sizes_of_batches_are_tried(queue, model):
    """A batch of an unknown size is drawn twice; one that is little larger than a known one is not tried."""

    def drawn(num: int) -> int:
        before = queue.images_drawn
        with held(queue, model):
            jobs = [queue.submit(model, prepared(model, seed=seed)) for seed in range(num)]
        for seed, job in enumerate(jobs):
            equals_direct(model, job.result(60), seed=seed)
        return queue.images_drawn - before - 1  # that of `held`

    assert [drawn(num) for num in (4, 4, 5, 8, 8)] == [8, 4, 5, 16, 8]


def test_a_long_request_lets_others_pass(queue, model):
    ended = []
    with held(queue, model):
        long = queue.submit(model, prepared(model, num=40))
        short = queue.submit(model, prepared(model, seed=1, steps=3))
        long.future.add_done_callback(lambda _: ended.append("long"))
        short.future.add_done_callback(lambda _: ended.append("short"))
    long.result(60)
    short.result(60)
    assert ended == ["short", "long"]


def test_a_full_queue_refuses(model):
    queue = DrawingQueue(most_waiting=2)
    with held(queue, model):
        job = queue.submit(model, prepared(model))
        with pytest.raises(QueueFull, match="2 requests are waiting, and no more may; try again in 1 s"):
            queue.submit(model, prepared(model))
        job.stop()
        queue.submit(model, prepared(model)).stop()  # what is stopped takes no room
    queue.close()


def test_what_is_stopped_is_not_drawn(queue, model):
    with held(queue, model):
        job = queue.submit(model, prepared(model))
        assert job.progress.state == "waiting" and job.progress.ahead == 1
        job.stop()
        assert job.progress.state == "stopped"
        with pytest.raises(Stopped):
            job.result(0)
    assert queue.images_drawn <= 1


def test_a_batch_for_nobody_ends_at_the_next_step(queue, model):
    calls = []

    def on_change(job) -> None:
        calls.append(job.progress.share)
        if len(calls) == 5:
            job.stop()

    job = queue.submit(model, prepared(model, steps=1000), on_change=on_change)
    with pytest.raises(Stopped):
        job.result(30)
    queue.submit(model, prepared(model)).result(30)
    assert len(calls) < 10
    assert queue.images_drawn == 1


def test_progress_grows_to_the_end(queue, model):
    seen = []
    job = queue.submit(model, prepared(model, num=16, steps=4), on_change=lambda job: seen.append(job.progress))
    job.result(30)
    queue.close()  # the last change is said after the result is there
    shares = [one.share for one in seen]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    assert {one.images for one in seen} == {0, 8, 16}
    assert [part.drawing.seeds[0] for part in job.parts] == [0, 8]


def test_one_bad_request_does_not_harm_the_others(queue, model, monkeypatch):
    draw = queues.draw_batches

    def failing(model, batches, size, calls):
        ((drawing, given),) = batches
        if 100 in drawing.seeds:
            raise NonFiniteError("seed 100 is not finite")
        yield from draw(model, [(drawing, given)], size, calls)

    monkeypatch.setattr(queues, "draw_batches", failing)
    with held(queue, model):
        jobs = [queue.submit(model, prepared(model, seed=seed, num=4)) for seed in (0, 100)]
    equals_direct(model, jobs[0].result(30), seed=0, num=4)
    with pytest.raises(NonFiniteError, match="seed 100"):
        jobs[1].result(30)
    assert not queue.is_closed


def test_a_lost_device_ends_the_queue(model, monkeypatch):
    queue = DrawingQueue()

    def lost(*given):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(queues, "draw_batches", lost)
    with pytest.raises(RuntimeError):
        queue.submit(model, prepared(model)).result(30)
    with pytest.raises(QueueClosed, match=r"^the device failed \(CUDA error: .*encountered\); start the server again$"):
        queue.submit(model, prepared(model))


def test_closing_finishes_the_batch_and_refuses_the_rest(model):
    queue = DrawingQueue(batch_size=4)
    with held(queue, model) as go:
        waiting = queue.submit(model, prepared(model))
        queue.begin_to_close()
        with pytest.raises(QueueClosed, match="is being closed"):
            queue.submit(model, prepared(model))
        go()
    with pytest.raises(QueueClosed):
        waiting.result(30)
    queue.close()
    assert queue.images_drawn == 1
