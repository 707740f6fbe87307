"""Sizes: read from a number or from WIDTHxHEIGHT, written back in the same form."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from latentflow.records import Record
from latentflow.sizes import ImageSize, Size, bounded


class Sized(Record):
    image_size: ImageSize
    drawn: Size | None = None


@pytest.mark.parametrize(
    ("given", "height", "width"),
    [
        (64, 64, 64),
        (np.int64(64), 64, 64),
        ("64", 64, 64),
        ("192x128", 128, 192),
        (" 192 X 128 ", 128, 192),
        ("192×128", 128, 192),
        ((128, 192), 128, 192),
        ([128, 192], 128, 192),
        (Size(128, 192), 128, 192),
    ],
)
def test_text_has_the_width_first_and_tensors_the_height(given, height, width):
    assert Size.of(given) == (height, width)
    assert Sized(image_size=given).image_size == Size(height, width)


@pytest.mark.parametrize(
    "given", ["", "x", "192x", "x128", "1.5", "192x128x3", "-4", "192*128", True, 1.5, None, (1, 2, 3)]
)
def test_what_is_no_size_is_refused_with_the_form(given):
    with pytest.raises(ValueError, match="is no size; give one number for a square, or WIDTHxHEIGHT like 192x128"):
        Size.of(given)


@pytest.mark.parametrize(("size", "written"), [(Size(64, 64), 64), (Size(128, 192), "192x128")])
def test_a_file_holds_what_a_person_writes(size, written):
    record = Sized(image_size=size)
    assert record.model_dump(mode="json")["image_size"] == written == size.written
    assert Sized.model_validate_json(record.model_dump_json()) == record
    assert Size.of(str(size)) == size
    assert f"{size.width} x {size.height}" == size.words


def test_a_pair_in_a_file_stays_height_and_width():
    """As the metadata of pictures have it."""
    assert Sized(image_size=8, drawn=(128, 192)).model_dump(mode="json")["drawn"] == [128, 192]
    assert Sized.model_validate({"image_size": 8, "drawn": [128, 192]}).drawn == Size(128, 192)


def test_sides_have_bounds():
    within = bounded(16, 1024).func
    assert within(Size(16, 1024)) == (16, 1024)
    for size in (Size(15, 64), Size(64, 1025)):
        with pytest.raises(ValueError, match=r"give 16 to 1,024 pixels for a side: one number.*64 or 256 are usual"):
            within(size)
    with pytest.raises(ValidationError):
        Sized(image_size="no")


def test_arithmetic():
    size = Size(128, 192)
    assert (size.area, size.aspect, size.is_square) == (24_576, 1.5, False)
    assert size.over(8) == (16, 24) and size.over(8).times(8) == size
    assert size.is_multiple_of(64) and not size.is_multiple_of(48) and not Size(4, 8).is_multiple_of(8)
    assert not Size(0, 8).is_multiple_of(8)


@pytest.mark.parametrize(
    ("size", "number", "nearest"),
    [
        (Size(17, 17), 2, [Size(16, 16), Size(18, 18)]),
        (Size(3, 3), 8, [Size(8, 8), Size(16, 16)]),
        (Size(128, 200), 16, [Size(128, 192), Size(128, 208)]),
        (Size(130, 190), 16, [Size(128, 192), Size(128, 176)]),
        (Size(5, 40), 16, [Size(16, 32), Size(16, 48)]),
    ],
)
def test_the_nearest_sizes_that_divide(size, number, nearest):
    assert size.nearest(number) == nearest
    assert all(one.is_multiple_of(number) for one in nearest)
