"""What the pixels of a set are read as: by its files, or as asked; mixed files are refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentflow.data.pixel_choice import ChoiceForAutoencoder, PixelChoice
from latentflow.data.sources.images import open_images
from latentflow.errors import DataError
from latentflow.pixel_format import PixelFormat
from tests.data.pictures.stored_files import SIDE, by_numpy, by_pillow, by_tifffile, every_kind, png16, ramp

KINDS = every_kind()


def folder(place: Path, **files: bytes) -> Path:
    """A folder of files; the last underscore of a name stands for the dot."""
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        (place / f"{stem}.{suffix}").write_bytes(content)
    return place


def chosen(place: Path, **choice: str) -> PixelFormat:
    return open_images(place, SIDE, pixels=PixelChoice(**choice)).pixel_format


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (["PNG, 8-bit gray"], PixelFormat()),
        (["PNG, 8-bit gray", "JPEG", "PNG, palette", "PNG, 8-bit colours and alpha"], PixelFormat()),
        (["PNG, 16-bit gray"], PixelFormat(channels=1, dtype="uint16")),
        (["PNG, 16-bit colours", "PNG, 16-bit colours and alpha"], PixelFormat(dtype="uint16")),
        (["TIFF, 8-bit, 4 bands"], PixelFormat(mode="bands", channels=4)),
    ],
)
def test_what_the_files_hold_decides(tmp_path, kinds, expected):
    for number, kind in enumerate(kinds):
        stored = KINDS[kind]
        (tmp_path / f"{number}{stored.name}").write_bytes(stored.content)
    found = chosen(tmp_path, value_range="full")
    assert found == expected
    if expected.dtype == "uint8":
        assert chosen(tmp_path) == expected


def test_12_bits_in_16_use_the_range_of_the_network(tmp_path):
    dark, bright = ramp(1, "uint16", 1000), ramp(1, "uint16", 4095)
    source = open_images(folder(tmp_path, dark_png=png16(dark), bright_png=png16(bright)), SIDE, pixels=PixelChoice())
    found = source.pixel_format
    assert (found.low, found.high, found.rule) == ([0], [4095], "least and greatest of 2 images")
    unit = found.to_unit(source[0].pixels)
    assert unit.min() == -1 and unit.max() == 1


def test_each_band_has_its_own_range_and_colours_share_one(tmp_path):
    values = np.concatenate([ramp(1, "uint16", most) for most in (100, 10_000, 500, 4000)], axis=2)
    place = folder(tmp_path, a_tif=by_tifffile(values, photometric="rgb", extrasamples=["unspecified"]))
    found = chosen(place)
    assert (found.mode, found.low, found.high) == ("bands", [0] * 4, [100, 10_000, 500, 4000])
    found = chosen(place, pixels="rgb")
    assert (found.mode, found.low, found.high) == ("rgb", [0], [10_000])
    found = chosen(place, value_range="0,200;0,20000;0,1000;0,5000")
    assert (found.high, found.rule) == ([200, 20_000, 1000, 5000], "given")


def test_percentiles_are_those_of_the_values(tmp_path):
    values = np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE, 1)
    values[0, 0] = 60_000  # a dead pixel
    found = chosen(folder(tmp_path, a_png=png16(values)), value_range="percentile:1,99")
    low, high = np.percentile(values, [1, 99])
    assert (found.low, found.high, found.rule) == ([low], [high], "percentiles 1 and 99 of 1 images")


def test_opacity_keeps_its_full_range(tmp_path):
    values = np.concatenate([ramp(3, "uint16", 4095), np.full((SIDE, SIDE, 1), 65535, np.uint16)], axis=2)
    found = chosen(folder(tmp_path, a_png=png16(values)), pixels="rgba")
    assert (found.low, found.high) == ([0, 0, 0, 0], [4095, 4095, 4095, 65535])


def test_a_range_that_was_chosen_before_is_kept(tmp_path):
    place = folder(tmp_path, a_png=png16(ramp(1, "uint16", 4095)))
    before = chosen(place)
    folder(place, a_png=png16(ramp(1, "uint16", 5000)))
    assert chosen(place).high == [5000]
    assert open_images(place, SIDE, pixels=PixelChoice(), known=before).pixel_format == before
    full = PixelChoice(value_range="full")
    assert open_images(place, SIDE, pixels=full, known=before).pixel_format.high == [65535]


@pytest.mark.parametrize(
    ("files", "choice", "said"),
    [
        (
            {"a_png": by_pillow(ramp(1, "uint8"), "PNG"), "b_png": png16(ramp(1, "uint16"))},
            {},
            r"a.png has 8 bits and b.png 16 bits; --depth 16 takes 255 and 65535 for the same white",
        ),
        (
            {"a_png": by_pillow(ramp(1, "uint8"), "PNG"), "b_png": png16(ramp(1, "uint16"))},
            {"depth": "16", "value_range": "0,4095"},
            r"--value-range 0,4095: a.png has 8 bits and b.png 16",
        ),
        (
            {"a_tif": by_tifffile(ramp(1, "float32")[..., 0]), "b_png": png16(ramp(1, "uint16"))},
            {},
            r"b.png has 16 bits and a.tif floating-point numbers; --depth float",
        ),
        (
            {"a_png": png16(ramp(1, "uint16")), "b_png": png16(ramp(3, "uint16"))},
            {},
            r"a.png is gray and b.png has colours; --pixels rgb repeats gray, --pixels gray",
        ),
        (
            {"a_npy": by_numpy(ramp(4, "uint8")), "b_npy": by_numpy(ramp(5, "uint8"))},
            {},
            r"a.npy has 4 channels and b.npy 5; give images of one kind, or .* --pixels rgb",
        ),
        (
            {"a_png": by_pillow(ramp(1, "uint8"), "PNG"), "b_png": by_pillow(ramp(3, "uint8"), "PNG")},
            {"pixels": "bands"},
            r"a.png has 1 channels and b.png 3",
        ),
        ({"a_png": png16(np.full((SIDE, SIDE, 1), 7, np.uint16))}, {}, r"the values are all 7, .*; check the files"),
        (
            {"a_npy": by_numpy(np.dstack([ramp(3, "uint16"), np.full((SIDE, SIDE, 1), 9, np.uint16)]))},
            {},
            r"the values of band 4 are all 9",
        ),
        (
            {"a_tif": by_tifffile(np.full((SIDE, SIDE), np.nan, np.float32))},
            {},
            r"no image can be read, for example a.tif: 144 of its 144 numbers are NaN or infinite; fill them",
        ),
        ({"a_png": png16(ramp(1, "uint16"))}, {"value_range": "0,1;0,2"}, r"has 2 ranges for 1 channels; give one"),
    ],
)
def test_what_is_mixed_or_empty_is_refused_by_name(tmp_path, files, choice, said):
    with pytest.raises(DataError, match=said) as refused:
        chosen(folder(tmp_path, **files), **choice)
    assert "\n" not in str(refused.value)


def test_mixed_depths_share_their_white_where_that_is_asked_for(tmp_path):
    shallow, deep = ramp(1, "uint8"), ramp(1, "uint16")
    place = folder(tmp_path, a_png=by_pillow(shallow, "PNG"), b_png=png16(deep))
    source = open_images(place, SIDE, pixels=PixelChoice(pixels="gray", depth="16"))
    assert np.array_equal(source[0].pixels, shallow.astype(np.uint16) * 257)
    assert np.array_equal(source[1].pixels, deep)
    source = open_images(place, SIDE, pixels=PixelChoice(pixels="gray", depth="8"))
    assert np.array_equal(source[0].pixels, shallow)
    assert np.array_equal(source[1].pixels, np.rint(deep / 257))


def test_gray_and_colours_become_each_other_where_that_is_asked_for(tmp_path):
    gray, colours = ramp(1, "uint16"), ramp(3, "uint16")
    place = folder(tmp_path, a_png=png16(gray), b_png=png16(colours))
    in_colours = open_images(place, SIDE, pixels=PixelChoice(pixels="rgb"))
    assert np.array_equal(in_colours[0].pixels, gray.repeat(3, 2))
    assert np.array_equal(in_colours[1].pixels, colours)
    in_gray = open_images(place, SIDE, pixels=PixelChoice(pixels="gray"))
    assert np.array_equal(in_gray[0].pixels, gray)
    assert np.abs(in_gray[1].pixels - colours @ [[0.299], [0.587], [0.114]]).max() <= 0.51


def test_transparent_parts_are_laid_on_white_or_kept(tmp_path):
    values = ramp(4, "uint16")
    values[..., 3] = np.where(np.arange(SIDE) < 6, 0, 65535)
    place = folder(tmp_path, a_png=png16(values))
    composed = open_images(place, SIDE, pixels=PixelChoice(value_range="full"))[0].pixels
    assert (composed[:, :6] == 65535).all()
    assert np.array_equal(composed[:, 6:], values[:, 6:, :3])
    kept = open_images(place, SIDE, pixels=PixelChoice(pixels="rgba"))[0].pixels
    assert np.array_equal(kept, values)


def test_the_fourth_band_is_opacity_where_that_is_asked_for(tmp_path):
    values = ramp(4, "uint16")
    place = folder(tmp_path, a_tif=by_tifffile(values, photometric="rgb", extrasamples=["unassalpha"]))
    assert chosen(place).mode == "bands"
    source = open_images(place, SIDE, pixels=PixelChoice(pixels="rgba"))
    assert source.pixel_format.mode == "rgba"
    assert np.array_equal(source[0].pixels, values)


def test_colours_count_by_their_opacity_where_pixels_are_mixed(tmp_path):
    values = np.zeros((SIDE, SIDE, 4), np.uint16)
    values[::2] = (60_000, 0, 0, 0)  # clear red between opaque blue rows
    values[1::2] = (0, 0, 50_000, 65535)
    place = folder(tmp_path, a_png=png16(values))
    pixels = open_images(place, SIDE // 2, pixels=PixelChoice(pixels="rgba", value_range="full"))[0].pixels
    assert np.abs(pixels.astype(int) - (0, 0, 50_000, 32768)).max() <= 2


def test_the_built_in_shapes_can_be_gray():
    source = open_images("synthetic:3", 16, pixels=PixelChoice(pixels="gray"))
    plain = open_images("synthetic:3", 16)
    assert (source.pixel_format.title, source[1].pixels.shape) == ("8-bit gray", (16, 16, 1))
    brightness = np.asarray(Image.fromarray(plain[1].pixels).convert("L"))
    assert np.abs(source[1].pixels[..., 0].astype(int) - brightness).max() <= 1


@pytest.mark.parametrize("text", ["4095", "9,3", "0,1,2", "percentile:1", "percentile:0,101", "a,b", ""])
def test_ranges_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="give full, a range like 0,4095"):
        PixelChoice(value_range=text)


LEARNED = PixelFormat(channels=1, dtype="uint16", low=[0], high=[4095], rule="least and greatest of 99 images")
BANDS = PixelFormat(mode="bands", channels=4, low=[0, 0, 0, 5], high=[200, 255, 255, 250], rule="given")


@pytest.mark.parametrize(
    ("kind", "trained_on", "asked", "expected"),
    [
        ("PNG, 16-bit gray", LEARNED, {}, LEARNED),
        ("PNG, 16-bit gray", LEARNED, {"value_range": "0,4095"}, LEARNED),
        ("PNG, 16-bit gray", LEARNED, {"value_range": "full"}, PixelFormat(channels=1, dtype="uint16")),
        ("PNG, 16-bit gray", LEARNED, {"pixels": "rgb", "value_range": "full"}, PixelFormat(dtype="uint16")),
        ("PNG, 16-bit gray", LEARNED, {"depth": "8"}, PixelFormat()),
        ("PNG, 8-bit gray", LEARNED, {}, PixelFormat()),
        ("PNG, 8-bit gray", PixelFormat(mode="gray"), {}, PixelFormat(mode="gray")),
        ("TIFF, 8-bit, 4 bands", BANDS, {}, BANDS),
    ],
)
def test_what_is_left_open_follows_the_autoencoder(tmp_path, kind, trained_on, asked, expected):
    (tmp_path / f"0{KINDS[kind].name}").write_bytes(KINDS[kind].content)
    choice = ChoiceForAutoencoder(**asked, trained_on=trained_on)
    assert open_images(tmp_path, SIDE, pixels=choice).pixel_format == expected
