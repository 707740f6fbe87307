"""A part is repainted, and the rest is preserved to the bit: profile, alpha and depth."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentflow.data.pictures.colour import to_rgb
from latentflow.data.pictures.decode import open_image
from latentflow.data.pictures.originals import Original, original_of
from tests.profiles import ADOBE_RGB, DISPLAY_P3, PROPHOTO, cmyk_profile, gray_profile, rgb_profile, rgb_table_profile

RANDOM = np.random.default_rng(0)
COLOURS = RANDOM.integers(0, 256, (12, 16, 4), np.uint8)
HOLE = np.zeros((12, 16), np.uint8)
HOLE[3:9, 4:11] = 1
PAINTED = np.full((12, 16, 3), (150, 120, 90), np.uint8)
GRAY = 125.55  # of what is painted


def opened(image: Image.Image, kind: str = "PNG", **options) -> Original:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    with open_image(buffer.getvalue()) as file:
        return original_of(file)


def saved(original: Original, folder: Path) -> Image.Image:
    original.painted(PAINTED, HOLE).save(folder / "out.png")
    image = Image.open(folder / "out.png")
    image.load()
    return image


@pytest.mark.parametrize(
    "mode, profile",
    [
        ("RGB", None),
        ("RGB", rgb_profile(DISPLAY_P3, 2.2)),
        ("RGB", rgb_profile(PROPHOTO, 1.8)),
        ("RGBA", None),
        ("RGBA", rgb_profile(ADOBE_RGB, 2.2)),
        ("L", None),
        ("L", gray_profile(1.8)),
        ("L", rgb_profile(PROPHOTO, 1.8)),
        ("LA", None),
        ("LA", gray_profile(1.8)),
    ],
)
def test_known_pixels_stay_to_the_bit_and_the_hole_looks_like_what_was_painted(tmp_path, mode, profile):
    image = Image.fromarray(COLOURS).convert(mode)
    original = opened(image, icc_profile=profile)
    assert (original.mode, original.lost, original.rgb.shape) == (mode, "", (12, 16, 3))
    result = saved(original, tmp_path)
    assert (result.mode, result.info.get("icc_profile")) == (mode, profile)
    assert np.array_equal(np.asarray(result)[HOLE == 0], np.asarray(image)[HOLE == 0])
    shown = np.asarray(to_rgb(result))
    expected = PAINTED if mode.startswith("RGB") else np.full_like(PAINTED, round(GRAY))
    assert np.abs(shown[HOLE > 0].astype(int) - expected[HOLE > 0]).max() <= 4


def test_sixteen_bits_stay(tmp_path):
    numbers = RANDOM.integers(0, 65536, (12, 16), np.uint16)
    original = opened(Image.fromarray(numbers))
    assert (original.mode, original.lost) == ("I;16", "")
    result = np.asarray(saved(original, tmp_path))
    assert result.dtype == np.uint16 and np.array_equal(result[HOLE == 0], numbers[HOLE == 0])
    assert np.abs(result[HOLE > 0] - 257 * GRAY).max() <= 257


def test_the_transparent_number_of_sixteen_bits_stays_and_is_not_painted(tmp_path):
    numbers = np.full((12, 16), 30000, np.uint16)
    numbers[0, :5] = clear = 257 * round(GRAY)
    image = Image.fromarray(numbers)
    result = saved(opened(image, transparency=clear), tmp_path)
    assert result.info["transparency"] == clear
    assert np.array_equal(np.asarray(result) == clear, numbers == clear)


@pytest.mark.parametrize("mode", ["P", "1"])
def test_modes_without_room_for_what_is_painted_keep_their_colours(tmp_path, mode):
    image = Image.fromarray(COLOURS).convert("RGB").convert(mode)
    result = saved(opened(image), tmp_path)
    assert result.mode == ("RGB" if mode == "P" else "L")
    assert np.array_equal(np.asarray(result)[HOLE == 0], np.asarray(image.convert(result.mode))[HOLE == 0])


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_one_transparent_colour_becomes_alpha_and_what_is_painted_is_opaque(tmp_path, mode):
    image = Image.new(mode, (16, 12), 0)
    image.paste(90 if mode == "L" else 1 if mode == "P" else (90, 90, 90), (0, 0, 8, 12))
    result = saved(opened(image, transparency=0 if mode != "RGB" else (0, 0, 0)), tmp_path)
    alpha = np.asarray(result.getchannel("A"))
    assert (alpha[HOLE > 0] == 255).all()
    assert np.array_equal(alpha[HOLE == 0] == 255, (np.arange(16) < 8)[None].repeat(12, 0)[HOLE == 0])


@pytest.mark.parametrize("turn", [3, 6])
def test_turned_pictures_are_upright(tmp_path, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    stored = COLOURS if turn == 3 else COLOURS.swapaxes(0, 1)
    original = opened(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert original.numbers.shape == (12, 16, 4)
    shown = np.rot90(stored, 2 if turn == 3 else -1)
    assert np.array_equal(np.asarray(saved(original, tmp_path))[HOLE == 0], shown[HOLE == 0])


@pytest.mark.parametrize(
    "image, kind, options, lost",
    [
        (Image.new("CMYK", (16, 12), (9, 50, 90, 10)), "TIFF", {}, "its CMYK colours"),
        (
            Image.new("CMYK", (16, 12), (9, 50, 90, 10)),
            "TIFF",
            {"icc_profile": cmyk_profile(lambda c, m, y, k: np.array([1 - c, 1 - m, 1 - y]) * (1 - k))},
            "its CMYK colours",
        ),
        (Image.new("RGB", (16, 12), (9, 50, 90)), "PNG", {"icc_profile": b"garbage"}, "its colour profile"),
        (
            Image.new("RGB", (16, 12), (9, 50, 90)),
            "PNG",
            {"icc_profile": rgb_table_profile(lambda r, g, b: np.array([b, g, r]))},
            "its colour profile, depth and transparency",
        ),
        (Image.new("RGB", (16, 12), (9, 50, 90)), "PNG", {"icc_profile": gray_profile(1.8)}, "its colour profile"),
    ],
)
def test_what_is_lost_is_named(tmp_path, image, kind, options, lost):
    original = opened(image, kind, **options)
    assert original.lost == lost
    result = saved(original, tmp_path)
    assert "icc_profile" not in result.info
    assert np.array_equal(np.asarray(result)[HOLE == 0], original.rgb[HOLE == 0])


def test_pictures_in_memory():
    image = Image.fromarray(COLOURS)
    assert np.array_equal(np.asarray(original_of(image).painted(PAINTED, HOLE))[HOLE == 0], COLOURS[HOLE == 0])
