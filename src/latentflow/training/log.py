"""The log of a run: metrics.jsonl, a tracker, a progress bar."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from latentflow.artifacts import json_line, write_text, writing
from latentflow.console import notice, printable
from latentflow.flow.times import sum_by_time
from latentflow.training.step import StepResult
from latentflow.training.trackers import open_tracker

NUM_TIME_BINS = 10


def bin_names() -> list[str]:
    """The time bins as the log names them: "0.0-0.1", ..."""
    return [f"{n / NUM_TIME_BINS:.1f}-{(n + 1) / NUM_TIME_BINS:.1f}" for n in range(NUM_TIME_BINS)]


class LossBins:
    """The losses, that of the velocity by time bin, summed on the device and read once per log line."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(2, NUM_TIME_BINS, device=device)
        self.align_sum = torch.zeros((), device=device)
        self.is_aligned = False

    def add(self, result: StepResult) -> None:
        """Take in the losses of a micro-batch."""
        self.sums += torch.stack(sum_by_time(result.time, result.velocity_loss.detach(), NUM_TIME_BINS))
        if result.align_loss is not None:
            self.align_sum += result.align_loss.detach().sum()
            self.is_aligned = True

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The mean `loss` over all images, and `loss_by_time` over those of each time bin that has any ("0.3-0.4").

        The loss is that of the velocity, to be compared between runs with and without a head; where there is one,
        `align_loss` is its mean, not weighted.

        Args:
            reduce: sums a tensor over all processes.
        """
        sums, counts = reduce(self.sums).tolist()
        bins = {name: total / count for name, total, count in zip(bin_names(), sums, counts, strict=True) if count}
        aligned = {"align_loss": float(reduce(self.align_sum)) / sum(counts)} if self.is_aligned else {}
        return {"loss": sum(sums) / sum(counts), "loss_by_time": bins, **aligned}


class Clock:
    """Images per second since its creation, without pauses."""

    def __init__(self) -> None:
        self.start, self.num_images = time.perf_counter(), 0

    def count(self, num_images: int) -> None:
        """Add the images of one step."""
        self.num_images += num_images

    def rate(self) -> float:
        """Images per second."""
        return self.num_images / (time.perf_counter() - self.start)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time does not count: saving and previews are not training."""
        before = time.perf_counter()
        yield
        self.start += time.perf_counter() - before


class RunLog:
    """The log of one run folder; a process that is not the main one has a silent log.

    Args:
        run: the run folder.
        num_steps: of the whole run.
        first_step: steps done already; later lines of an interrupted run are deleted.
        enabled: false: write and print nothing.
        track: the name of a tracker; None: TensorBoard where it is installed.
    """

    def __init__(self, run: Path, *, num_steps: int, first_step: int, enabled: bool, track: str | None = None):
        self.enabled = enabled
        if not enabled:
            return
        self.file = run / "metrics.jsonl"
        _drop_after(self.file, first_step)
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} images/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not sys.stderr.isatty(),
        )
        self.task = self.progress.add_task("", total=num_steps, completed=first_step, loss="-", speed="-")
        self.tracker = open_tracker(run, track, first_step)

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Write one line of numbers; nested ones (loss by time bin) go to the tracker as "key/subkey"."""
        if not self.enabled:
            return
        with writing(self.file), self.file.open("a", encoding="utf-8") as file:
            file.write(_line({"step": step, **values}))
        self.progress.update(
            self.task, completed=step, loss=f"{values['loss']:.4f}", speed=f"{values['images_per_second']:.0f}"
        )
        if not sys.stderr.isatty():
            speed, rate = values["images_per_second"], values["learning_rate"]
            held_out = f"  held out {values['held_out_loss']:.4f}" if "held_out_loss" in values else ""
            self.say(f"step {step:>7}  loss {values['loss']:.4f}{held_out}  lr {rate:.2e}  {speed:.1f} images/s")
        if self.tracker:
            self.tracker.log(_flat(values), step)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self.enabled and not self.progress.disable:  # an update takes a quarter of a millisecond
            self.progress.update(self.task, completed=step)

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.enabled:
            self.console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> RunLog:
        if self.enabled:
            self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.enabled:
            self.progress.stop()
            if self.tracker:
                self.tracker.finish()


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, oldest first; damaged lines are skipped with a notice.

    A null in the file, which stands for a number that was not finite, becomes NaN.
    """
    file = Path(run) / "metrics.jsonl"
    if not file.exists():
        return []
    found = file.read_bytes().splitlines()
    lines = [line for line in map(_parsed, found) if line is not None]
    if len(lines) < len(found):
        notice(f"{len(found) - len(lines)} of {len(found)} lines of {file} cannot be read and are skipped")
    return lines


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text, object_hook=_with_numbers)
    except (ValueError, RecursionError):  # also of bytes that are not UTF-8
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None


def _with_numbers(values: dict[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in values.items()}


def _line(values: dict[str, Any]) -> str:
    """One line of metrics.jsonl. JSON has no infinity and no NaN: both become null."""
    return json_line(values) + "\n"


def _drop_after(file: Path, step: int) -> None:
    """Delete the lines that a resumed run will write again."""
    kept = [line for line in read_metrics(file.parent) if line["step"] <= step]
    write_text(file, "".join(map(_line, kept)))


def _flat(values: dict[str, Any]) -> dict[str, float]:
    """Numbers by "key" or "key/subkey"."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        flat |= {f"{key}/{part}": one for part, one in value.items()} if isinstance(value, dict) else {key: value}
    return flat
