"""The progress bar of long work: images done, throughput, time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def image_progress(what: str, num_images: int, *, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr while images are worked on; yields a function that takes the number just finished."""
    bar = Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images  {task.fields[speed]} images/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not (enabled and sys.stderr.isatty()),
    )
    task = bar.add_task("", total=num_images, speed="-")
    began, done = time.perf_counter(), 0

    def on_images(number: int) -> None:
        nonlocal done
        done += number
        bar.update(task, advance=number, speed=f"{done / (time.perf_counter() - began):.1f}")

    with bar:
        yield on_images
