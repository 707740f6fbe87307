"""Contact sheets: where pictures and their captions stand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from latentflow.sampling import contact_sheet as grid
from latentflow.sampling.contact_sheet import image_grid

DARK = torch.zeros(6, 3, 16, 16, dtype=torch.uint8)


def test_without_captions_pictures_stand_two_pixels_apart():
    assert image_grid(DARK, 3).size == (3 * 16 + 4, 2 * 16 + 2)
    assert image_grid(DARK, 10**9).size == (6 * 16 + 10, 16)


@pytest.mark.parametrize(
    ("captions", "size"),
    [
        (["cat", "dog", "owl"] * 2, (196, 15 + 130)),  # above each column
        (["cat"] * 3 + ["dog"] * 3, None),  # to the left of each row
        (["cat", "dog", "owl", "owl", "dog", "cat"], (196, 2 * (64 + 15) + 2)),  # under each picture
    ],
)
def test_captions_stand_where_they_are_needed(captions, size):
    sheet = image_grid(DARK, 3, captions=captions)
    if size is None:
        assert sheet.height == 130
        assert 196 < sheet.width <= 196 + 160
    else:
        assert sheet.size == size
    bare = np.asarray(image_grid(DARK, 3, captions=["\u200c"] * 3 + [" "] * 3))
    assert (np.asarray(sheet) == 0).sum() > 0
    assert bare.shape


def test_small_pictures_are_enlarged_by_a_whole_number():
    pixels = torch.arange(3 * 16 * 16, dtype=torch.int64).remainder(200).to(torch.uint8).reshape(1, 3, 16, 16)
    shown = np.asarray(image_grid(pixels, 1, captions=["cat"]))[15:]
    assert (shown[::4, ::4] == pixels[0].permute(1, 2, 0).numpy()).all()
    assert image_grid(torch.zeros(1, 3, 256, 256, dtype=torch.uint8), 1, captions=["cat"]).size == (256, 271)


def test_accents_that_the_font_lacks_are_left_out():
    for name in ("Zürich", "Zu\u0308rich"):
        assert grid._legible(name) in ("Zürich", "Zurich")


def test_letters_that_the_font_lacks_are_written_as_codes():
    assert grid._legible("plain") == "plain"
    assert grid._legible("猫\x1b[2J") == "\\u732b\\x1b[2J"


def test_a_long_caption_is_cut_short():
    long = image_grid(DARK[:1], 1, captions=["a very long name of a class that nobody can show here"])
    assert long.size == (64, 15 + 64)
