"""What the pages say is so: every command line parses, and those for which small stand-ins can be had run."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from latentflow.cli import app
from latentflow.training.config import load_recipe
from latentflow.training.first_stage import load_autoencoder_recipe
from tests import tiny
from tests.processes import run_here

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]
VERBS = typer.main.get_command(app).commands


def command_lines(page: str) -> list[list[str]]:
    """The indented lines of a page that call latentflow, as words, without what stands after a #."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = re.findall(r"^    (?:\.venv/bin/)?(latentflow .*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


EVERY = [(page, words) for page in PAGES for words in command_lines(page)]


def test_the_pages_show_commands():
    assert {page for page, _ in EVERY} == {*PAGES}
    assert len(EVERY) > 40


@pytest.mark.parametrize(("page", "words"), EVERY, ids=lambda x: x if isinstance(x, str) else x[1])
def test_every_command_of_the_pages_is_one(page, words):
    """Verbs, options and the kinds of their values; recipes and their keys."""
    context = VERBS[words[1]].make_context(words[1], words[2:])
    loader = {"train": load_recipe, "train-autoencoder": load_autoencoder_recipe}.get(words[1])
    if loader:
        loader(context.params["recipe"], context.params["overrides"])


# A place where the files that README names are there, in small


@pytest.fixture(scope="module")
def place(tmp_path_factory, kl, kl_folder) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_images(folder / "photos", classes=("cat", "dog"), per_class=12)
    shutil.copytree(kl_folder, folder / "autoencoder")
    picture, whole = next((folder / "photos").rglob("*.png")), np.zeros((20, 24), np.uint8)
    for name in ("photo.jpg", "street.jpg", "cat.png"):
        with Image.open(picture) as image:
            image.save(folder / name)
    hole = whole.copy()
    hole[6:14, 8:16] = 255
    Image.fromarray(hole).save(folder / "hole.png")
    Image.fromarray(whole).save(folder / "map.png")
    painter = tiny.model(kl, class_names=(), conditioning=tiny.SPATIAL)
    painter.save_pretrained(folder / "runs" / "camvid")
    tiny.model(kl, time_scale=1.0).save_pretrained(folder / "models" / "ffhq")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


SMALL = {
    "stabilityai/sd-vae-ft-mse": "autoencoder",
    "256": str(tiny.IMAGE_SIZE),
    "10000": "12",
    "600": "2",
}
MORE = {
    "train": [
        *(
            "training.steps=4",
            "training.batch_size=4",
            "training.log_every=2",
            "training.precision=fp32",
            "--device",
            "cpu",
        ),
        *("network.depth=2", "network.hidden_size=32", "network.num_heads=2", "network.patch_size=2"),
    ],
    "evaluate": ["--features", "random"],
    "sweep": ["--num", "4"],
    "diagnose": ["--num", "16"],
    "bound": ["--num", "8"],
}
NOT_HERE = ("prepare", "convert", "push")
"""Their inputs are others' files, or the hub; their own tests have stand-ins."""


def test_the_commands_of_the_readme_run_one_after_the_other(place, capsys, monkeypatch):
    ran = []
    for words in command_lines("README.md"):
        if words[1] in NOT_HERE or (words[1] in ("encode", "train") and "camvid" in " ".join(words)):
            continue
        given = [SMALL.get(word, word) for word in words[1:]]
        done = run_here([*given, *MORE.get(words[1], [])], capsys, monkeypatch)
        assert done.code == 0, (words, done.err)
        ran.append(words[1])
    assert {*ran} >= {"encode", "train", "sample", "inpaint", "mask-to-image", "image-to-image", "interpolate", "vary"}
    assert {*ran} >= {"invert", "export", "evaluate", "sweep", "diagnose", "bound"}
    for file in ("filled.png", "street_seed-00000003.png", "again.png", "samples/grid.png", "diagnosis/page.html"):
        assert list(place.glob(file)) or list(place.glob(f"*{file}")), (file, sorted(place.iterdir()))
