"""Reading ahead in processes of their own: how many, started how, and how they end.

They are forked as long as that is safe. Once CUDA has begun they are spawned: a fork would have its state, and
locks that belong to nobody.
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
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from latentflow import console
from latentflow.data.pictures.decode import BrokenImage
from latentflow.errors import DataError, LatentFlowError

_MOST_AHEAD = 4  # batches of each process
_MOST_THREADS = 8
_MOST_PROCESSES = 32
_WORTH_PROCESSES = 10.0  # seconds of reading; processes take three or four to begin
_LEAST_SHARED_BYTES = 16 << 20  # of /dev/shm, for a few batches of latents
_FILES_OF_BATCHES, _FILES_OF_A_WORKER = 128, 8  # open ones: tensors on their way, pipes
_SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
_GROUP = Path("/sys/fs/cgroup")


def usable_cpus(group: Path = _GROUP) -> int:
    """Processors that this process may use: those it may run on, of whose time a container may have a share only."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((group / file).read_text(encoding="utf-8") for file in files).split()
            if float(quota) > 0:
                return max(1, min(allowed, round(float(quota) / float(period))))
        except (OSError, ValueError):  # no such group, or a quota of "max"
            continue
    return allowed


def room_for_workers(wanted: int, num_bytes: int, sharing: int = 1) -> int:
    """How many of `wanted` reading processes the machine has room for; 0: none.

    Args:
        num_bytes: of one batch.
        sharing: processes of this machine that want as many.
    """
    if wanted < 1 or shared_bytes() < _LEAST_SHARED_BYTES or _allowed_files() < _needed_files(wanted):
        return 0
    return min(wanted, int(_batches_with_room(num_bytes, sharing)))


