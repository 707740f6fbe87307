"""One writer at a time, seen with real processes."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import threading
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from latentflow import locks
from latentflow.artifacts import require_new, write_text
from latentflow.errors import ArtifactError
from latentflow.locks import only_writer, writes
from latentflow.runtime import Runtime, launch_name

_CONTEXT = multiprocessing.get_context("fork")


def holder(path: Path, rank: int) -> str | None:
    """Who holds the lock of folder `path` as process `rank` of its launch; None where nobody does."""
    return locks._holder(path / f"{locks.LOCK}.{rank}")


def _hold(path: Path, pipe, environment: dict[str, str], rank: int | None) -> None:
    os.environ.update(environment)
    try:
        with only_writer(path, None if rank is None else Runtime(torch.device("cpu"), rank, world=2)):
            pipe.send("held")
            pipe.recv()
    except ArtifactError as error:
        pipe.send(str(error))


class Other:
    """Another process that holds, or wants, the lock of a path; `said` is "held" or why it was refused."""

    all: ClassVar[list[Other]] = []

    def __init__(self, path: Path, *, rank: int | None = None, **environment: str):
        self.pipe, far = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_hold, args=(path, far, environment, rank), daemon=True)
        self.process.start()
        self.said = self.pipe.recv()
        self.all.append(self)

    def end(self) -> None:
        self.pipe.send("end")
        self.process.join(10)

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(10)


@pytest.fixture(autouse=True)
def quick_and_tidy(monkeypatch):
    monkeypatch.setattr(locks, "_WAIT_SECONDS", 0.05)
    yield
    for other in Other.all:
        other.process.kill()
        other.process.join()
    Other.all.clear()


LAUNCH = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_a_second_process_is_refused_in_one_line(tmp_path):
    first = Other(tmp_path)
    with pytest.raises(ArtifactError) as caught, only_writer(tmp_path):
        pass
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(tmp_path), f"process {first.process.pid} on {socket.gethostname()}", "wait for it to end"):
        assert word in message
    first.end()
    with only_writer(tmp_path):
        assert [file.name for file in tmp_path.iterdir()] == [".lock.0"]
    assert list(tmp_path.iterdir()) == []


def test_a_lock_goes_with_a_killed_process(tmp_path):
    first = Other(tmp_path)
    assert holder(tmp_path, 0)
    first.kill()
    assert (tmp_path / ".lock.0").exists()
    assert holder(tmp_path, 0) is None
    assert Other(tmp_path).said == "held"


def test_children_of_a_killed_process_do_not_keep_it(tmp_path):
    """As prefetching workers do for some seconds."""

    def parent(pipe):
        with only_writer(tmp_path):
            child = _CONTEXT.Process(target=pipe.recv)
            child.start()
            pipe.send(child.pid)
            child.join()

    near, far = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=parent, args=(far,))
    process.start()
    child = near.recv()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    os.kill(child, 0)  # is alive
    with only_writer(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)


def test_a_copied_folder_is_free(tmp_path):
    Other(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with only_writer(tmp_path / "copy"):
        assert (tmp_path / "copy" / ".lock.0").exists()


def test_deleting_the_file_of_a_lock_helps_as_the_message_says(tmp_path):
    Other(tmp_path)
    with pytest.raises(ArtifactError) as caught, only_writer(tmp_path):
        pass
    Path(re.search(r"delete (.+)\)", str(caught.value))[1]).unlink()
    with only_writer(tmp_path):
        assert holder(tmp_path, 0)


def test_a_folder_where_nothing_was_written_goes_again(tmp_path):
    with pytest.raises(RuntimeError), only_writer(tmp_path / "new" / "deep"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with only_writer(tmp_path / "new" / "deep"):
        write_text(tmp_path / "new" / "deep" / "a.txt", "a")
    assert [file.name for file in (tmp_path / "new" / "deep").iterdir()] == ["a.txt"]


def test_a_lock_next_to_a_file(tmp_path):
    first = Other(tmp_path / "one.json")
    assert first.said == "held"
    assert "is being written" in Other(tmp_path / "one.json").said
    assert Other(tmp_path / "other.json").said == "held"


def test_locks_do_not_count_as_contents(tmp_path):
    Other(tmp_path)
    Other(tmp_path / "report.json")
    assert require_new(tmp_path) == tmp_path
    (tmp_path / ".lock.html").touch()
    with pytest.raises(ArtifactError, match=r"is not empty \(\.lock\.html"):
        require_new(tmp_path)


def test_processes_of_one_launch_write_together_and_no_others(tmp_path):
    first = Other(tmp_path, rank=0, **LAUNCH)
    second = Other(tmp_path, rank=1, **LAUNCH)
    assert first.said == second.said == "held"
    assert "is being written" in Other(tmp_path, rank=1, **LAUNCH).said
    assert "is being written" in Other(tmp_path, rank=0).said
    first.end()
    assert holder(tmp_path, 1)
    assert f"process {second.process.pid}" in Other(tmp_path, rank=0).said
    assert f"process {second.process.pid}" in Other(tmp_path, **{**LAUNCH, "MASTER_PORT": "29501"}).said
    second.kill()
    assert Other(tmp_path, rank=0).said == "held"


def test_a_fellow_that_has_locked_and_not_yet_said_so_is_waited_for(tmp_path, monkeypatch):
    for key, value in LAUNCH.items():
        monkeypatch.setenv(key, value)
    with (tmp_path / ".lock.1").open("w") as fellow:
        fcntl.flock(fellow, fcntl.LOCK_EX)
        said = threading.Timer(0.01, lambda: print(json.dumps({"launch": launch_name()}), file=fellow, flush=True))
        said.start()
        with only_writer(tmp_path, Runtime(torch.device("cpu"), 0, 2)):
            assert holder(tmp_path, 0)
        said.join()


def test_a_command_of_one_process_under_a_launcher(tmp_path):
    assert Other(tmp_path, **LAUNCH).said == "held"
    assert "start it without the launcher" in Other(tmp_path, **LAUNCH).said


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog, number):
    def flock(handle, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with only_writer(tmp_path), only_writer(tmp_path):
        assert list(tmp_path.iterdir()) == []
    assert [record.getMessage() for record in caplog.records] == [
        f"the file system of {tmp_path} has no locks; make sure that no other process writes there"
    ]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"null"])
def test_a_lock_file_that_says_nothing(tmp_path, content):
    first = Other(tmp_path)
    (tmp_path / ".lock.0").write_bytes(content)
    with (
        pytest.raises(ArtifactError, match=r"another process is writing .*; wait"),
        only_writer(tmp_path),
    ):
        pass
    first.end()


def test_many_at_once(tmp_path):
    """Of twelve that begin together one goes first, and none is left outside for good."""
    others = [Other(tmp_path / "run") for _ in range(12)]
    assert [other.said for other in others].count("held") == 1
    [first] = [other for other in others if other.said == "held"]
    first.end()
    assert Other(tmp_path / "run").said == "held"


def test_a_function_that_writes(tmp_path):
    @writes("out")
    def verb(number: int, out: Path | None = None) -> int:
        assert out is None or holder(out, 0)
        return number

    assert verb(3) == 3
    assert verb(4, tmp_path) == 4
    Other(tmp_path)
    with pytest.raises(ArtifactError, match="is being written"):
        verb(5, out=tmp_path)
