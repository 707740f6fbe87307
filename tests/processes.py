"""The command line, in this process or in one of its own that may be killed.

Processes are forked from a server which has imported torch and diffusers once, so that each costs a tenth of
a second and not ten seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "latentflow.commands.train",
        "latentflow.commands.encode",
        "diffusers.models.auto_model",
        "diffusers.models.autoencoders.autoencoder_kl",
        "torch.utils.tensorboard",
    ]
)

_STORES = []  # they live as long as the tests


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on stderr that an error is."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        return lines[0]


def run_here(args: Sequence[object], capsys, monkeypatch) -> Result:
    """`latentflow ARGS` in this process."""
    from latentflow.cli import main

    monkeypatch.setattr(sys, "argv", ["latentflow", *map(str, args)])
    capsys.readouterr()
    code = 0
    try:
        main()
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    captured = capsys.readouterr()
    return Result(code, captured.out, captured.err)


def start(args: Sequence[object], log: Path, environment: Mapping[str, str] | None = None) -> BaseProcess:
    """`latentflow ARGS` in a process of its own; its output goes to the file `log`."""
    process = _CONTEXT.Process(target=_command, args=([*map(str, args)], str(log), dict(environment or {})))
    process.start()
    return process


def start_processes(args: Sequence[object], log: Path, num_processes: int) -> list[BaseProcess]:
    """The same command in several processes that know of each other as under torchrun.

    As torchrun does, this process keeps the store by which they find each other: any of them may end first.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _STORES.append(store)
    common = {
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    return [
        start(args, log.with_name(f"{log.name}.{rank}"), {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(num_processes)
    ]


def finish(process: BaseProcess, log: Path, *, timeout: float = 120) -> int:
    """Wait for a process; its exit code."""
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"the process did not end in {timeout} s: {log.read_text()}")
    return process.exitcode


def wait_until(condition: Callable[[], bool], process: BaseProcess, *, timeout: float = 120) -> None:
    """Return as soon as `condition` holds or the process has ended."""
    end = time.monotonic() + timeout
    while not condition() and process.is_alive():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


def _command(args: list[str], log: str, environment: dict[str, str]) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    import torch

    from latentflow.cli import main

    torch.set_num_threads(1)
    sys.argv = ["latentflow", *args]
    main()
