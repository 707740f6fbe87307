"""What feature networks see of images of any pixels."""

from __future__ import annotations

import pickle

import numpy as np

from latentflow.data.pixel_choice import PixelChoice
from latentflow.data.sources.images import open_images
from latentflow.data.sources.shown_images import shown_images
from latentflow.pixel_format import RGB
from latentflow.runtime import open_runtime
from latentflow.training.feature_run import prepare_features
from latentflow.training.request import TrainFeaturesRequest
from tests.data.pictures.stored_files import SIDE, png16


def scans(place, most: int, count: int = 40):
    for number in range(count):
        values = np.random.default_rng(number).integers(0, most + 1, (SIDE, SIDE, 1), np.uint16)
        values[0, 0], values[0, 1] = 0, most
        (place / f"{number:03}.png").write_bytes(png16(values))
    return place


def test_12_bits_are_shown_from_black_to_white(tmp_path):
    source = open_images(scans(tmp_path, 4095), SIDE, pixels=PixelChoice())
    shown = shown_images(source)
    assert (shown.pixel_format, len(shown), shown.name(3), shown.class_names) == (RGB, 40, "003.png", ())
    pixels = shown[3].pixels
    assert (pixels.shape, pixels.dtype, pixels.min(), pixels.max()) == ((SIDE, SIDE, 3), np.uint8, 0, 255)
    assert np.array_equal(pixels[..., 1:2], np.rint(source[3].pixels / (4095 / 255)))
    assert np.array_equal(pickle.loads(pickle.dumps(shown))[3].pixels, pixels)


def test_colours_of_8_bits_are_what_they_are():
    source = open_images("synthetic:2", 16)
    assert shown_images(source) is source


def test_a_judge_learns_from_what_is_shown(tmp_path):
    (tmp_path / "scans").mkdir()
    request = TrainFeaturesRequest(
        data=scans(tmp_path / "scans", 1000, 250), out=tmp_path / "judge", image_size=16, steps=2
    )
    prepared = prepare_features(request, open_runtime("cpu", alone=True))
    assert prepared.plan.pixel_format.title == "16-bit gray, 0 to 1000 (least and greatest of 250 images)"
    batch = prepared.images.at(range(8))
    assert (batch.pixels.shape[1], batch.pixels.amax() > 200) == (3, True)
