"""Facts about files, remembered while the files do not change.

Hashing or decoding every file of a large data set takes minutes, too long to repeat at every start of a command. A fact
is stored by the file's path, with a stamp of its size, times and inode, in a small database in the user's cache folder
(`LATENTFLOW_CACHE`, else `XDG_CACHE_HOME`/latentflow, else ~/.cache/latentflow). It only saves work: if it is missing
or damaged, everything is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

_UNSETTLED_SECONDS = 2.0  # a file written this recently may be written again within one tick of its file system's clock
_WAIT_SECONDS = 2.0  # for another process that writes the database
_MOST_WAIT = 24 * 3600.0  # for another process that computes the same

_TABLE = (
    "CREATE TABLE IF NOT EXISTS facts (kind TEXT, place TEXT, name TEXT, stamp TEXT, value TEXT, "
    "PRIMARY KEY (kind, place, name)) WITHOUT ROWID"
)


def cache_folder() -> Path:
    """The folder for what only saves work; it may be deleted at any time."""
    if own := os.environ.get("LATENTFLOW_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "latentflow"


def stamp_of(status: os.stat_result | str) -> str:
    """A stamp that changes whenever a file is written: size, inode, and the times of its content and inode.

    Unlike the content's time, the inode's time cannot be set by `touch`, `cp -p` or rsync. A text is returned
    unchanged.
    """
    if isinstance(status, str):
        return status
    return f"{status.st_size}:{status.st_ino}:{status.st_mtime_ns}:{status.st_ctime_ns}"


class Ledger:
    """Facts of one kind about the files of one place. Use it as a context manager; facts are written at its end.

    with Ledger("crc32", folder) as ledger:
        for name in names:
            status = os.stat(folder / name)
            crc = ledger.get(name, status)
            if crc is None:
                ledger.put(name, status, crc := compute(folder / name))

    Args:
        kind: the kind of fact. Change it whenever the way of computing it changes.
        place: a folder or an archive.
    """

    def __init__(self, kind: str, place: str | Path):
        self._key = (kind, os.fsdecode(Path(place).resolve()).encode("utf-8", "backslashreplace").decode())
        self._known: dict[str, tuple[str, str]] = {}
        self._new: dict[str, tuple[str, str]] = {}
        with suppress(sqlite3.Error, OSError), closing(_database()) as database:
            rows = database.execute("SELECT name, stamp, value FROM facts WHERE kind = ? AND place = ?", self._key)
            self._known = {name: (stamp, value) for name, stamp, value in rows}

    def get(self, name: str, status: os.stat_result | str) -> Any | None:
        """The fact about file `name` if its `status` has not changed since; else None.

        Args:
            status: of the file; or a text that identifies its content.
        """
        stamp, value = self._new.get(_text(name)) or self._known.get(_text(name)) or (None, None)
        return json.loads(value) if value is not None and stamp == stamp_of(status) else None

    def put(self, name: str, status: os.stat_result | str, value: Any) -> None:
        """Remember `value`, any JSON, of file `name`.

        Args:
            status: from before the file was read; or a text that identifies its content.
        """
        if isinstance(status, str) or time.time() - max(status.st_mtime, status.st_ctime) > _UNSETTLED_SECONDS:
            self._new[_text(name)] = (stamp_of(status), json.dumps(value))

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.save()

    def save(self) -> None:
        """Write the facts so far; long work calls this now and then, since it may be killed."""
        if not self._new:
            return
        rows = [(*self._key, name, stamp, value) for name, (stamp, value) in self._new.items()]
        with suppress(sqlite3.Error, OSError), closing(_database()) as database, database:
            database.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?, ?)", rows)
        self._known |= self._new
        self._new = {}


@contextmanager
def one_at_a_time(place: str | Path) -> Iterator[None]:
    """Let only one process of this user at a time compute facts about `place`; the others wait and then find them.

    Open the `Ledger` inside. When a process ends, for whatever reason, the next one continues. (`locks.only_writer`
    refuses the second process instead, and locks the place itself, which may be read-only here.)
    """
    name = hashlib.sha256(os.fsencode(Path(place).resolve())).hexdigest()[:16]
    with ExitStack() as stack:
        with suppress(sqlite3.Error, OSError):
            cache_folder().mkdir(parents=True, exist_ok=True)
            turns = stack.enter_context(closing(sqlite3.connect(cache_folder() / f"turn-{name}.sqlite", _MOST_WAIT)))
            turns.execute("BEGIN EXCLUSIVE")
        yield


def _database() -> sqlite3.Connection:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(folder / "facts.sqlite", timeout=_WAIT_SECONDS)
    try:
        database.execute(_TABLE)
    except BaseException:
        database.close()
        raise
    return database


def _text(name: str) -> str:
    """`name` as valid text, with bytes that are not UTF-8 escaped."""
    return name.encode("utf-8", "backslashreplace").decode()
