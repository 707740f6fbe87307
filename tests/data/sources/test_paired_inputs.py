"""Sources with paired inputs: in files next to the images, or made from them."""

from __future__ import annotations

import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentflow.data.painting.input_rules import NO_INPUTS
from latentflow.data.paired_choice import PairedChoice
from latentflow.data.pictures.crop import center_crop
from latentflow.data.pictures.decode import BrokenImage
from latentflow.data.pixel_choice import PixelChoice
from latentflow.data.sources.images import open_images
from latentflow.errors import ConfigError, DataError
from latentflow.pixel_format import PixelFormat
from latentflow.sizes import Size
from tests import tiny

SIZE = tiny.IMAGE_SIZE


@pytest.fixture
def paired(tmp_path) -> Path:
    """Images of 24 x 20 pixels in three classes, and inputs of half their size in other colours."""
    return tiny.write_paired(tmp_path / "pairs")


def test_an_input_is_the_file_of_the_same_name_cropped_like_its_image(paired):
    source = open_images(paired, SIZE)
    assert (source.input_format, source.input_origin) == (PixelFormat(), "files")
    assert source.class_names == tiny.CLASSES
    assert "with paired inputs" in source.description
    for row, item in enumerate(source):
        picture = Image.open((paired / "inputs" / source.name(row)).with_suffix(".jpg")).convert("RGB")
        assert np.array_equal(item.input, center_crop(picture, SIZE))
        assert not np.array_equal(item.input, item.pixels)


def test_inputs_that_are_not_wanted_are_not_read(paired):
    with_them, without = open_images(paired, SIZE), open_images(paired, SIZE, inputs=NO_INPUTS)
    assert (without.input_format, without.input_origin, without[0].input) == (None, "", None)
    assert np.array_equal(without[0].pixels, with_them[0].pixels)
    assert without.fingerprint() != with_them.fingerprint()


def test_another_input_is_another_data_set(paired):
    before = open_images(paired, SIZE).fingerprint()
    shutil.copy(paired / "inputs" / "apple" / "0.jpg", paired / "inputs" / "apple" / "1.jpg")
    assert open_images(paired, SIZE).fingerprint() != before


def test_maps_and_inputs_may_both_be_there(tmp_path):
    folder = tiny.write_segmented(tmp_path / "both")
    shutil.copytree(folder / "images", folder / "inputs")
    item = open_images(folder, SIZE)[0]
    assert np.array_equal(item.input, item.pixels)
    assert item.semantic_map.shape == (SIZE, SIZE)


def test_a_zip_reads_alike(paired, tmp_path):
    with zipfile.ZipFile(tmp_path / "pairs.zip", "w") as archive:
        for file in sorted(paired.rglob("*.*")):
            archive.write(file, file.relative_to(paired))
    source, other = open_images(paired, SIZE), open_images(tmp_path / "pairs.zip", SIZE)
    assert source.fingerprint() == other.fingerprint()
    assert np.array_equal(source[5].input, other[5].input)


@pytest.mark.parametrize("origin", ["shrink:4", "gray"])
def test_a_derived_input_follows_from_the_image_alone(images, origin):
    plain, derived = open_images(images, SIZE), open_images(images, SIZE, inputs=origin)
    assert derived.input_origin == origin
    assert derived.fingerprint() == plain.fingerprint()
    assert derived.class_names == plain.class_names
    item = pickle.loads(pickle.dumps(derived))[7]
    assert np.array_equal(item.pixels, plain[7].pixels)
    assert item.input.shape == ((4, 4, 3) if origin == "shrink:4" else (16, 16, 1))
    assert abs(item.input.mean() - item.pixels.mean()) < (1 if origin == "shrink:4" else 60)


def write_numbers(paired: Path, make) -> None:
    """NPY files in place of the inputs: make(number) gives [10, 12, ...]."""
    for number, file in enumerate(sorted((paired / "inputs").rglob("*.jpg"))):
        np.save(file.with_suffix(".npy"), make(number))
        file.unlink()


