"""Files of every format and mode: known numbers in, the same numbers out."""

from __future__ import annotations

import numpy as np
import pytest

from latentflow.data.pictures.numbers import open_stored
from latentflow.data.pixel_choice import PixelChoice
from latentflow.data.sources.images import open_images
from tests.data.pictures.stored_files import SIDE, every_kind

KINDS = every_kind()


@pytest.mark.parametrize("kind", KINDS)
def test_the_header_says_what_the_file_holds(kind):
    stored = KINDS[kind]
    with open_stored(stored.content, stored.name) as picture:
        found = picture.pixel_format
    assert (found.mode, found.channels, found.dtype) == (stored.mode, stored.values.shape[2], stored.values.dtype.name)


@pytest.mark.parametrize("kind", KINDS)
def test_known_numbers_come_back_from_the_range_of_the_network(kind, tmp_path):
    """The way of training images: a file, a source, [-1, 1], and back to stored numbers."""
    stored = KINDS[kind]
    (tmp_path / stored.name).write_bytes(stored.content)
    depth = {"uint8": "8", "uint16": "16", "float32": "float"}[stored.values.dtype.name]
    source = open_images(tmp_path, SIDE, pixels=PixelChoice(pixels=stored.mode, depth=depth))
    pixel_format, pixels = source.pixel_format, source[0].pixels
    assert (pixels.shape, pixels.dtype) == (stored.values.shape, stored.values.dtype)
    unit = pixel_format.to_unit(pixels)
    assert unit.dtype == np.float32 and unit.min() >= -1 and unit.max() <= 1
    back = pixel_format.from_unit(unit)
    assert back.dtype == stored.values.dtype
    step = 0 if depth != "float" else 1e-6 * (max(pixel_format.high) - min(pixel_format.low))
    if stored.off and not np.array_equal(back, pixels):
        pytest.fail("a lossy format was lossy twice")
    assert np.abs(back.astype(np.float64) - stored.values).max() <= max(step, stored.off)
