"""How a command ends: any exception becomes one line for the user, an exit code and, if needed, a log.

0    done
1    the machine lacks something: memory, disk, permission; or the reader of the output has gone
2    bad input, one line with a remedy
70   a bug, to be reported with its log
129  ended by SIGHUP, 130 by Ctrl-C, 143 by SIGTERM
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import platform
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from latentflow.console import say
from latentflow.errors import LatentFlowError
from latentflow.ledger import cache_folder

MACHINE, FAULT = 1, 70

_MOST_LOGS = 50
_LIBRARIES = ("torch", "diffusers", "accelerate", "safetensors", "huggingface_hub", "numpy", "pillow", "pydantic")
_REMEDIES = {
    errno.ENOSPC: "the disk is full; make room, or choose another place",
    errno.EDQUOT: "the disk quota is used up; make room, or choose another place",
    errno.EROFS: "the place is read-only; choose another",
    errno.EACCES: "permission denied; change the permissions, or choose another place",
    errno.EPERM: "permission denied; change the permissions, or choose another place",
    errno.EMFILE: "too many open files; raise the limit (`ulimit -n 4096`), or use fewer workers",
    errno.ENFILE: "the machine has too many open files; close some programs",
    errno.ENOMEM: "the machine is out of memory; make the batch smaller, or close other programs",
    errno.EIO: "the device reports an error; check the disk",
    errno.ENAMETOOLONG: "the name is too long for the file system; choose a shorter one",
}
"""Remedies for errors of the operating system."""

_NO_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "ProcessGroup")


def hush_libraries() -> None:
    """Hide messages that libraries address to developers; PYTHONWARNINGS shows the warnings again.

    Call this before they are imported.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if not logging.root.handlers:  # without one, Python prints log messages
        logging.root.addHandler(logging.NullHandler())
    quiet = {
        "DIFFUSERS_VERBOSITY": "error",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_VERBOSITY": "error",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if not sys.stderr.isatty():
        quiet["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for name, value in quiet.items():
        os.environ.setdefault(name, value)


def guarded(run: Callable[[], int]) -> int:
    """Call `run`; returns its result, or prints one line and returns the exit code of its failure."""
    threading.excepthook = lambda failed: _leave(failed.exc_type, failed.exc_value, failed.exc_traceback)
    sys.unraisablehook = lambda failed: _write_log(failed.exc_type, failed.exc_value, failed.exc_traceback)
    with _ended_by_signals():
        try:
            code = run()
            sys.stdout.flush()
            return code
        except BrokenPipeError as error:
            if _reader_has_gone():
                return MACHINE
            return _leave(*_parts(error))
        except (Exception, KeyboardInterrupt) as error:
            return _leave(*_parts(error))


class _Ended(KeyboardInterrupt):
    """SIGTERM or SIGHUP; like Ctrl-C it passes through all cleanup."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """End the command at the first SIGTERM or SIGHUP as Ctrl-C does; a second one kills. Ignored ones stay ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, frame: object) -> None:
        for one in numbers:
            signal.signal(one, signal.SIG_DFL)
        raise _Ended(number)

    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _leave(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> int:
    """Print why a command failed; returns its exit code."""
    code, line = _verdict(kind, error)
    first = _is_first_to_print(line)
    if code in (MACHINE, FAULT):
        log = _write_log(kind, error, trace)
        details = f"the details are in {log}" if log else f"no log could be written; it happened at {_place(trace)}"
        line = f"{line}; {details}" + ("; please report it" if code == FAULT else "")
    if first:
        with suppress(OSError):  # stderr may be gone, too
            say(f"latentflow: {line}")
    return code


def _verdict(kind: type[BaseException], error: BaseException | None) -> tuple[int, str]:
    """The exit code of an exception, and the line for the user."""
    text = str(error) if error is not None else ""
    if isinstance(error, LatentFlowError):
        return error.exit_code, text
    if isinstance(error, _Ended):
        return 128 + error.number, f"ended by {signal.Signals(error.number).name}"
    if issubclass(kind, KeyboardInterrupt):
        return 128 + signal.SIGINT, "interrupted"
    if issubclass(kind, MemoryError) or any(words in text for words in _NO_MEMORY):
        where = "the GPU" if "CUDA" in text or "MPS" in text else "the machine"
        return MACHINE, f"{where} is out of memory; make the batch or the images smaller, or close other programs"
    if isinstance(error, OSError) and (remedy := _REMEDIES.get(error.errno)):
        return MACHINE, f"{_named(error)}{remedy}"
    if isinstance(error, OSError) and error.filename is not None:
        return MACHINE, f"{_named(error)}{error.strerror}; check that it is still there and what it should be"
    if issubclass(kind, RuntimeError) and _is_launched() and any(words in text for words in _PEER_GONE):
        return MACHINE, "another process of this run has ended, and this one with it; see what that one said"
    reason = text.strip().splitlines()[0] if text.strip() else ""
    return FAULT, f"unexpected {kind.__name__}" + (f": {reason}" if reason else "")


def _named(error: OSError) -> str:
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return f"{' and '.join(names)}: " if names else ""


def _parts(error: BaseException) -> tuple[type[BaseException], BaseException, TracebackType | None]:
    return type(error), error, error.__traceback__


def _place(trace: TracebackType | None) -> str:
    frames = traceback.extract_tb(trace)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown place"


def _reader_has_gone() -> bool:
    """Whether stdout is broken; if so it is redirected to /dev/null, since Python would complain of it at exit."""
    try:
        handle = sys.stdout.fileno()
    except OSError:  # it has no file descriptor
        return False
    poll = select.poll()
    poll.register(handle, select.POLLOUT)
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), handle)
    return True


def _is_first_to_print(line: str) -> bool:
    """Whether no other process of this launch on this machine has printed `line`: ranks fail alike."""
    if not _is_launched():
        return True
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    job = [*(os.environ.get(name, "") for name in names), str(os.getppid()), line]
    said = hashlib.sha256("\0".join(job).encode("utf-8", "backslashreplace")).hexdigest()[:32]
    for folder in _log_folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{said}.said").touch(exist_ok=False)
            return True
        except FileExistsError:
            return False
        except OSError:
            continue
    return True


def _is_launched() -> bool:
    return "MASTER_PORT" in os.environ


def _write_log(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> Path | None:
    """Write a log of a failure; returns the file, or None if none can be written."""
    now = time.strftime("%Y%m%d-%H%M%S")
    text = "\n".join(
        [
            f"latentflow {_version('latentflow')}, Python {platform.python_version()}, {platform.platform()}",
            ", ".join(f"{name} {_version(name)}" for name in _LIBRARIES),
            f"{now}: {' '.join(sys.argv)}",
            "",
            "".join(traceback.format_exception(kind, error, trace)),
        ]
    )
    for folder in _log_folders():
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            _prune(folder)
            log = folder / f"{now}-{os.getpid()}.log"
            with log.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return log
    return None


def _log_folders() -> list[Path]:
    folders = []
    with suppress(RuntimeError):  # there is no home
        folders.append(cache_folder() / "logs")
    with suppress(OSError):  # nor a place for temporary files
        folders.append(Path(tempfile.gettempdir()) / f"latentflow-logs-{os.getuid() if hasattr(os, 'getuid') else 0}")
    return folders


def _prune(folder: Path) -> None:
    """Keep the newest logs."""
    files = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime)
    for file in files[: max(len(files) - _MOST_LOGS, 0)]:
        file.unlink(missing_ok=True)


def _version(package: str) -> Any:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
