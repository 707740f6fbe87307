"""The example programs of the documentation run as they stand, learn, and leave what they say."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
from pathlib import Path

import pytest
import torch

from latentflow.api import LatentFlow
from latentflow.networks import registered
from tests import tiny

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
PROGRAMS = sorted(file.name for file in EXAMPLES.glob("*.py"))
SAVED = {
    "own_data.py": "own_data",
    "own_loop.py": "own_loop",
    "own_loss.py": "own_loss",
    "own_network.py": "own_network",
}


def run(name: str, folder: Path, monkeypatch) -> str:
    """What a program prints, run in a folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(registered, "_MAKERS", {})
    torch.manual_seed(0)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(EXAMPLES / name))
    return printed.getvalue()


def test_there_is_one_for_each_part_of_ones_own():
    assert [f"own_{part}.py" for part in ("condition", "data", "loop", "loss", "network")] == PROGRAMS
    assert all(len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 40 for name in PROGRAMS)


def test_the_page_shows_each_of_them():
    """By the line of pymdownx.snippets, which a formatter of Python would take for a comparison."""
    lines = (EXAMPLES.parent / "how-to" / "programs.md").read_text(encoding="utf-8").splitlines()
    assert sorted(line for line in lines if "docs/examples/" in line) == [
        f'--8<-- "docs/examples/{name}"' for name in PROGRAMS
    ]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_learns(name, tmp_path, monkeypatch):
    printed = run(name, tmp_path, monkeypatch)
    losses = [float(number) for number in re.findall(r"loss (\d+\.\d+)", printed)]
    assert len(losses) > 2
    assert losses[-1] < 0.75 * losses[0]
    folders = {file.parent.name for file in tmp_path.glob("*/config.json")}
    assert folders == ({SAVED[name]} if name in SAVED else set())
    if name in SAVED:  # its own class is that of the run, which has ended
        drawn = LatentFlow.from_pretrained(tmp_path / SAVED[name], device="cpu").sample(num=1, steps=2)
        assert drawn.pixels.shape == (1, 3, 32, 32)
    if name == "own_loop.py":
        assert len(list(tmp_path.glob("own_loop_pictures/0060/*.png"))) == 4
    if name == "own_condition.py":
        red, green, blue = map(float, re.search(r"\[\[(.*?)\]\]", printed)[1].split(","))
        assert red > 0.2 > -0.2 > max(green, blue)


def test_pictures_name_the_weights_that_drew_them(kl):
    """In one's own loop the weights change between two drawings."""
    model = tiny.model(kl)
    first, same = model.sample(1).drawn_by()["weights"], model.sample(1).drawn_by()["weights"]
    model.network.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.network.parameters(), lr=0.1)
    model.loss(torch.randn(2, *model.config.latent_shape)).mean().backward()
    optimizer.step()
    later = model.sample(1).drawn_by()["weights"]
    assert first == same != later
