"""The net at the door: whatever happens inside a command, the user gets one line, a code and, if need be, a log."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latentflow import artifacts, door
from latentflow.cli import main
from latentflow.door import guarded
from latentflow.errors import DataError
from latentflow.ledger import cache_folder
from tests import processes
from tests.processes import run_here


@pytest.fixture(autouse=True)
def own_logs(tmp_path, monkeypatch) -> Path:
    """Logs of one test."""
    monkeypatch.setenv("LATENTFLOW_CACHE", str(tmp_path / "remembered"))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr("threading.excepthook", lambda failed: None)
    return tmp_path / "remembered" / "logs"


@pytest.fixture
def failing(capsys):
    """The exit code and the lines of a command that raises `error`."""

    def run(error: BaseException) -> tuple[int, list[str]]:
        def command() -> int:
            raise error

        code = guarded(command)
        return code, capsys.readouterr().err.splitlines()

    return run


def test_a_fault_of_ours_is_one_line_and_a_log(failing, own_logs):
    code, lines = failing(KeyError("masked_latents\n\x1b[31m"))
    (log,) = own_logs.iterdir()
    assert (code, len(lines)) == (70, 1)
    assert lines[0].startswith("latentflow: unexpected KeyError: 'masked_latents")
    assert lines[0].endswith(f"; the details are in {log}; please report it")
    assert "\x1b" not in lines[0]
    text = log.read_text(encoding="utf-8")
    assert "Traceback (most recent call last)" in text
    assert f"torch {torch.__version__}" in text


@pytest.mark.parametrize(
    "error",
    [RecursionError("maximum recursion depth exceeded"), AssertionError(), RuntimeError("a\nb"), ValueError("\udce9")],
    ids=lambda error: type(error).__name__,
)
def test_faults_of_every_kind(failing, error):
    code, lines = failing(error)
    assert (code, len(lines)) == (70, 1)
    assert f"unexpected {type(error).__name__}" in lines[0]


def test_without_a_place_for_logs_the_line_says_where_it_happened(failing, monkeypatch):
    monkeypatch.setattr(door, "_log_folders", lambda: [Path("/proc/nowhere")])
    code, (line,) = failing(KeyError("x"))
    assert code == 70
    assert f"no log could be written; it happened at {__file__}:" in line


def test_logs_go_to_the_temporary_folder_where_the_home_is_not_writable(failing, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTFLOW_CACHE", "/proc/nowhere")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "tmp"))
    _, (line,) = failing(KeyError("x"))
    (folder,) = (tmp_path / "tmp").iterdir()
    (log,) = folder.iterdir()
    assert str(log) in line


def test_old_logs_go(failing, own_logs):
    own_logs.mkdir(parents=True)
    for number in range(door._MOST_LOGS + 5):
        (own_logs / f"{number}.log").touch()
        os.utime(own_logs / f"{number}.log", (number, number))
    failing(KeyError("x"))
    names = {file.name for file in own_logs.iterdir()}
    assert len(names) == door._MOST_LOGS + 1
    assert "4.log" not in names
    assert f"{door._MOST_LOGS + 4}.log" in names


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataError("no images in nowhere"), 2, "no images in nowhere"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "the machine is out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), 1, "the GPU is out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "the machine is out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b.png"), 1, "a/b.png: the disk is full; make room"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "the disk is full; make room"),
        (PermissionError(errno.EACCES, "Permission denied", b"caf\xe9"), 1, r"caf\xe9: permission denied"),
        (OSError(errno.EMFILE, "Too many open files", "x"), 1, "x: too many open files; raise the limit"),
        (OSError(errno.EROFS, "Read-only file system", "x"), 1, "x: the place is read-only"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "gone"), 1, "gone: No such file or directory"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 70, "unexpected BrokenPipeError"),  # not that of stdout
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_has_a_line_of_its_own(failing, error, code, said):
    found, (line,) = failing(error)
    assert found == code
    assert line.startswith(f"latentflow: {said}")


def test_processes_of_one_launcher_say_a_line_once(failing, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29500")
    said = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        said.append(failing(DataError("no images in nowhere")))
    alone = failing(DataError("rank 2 alone cannot read this"))
    assert [lines for _, lines in said] == [["latentflow: no images in nowhere"], [], []]
    assert {code for code, _ in said} == {2}
    assert alone == (2, ["latentflow: rank 2 alone cannot read this"])
    monkeypatch.setenv("MASTER_PORT", "29501")  # the next job
    assert failing(DataError("no images in nowhere"))[1]


def test_threads_and_destructors_leave_no_traceback():
    program = """
import sys, threading
from latentflow.door import guarded
def run():
    thread = threading.Thread(target=lambda: {}["in a thread"])
    thread.start(); thread.join()
    class Odd:
        def __del__(self): raise KeyError("at the end")
    Odd()
    return 0
sys.exit(guarded(run))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("latentflow: unexpected KeyError: 'in a thread'")


