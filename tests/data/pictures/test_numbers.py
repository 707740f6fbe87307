"""Files of every format and mode: known numbers in, the same numbers out."""

from __future__ import annotations

import numpy as np
import pytest

from latentflow.data.pictures import decode, numbers
from latentflow.data.pictures.decode import BrokenImage
from latentflow.data.pictures.numbers import open_stored
from latentflow.data.pixel_choice import PixelChoice
from latentflow.data.sources.images import open_images
from latentflow.pixel_format import PixelFormat
from tests.data.pictures.stored_files import SIDE, by_numpy, by_tifffile, dicom, every_kind, png16, ramp

KINDS = every_kind()
CONTIGUOUS = {"photometric": "minisblack", "planarconfig": "contig"}


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


def source_of(place, name, content, **choice):
    (place / name).write_bytes(content)
    return open_images(place, SIDE, pixels=PixelChoice(**choice))


def test_resizing_makes_no_values_beyond_those_of_the_image(tmp_path):
    values = np.where(np.indices((SIDE, SIDE)).sum(0) % 4 < 2, 1000, 4000)[..., None].astype(np.uint16)
    (tmp_path / "a.png").write_bytes(png16(values))
    pixels = open_images(tmp_path, 40, pixels=PixelChoice())[0].pixels
    assert (pixels.min(), pixels.max()) == (1000, 4000)
    assert len(np.unique(pixels)) > 20


def test_an_exif_orientation_turns_numbers_like_colours(tmp_path):
    values = ramp(5, "uint16")
    extra = [(274, "H", 1, 6, False)]
    content = by_tifffile(values, **CONTIGUOUS, extratags=extra)
    assert np.array_equal(source_of(tmp_path, "a.tif", content)[0].pixels, np.rot90(values, -1))


def test_8_bits_show_a_dicom_file_through_its_window(tmp_path):
    stored = np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE, 1) * 20
    units = stored.astype(float) - 1024  # a window of 400 around 40 shows -160.5 + 0.5 to 239.5 - 0.5 and a bit
    tags = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 40, "WindowWidth": 400}
    expected = np.rint(((units - (39.5 - 199.5)) / 399).clip(0, 1) * 255)
    shown = source_of(tmp_path, "a.dcm", dicom(stored, **tags), pixels="gray", depth="8")
    assert np.array_equal(shown[0].pixels, expected)
    inverted = dicom(stored, kind="MONOCHROME1", **tags)
    assert np.array_equal(source_of(tmp_path, "a.dcm", inverted, pixels="gray", depth="8")[0].pixels, 255 - expected)
    plain = source_of(tmp_path, "a.dcm", dicom(stored), pixels="gray", depth="8")
    assert np.array_equal(plain[0].pixels, np.rint(stored / 4095 * 255))


def test_a_heic_file_is_read_where_pillow_heif_is(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    gradient = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
    colours = np.dstack([gradient, gradient.T, 255 - gradient])
    pillow_heif.from_bytes("RGB", (64, 64), colours.tobytes()).save(tmp_path / "a.heic", quality=95)
    pixels = open_images(tmp_path, 64)[0].pixels
    assert np.abs(pixels.astype(int) - colours).mean() < 4


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.tif", by_tifffile(ramp(5, "uint16"), **CONTIGUOUS), "a TIFF that Pillow does not read: install latentflow"),
        ("a.tif", by_tifffile(ramp(3, "uint16"), photometric="rgb"), "16 bits are read by tifffile, which is not"),
        ("a.dcm", dicom(ramp(1, "uint16", 4095)), "DICOM files are read by pydicom, which is not installed"),
    ],
)
def test_without_its_library_a_file_is_broken_with_the_remedy(monkeypatch, name, content, said):
    for module in (numbers, decode):
        monkeypatch.setattr(module, "has_library", lambda library: False)
    with pytest.raises((BrokenImage, ValueError), match=said), open_stored(content, name) as stored:
        assert stored.pixel_format


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.npy", by_numpy(np.zeros((SIDE, SIDE), complex)), "its numbers are complex128"),
        ("a.npy", by_numpy(np.zeros((2, SIDE, SIDE, 3), np.uint8)), r"its array has the shape \[2, 12, 12, 3\]"),
        ("a.npy", by_numpy(np.full((SIDE, SIDE), 1 << 30)), "its whole numbers reach 1,073,741,824"),
        ("a.npy", by_numpy(np.zeros((400, 400, 300), np.uint8)), "it has 300 channels, and at most 256 are read"),
        ("a.npy", by_numpy(ramp(3, "uint8"))[:-40], "reshape|bytes"),
        ("a.npy", by_numpy(np.array([{"a": 1}], dtype=object)), "allow_pickle|pickle"),
        ("a.tif", by_tifffile(ramp(4, "uint16"), photometric="rgb", extrasamples=["unspecified"])[:600], "."),
        (
            "a.tif",
            by_tifffile(ramp(1, "float32")[..., 0] * 0 - 9999, extratags=[(42113, "s", 0, "-9999", False)]),
            "numbers are -9999, its mark of no data; fill them",
        ),
    ],
)
def test_what_cannot_be_kept_is_broken_in_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    read_as = PixelFormat(channels=1, dtype="float32")
    source = open_images(tmp_path, SIDE, pixels=read_as)
    with pytest.raises(BrokenImage, match=said) as broken:
        source[0]
    assert "\n" not in str(broken.value)


def test_an_archive_of_several_arrays_is_broken(tmp_path):
    np.savez(tmp_path / "a.npz", x=ramp(1, "uint8"), y=ramp(1, "uint8"))
    with pytest.raises(BrokenImage, match=r"it holds 2 arrays \(x, y\); save one in a file"):
        open_images(tmp_path, SIDE)[0]
