"""How far long work is: a bar in a terminal or in a notebook, or a line now and then if stderr is neither."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from latentflow.console import is_muted, say

SECONDS_BETWEEN_LINES = 30
_SECONDS_BETWEEN_UPDATES = 0.2  # of a bar in a notebook


@contextmanager
def image_progress(what: str, num_images: int, *, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """Show progress over images on stderr; yields a function to call with the number just finished.

    If stderr is not a terminal, a line is printed at most every half minute:
    "encoding 1200/50000 images, 85.2 images/s, 9 min left"; short work prints nothing. A muted process shows nothing.
    In a Jupyter notebook the bar stands below the cell.
    """
    enabled = enabled and not is_muted()
    if enabled and in_notebook():
        yield _NotebookBar(what, num_images).advance
        return
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


def in_notebook() -> bool:
    """Whether a cell of a Jupyter notebook runs this."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and type(ipython.get_ipython()).__name__ == "ZMQInteractiveShell"


class _NotebookBar:
    """A bar below a cell, which needs no other package than the notebook's kernel."""

    def __init__(self, what: str, num_images: int):
        from IPython.display import display

        self._what, self._num_images, self._done = what, num_images, 0
        self._began = self._shown = time.monotonic()
        self._handle = display(self._html(), display_id=True)

    def advance(self, number: int) -> None:
        """Count images that are finished."""
        self._done += number
        now = time.monotonic()
        if self._done >= self._num_images or now - self._shown >= _SECONDS_BETWEEN_UPDATES:
            self._shown = now
            self._handle.update(self._html())

    def _html(self) -> object:
        from IPython.display import HTML

        seconds, left = time.monotonic() - self._began, ""
        speed = self._done / max(seconds, 1e-9)
        if 0 < self._done < self._num_images:
            left = f", {duration((self._num_images - self._done) / speed)} left"
        text = f"{self._what} {self._done}/{self._num_images} images, {speed:.1f} images/s{left}"
        return HTML(f'<progress value="{self._done}" max="{self._num_images}"></progress> {escape(text)}')


def duration(seconds: float) -> str:
    """A length of time in the largest unit that fits it: "40 s", "9 min", "3.5 h", "2.1 days"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"
