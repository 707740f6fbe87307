"""Long work without a terminal says now and then how far it is."""

from __future__ import annotations

import sys
import types

import pytest

from latentflow import progress
from latentflow.progress import duration, image_progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that is put forward by hand."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def forward(seconds: float) -> None:
        now[0] += seconds

    return forward


def test_a_line_at_most_every_half_minute(clock, capsys):
    with image_progress("encoding", 1000) as on_images:
        for _ in range(100):  # 10 images in 6 seconds, again and again
            clock(6)
            on_images(10)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 20
    assert lines[0] == "encoding 50/1000 images, 1.7 images/s, 10 min left"
    assert lines[9] == "encoding 500/1000 images, 1.7 images/s, 5 min left"
    assert lines[-1] == "encoding 1000/1000 images, 1.7 images/s"


def test_short_work_and_other_ranks_say_nothing(clock, capsys):
    with image_progress("encoding", 10) as on_images:
        clock(20)
        on_images(10)
    with image_progress("encoding", 10, enabled=False) as on_images:
        clock(2000)
        on_images(10)
    assert capsys.readouterr().err == ""


def test_nothing_done_after_a_long_time(clock, capsys):
    with image_progress("reading", 10) as on_images:
        clock(100)
        on_images(0)
    assert capsys.readouterr().err.splitlines() == ["reading 0/10 images, 0.0 images/s"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (89, "89 s"), (90, "2 min"), (5000, "83 min"), (12_600, "3.5 h"), (181_440, "2.1 days")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


class ZMQInteractiveShell:
    """The name that IPython's shell has in a notebook."""


def test_in_a_notebook_the_bar_stands_below_the_cell(monkeypatch):
    shown = []
    display = types.ModuleType("IPython.display")
    display.HTML = str
    handle = types.SimpleNamespace(update=shown.append)
    display.display = lambda html, display_id: shown.append(html) or handle
    ipython = types.ModuleType("IPython")
    ipython.get_ipython, ipython.display = ZMQInteractiveShell, display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    assert progress.in_notebook()
    with progress.image_progress("drawing <b>", 4) as on_images:
        on_images(2)
        on_images(2)
    assert '<progress value="0" max="4">' in shown[0]
    assert '<progress value="4" max="4">' in shown[-1]
    assert "drawing &lt;b&gt; 4/4 images" in shown[-1]
    ipython.get_ipython = lambda: None
    assert not progress.in_notebook()
