"""Prefetching: worker processes or threads read the next batches while the device computes.

Whatever reads images in the background reads them here: `prefetch` where there is an end (encoding, checking,
evaluating), `stream_processes` for the endless stream of training.

Workers are forked while that is safe. Once CUDA is initialised they are spawned: a fork would inherit CUDA's state, and
locks that nobody releases.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from statistics import median_low
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from latentflow import console
from latentflow.errors import DataError, LatentFlowError

Item = TypeVar("Item")
Result = TypeVar("Result")

BYTES_READ_TOGETHER = 4 << 20
"""Of a batch that only serves reading: few messages, of which many fit into shared memory."""

_MOST_AHEAD = 4  # batches of each process
_MOST_THREADS = 8
_SECONDS_OF_PYTHON = 2.5e-4  # to read one image, while no other thread runs: more threads would wait for each other
_MOST_PROCESSES = 32
_FEW_IMAGES = 1000
_WORTH_PROCESSES = 4.0  # seconds of reading; processes take three or four to start
_WORTH_ONE_PROCESS = 1.0  # seconds of reading for each: its start takes two or three of a processor
_TIMED = 8  # images that are read to see how long it takes
_MOST_READ_TOGETHER = 128
_LEAST_SHARED_BYTES = 16 << 20  # of /dev/shm, for a few batches of latents
_FILES_OF_BATCHES, _FILES_OF_A_WORKER = 128, 8  # open ones: tensors on their way, pipes
_SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Reading:
    """How batches are read in the background.

    Attributes:
        num_workers: worker processes; 0: threads of this process; None: processes where they pay off.
        batch_bytes: size of one batch, about.
        pin_memory: pin each batch, so that copies to a GPU do not block; a batch then has a method `pin_memory`.
        cpu_is_busy: whether this machine's processors compute meanwhile; worker processes would only slow them down.
        sharing: processes of this machine that read in the same way.
        option: what sets `num_workers`, for messages.
        num_threads: threads at most, where there are no worker processes.
    """

    num_workers: int | None = None
    batch_bytes: int = 1
    pin_memory: bool = False
    cpu_is_busy: bool = False
    sharing: int = 1
    option: str = "--num-workers"
    num_threads: int = _MOST_THREADS


@contextmanager
def prefetch(dataset: Dataset, batches: Sequence[Any], how: Reading | None = None) -> Iterator[Iterator[Any]]:
    """Read `dataset.__getitems__(batch)` for each of `batches` in the background; yields the results in order.

    Reading stops at the end of the context.

    Raises:
        DataError: the machine has no room for this many worker processes, or one of them was lost.
    """
    how = how or Reading()
    if how.num_workers is None:
        how = what_pays(dataset, batches, how)
    read = (stream_processes if how.num_workers else _read_in_threads)(dataset, batches, how)
    with closing(read), lost_workers(how.num_workers, how.option):
        yield read


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int = 8
) -> Generator[Result, None, None]:
    """`function` of each item, in order, computed by threads that run a few items ahead."""
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(num_threads)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def what_pays(dataset: Dataset, batches: Sequence[Any], how: Reading) -> Reading:
    """As many worker processes as are worth starting; or threads, if images are few or processors busy with computing.

    A few images are read to see how long it takes.
    """
    num_images = sum(map(len, batches))
    if how.cpu_is_busy or num_images < _FEW_IMAGES:
        return replace(how, num_workers=0)
    timed = []
    for batch in batches[:: max(len(batches) // _TIMED, 1)]:
        middle, began = len(batch) // 2, time.perf_counter()
        dataset.__getitems__(batch[middle : middle + 1])
        timed.append(time.perf_counter() - began)
    seconds = median_low(timed)  # the first one may take longer
    in_all = seconds * num_images
    wanted = min(usable_cpus() // how.sharing - 1, _MOST_PROCESSES, round(in_all / _WORTH_ONE_PROCESS))
    pays = wanted > 1 and in_all > _WORTH_PROCESSES
    num_workers = room_for_workers(wanted, how.batch_bytes, how.sharing) if pays else 0
    return replace(how, num_workers=num_workers, num_threads=min(round(seconds / _SECONDS_OF_PYTHON), _MOST_THREADS))


def images_read_together(bytes_per_image: int) -> int:
    """How many images `BYTES_READ_TOGETHER` hold: at least one, and at most so many that every process gets some."""
    return min(max(BYTES_READ_TOGETHER // bytes_per_image, 1), _MOST_READ_TOGETHER)


def room_for_workers(wanted: int, batch_bytes: int, sharing: int = 1) -> int:
    """How many of `wanted` worker processes the machine has room for; 0: none.

    Args:
        batch_bytes: size of one batch.
        sharing: processes of this machine that want as many.
    """
    if wanted < 1 or shared_bytes() < _LEAST_SHARED_BYTES or _allowed_files() < _needed_files(wanted):
        return 0
    return min(wanted, int(_batches_with_room(batch_bytes, sharing)))


def usable_cpus(group: Path = _GROUP) -> int:
    """Processors that this process may use: its affinity, limited by the CPU quota of its container."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((group / file).read_text(encoding="utf-8") for file in files).split()
            if float(quota) > 0:
                return max(1, min(allowed, round(float(quota) / float(period))))
        except (OSError, ValueError):  # no such group, or a quota of "max"
            continue
    return allowed


