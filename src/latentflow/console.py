"""Messages to the user: the only place that prints lines.

Names of files, classes and devices come from other people's disks. They may contain escape codes, newlines or bytes
that are not UTF-8, so nothing reaches a terminal or a log before `printable` has escaped it.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

from rich.console import Console

_LOGGER = logging.getLogger("latentflow")
_JOINERS = "\u200c\u200d"  # invisible, but part of correctly spelt Persian words and of some emoji
_printed: set[str] = set()
_muted = False
_noted: list[tuple[str, str]] | None = None


def printable(text: object) -> str:
    r"""`text` on one line, with everything escaped that could control a terminal.

    >>> printable("a\x1b[2Jb\nc")
    'a\\x1b[2Jb\\nc'

    A byte of a file name that is not UTF-8, which Python holds as a lone surrogate, becomes its value: \xe9.
    """
    return "".join(
        character if character.isprintable() or character in _JOINERS else _escaped(character)
        for character in str(text)
    )


def say(text: object) -> None:
    """Print one line on stderr."""
    Console(stderr=True).print(printable(text), highlight=False, markup=False, soft_wrap=True)


def notice(text: str, kind: str = "") -> None:
    """Print a notice that is not an error, once per process.

    Of notices of one `kind`, such as those about one file of many, only the first is printed.

    It goes to the logger "latentflow" as a warning, so that programs which use the library can handle it. A muted
    process prints nothing, and a worker process passes its notices to the main process.
    """
    line = printable(text)
    if (kind or line) in _printed or _muted:
        return
    _printed.add(kind or line)
    if _noted is not None:
        _noted.append((text, kind))
    else:
        _LOGGER.warning("%s", line)


def note_down() -> None:
    """Keep notices from now on, in a worker, for the main process; see `noted`."""
    global _noted
    _noted = []


def noted() -> list[tuple[str, str]]:
    """The notices kept since the last call, as arguments of `notice` for the main process."""
    kept = list(_noted or [])
    if _noted is not None:
        _noted.clear()
    return kept


def mute() -> None:
    """Print no notices and show no progress from now on: of several processes only the first prints."""
    global _muted
    _muted = True


def is_muted() -> bool:
    """Whether this process prints nothing."""
    return _muted


def open_streams() -> None:
    """Prepare stdout and stderr of a command: characters outside their encoding are escaped, notices become lines.

    A terminal or a log may be ASCII or cp1252, whatever the names in a data set are.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - for the whole command
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about damaged metadata; what cannot be read is an error anyway
    if not any(isinstance(handler, _Lines) for handler in _LOGGER.handlers):
        _LOGGER.addHandler(_Lines())
        _LOGGER.propagate = False


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(f"note: {record.getMessage()}")


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else character.encode("unicode_escape").decode()
