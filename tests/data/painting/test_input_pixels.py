"""Paired inputs: made from images by the stated rules, and brought to latent size without losing a value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.data.painting.input_pixels import (
    at_image_size,
    at_latent_size,
    derived_format,
    derived_inputs,
    stack_inputs,
    unit_inputs,
)
from latentflow.data.painting.input_rules import InputRules
from latentflow.errors import ConfigError
from latentflow.pixel_format import PixelFormat

RGB, ONE = PixelFormat(), PixelFormat(channels=1)
SHRINK, GRAY, FILES = (InputRules(origin=origin, form="pixels") for origin in ("shrink:4", "gray", "files"))


def pictures(num: int = 2, height: int = 16, width: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (num, 3, height, width), generator=torch.Generator().manual_seed(0)).byte()


def test_a_shrunk_input_holds_the_rounded_means():
    given = pictures()
    means = given.double().reshape(2, 3, 4, 4, 6, 4).mean((3, 5))
    assert torch.equal(derived_inputs(given, SHRINK), (means + 0.5).floor().byte())
    halves = torch.tensor([0, 1, 0, 1]).repeat(4).reshape(1, 1, 4, 4).byte()  # a mean of 1/2 becomes 1
    assert derived_inputs(halves, SHRINK).tolist() == [[[[1]]]]


def test_the_brightness_is_that_of_pillow():
    given = pictures(1)
    picture = Image.fromarray(given[0].permute(1, 2, 0).numpy())
    assert np.array_equal(derived_inputs(given, GRAY)[0, 0].numpy(), np.asarray(picture.convert("L")))


def test_gray_stays_gray():
    levels = torch.arange(256).byte().reshape(1, 1, 16, 16)
    assert torch.equal(derived_inputs(levels.expand(-1, 3, -1, -1), GRAY), levels)


@pytest.mark.parametrize("rules", [SHRINK, GRAY], ids=lambda rules: rules.origin)
def test_mirroring_an_image_mirrors_its_input(rules):
    given = pictures()
    assert torch.equal(derived_inputs(given.flip(-1), rules), derived_inputs(given, rules).flip(-1))


@pytest.mark.parametrize(("shrinking", "channels"), [(1, 3 * 64), (2, 3 * 16), (4, 3 * 4), (8, 3), (16, 3)])
def test_at_latent_size_no_value_is_lost_and_the_norm_is_that_of_one_pixel(shrinking, channels):
    inputs = torch.randn(2, 3, 64 // shrinking, 32 // shrinking, generator=torch.Generator().manual_seed(1))
    at_latents = at_latent_size(inputs, 8, shrinking)
    assert at_latents.shape == (2, channels, 8, 4)
    rules = InputRules(origin=f"shrink:{shrinking}", form="pixels") if shrinking > 1 else FILES
    assert rules.network_channels(RGB, RGB, 8, 4) == channels
    per_side = max(8 // shrinking, 1)
    assert torch.equal(
        (at_latents.flatten().sort().values * per_side).unique(), inputs.flatten().sort().values.unique()
    )
    assert torch.allclose(at_latents.square().sum(1).mean(), inputs.square().sum(1).mean(), rtol=1e-5)


def test_a_latent_pixel_gets_the_pixels_below_it():
    inputs = torch.arange(64.0).reshape(1, 1, 8, 8)
    at_latents = at_latent_size(inputs, 4, 1)
    assert torch.equal(at_latents[0, :, 1, 0] * 4, inputs[0, 0, 4:, :4].flatten())


def test_as_an_image_an_input_has_the_size_and_the_channels_of_one():
    inputs = torch.full((2, 1, 4, 6), 0.25)
    assert torch.allclose(at_image_size(inputs, 4, 3), torch.full((2, 3, 16, 24), 0.25))
    assert at_image_size(torch.zeros(1, 3, 8, 8), 1, 3).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("origin", ["shrink:1", "shrink:0", "shrink", "shrink:-2", "grey", "blur:3", ""])
def test_another_origin_is_refused(origin):
    with pytest.raises(ConfigError, match=r"inputs .*: give files, shrink:N .* or gray"):
        InputRules(origin=origin)


def test_sizes_that_do_not_fit_are_refused_with_those_that_do():
    with pytest.raises(ConfigError, match="62 pixels are not a multiple of 4; use an image size of 64"):
        SHRINK.size(62)
    with pytest.raises(ConfigError, match=r"reduces by 8, which neither divides .* by 3; use 2, 4, 8, 16, or the form"):
        InputRules(origin="shrink:3", form="pixels").network_channels(RGB, RGB, 8, 4)
    in_latents = InputRules(origin="shrink:3", form="latents")
    assert in_latents.network_channels(RGB, RGB, 8, 4) == in_latents.network_channels(ONE, RGB, 8, 4) == 4
    with pytest.raises(
        ConfigError, match="inputs of 4 channels cannot be encoded like images of 3; use the form 'pixels'"
    ):
        in_latents.network_channels(PixelFormat(channels=4), RGB, 8, 4)
    with pytest.raises(ConfigError, match="inputs gray: the images are 8-bit 4 bands, not RGB with one range"):
        derived_format(GRAY, PixelFormat(channels=4))


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_inputs_of_any_format_are_made_and_scaled_by_it(dtype):
    """Derived in stored values, and given to the network in [-1, 1]; 8-bit values stay what they are until then."""
    images = PixelFormat(dtype=dtype, low=[0], high=[1000])
    stored = images.from_unit(torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1)
    small = derived_inputs(stored, SHRINK)
    assert small.dtype == stored.dtype
    assert torch.allclose(small.float(), stored.float().unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5)), atol=0.51)
    given = stack_inputs(list(small.permute(0, 2, 3, 1).numpy()), derived_format(SHRINK, images))
    assert torch.allclose(given, small.float() / 500 - 1, atol=1e-6)
    assert torch.equal(unit_inputs(given, images), given)
    gray, luma = derived_inputs(stored, GRAY), torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    assert derived_format(GRAY, images).channels == gray.shape[1] == 1
    assert torch.allclose(gray.float(), (stored.float() * luma).sum(1, keepdim=True), atol=0.51)


def test_8_bit_inputs_stay_bytes():
    given = stack_inputs(list(pictures().permute(0, 2, 3, 1).numpy()), RGB)
    assert torch.equal(given, pictures())
    assert torch.equal(unit_inputs(given, RGB), pictures().float() / 127.5 - 1)


def test_by_default_inputs_are_encoded_where_the_autoencoder_can():
    rules, bands = InputRules(origin="shrink:4"), PixelFormat(channels=5)
    assert [rules.resolved(one, RGB).form for one in (RGB, ONE, bands)] == ["latents", "latents", "pixels"]
    assert rules.resolved(bands, bands).form == "latents"
    assert SHRINK.resolved(RGB, RGB) == SHRINK
    assert SHRINK.agrees_with(rules)
    assert SHRINK.agrees_with(InputRules())
    assert not SHRINK.agrees_with(InputRules(origin="gray"))
    assert not SHRINK.agrees_with(InputRules(origin="shrink:4", form="latents"))