def test_inputs_of_16_bits_keep_their_range(paired):
    """Whatever the images are: the least and the greatest value of the inputs become -1 and 1."""
    write_numbers(paired, lambda number: np.linspace(100 * number, 4000, 120).reshape(10, 12).astype(np.uint16))
    source = open_images(paired, SIZE, inputs=PairedChoice(pixels=PixelChoice()))
    found = source.input_format
    assert (found.dtype, found.channels) == ("uint16", 1)
    assert 3900 < found.high[0] <= 4000
    assert source.pixel_format == PixelFormat()
    item = source[3]
    assert (item.input.dtype, item.input.shape) == (np.uint16, (SIZE, SIZE, 1))
    assert 250 < item.input.min() < 350
    again = open_images(paired, SIZE, inputs=PairedChoice(pixels=found))
    assert np.array_equal(again[3].input, item.input)


def test_inputs_may_have_any_number_of_bands(paired):
    write_numbers(paired, lambda number: np.full((10, 12, 5), number, np.uint8) + np.arange(5, dtype=np.uint8))
    source = open_images(paired, SIZE, inputs=PairedChoice(pixels=PixelChoice()))
    assert source.input_format.title == "8-bit 5 bands"
    assert source[2].input[0, 0].tolist() == [2, 3, 4, 5, 6]


def test_gray_inputs_of_8_bits_may_stay_gray(paired):
    given = PairedChoice(pixels=PixelChoice(pixels="gray"))
    assert open_images(paired, SIZE, inputs=given)[0].input.shape == (SIZE, SIZE, 1)


def test_inputs_of_other_channels_are_refused_by_name(paired):
    write_numbers(paired, lambda number: np.zeros((10, 12, 5 if number else 4), np.uint8))
    with pytest.raises(DataError, match=r"inputs/apple/0.npy has 4 channels and inputs/apple/1.npy 5"):
        open_images(paired, SIZE, inputs=PairedChoice(pixels=PixelChoice()))


def test_pairs_of_different_stems_are_refused(paired):
    (paired / "inputs" / "apple" / "0.jpg").rename(paired / "inputs" / "apple" / "zero.jpg")
    with pytest.raises(DataError, match=r"1 images have no input \(apple/0.png\); 1 inputs have no image \(apple/zero"):
        open_images(paired, SIZE)


def test_an_input_of_another_aspect_breaks_its_image_alone(paired):
    Image.new("RGB", (30, 10)).save(paired / "inputs" / "apple" / "0.jpg")
    source = open_images(paired, SIZE)
    with pytest.raises(BrokenImage, match=r"inputs/apple/0.jpg has 30 x 10 pixels, its image 24 x 20: another aspect"):
        source[0]
    assert source[1].input is not None


def test_a_damaged_input_breaks_its_image_alone(paired):
    (paired / "inputs" / "apple" / "0.jpg").write_bytes(b"no image")
    source = open_images(paired, SIZE)
    with pytest.raises(BrokenImage, match=r"inputs/apple/0.jpg"):
        source[0]


def test_other_folders_next_to_them_are_refused(paired):
    shutil.copytree(paired / "images", paired / "more")
    with pytest.raises(DataError, match=r"images/ and inputs/, and other images as well \(more\)"):
        open_images(paired, SIZE)


def test_a_size_that_does_not_shrink_is_refused(images):
    with pytest.raises(ConfigError, match="shrink:5: 16 pixels are not a multiple of 5; use an image size of 15"):
        open_images(images, SIZE, inputs="shrink:5")


@pytest.mark.parametrize(("origin", "size"), [("files", (16, 24)), ("shrink:4", (4, 6)), ("gray", (16, 24))])
def test_inputs_follow_the_size_of_their_images(paired, origin, size):
    """Height and width, of images that are wider than high."""
    source = open_images(paired, Size(16, 24), inputs=origin)
    assert source[0].pixels.shape[:2] == (16, 24)
    assert source[0].input.shape[:2] == size
