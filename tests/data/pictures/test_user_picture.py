"""Single pictures: read, described, made square, compared."""

from __future__ import annotations

import hashlib
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.data.pictures.crop import center_crop
from latentflow.data.pictures.user_picture import cropped_picture, describe_file, psnr, read_picture
from latentflow.errors import DataError


def test_a_picture_is_read_upright_and_opaque(tmp_path):
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    read = read_picture(tmp_path / "turned.png").planes[0]
    assert (read.mode, read.size) == ("RGB", (2, 4))
    assert read.getpixel((0, 0)) == (255, 255, 255)


def test_a_file_is_described_by_name_and_content(tmp_path):
    (tmp_path / "a.png").write_bytes(b"content")
    assert describe_file(tmp_path / "a.png") == f"a.png sha256:{hashlib.sha256(b'content').hexdigest()[:12]}"


@pytest.mark.parametrize("use", [read_picture, describe_file])
def test_files_that_are_not_there(use, tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.png does not exist"):
        use(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match="is a folder"):
        use(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zero.png"):  # which would be read without end
        with pytest.raises(DataError, match=f"{name} is a pipe or a device; give an image file"):
            use(tmp_path / name)


def test_a_cropped_picture_is_cropped_as_for_training():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    square = cropped_picture(read_picture(Image.fromarray(pixels)), 16)
    assert square.dtype == torch.uint8
    assert np.array_equal(square[0].permute(1, 2, 0).numpy(), center_crop(Image.fromarray(pixels), 16))
    with pytest.raises(DataError, match="white"):
        read_picture(Image.new("F", (30, 30)))


def test_psnr():
    black = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    other = black.clone()
    other[0] += 51  # a fifth of the range
    expected = [20 * math.log10(5), 10 * math.log10(255**2 * 48)]
    torch.testing.assert_close(psnr(black, other), torch.tensor(expected, dtype=torch.float64))
