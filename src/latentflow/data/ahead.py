"""Reading ahead in processes of their own: how many, started how, and how they end.

They are forked as long as that is safe. Once CUDA has begun they are started anew: a fork would have its state, and
locks that belong to nobody.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from latentflow.errors import DataError, LatentFlowError

Read = TypeVar("Read")

_MOST_AHEAD = 4  # batches of each process
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
    if wanted < 1 or _shared_bytes() < _LEAST_SHARED_BYTES or _allowed_files() < _needed_files(wanted):
        return 0
    return min(wanted, int(_batches_with_room(num_bytes, sharing)))


def read_ahead(
    dataset: Dataset,
    batches: Iterable[Any],
    *,
    num_workers: int,
    num_bytes: int,
    pin_memory: bool,
    sharing: int = 1,
    start: str | None = None,
) -> Generator[Any, None, None]:
    """What `dataset` gives for each of `batches`, in order, read by processes until it is closed.

    Args:
        num_workers: processes, >= 1.
        num_bytes: of one batch.
        start: how processes are started; None: as is safe.

    Raises:
        DataError: the machine has no room for what `num_workers` processes hand over.
    """
    _require_shared_memory(num_workers)
    _require_open_files(num_workers)
    start = start or ("spawn" if torch.cuda.is_initialized() else None)
    if start == "spawn":
        resource_tracker.ensure_running()  # which lets signals through when it starts
    loader = DataLoader(
        _Told(dataset),
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_as_is,
        prefetch_factor=int(min(max(_batches_with_room(num_bytes, sharing) // num_workers, 1), _MOST_AHEAD)),
        worker_init_fn=_leave_signals_to_the_run,
        multiprocessing_context=start,
    )
    with _signals_held():
        reading = iter(loader)
    return _read(reading, num_workers)


class _Told(Dataset):
    """Batches whose faults are handed on as values: an exception from another process would bring its traceback."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitems__(self, batch: Any) -> Any:
        try:
            return self.dataset.__getitems__(batch)
        except (LatentFlowError, OSError) as error:
            return DataError(str(error))


@contextmanager
def _signals_held() -> Iterator[None]:
    """Keep signals for later: processes that are started in here get none before they know what to do with them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_run(worker: int) -> None:
    """Terminals and batch systems signal all processes at once; the run needs images to end well, and ends this one.

    The second SIGTERM ends it: the first may be a batch system's, and at the end torch and Python send one each.
    """
    for number in set(_SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


@contextmanager
def lost_workers(num_workers: int | None = None) -> Iterator[None]:
    """A process that reads images ahead and dies is one line, wherever torch raises it: it does so in any place.

    Raises:
        DataError: with what was said of it, and the remedy.
    """
    try:
        yield
    except RuntimeError as error:
        if num_workers != 0 and "DataLoader worker" in str(error):
            raise _lost(num_workers, error) from error
        raise


def _read(batches: Iterator[Any], num_workers: int) -> Generator[Any, None, None]:
    try:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                raise _lost(num_workers, error) from error.with_traceback(None)  # which would keep `batches`
            if isinstance(batch, DataError):
                raise batch
            yield batch
    finally:
        del batches  # its last reference: torch ends the processes that read ahead


def _lost(num_workers: int | None, error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    which = f"one of {num_workers} processes" if num_workers else "one of the processes"
    return DataError(
        f"{which} that read images ahead was lost ({reason}); use data.num_workers=0, "
        "or give more memory, shared memory (/dev/shm) or open files (ulimit -n)"
    )


def _require_open_files(num_workers: int) -> None:
    """Each tensor that comes from another process is an open file; where they run out, torch fails in many ways."""
    allowed, needed = _allowed_files(), _needed_files(num_workers)
    if allowed < needed:
        raise DataError(
            f"data.num_workers={num_workers} needs {needed} open files, and {allowed} are allowed; use "
            f"data.num_workers=0, or allow more with `ulimit -n {max(needed, 1024)}`"
        )


def _require_shared_memory(num_workers: int) -> None:
    """Batches of other processes come through /dev/shm; where there is none, torch waits for minutes."""
    num_bytes = _shared_bytes()
    if num_bytes < _LEAST_SHARED_BYTES:
        raise DataError(
            f"data.num_workers={num_workers} needs shared memory, and /dev/shm has {num_bytes / 2**20:.0f} MiB; use "
            "data.num_workers=0, or start the container with --shm-size=1g"
        )


def _batches_with_room(num_bytes: int, sharing: int) -> float:
    """How many batches half of the shared memory holds."""
    return _shared_bytes() / 2 / sharing // max(num_bytes, 1)


def _shared_bytes() -> float:
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return 0 if sys.platform == "linux" else float("inf")


def _allowed_files() -> float:
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return float("inf") if allowed == resource.RLIM_INFINITY else allowed


def _needed_files(num_workers: int) -> int:
    return _FILES_OF_BATCHES + _FILES_OF_A_WORKER * num_workers


def _as_is(batch: Any) -> Any:
    return batch
