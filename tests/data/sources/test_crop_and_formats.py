"""The pixels of an image: its crop, file formats and colour modes."""

import numpy as np
import pytest
from PIL import Image

from latentflow.data.pictures.colour import to_rgb
from latentflow.data.pictures.crop import center_crop, crop_map, cut_by
from latentflow.data.pictures.decode import BrokenImage
from latentflow.data.sources.images import open_images
from latentflow.errors import DataError
from latentflow.sizes import Size
from tests.data.sources.pictured import RED, WHITE, one, picture, save

# The crop


def test_crop_of_the_right_size_is_the_image_itself():
    image = picture(0, 32, 32)
    assert np.array_equal(center_crop(image, 32), np.asarray(image))


def test_crop_cuts_the_middle_of_a_wide_and_a_tall_image():
    wide, tall = picture(0, 13, 8), picture(1, 8, 12)
    assert np.array_equal(center_crop(wide, 8), np.asarray(wide)[:, 2:10])
    assert np.array_equal(center_crop(tall, 8), np.asarray(tall)[2:10])


@pytest.mark.parametrize(("size", "wanted"), [((20, 8), np.s_[:, 4:16]), ((12, 14), np.s_[3:11]), ((12, 8), np.s_[:])])
def test_crop_takes_the_largest_part_of_any_shape(size, wanted):
    """Pictures that are as high, or as wide, as a crop of 12 x 8 pixels need no scaling; their maps are cut alike."""
    image = picture(0, *size)
    assert np.array_equal(center_crop(image, Size(8, 12)), np.asarray(image)[wanted])
    assert np.array_equal(crop_map(np.asarray(image)[..., 0], Size(8, 12)), np.asarray(image)[wanted][..., 0])
    doubled = Image.fromarray(np.asarray(image).repeat(2, 0).repeat(2, 1))
    assert np.array_equal(center_crop(doubled, Size(8, 12)), np.asarray(image)[wanted])
    assert cut_by(*size, Size(8, 12)) == pytest.approx(1 - 96 / (size[0] * size[1]))


@pytest.mark.parametrize("factor", [2, 4])
def test_crop_halves_with_a_box_filter(factor):
    small = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    blocks = small.repeat(factor, 0).repeat(factor, 1)
    assert np.array_equal(center_crop(Image.fromarray(blocks), 8), small)


def test_crop_averages_two_by_two_pixels():
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0, 0], pixels[0, 1], pixels[1, 0], pixels[1, 1] = 40, 80, 120, 200
    assert center_crop(Image.fromarray(pixels), 2)[..., 0].tolist() == [[110, 0], [0, 0]]


def test_crop_follows_the_rule_step_by_step_at_odd_sizes():
    image = picture(2, 151, 67)
    halved = image.resize((75, 33), Image.Resampling.BOX)  # 67 >= 2 * 32, and 33 is less
    resized = halved.resize((round(75 * 32 / 33), 32), Image.Resampling.BICUBIC)
    assert resized.width == 73
    assert np.array_equal(center_crop(image, 32), np.asarray(resized)[:, 20:52])


def test_crop_enlarges_a_small_image_bicubically():
    image = picture(3, 32, 32)
    assert np.array_equal(center_crop(image, 64), np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)))


def test_crop_of_a_strip_shows_its_middle():
    ramp = np.repeat(np.linspace(0, 255, 500).astype(np.uint8)[:, None, None], 3, 2)
    pixels = center_crop(Image.fromarray(ramp), 64)
    assert pixels.shape == (64, 64, 3)
    assert np.abs(pixels.astype(int) - 127).max() <= 1


def test_strip_that_would_fill_the_memory_is_broken(tmp_path):
    save(tmp_path / "strip.png", Image.new("L", (1, 60000)))
    with pytest.raises(BrokenImage, match="1 x 60000 pixels are too long and thin for 64 x 64"):
        open_images(tmp_path, 64)[0]


# Formats and modes


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".jpeg", ".webp", ".bmp", ".tif", ".TIFF", ".gif", ".ppm"])
def test_common_formats_in_either_case(tmp_path, suffix):
    pixels = one(tmp_path, Image.new("RGB", (10, 9), (200, 60, 30)), suffix)
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - (200, 60, 30)).max() <= 4


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    pixels = one(tmp_path, frames[0], ".gif", save_all=True, append_images=frames[1:])
    assert (pixels == RED).all()


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (16, 8), RED)
    image.paste((0, 0, 255), (0, 0, 8, 8))  # stored with blue at the left ...
    exif = Image.Exif()
    exif[0x0112] = 6  # ... to be shown turned clockwise, with blue at the top
    save(tmp_path / "a.png", image, exif=exif)
    upright = np.asarray(to_rgb(Image.open(tmp_path / "a.png")))
    assert upright.shape == (16, 8, 3)
    assert (upright[:8] == (0, 0, 255)).all() and (upright[8:] == RED).all()


def test_sixteen_bit_grey_is_scaled_from_its_full_range(tmp_path):
    values = np.zeros((8, 8), np.uint16)
    values[0, :5] = (0, 257, 32768, 65278, 65535)
    for suffix in (".png", ".tif", ".pgm"):
        pixels = one(tmp_path / suffix, Image.fromarray(values), suffix)
        assert pixels[0, :5].tolist() == [[0] * 3, [1] * 3, [128] * 3, [254] * 3, [255] * 3], suffix


def test_numbers_without_a_white_are_refused(tmp_path):
    for mode, value in (("F", 0.5), ("I", 70000), ("I", -1)):
        save(tmp_path / "a.tif", Image.new(mode, (8, 8), value))
        with pytest.raises(BrokenImage, match=f"pixels of mode {mode} have no defined white; save it as 8 or 16 bits"):
            open_images(tmp_path, 8)[0]


def test_transparency_is_laid_on_white(tmp_path):
    image = Image.new("RGBA", (8, 8), (*RED, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 8))
    image.putpixel((7, 0), (0, 0, 0, 51))  # a fifth of black on white
    pixels = one(tmp_path, image)
    assert (pixels[:, :4] == WHITE).all() and (pixels[1:, 4:] == RED).all()
    assert pixels[0, 7].tolist() == [204] * 3


def test_transparent_palette_and_grey(tmp_path):
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 255, *RED])
    palette.paste(0, (0, 0, 4, 8))
    pixels = one(tmp_path / "p", palette, transparency=0)
    assert (pixels[:, :4] == WHITE).all() and (pixels[:, 4:] == RED).all()
    assert (one(tmp_path / "opaque", palette)[:, :4] == (0, 0, 255)).all()
    assert (one(tmp_path / "la", Image.new("LA", (8, 8), (0, 51))) == 204).all()


@pytest.mark.parametrize("mode, value, expected", [("L", 90, 90), ("1", 1, 255), ("CMYK", (0, 0, 0, 155), 100)])
def test_other_modes(tmp_path, mode, value, expected):
    pixels = one(tmp_path, Image.new(mode, (8, 8), value), ".tif")
    assert (pixels == expected).all()


def test_mixed_sizes_come_out_alike(tmp_path):
    for i, (width, height) in enumerate([(10, 10), (100, 30), (7, 300), (1, 1)]):
        save(tmp_path / f"{i}.png", picture(i, width, height))
    assert {item.pixels.shape for item in open_images(tmp_path, 24)} == {(24, 24, 3)}


def test_classes_without_masks_are_no_plain_images(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    (tmp_path / "classes.json").write_text('["sky", "road"]')
    with pytest.raises(DataError, match=r"has a classes\.json, but not images/ and masks/ with images in both"):
        open_images(tmp_path, 8)
