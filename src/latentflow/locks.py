"""One writer at a time: a lock file in every folder that is being written.

The lock is the system's own (flock) on a small hidden file, so it ends with its process, however that ends: a file that
is left behind, or copied with its folder, locks nothing. Its content only names the holder for others.
"""

from __future__ import annotations

import errno
import fcntl
import inspect
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any

from latentflow.artifacts import LOCK, make_folder, remove_leftovers, require_writable
from latentflow.console import notice
from latentflow.errors import ArtifactError
from latentflow.runtime import Runtime, launch_name, open_runtime

_UNSUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)
_WAIT_SECONDS = 1.0  # for a process that is just ending, or only checking
_held: set[int] = set()


@contextmanager
def only_writer(path: str | Path, runtime: Runtime | None = None) -> Iterator[None]:
    """Hold the lock of a folder, or of a JSON file, while it is written; other writers are refused.

    The folder is created if it is missing, and removed again if nothing was written into it. Half-written files of dead
    writers are removed. On a file system without locks a notice is printed once, and nothing is held.

    Args:
        path: a folder; or a .json file, whose lock is next to it.
        runtime: processes of one launch that write together; None: only one of them may write.

    Raises:
        ArtifactError: another process holds the lock; the message names its id, machine and command.
    """
    path = Path(path)
    folder, name = (path.parent, f".{path.name}{LOCK}") if path.suffix == ".json" else (path, LOCK)
    rank = runtime.rank if runtime else 0
    require_writable(folder)
    together = runtime is not None and runtime.world > 1  # the last one to leave removes an empty folder
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()] or [folder] * together
    handle = None
    try:
        handle = _acquire(folder, name, rank, path, single=runtime is None)
        if handle is not None:
            _refuse_another_launch(folder, name, path)
            remove_leftovers(folder)
        yield
    finally:
        if handle is not None:
            if _is_same(handle, file := folder / f"{name}.{rank}"):  # not in a folder that has been replaced
                file.unlink(missing_ok=True)  # still locked: nobody else can have taken it
            _held.discard(handle)
            os.close(handle)
        with suppress(OSError):  # it is not empty
            for parent in made:
                parent.rmdir()


def writes(place: str | Callable[[Mapping[str, Any]], Any], *, launch: bool = False) -> Callable:
    """A decorator for functions that write: they hold `only_writer` of a place while they run.

    Args:
        place: the name of the parameter with the path, or a function of all arguments that returns it; a path of None
            means that nothing is written.
        launch: the processes of one launch write together, as the parameter `runtime` says; if that is None, it is
            opened here.
    """

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)

        @wraps(function)
        def locked(*args: Any, **options: Any) -> Any:
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            if launch and bound.arguments["runtime"] is None:
                bound.arguments["runtime"] = open_runtime()
            path = bound.arguments[place] if isinstance(place, str) else place(bound.arguments)
            if not path:
                return function(*bound.args, **bound.kwargs)
            with only_writer(path, bound.arguments["runtime"] if launch else None):
                return function(*bound.args, **bound.kwargs)

        return locked

    return decorate


def _acquire(folder: Path, name: str, rank: int, path: Path, *, single: bool) -> int | None:
    """A handle of the locked file; None if the file system has no locks."""
    file, began = folder / f"{name}.{rank}", time.monotonic()
    while True:
        make_folder(folder)  # which its holder may just have removed
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ArtifactError(f"cannot write {file}: {error.strerror}; choose another place") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            record = os.read(handle, 1 << 16).decode(errors="replace")
            os.close(handle)
            if time.monotonic() - began > _WAIT_SECONDS:
                raise _refusal(path, file, record, single=single) from None
            time.sleep(_WAIT_SECONDS / 10)
            continue
        except OSError as error:
            os.close(handle)
            if error.errno not in _UNSUPPORTED:
                raise ArtifactError(f"cannot lock {file}: {error.strerror}; choose another place") from error
            file.unlink(missing_ok=True)
            notice(f"the file system of {folder} has no locks; make sure that no other process writes there")
            return None
        if _is_same(handle, file):
            break
        os.close(handle)  # its holder has just removed it: the locked file has no name any more
    _held.add(handle)
    os.ftruncate(handle, 0)
    os.write(handle, json.dumps(_this_process()).encode())
    return handle


def _is_same(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _refuse_another_launch(folder: Path, name: str, path: Path) -> None:
    """Refuse if processes of another launch still hold their locks, even if its first one has finished."""
    for file in folder.glob(f"{name}.*"):
        if (record := _written(file)) is not None and _parsed(record).get("launch") != launch_name():
            raise _refusal(path, file, record)


def _written(file: Path) -> str | None:
    """The content of a locked file, once its holder has written it; None if it is not locked."""
    began = time.monotonic()
    while (record := _holder(file)) == "" and time.monotonic() - began < _WAIT_SECONDS:
        time.sleep(_WAIT_SECONDS / 100)
    return record


def _holder(file: Path) -> str | None:
    """The content of a locked file; None if it is not locked."""
    try:
        with file.open(encoding="utf-8", errors="replace") as opened:
            try:
                fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return opened.read()
            return None
    except OSError:
        return None


def _this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "launch": launch_name(),
    }


def _parsed(record: str) -> dict[str, Any]:
    try:
        found = json.loads(record)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _refusal(path: Path, file: Path, record: str, *, single: bool = False) -> ArtifactError:
    found = _parsed(record)
    if single and found.get("launch") and found["launch"] == launch_name():
        return ArtifactError(
            f"{path}: this command runs in one process, but the launcher started several; start it without the launcher"
        )
    if not found:
        return ArtifactError(f"another process is writing {path}; wait for it to end, or choose another place")
    return ArtifactError(
        f"{path} is being written by process {found.get('pid')} on {found.get('host')} ({found.get('command')}); wait "
        f"for it to end, stop it, or choose another place (should that machine be gone, delete {file})"
    )


def _forget() -> None:
    """A child, such as a worker that reads images, must not keep the lock of a killed parent."""
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