def reading_processes(
    read: Callable[[int], Any],
    shards: Sequence[Sequence[int]],
    *,
    device: torch.device | None = None,
    num_bytes: int,
    sharing: int = 1,
) -> int:
    """How many processes pay that read images; 0 for few of them, and where a CPU is busy with computing.

    Args:
        read: reads one image; some are, to see how long it takes.
        shards: which images.
        device: what computes meanwhile; None: nothing does.
        num_bytes: of what is read together.
        sharing: processes of this machine that read likewise.
    """
    num_images = sum(map(len, shards))
    wanted = min(usable_cpus() // sharing - 1, _MOST_PROCESSES)
    if (device is not None and device.type == "cpu") or wanted < 2 or num_images < 1000:
        return 0
    tried = [part[len(part) // 2] for part in shards[:: max(len(shards) // 8, 1)]]
    began = time.perf_counter()
    for row in tried:
        with suppress(BrokenImage):
            read(row)
    seconds = (time.perf_counter() - began) / len(tried) * num_images
    return room_for_workers(wanted, num_bytes, sharing) if seconds > _WORTH_PROCESSES else 0


def shared_bytes() -> float:
    """How much of the memory is free through which processes hand on tensors."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return 0 if sys.platform == "linux" else float("inf")


def read_ahead(
    dataset: Dataset,
    batches: Iterable[Any],
    *,
    num_workers: int,
    num_bytes: int,
    pin_memory: bool,
    sharing: int = 1,
    option: str = "data.num_workers",
    start: str | None = None,
) -> Generator[Any, None, None]:
    """What `dataset` gives for each of `batches`, in order, read by processes until it is closed.

    Args:
        num_workers: processes, >= 1.
        num_bytes: of one batch.
        sharing: processes of this machine that read likewise.
        option: what sets `num_workers`, for messages.
        start: how processes are started; None: as is safe.

    Raises:
        DataError: the machine has no room for what `num_workers` processes hand over.
    """
    _require_shared_memory(num_workers, option)
    _require_open_files(num_workers, option)
    start = start or ("spawn" if torch.cuda.is_initialized() else None)
    hidden = nullcontext()
    if start == "spawn":
        resource_tracker.ensure_running()  # which lets signals through when it starts
        hidden = _main_hidden(dataset)
    ahead = int(min(max(_batches_with_room(num_bytes, sharing) // num_workers, 1), _MOST_AHEAD))
    with warnings.catch_warnings(), _signals_held(), hidden:
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # more than there are processors
        loader = DataLoader(
            _Answering(dataset),
            batch_sampler=batches,
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=_as_is,
            prefetch_factor=ahead,
            worker_init_fn=_serve,
            multiprocessing_context=start,
        )
        reading = iter(loader)
    return _read(reading, num_workers, option)


def read_in_threads(
    dataset: Dataset, batches: Iterable[Any], *, pin_memory: bool = False, sharing: int = 1
) -> Generator[Any, None, None]:
    """What `read_ahead` gives, by threads of this process: they begin at once, and take turns in running Python."""
    num_threads = max(min(usable_cpus() // sharing, _MOST_THREADS), 1)

    def read(batch: Any) -> Any:
        found = dataset.__getitems__(batch)
        return found.pin_memory() if pin_memory else found

    waiting: deque[Future[Any]] = deque()
    pool = ThreadPoolExecutor(num_threads)
    try:
        for batch in batches:
            waiting.append(pool.submit(read, batch))
            if len(waiting) > 2 * num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Answer:
    """What a process hands on: what it has read, or its fault, since an exception would bring its traceback; and what
    is to be told of it."""

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
    """Keep processes that are spawned from running the user's script again, which may not be made for that.

    One that defines what they read, such as a source of its own, must be.
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
    """Keep signals for later: processes that are started in here get none before they know what to do with them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(worker: int) -> None:
    """Leave signals and notices to the run, in a process that reads for it.

    Terminals and batch systems signal all processes at once; the run needs images to end well, and ends this one.
    The second SIGTERM ends it: the first may be a batch system's, and at the end torch and Python send one each.
    """
    for number in set(_SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    warnings.filterwarnings("ignore", module=r"PIL\.")
    console.note_down()


@contextmanager
def lost_workers(num_workers: int | None = None, option: str = "data.num_workers") -> Iterator[None]:
    """A process that reads images ahead and dies is one line, wherever torch raises it: it does so in any place.

    Raises:
        DataError: with what was said of it, and the remedy.
    """
    try:
        yield
    except RuntimeError as error:
        if num_workers != 0 and "DataLoader worker" in str(error):
            raise _lost(num_workers, option, error) from error
        raise


def _read(batches: Iterator[Any], num_workers: int, option: str) -> Generator[Any, None, None]:
    try:
        while True:
            try:
                answer = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                raise _lost(num_workers, option, error) from error.with_traceback(None)  # which would keep `batches`
            for text, kind in answer.notices:
                console.notice(text, kind)
            if isinstance(answer.read, DataError):
                raise answer.read
            yield answer.read
    finally:
        del batches  # its last reference: torch ends the processes that read ahead


def _lost(num_workers: int | None, option: str, error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    which = f"one of {num_workers} processes" if num_workers else "one of the processes"
    return DataError(
        f"{which} that read images ahead was lost ({reason}); use {_none(option)}, "
        "or give more memory, shared memory (/dev/shm) or open files (ulimit -n)"
    )


def _none(option: str) -> str:
    return f"{option} 0" if option.startswith("--") else f"{option}=0"


def _require_open_files(num_workers: int, option: str) -> None:
    """Each tensor that comes from another process is an open file; where they run out, torch fails in many ways."""
    allowed, needed = _allowed_files(), _needed_files(num_workers)
    if allowed < needed:
        raise DataError(
            f"{option}={num_workers} needs {needed} open files, and {allowed} are allowed; use "
            f"{_none(option)}, or allow more with `ulimit -n {max(needed, 1024)}`"
        )


def _require_shared_memory(num_workers: int, option: str) -> None:
    """Batches of other processes come through /dev/shm; where there is none, torch waits for minutes."""
    num_bytes = shared_bytes()
    if num_bytes < _LEAST_SHARED_BYTES:
        raise DataError(
            f"{option}={num_workers} needs shared memory, and /dev/shm has {num_bytes / 2**20:.0f} MiB; use "
            f"{_none(option)}, or start the container with --shm-size=1g"
        )


def _batches_with_room(num_bytes: int, sharing: int) -> float:
    """How many batches half of the shared memory holds."""
    return shared_bytes() / 2 / sharing // max(num_bytes, 1)


def _allowed_files() -> float:
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return float("inf") if allowed == resource.RLIM_INFINITY else allowed


def _needed_files(num_workers: int) -> int:
    return _FILES_OF_BATCHES + _FILES_OF_A_WORKER * num_workers


def _as_is(batch: Any) -> Any:
    return batch
