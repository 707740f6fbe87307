"""What stored values mean: known values, round trips, and 8-bit RGB to the bit as ever."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from latentflow.autoencoder import to_uint8, to_unit_range
from latentflow.pixel_format import FULL_RANGE, PixelFormat

RADIOGRAPH = PixelFormat(channels=1, dtype="uint16", low=[0], high=[4095], rule="given")
TILE = PixelFormat(channels=4, dtype="uint16", low=[0, 0, 0, 100], high=[10000, 10000, 8000, 6000], rule="given")
HOUNSFIELD = PixelFormat(channels=1, dtype="float32", low=[-1000], high=[3000], rule="given")


def test_the_default_is_8_bit_rgb_to_the_bit_as_ever():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(PixelFormat().to_unit(levels), to_unit_range(levels))
    unit = torch.linspace(-1.2, 1.2, 3 * 1001).reshape(1, 3, 7, 143)
    assert torch.equal(PixelFormat().from_unit(unit), to_uint8(unit))
    assert PixelFormat().title == "8-bit rgb"


def test_what_is_not_said_follows_from_what_is():
    assert PixelFormat() == PixelFormat(channels=3, dtype="uint8", low=[0], high=[255], mode="rgb")
    assert (PixelFormat(channels=1).mode, PixelFormat(channels=4).mode) == ("gray", "bands")
    assert (PixelFormat(mode="rgba").channels, PixelFormat(mode="gray-alpha").channels) == (4, 2)
    assert PixelFormat(dtype="uint16").high == [65535]
    assert PixelFormat.model_validate(TILE.model_dump(mode="json")) == TILE


def test_known_values():
    values = np.array([[[0], [4095]], [[1024], [2048]]], np.uint16)
    expected = [[[-1], [1]], [[2 * 1024 / 4095 - 1], [2 * 2048 / 4095 - 1]]]
    assert np.allclose(RADIOGRAPH.to_unit(values), expected, atol=1e-7)
    tile = np.array([[[5000, 10000, 4000, 100]]], np.uint16)
    assert np.allclose(TILE.to_unit(tile), [[[0, 1, 0, -1]]], atol=1e-7)
    assert np.allclose(HOUNSFIELD.to_unit(np.float32([[[-1000], [0], [3000]]])), [[[-1], [-0.5], [1]]], atol=1e-7)
    assert TILE.title == "16-bit 4 bands, 0 to 10000; 0 to 10000; 0 to 8000; 100 to 6000 (given)"


def test_values_outside_the_range_are_clipped():
    assert RADIOGRAPH.to_unit(np.uint16([[[60000]]])).item() == 1
    assert HOUNSFIELD.to_unit(torch.tensor([[[-2000.0]]])).item() == -1
    assert RADIOGRAPH.from_unit(torch.tensor([[[50.0]]])).item() == 65535
    assert RADIOGRAPH.from_unit(torch.tensor([[[-1.5]]])).item() == 0


@pytest.mark.parametrize("pixel_format", [PixelFormat(), RADIOGRAPH, PixelFormat(channels=1, dtype="uint16"), TILE])
def test_every_integer_of_the_range_comes_back(pixel_format):
    low, high = round(max(pixel_format.low)), round(min(pixel_format.high))
    levels = np.arange(low, high + 1, dtype=pixel_format.dtype)
    values = np.repeat(levels[None, :, None], pixel_format.channels, axis=2)
    assert np.array_equal(pixel_format.from_unit(pixel_format.to_unit(values)), values)
    tensor = torch.from_numpy(values).permute(2, 0, 1)
    unit = pixel_format.to_unit(tensor)
    assert unit.dtype == torch.float32
    back = pixel_format.from_unit(unit)
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor)


@settings(deadline=None, max_examples=30)
@given(low=st.floats(-1e4, 1e4), width=st.floats(1e-3, 1e5), place=st.floats(0, 1))
def test_floating_point_values_come_back_within_a_millionth_of_the_range(low, width, place):
    pixel_format = PixelFormat(channels=1, dtype="float32", low=[low], high=[low + width], rule="given")
    values = np.full((2, 2, 1), low + place * width, np.float32)
    back = pixel_format.from_unit(pixel_format.to_unit(values))
    assert back.dtype == np.float32
    assert np.abs(back - values).max() <= 1e-6 * width + 4 * np.spacing(np.float32(abs(low) + width))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"channels": 4, "mode": "rgb"}, "3 channels, not 4"),
        ({"low": [0, 0], "high": [1, 1]}, "low has 2 numbers for 3 channels"),
        ({"low": [5], "high": [5]}, "not below"),
        ({"low": [0, 0, 0], "high": [255]}, "high 1"),
        ({"dtype": "int16"}, "uint8"),
        ({"channels": 0}, "greater than or equal to 1"),
    ],
)
def test_contradictions_are_refused(given, said):
    with pytest.raises(ValidationError, match=said):
        PixelFormat(**given)


def test_full_ranges_are_those_of_the_dtypes():
    assert {name: (np.iinfo(name).min, np.iinfo(name).max) for name in ("uint8", "uint16")} == {
        name: FULL_RANGE[name] for name in ("uint8", "uint16")
    }
    assert PixelFormat(dtype="uint16").is_full_range
    assert not RADIOGRAPH.is_full_range
    assert not PixelFormat(dtype="float32").is_full_range