# The command line


@pytest.fixture
def command(capsys, monkeypatch):
    return lambda *args: run_here(args, capsys, monkeypatch)


def test_every_verb_stands_behind_the_net(command, monkeypatch, own_logs):
    def describe(model):
        raise KeyError("autoencoder")

    monkeypatch.setattr("latentflow.commands.info.describe", describe)
    result = command("info", "runs/x")
    assert result.code == 70
    assert result.error.startswith("latentflow: unexpected KeyError: 'autoencoder'; the details are in ")
    assert "info runs/x" in next(own_logs.iterdir()).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["smaple"], "there is no latentflow 'smaple'; did you mean 'sample'?"),
        (["--versio"], "latentflow has no option --versio"),
        (["sample"], "latentflow sample needs MODEL; see `latentflow sample --help`"),
        (["push", "runs/x"], "latentflow push needs NAME; see `latentflow push --help`"),
        (["sample", "runs/x"], "latentflow sample needs --out; see `latentflow sample --help`"),
        (["sample", "runs/x", "--clases", "3"], "latentflow sample has no option --clases; did you mean '--classes'?"),
        (["sample", "runs/x", "--out", "o", "--num", "abc"], "--num 'abc': "),
        (["sample", "runs/x", "--out", "o", "--num=abc"], "--num 'abc': "),
        (["sample", "runs/x", "too", "much", "--out", "o"], "unexpected extra argument"),
        (["sample", "runs/x", "--out"], "'--out' requires an argument"),
        (["encode", "d", "--autoencoder", "shapes", "--out", "o", "--dtype", "f8"], "'float16', 'float32'"),
        (["encode", "d", "--autoencoder", "shapes", "--out", "o", "--batch-size", "0"], "--batch-size 0: give a whole"),
        (["info", "x", "--json=3"], "'--json' does not take a value"),
        (["train", "--\x1b[31m"], r"\x1b[31m"),
    ],
)
def test_a_wrong_command_line_is_one_line(command, arguments, said):
    result = command(*arguments)
    assert result.code == 2
    assert result.error.startswith("latentflow: ")
    assert said in result.error


def test_no_arguments_are_a_question_for_help(command):
    result = command()
    assert (result.code, result.err) == (0, "")
    assert "train-autoencoder" in result.out


@pytest.mark.parametrize("start", [["-m", "latentflow"], ["-c", "from latentflow.cli import main; main()"]])
def test_both_doors(start):
    done = subprocess.run([sys.executable, *start, "smaple"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "latentflow: there is no latentflow 'smaple'; did you mean 'sample'? (valid: {})\n".format(
        done.stderr.partition("(valid: ")[2].removesuffix(")\n")
    )


def _recipes(stdout, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "latentflow", "recipes", *options],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_goes_is_no_error(options):
    reading, writing = os.pipe()
    os.close(reading)
    done = _recipes(writing, *options)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_full_disk_behind_stdout():
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = _recipes(full)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("latentflow: the disk is full; make room")


def test_what_libraries_say_stays_off_the_screen():
    program = """
import logging, sys, warnings
from latentflow.door import hush_libraries
hush_libraries()
import diffusers, huggingface_hub
warnings.warn("of use to developers")
logging.getLogger("some.library").warning("of use to developers")
diffusers.logging.get_logger("diffusers.models").warning("of use to developers")
huggingface_hub.logging.get_logger("huggingface_hub").warning("of use to developers")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_the_log_is_in_the_cache_folder(failing, own_logs):
    failing(KeyError("x"))
    assert own_logs == cache_folder() / "logs"
    assert list(own_logs.glob("*.log"))


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_stream_is_no_fault(closed):
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -m latentflow recipes {closed}', sys.executable], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    assert (done.stdout == b"") == (">&-" in closed.split())


@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_every_command_understands_may_stand_anywhere(place, monkeypatch, capsys):
    words = ["recipes", "--json"]
    monkeypatch.setattr(artifacts, "_verify", True)
    monkeypatch.setattr(sys, "argv", ["latentflow", *words[:place], "--no-verify", *words[place:]])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    assert not artifacts.verifies()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_a_command_with_a_line_and_nothing_half_done(number, kl_folder, tmp_path):
    out, log = tmp_path / "cache", tmp_path / "log"
    options = ("--autoencoder", kl_folder, "--image-size", 16, "--shard-size", 8, "--device", "cpu", "--out", out)
    process = processes.start(("encode", "synthetic:100000", *options), log)
    processes.wait_until(lambda: len(list(out.glob("shard-*.json"))) > 2, process)
    os.kill(process.pid, number)
    assert processes.finish(process, log, timeout=30) == 128 + number
    said = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
    assert log.read_text(encoding="utf-8").splitlines()[-1] == f"latentflow: {said}"
    assert not [file.name for file in out.iterdir() if file.name.startswith(".")]
