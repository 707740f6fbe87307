"""How far long work is: a bar in a terminal, or a line now and then if stderr is not one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from latentflow.console import is_muted, say

SECONDS_BETWEEN_LINES = 30


@contextmanager
def image_progress(what: str, num_images: int, *, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """Show progress over images on stderr; yields a function to call with the number just finished.

    If stderr is not a terminal, a line is printed at most every half minute:
    "encoding 1200/50000 images, 85.2 images/s, 9 min left"; short work prints nothing. A muted process shows nothing.
    """
    enabled = enabled and not is_muted()
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
    began = said = time.monotonic()
    done = 0

    def on_images(number: int) -> None:
        nonlocal done, said
        done += number
        now = time.monotonic()
        speed = done / max(now - began, 1e-9)
        bar.update(task, advance=number, speed=f"{speed:.1f}")
        if bar.disable and enabled and now - said >= SECONDS_BETWEEN_LINES:
            said = now
            left = f", {duration((num_images - done) / speed)} left" if 0 < done < num_images else ""
            say(f"{what} {done}/{num_images} images, {speed:.1f} images/s{left}")

    with bar:
        yield on_images


def duration(seconds: float) -> str:
    """A length of time in the largest unit that fits it: "40 s", "9 min", "3.5 h", "2.1 days"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"
