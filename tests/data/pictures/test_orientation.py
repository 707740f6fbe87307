import io
import re

import numpy as np
import pytest
from PIL import Image, ImageOps

from latentflow.data.pictures.colour import to_rgb
from latentflow.data.pictures.decode import stored_mode
from latentflow.data.pictures.orientation import Photo, own_turn, turned, upright_as, with_turn
from latentflow.errors import DataError

STORED = np.arange(6, dtype=np.uint8).reshape(2, 3)
SQUARE = np.arange(9, dtype=np.uint8).reshape(3, 3)
TURNS = range(1, 9)


def tagged(pixels: np.ndarray, turn: int | None, kind: str = "PNG") -> Image.Image:
    """An image file with an EXIF orientation, opened and not decoded."""
    exif = Image.Exif()
    if turn is not None:
        exif[274] = turn
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"tiffinfo": dict(exif)} if kind == "TIFF" else {"exif": exif}))
    return Image.open(buffer)


@pytest.mark.parametrize("turn", TURNS)
def test_pixels_are_turned_as_pillow_turns_them(turn):
    assert np.array_equal(turned(STORED, turn), np.asarray(ImageOps.exif_transpose(tagged(STORED, turn))))
    assert turned(STORED[..., None].repeat(3, 2), turn).shape == (*turned(STORED, turn).shape, 3)


def test_own_orientation():
    for turn in TURNS:
        assert own_turn(tagged(STORED, turn)) == turn
        assert own_turn(tagged(STORED, turn, "TIFF")) == (None if turn == 1 else 1)  # Pillow turns TIFFs itself
    assert own_turn(tagged(STORED, None)) is None and own_turn(tagged(STORED, 9)) is None
    assert own_turn(Image.fromarray(STORED)) is None


def photo_of(stored: np.ndarray, turn: int) -> Photo:
    return Photo(*turned(stored, turn).shape[:2], turn)


@pytest.mark.parametrize("turn", [5, 6, 7, 8])
def test_size_distinguishes_stored_pixels_from_upright_ones(turn):
    photo, upright = photo_of(STORED, turn), turned(STORED, turn)
    assert np.array_equal(upright_as(STORED, None, photo, "m", "map"), upright)
    assert np.array_equal(upright_as(upright, None, photo, "m", "map"), upright)


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("stored", [STORED, SQUARE], ids=["long", "square"])
def test_an_orientation_of_its_own_decides(turn, stored):
    photo, upright = photo_of(stored, turn), turned(stored, turn)
    assert np.array_equal(upright_as(stored, turn, photo, "m", "map"), upright)
    assert np.array_equal(upright_as(upright, 1, photo, "m", "map"), upright)


@pytest.mark.parametrize("turn", [5, 6, 7, 8])
def test_size_decides_where_a_stated_orientation_cannot_be(turn):
    photo, upright = photo_of(STORED, turn), turned(STORED, turn)
    assert np.array_equal(upright_as(upright, turn, photo, "m", "map"), upright)  # a copied tag
    assert np.array_equal(upright_as(STORED, 1, photo, "m", "map"), upright)


AMBIGUOUS = [(STORED, turn) for turn in (2, 3, 4)] + [(SQUARE, turn) for turn in TURNS[1:]]


@pytest.mark.parametrize("stored, turn", AMBIGUOUS)
@pytest.mark.parametrize("what", ["mask", "map"])
def test_what_fits_both_is_refused_with_remedies_that_work(tmp_path, monkeypatch, stored, turn, what):
    photo = photo_of(stored, turn)
    with pytest.raises(DataError, match=f"EXIF orientation {turn}\\), and both have {photo.width} x ") as caught:
        upright_as(stored, None, photo, "m", what)
    message = str(caught.value)
    assert message.endswith(f"exif[274] = {turn} if the stored pixels") and "\n" not in message
    remedy = re.search(r"in Pillow (exif = .*) if it shows the upright image", message)[1]
    monkeypatch.chdir(tmp_path)
    for own, expected in ((1, stored), (turn, turned(stored, turn))):
        exec(remedy.replace("= 1;", f"= {own};"), {"Image": Image, what: Image.fromarray(stored)})
        saved = Image.open(tmp_path / f"{what}.png")
        assert np.array_equal(upright_as(stored, own_turn(saved), photo, "m", what), expected)


def test_what_looks_the_same_either_way_is_not_ambiguous():
    ring = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]], np.uint8)
    for turn in TURNS:
        assert np.array_equal(upright_as(ring, None, Photo(3, 3, turn), "m", "mask"), ring)


# Other sizes


def misfit(pixels: np.ndarray, photo: Photo) -> str:
    with pytest.raises(DataError) as caught:
        upright_as(pixels, None, photo, "m", "mask")
    return str(caught.value)


@pytest.mark.parametrize("size, photo", [((2, 3), Photo(20, 30)), ((240, 180), Photo(481, 361)), ((4, 6), Photo(2, 3))])
def test_another_size_of_the_same_shape_is_refused_with_a_remedy_that_works(size, photo):
    mask = np.random.default_rng(0).integers(0, 2, size, np.uint8)
    message = misfit(mask, photo)
    assert message.startswith(f"m has {size[1]} x {size[0]} pixels (width x height), its image {photo.width} x ")
    resized = eval(message.partition("in Pillow ")[2], {"mask": Image.fromarray(mask), "Image": Image})
    assert upright_as(np.asarray(resized), None, photo, "m", "mask").shape == photo[:2]


@pytest.mark.parametrize("turn", [5, 6, 7, 8])
def test_the_remedy_for_a_smaller_mask_of_the_stored_pixels_never_swaps_sides(turn):
    photo = Photo(30, 20, turn)
    message = misfit(STORED, photo)
    assert message.endswith("mask.resize((30, 20), Image.Resampling.NEAREST)")
    resized = eval(message.partition("in Pillow ")[2], {"mask": Image.fromarray(STORED), "Image": Image})
    assert np.array_equal(
        upright_as(np.asarray(resized), None, photo, "m", "mask"), turned(STORED.repeat(10, 0).repeat(10, 1), turn)
    )


def test_swapped_sides_and_other_shapes():
    message = misfit(STORED, Photo(3, 2))
    assert "resize" not in message and "it is rotated; rotate it back, in Pillow mask.transpose" in message
    for remedy in message.partition("in Pillow ")[2].split(" or "):
        back = np.asarray(eval(remedy, {"mask": Image.fromarray(STORED), "Image": Image}))
        assert upright_as(back, None, Photo(3, 2), "m", "mask").shape == (3, 2)
    assert misfit(np.zeros((64, 64)), Photo(480, 640)).endswith("aspect ratio; make the mask from this very image")


def test_how_a_picture_lies_in_its_file():
    for kind in ("PNG", "JPEG", "TIFF"):
        for turn in TURNS:
            rgb, found = with_turn(tagged(STORED, turn, kind), to_rgb)
            assert rgb.size == turned(STORED, turn).shape[::-1] and found == turn
    assert with_turn(Image.fromarray(STORED), to_rgb)[1] == 1
    deep = tagged(STORED.astype(np.uint16) * 300, None)
    assert with_turn(deep, stored_mode) == ("I;16B", 1)  # asked before it is decoded
