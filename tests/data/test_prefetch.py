"""Batches that are read in the background."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch

from latentflow.data import batches, prefetch
from latentflow.data.batches import SpatialData, StreamPositions, TrainingImages, stream_batches
from latentflow.data.cache.reader import LatentCache
from latentflow.data.painting.mask_rules import MaskRules
from latentflow.data.prefetch import Reading, in_threads, room_for_workers, stream_processes, usable_cpus
from latentflow.data.sources.images import open_images
from tests import tiny


@pytest.mark.parametrize(
    ("files", "share"),
    [
        ({}, None),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu.max": "nonsense"}, None),
    ],
)
def test_processors_that_a_container_gives(tmp_path, files, share):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert usable_cpus(tmp_path) == (share or len(os.sched_getaffinity(0)))


def test_processes_are_as_many_as_there_is_room_for(monkeypatch):
    free, files = [1 << 30], [1024]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (files[0], 4096))
    assert room_for_workers(8, 1 << 20) == 8
    assert room_for_workers(8, 100 << 20) == 5  # half of the shared memory holds so many batches
    assert room_for_workers(8, 100 << 20, sharing=2) == 2
    assert room_for_workers(8, 1 << 30) == 0
    assert room_for_workers(0, 1) == room_for_workers(-1, 1) == 0
    files[0] = 150
    assert room_for_workers(8, 1) == 0
    files[0], free[0] = 1024, 1 << 20
    assert room_for_workers(8, 1) == 0


def test_threads_keep_the_order_and_run_only_a_little_ahead():
    taken = []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    with closing(in_threads(lambda number: number**2, items(), num_threads=2)) as squares:
        assert [next(squares) for _ in range(3)] == [0, 1, 4]
        assert len(taken) == 7  # three, and twice as many ahead as there are threads
    assert len(taken) == 7
    assert list(in_threads(lambda number: number**2, range(9), num_threads=2)) == [n**2 for n in range(9)]


def test_what_goes_wrong_in_a_thread_is_raised_in_its_place():
    results = in_threads(lambda number: 1 / number, [1, 2, 0, 4])
    assert [next(results), next(results)] == [1, 0.5]
    with pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_threads_and_processes_prefetch_the_same(images, num_workers):
    own = TrainingImages(open_images(images, tiny.IMAGE_SIZE), seed=2, flip=True)
    positions = [range(5), range(5, 9), range(9, 20)]
    with prefetch.prefetch(own, positions, Reading(num_workers)) as read:
        batches = list(read)
    for some, batch in zip(positions, batches, strict=True):
        assert torch.equal(batch.pixels, own.at(some).pixels)


@pytest.mark.parametrize(
    ("cpus", "sharing", "from_cache", "from_images"), [(16, 1, 4, 15), (16, 8, 1, 1), (4, 1, 2, 3), (1, 1, 0, 0)]
)
def test_readers_for_a_gpu(
    monkeypatch, images, cache, segmented_cache, segmented, cpus, sharing, from_cache, from_images
):
    monkeypatch.setattr(batches, "usable_cpus", lambda: cpus)
    cached, own = LatentCache(cache), open_images(images, tiny.IMAGE_SIZE)
    given = {"seed": 0, "flip": False}
    assert batches._readers(TrainingImages(cached, **given), True, sharing) == from_cache
    assert batches._readers(TrainingImages(own, **given), True, sharing) == from_images
    cut = SpatialData(tiny.FACTOR, holes=MaskRules(), pictures=own)
    both = TrainingImages(cached, spatial=cut, **given)
    assert batches._readers(both, True, sharing) == from_images
    assert batches._readers(both, False, sharing) == 0
    held = TrainingImages(cached, **given)
    held.hold(torch.device("cpu"))
    assert batches._readers(held, True, sharing) == 0


@pytest.mark.parametrize("start", [None, "spawn"])
def test_processes_that_are_spawned_give_the_same(images, start):
    own = TrainingImages(open_images(images, tiny.IMAGE_SIZE), seed=2, flip=True)
    positions = [range(5), range(5, 9), range(9, 20)]
    read = list(stream_processes(own, positions, Reading(2), start=start))
    assert [batch.positions.tolist() for batch in read] == [list(some) for some in positions]
    for some, batch in zip(positions, read, strict=True):
        assert torch.equal(batch.pixels, own.at(some).pixels)


def test_after_cuda_has_begun_nothing_is_forked(images, monkeypatch):
    used = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)

    class Loader:
        def __init__(self, *given, multiprocessing_context, **options):
            used.append(multiprocessing_context)

        def __iter__(self):
            return iter([])

    monkeypatch.setattr(prefetch, "DataLoader", Loader)
    own = TrainingImages(open_images(images, tiny.IMAGE_SIZE), seed=2, flip=True)
    assert list(stream_batches(own, StreamPositions(0, 2, 2, 0, 1), num_workers=1, pin_memory=False)) == []
    assert used == ["spawn"]


@pytest.mark.parametrize("start", [None, "spawn"])
def test_signals_to_the_whole_group_leave_the_readers_alive(images, start):
    """Those of a terminal and of a batch system, also while processes begin."""
    own = TrainingImages(open_images(images, tiny.IMAGE_SIZE), seed=2, flip=True)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    stream = stream_processes(own, StreamPositions(0, 2, 2, 0, 1), Reading(1), start=start)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    worker = stream.gi_frame.f_locals["batches"]._workers[0]
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):  # perhaps before it has begun
        os.kill(worker.pid, number)
    read = [batch.positions.tolist() for batch in itertools.islice(stream, 5)]
    for number in (signal.SIGINT, signal.SIGHUP):
        os.kill(worker.pid, number)
    read += [batch.positions.tolist() for batch in itertools.islice(stream, 30)]
    assert read == [[n, n + 1] for n in range(0, 70, 2)]
    stream.close()
    worker.join(10)
    assert not worker.is_alive()


SCRIPT = """
import sys
from latentflow.data.prefetch import Reading, stream_processes
from latentflow.data.batches import TrainingImages
from latentflow.data.sources.images import open_images

print("the script runs", flush=True)
images = TrainingImages(open_images(sys.argv[1], 16), seed=0, flip=False)
read = stream_processes(images, [range(4), range(4, 6)], Reading(2), start="spawn")
print([len(batch.pixels) for batch in read])
"""


def test_a_script_that_is_not_made_for_it_runs_once(images, tmp_path):
    """As one that calls `encode` without asking whether it is the main module."""
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, tmp_path / "script.py", images], capture_output=True, text=True, timeout=600)
    assert (done.stdout, done.stderr) == ("the script runs\n[4, 2]\n", "")