def shared_bytes() -> float:
    """Free bytes of shared memory, through which worker processes return tensors."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return 0 if sys.platform == "linux" else float("inf")


def stream_processes(
    dataset: Dataset, batches: Iterable[Any], how: Reading, *, start: str | None = None
) -> Generator[Any, None, None]:
    """What `dataset` gives for each of `batches`, in order, read by worker processes until the generator is closed.

    Args:
        batches: may be endless.
        how: with at least one worker.
        start: how processes are started; None: the safe way.

    Raises:
        DataError: the machine has no room for what the worker processes return.
    """
    _require_shared_memory(how)
    _require_open_files(how)
    start = start or ("spawn" if torch.cuda.is_initialized() else None)
    hidden = nullcontext()
    if start == "spawn":
        resource_tracker.ensure_running()  # which lets signals through when it starts
        hidden = _main_hidden(dataset)
    ahead = int(min(max(_batches_with_room(how.batch_bytes, how.sharing) // how.num_workers, 1), _MOST_AHEAD))
    with warnings.catch_warnings(), _signals_held(), hidden:
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # more than there are processors
        loader = DataLoader(
            _Answering(dataset),
            batch_sampler=batches,
            num_workers=how.num_workers,
            pin_memory=how.pin_memory,
            collate_fn=_unchanged,
            prefetch_factor=ahead,
            worker_init_fn=_serve,
            multiprocessing_context=start,
        )
        reading = iter(loader)
    return _answers(reading, how)


def _read_in_threads(dataset: Dataset, batches: Iterable[Any], how: Reading) -> Generator[Any, None, None]:
    """The same by threads: they start at once, and take turns in running Python."""

    def read(batch: Any) -> Any:
        found = dataset.__getitems__(batch)
        return found.pin_memory() if how.pin_memory else found

    return in_threads(read, batches, max(min(usable_cpus() // how.sharing, how.num_threads), 1))


@dataclass(frozen=True)
class _Answer:
    """What a worker returns: a batch, or an error in its place, since an exception would bring its traceback along; and
    its notices, which the main process prints."""

    read: Any
    notices: list[tuple[str, str]]

    def pin_memory(self) -> _Answer:
        return self if isinstance(self.read, DataError) else replace(self, read=self.read.pin_memory())


class _Answering(Dataset):
    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitems__(self, batch: Any) -> _Answer:
        try:
            read = self.dataset.__getitems__(batch)
        except (LatentFlowError, OSError) as error:
            read = DataError(str(error))
        return _Answer(read, console.noted())


@contextmanager
def _main_hidden(dataset: Dataset) -> Iterator[None]:
    """Keep spawned workers from running the user's script a second time, which it may not be written for.

    A script that defines what the workers read, such as a custom source, must be.
    """
    main = sys.modules["__main__"]
    if b"__main__" not in bytes(ForkingPickler.dumps(dataset)):
        sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold signals back: workers started in this context get none before their handlers are set."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(worker: int) -> None:
    """Prepare a worker: the main process handles signals and prints notices.

    Terminals and batch systems signal all processes at once; the main process needs images to finish its step, and then
    ends the workers. A worker ends at its second SIGTERM: the first may be a batch system's, and at the end torch and
    Python send one each.
    """
    for number in set(_SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    warnings.filterwarnings("ignore", module=r"PIL\.")
    console.note_down()


@contextmanager
def lost_workers(num_workers: int | None = None, option: str = "data.num_workers") -> Iterator[None]:
    """Turn torch's report of a dead worker process, which it raises at any place, into one line.

    Raises:
        DataError: with the reason and the remedy.
    """
    try:
        yield
    except RuntimeError as error:
        if num_workers != 0 and "DataLoader worker" in str(error):
            raise _lost(num_workers, option, error) from error
        raise


def _answers(batches: Iterator[Any], how: Reading) -> Generator[Any, None, None]:
    try:
        while True:
            try:
                answer = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                raise _lost(how.num_workers, how.option, error) from error.with_traceback(
                    None
                )  # which would keep `batches` alive
            for text, kind in answer.notices:
                console.notice(text, kind)
            if isinstance(answer.read, DataError):
                raise answer.read
            yield answer.read
    finally:
        del batches  # the last reference: torch ends the workers


def _lost(num_workers: int | None, option: str, error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    which = f"one of {num_workers} worker processes" if num_workers else "a worker process"
    return DataError(
        f"{which} that read images was lost ({reason}); use {_none(option)}, "
        "or give more memory, shared memory (/dev/shm) or open files (ulimit -n)"
    )


def _none(option: str) -> str:
    return f"{option} 0" if option.startswith("--") else f"{option}=0"


def _require_open_files(how: Reading) -> None:
    """Each tensor from another process is an open file; when they run out, torch fails in many ways."""
    allowed, needed = _allowed_files(), _needed_files(how.num_workers)
    if allowed < needed:
        raise DataError(
            f"{how.option}={how.num_workers} needs {needed} open files, and {allowed} are allowed; use "
            f"{_none(how.option)}, or allow more with `ulimit -n {max(needed, 1024)}`"
        )


def _require_shared_memory(how: Reading) -> None:
    """Batches of worker processes come through /dev/shm; without it, torch waits for minutes."""
    num_bytes = shared_bytes()
    if num_bytes < _LEAST_SHARED_BYTES:
        raise DataError(
            f"{how.option}={how.num_workers} needs shared memory, and /dev/shm has {num_bytes / 2**20:.0f} MiB; use "
            f"{_none(how.option)}, or start the container with --shm-size=1g"
        )


def _batches_with_room(batch_bytes: int, sharing: int) -> float:
    """How many batches half of the shared memory holds."""
    return shared_bytes() / 2 / sharing // max(batch_bytes, 1)


def _allowed_files() -> float:
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return float("inf") if allowed == resource.RLIM_INFINITY else allowed


def _needed_files(num_workers: int) -> int:
    return _FILES_OF_BATCHES + _FILES_OF_A_WORKER * num_workers


def _unchanged(batch: Any) -> Any:
    return batch
