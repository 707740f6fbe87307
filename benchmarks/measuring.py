"""What the benchmarks share: a stopwatch of parts, stand-in autoencoders, results on disk."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentflow.artifacts import make_folder, write_json
from latentflow.autoencoder import Autoencoder

RESULTS = Path(__file__).parent / "results"
CLOCKS = ("wall", "cpu")
"""Seconds on the wall, and seconds of processor time of all threads, which another program hardly disturbs."""

REST = "everything else"
Lap = dict[str, np.ndarray]
"""Seconds of each part, [2] in the order of `CLOCKS`."""


class Enough(Exception):
    """Leaves the training loop when enough was measured: its own end would write a checkpoint."""


class Stopwatch:
    """Time by part, on both clocks. A part inside another is not counted to the other; what is in no part is `REST`.

    Args:
        device: it is waited for at every reading.
        fine: false: only `part` counts, and what was wrapped by `timed` runs as it is. On an accelerator, waiting at
            every part makes the whole slower.
    """

    def __init__(self, device: torch.device, *, fine: bool = True):
        self.device = device
        self.fine = fine
        self._running = [REST]
        self._parts: Lap = {}
        self._last = self._now()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside to `name`."""
        self._count()
        self._running.append(name)
        try:
            yield
        finally:
            self._count()
            self._running.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its calls counted to the part `name`."""

        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if not self.fine:
                return function(*args, **kwargs)
            with self.part(name):
                return function(*args, **kwargs)

        return counted

    def lap(self) -> Lap:
        """The parts since the last call."""
        self._count()
        parts, self._parts = self._parts, {}
        return parts

    def _count(self) -> None:
        now = self._now()
        name = self._running[-1]
        self._parts[name] = self._parts.get(name, 0.0) + now - self._last
        self._last = now

    def _now(self) -> np.ndarray:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return np.array([time.perf_counter(), time.process_time()])


def seconds(laps: Sequence[Lap], *parts: str) -> np.ndarray:
    """The seconds of some parts in each lap: [laps, 2]."""
    return np.array([sum((lap[part] for part in parts if part in lap), np.zeros(2)) for lap in laps])


def by_clock(values: Sequence[float]) -> dict[str, float]:
    """Two numbers, named after their clocks."""
    return {clock: float(value) for clock, value in zip(CLOCKS, values, strict=True)}


def median_and_quartiles(values: np.ndarray) -> dict[str, dict[str, float]]:
    """The middle of [n, 2] values and the range of their middle half, by clock."""
    return {
        name: by_clock(np.quantile(values, q, axis=0)) for name, q in (("median", 0.5), ("low", 0.25), ("high", 0.75))
    }


def variational(block_out_channels: Sequence[int], *, layers_per_block: int, name: str) -> Autoencoder:
    """An AutoencoderKL with 4 latent channels and untrained weights: speed asks for no other."""
    from diffusers import AutoencoderKL

    levels = len(block_out_channels)
    model = AutoencoderKL(
        block_out_channels=tuple(block_out_channels),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=layers_per_block,
        norm_num_groups=min(32, *block_out_channels),
        latent_channels=4,
    )
    return Autoencoder(model, name)


def setup(device: str, threads: int | None) -> None:
    """Choose the threads before anything is computed; refuse a device that is not there."""
    if threads:
        torch.set_num_threads(threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is here; use --device cpu")


def parsed(
    parser: argparse.ArgumentParser, defaults: Mapping[str, Mapping[str, Any]], arguments: Sequence[str] | None
) -> argparse.Namespace:
    """Parse the options, fill in those of the device that were not given, and choose the threads.

    Args:
        parser: has --device and --threads.
        defaults: by device and option.
    """
    options = parser.parse_args(arguments)
    for name, value in defaults[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    setup(options.device, options.threads)
    return options


def take_turns(sides: Mapping[str, Callable[[int], None]], device: torch.device, rounds: int) -> dict[str, np.ndarray]:
    """The seconds of each side in each round, [rounds, 2]; every side is called with the number of the round.

    Round 0 warms up, compiles where something is compiled, and is left out.
    """
    stopwatch, laps = Stopwatch(device), {side: [] for side in sides}
    for number in range(1 + rounds):
        for side, step in sides.items():
            stopwatch.lap()
            with stopwatch.part(side):
                step(number)
            if number:
                laps[side].append(stopwatch.lap())
    return {side: seconds(lap, side) for side, lap in laps.items()}


def cpu_name() -> str:
    """The processor as Linux calls it, elsewhere its architecture."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_results(name: str, device: torch.device, values: dict[str, Any], folder: str | Path) -> Path:
    """Write `NAME-DEVICE.json`: the figures and where they were taken."""
    cuda = device.type == "cuda"
    where = {
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    file = make_folder(folder) / f"{name}-{device.type}.json"
    write_json(file, {"machine": where, **values})
    print(f"written to {file}")
    return file


def overrides(defaults: Mapping[str, object], changes: Sequence[str]) -> list[str]:
    """A recipe's `key=value`: the defaults that no change touches, and the changes."""
    changed = [change.partition("=")[0].split(".") for change in changes]

    def is_touched(key: str) -> bool:
        path = key.split(".")
        return any(path[: len(other)] == other[: len(path)] for other in changed)

    return [*(f"{key}={value}" for key, value in defaults.items() if not is_touched(key)), *changes]
