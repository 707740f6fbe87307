"""Folders that several tests of sources begin with."""

from pathlib import Path

import pytest
from PIL import Image

from latentflow.data.painting.semantic_maps import colour_map
from latentflow.data.stores import files as store_files
from tests.data.sources.pictured import TOWN, picture, save, semantic_map


@pytest.fixture
def labelled(tmp_path) -> Path:
    folder = tmp_path / "labelled"
    for i, name in enumerate(["dog/b.png", "dog/deep/er/a.png", "cat/z.PNG", "cat/y.png", "emu/x.png"]):
        save(folder / name, picture(i))
    (folder / "dog" / "notes.txt").write_text("not an image")
    (folder / "empty class").mkdir()
    return folder


@pytest.fixture
def bare(monkeypatch):
    """Without the libraries that read HEIC and DICOM."""
    monkeypatch.setattr(store_files, "has_library", lambda name: False)


@pytest.fixture
def mapped(tmp_path) -> Path:
    """Images in two class folders with maps as indices, in a palette's place, and in colours."""
    folder = tmp_path / "mapped"
    for i, name in enumerate(["town/a", "town/b", "wood/deep/c"]):
        save(folder / "images" / f"{name}.{('jpg', 'png', 'PNG')[i]}", picture(i))
        values = semantic_map(i)
        image = Image.fromarray(colour_map(values, TOWN.palette) if i == 2 else values)
        if i == 1:
            image = Image.new("P", (20, 16))
            image.putpalette([100] * 768)
            image.putdata(values.reshape(-1).tolist())
        save(folder / "masks" / f"{name}.png", image)
    TOWN.write(folder / "classes.json")
    return folder
