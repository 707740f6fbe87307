"""A process that runs one command of latentflow after the other, so that imports and compiled blocks are there."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import IO

from latentflow.artifacts import make_folder


class Failed(Exception):
    """A command has no result; the message says why."""


class Stopped(Exception):
    """The worker was closed before a command, or while it ran."""


class Worker:
    """Runs commands in a process of its own, each with a time limit; the process begins with the first one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._asked: subprocess.Popen[bytes] | None = None  # to end
        self._closed = False

    def run(self, arguments: Sequence[object], log: Path, limit: float) -> Path:
        """Run `latentflow ARGUMENTS`; its output goes to `log`.out, which is returned, and `log`.err.

        Raises:
            Failed: it took longer than `limit` seconds, or failed; with its last line. The next one gets a new process.
            Stopped: `close` was called.
        """
        if self._closed:
            raise Stopped
        make_folder(log.parent)
        out, err = (log.with_name(f"{log.name}.{kind}") for kind in ("out", "err"))
        request = {"arguments": [str(one) for one in arguments], "out": str(out), "err": str(err)}
        code = self._ask(json.dumps(request) + "\n", limit)
        if self._closed:
            raise Stopped
        if code == 0:
            return out
        self._end()
        if code is None:
            raise Failed(f"{arguments[0]} was stopped after {limit:g} s")
        text = err.read_text(encoding="utf-8", errors="replace") if err.exists() else ""
        said = [line.strip() for line in text.splitlines() if line.strip()]
        raise Failed(f"{arguments[0]}: {said[-1] if said else f'exit code {code}'}")

    def close(self) -> None:
        """End the process; a command that runs can save what it has for a minute."""
        self.stop()
        self._end()

    def stop(self) -> None:
        """Ask the process to end, and do not wait for it."""
        self._closed = True
        self._ask_to_end()

    def _ask(self, request: str, limit: float) -> int | None:
        """The exit code of a command; None: it took too long. A process that died gives its own."""
        if self._process is None:
            # In a session of its own: Ctrl-C reaches the ladder only, which ends it. It inherits the ladder's lock.
            command = [sys.executable, __file__]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, close_fds=False
            )
        process = self._process
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has died, or `stop` has closed it
            process.stdin.write(request.encode())
            process.stdin.flush()
        if not select.select([process.stdout], [], [], limit)[0]:
            return None
        answer = process.stdout.readline()
        return int(answer) if answer else (process.wait() or 1)

    def _end(self) -> None:
        self._ask_to_end()
        process, self._process = self._process, None
        if process is not None:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _ask_to_end(self) -> None:
        """By a signal, which ends a command early, and the end of its requests, which ends the process after it.

        Once: a second signal would end what it is saving.
        """
        process = self._process
        if process is not None and process is not self._asked and process.poll() is None:
            self._asked = process
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.terminate()


class Workers:
    """Some train networks, and others do the rest: on a GPU models are measured while the next one trains."""

    def __init__(self, trainings: int = 1, others: int = 1) -> None:
        self._train, self._do_the_rest = ([Worker() for _ in range(number)] for number in (trainings, others))
        self._idle = [_queue(self._train), _queue(self._do_the_rest)]

    def __call__(self, arguments: Sequence[object], log: Path, limit: float) -> Path:
        """See `Worker.run`; a command waits until a worker of its kind is idle."""
        idle = self._idle[arguments[0] != "train"]
        worker = idle.get()
        try:
            return worker.run(arguments, log, limit)
        finally:
            idle.put(worker)

    def close(self) -> None:
        """End all of them, side by side."""
        every = (*self._train, *self._do_the_rest)
        for worker in every:
            worker.stop()
        for worker in every:
            worker.close()


def _queue(workers: Sequence[Worker]) -> SimpleQueue[Worker]:
    idle: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)
    return idle


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Run what is asked for, line by line, and answer with exit codes."""
    for line in requests:
        request = json.loads(line)
        for handle, file in ((1, request["out"]), (2, request["err"])):
            opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(opened, handle)
            os.close(opened)
        code = _command(request["arguments"])
        print(code, file=answers, flush=True)


def _command(arguments: Sequence[str]) -> int:
    from latentflow.cli import main

    sys.argv = ["latentflow", *arguments]
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()  # for the other worker
    return code


if __name__ == "__main__":
    serve(os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w"))
