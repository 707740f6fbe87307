"""Translate: the model sees the input that training gives, at any size of the image."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from latentflow.api import LatentFlow
from latentflow.autoencoder import to_unit_range
from latentflow.data.items import stack_pixels
from latentflow.data.painting.input_pixels import at_latent_size, derived_inputs
from latentflow.data.painting.input_rules import InputRules
from latentflow.data.pictures.crop import center_crop
from latentflow.errors import ConfigError, DataError
from latentflow.pixel_format import PixelFormat
from latentflow.sampling.translate import read_paired
from latentflow.shapes import Condition
from tests import tiny

SIZE, FACTOR = tiny.IMAGE_SIZE, tiny.FACTOR
ORIGINS = ["files", "shrink:2", "shrink:4", "gray"]


class Attentive(LatentFlow):
    """A model that records its conditions."""

    def velocity(self, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
        self.conditions.append(condition)
        return super().velocity(latents, time, condition)


@pytest.fixture(scope="module")
def models(kl) -> dict[str, Attentive]:
    """By the origin of their inputs."""
    made = {}
    for origin in ORIGINS:
        plain = tiny.model(
            kl, inputs=InputRules(origin=origin, form="pixels"), input_channels=1 if origin == "gray" else 3
        )
        made[origin] = Attentive(plain.config, plain.network, plain.autoencoder)
        made[origin].conditions = []
    return made


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def seen_by(model: Attentive, image, **request) -> Tensor:
    """The input in the condition of the model: [I, h, w]."""
    model.conditions.clear()
    model.translate(image, **request)
    seen = model.conditions[0].input
    assert all(torch.equal(condition.input, seen) for condition in model.conditions)
    return seen[0]


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("size", [(16, 16), (41, 23), (8, 8), (64, 90)], ids=str)
def test_the_square_middle_as_in_training(models, origin, size):
    model, image, rules = models[origin], picture(*size), InputRules(origin=origin)
    pixels = stack_pixels([center_crop(image, SIZE // rules.shrinking)])
    pixels = derived_inputs(pixels, rules) if origin == "gray" else pixels
    expected = at_latent_size(to_unit_range(pixels), FACTOR, rules.shrinking)
    assert torch.equal(seen_by(model, image), expected[0])
    assert model.translate(image, num=2).pixels.shape == (2, 3, SIZE, SIZE)


def test_what_was_shrunk_in_training_is_what_a_small_image_holds(models):
    """A file of the low resolution is given to the model pixel by pixel."""
    image = picture(SIZE, SIZE)
    small = derived_inputs(stack_pixels([np.asarray(image)]), InputRules(origin="shrink:4"))
    given = Image.fromarray(small[0].permute(1, 2, 0).numpy())
    seen = seen_by(models["shrink:4"], given)
    assert torch.equal(seen[:, ::2, ::2], to_unit_range(small)[0])  # 4 x 4 pixels over 8 x 8 latent pixels


@pytest.mark.parametrize(("origin", "size", "drawn"), [("shrink:4", (6, 9), (24, 36)), ("gray", (24, 20), (24, 20))])
def test_native_keeps_every_pixel(models, origin, size, drawn):
    samples = models[origin].translate(picture(*size), native=True)
    assert samples.images[0].size == drawn
    assert samples.drawing.image_size == drawn[::-1]


def test_native_names_the_nearest_size_that_fits(models):
    with pytest.raises(ConfigError, match=r"21 x 18 pixels cannot be .* multiples of 4; resize to 20 x 16"):
        models["files"].translate(picture(21, 18), native=True)
    with pytest.raises(ConfigError, match=r"7 x 8 pixels cannot be .* multiples of 2; resize to 8 x 8"):
        models["shrink:2"].translate(picture(7, 8), native=True)
    assert models["shrink:4"].translate(picture(7, 5), native=True).images[0].size == (28, 20)


def test_a_gray_picture_and_its_rgb_copy_are_the_same_input(models):
    gray = picture(20, 20).convert("L")
    assert torch.equal(seen_by(models["gray"], gray), seen_by(models["gray"], gray.convert("RGB")))


def test_one_seed_one_picture(models):
    model, image = models["shrink:4"], picture(4, 4)
    together = model.translate(image, num=3, seed=5, guidance=2.0)
    alone = model.translate(image, seed=6, guidance=2.0)
    assert torch.allclose(together.latents[1], alone.latents[0], atol=1e-5)
    other = model.translate(picture(4, 4, seed=1), seed=6, guidance=2.0)
    assert not torch.allclose(other.latents, alone.latents, atol=1e-2)


def test_guidance_acts_on_the_input(models):
    model, image = models["gray"], picture(16, 16)
    drawn = [model.translate(image, seed=1, guidance=scale).latents for scale in (0, 1, 2)]
    assert not torch.allclose(drawn[1], drawn[2], atol=1e-3)
    null = model.translate(picture(16, 16, seed=2), seed=1, guidance=0).latents
    assert torch.allclose(drawn[0], null, atol=1e-5)  # the velocity without the input


def test_its_png_names_the_file_and_the_condition(models, tmp_path):
    picture(16, 16).save(tmp_path / "small.png")
    samples = models["files"].translate(tmp_path / "small.png", seed=3, classes=["berry"])
    facts = json.loads(Image.open(samples.save_as(tmp_path / "out.png")[0]).info["latentflow"])
    assert (facts["task"], facts["seeds"], facts["class_name"]) == ("translate", [3], "berry")
    assert facts["told"] == ["label", "input"]
    assert facts["inputs"]["image"].startswith("small.png sha256:")


def test_a_model_without_inputs_and_what_is_no_image_are_refused(models, kl, tmp_path):
    with pytest.raises(ConfigError, match="not trained with the condition input"):
        tiny.model(kl).translate(picture(16, 16))
    with pytest.raises(DataError, match="give a file or a Pillow image"):
        models["files"].translate(np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(DataError, match="does not exist"):
        models["files"].translate(tmp_path / "nowhere.png")


def test_a_model_that_requires_an_input_says_how_to_give_it(kl):
    needy = tiny.model(kl, inputs=InputRules(), conditioning={"input_dropout": 0.0})
    with pytest.raises(ConfigError, match=r"requires the condition input.*`latentflow translate`"):
        needy.sample()
    assert needy.translate(picture(16, 16)).pixels.shape == (1, 3, SIZE, SIZE)


@pytest.mark.parametrize("native", [False, True])
def test_an_input_of_16_bits_keeps_its_range(kl, tmp_path, native):
    """Through a file: 1,000 and 3,000 of a range of 0 to 4,000 are -0.5 and 0.5."""
    pixels = PixelFormat(channels=1, dtype="uint16", low=[0], high=[4000])
    plain = tiny.model(kl, inputs=InputRules(form="pixels"), input_channels=1)
    config = plain.config.model_copy(update={"input_format": pixels})
    values = np.full((SIZE, SIZE), 1000, np.uint16)
    values[:, SIZE // 2 :] = 3000
    Image.fromarray(values).save(tmp_path / "elevation.png")
    seen = read_paired(LatentFlow(config, plain.network, plain.autoencoder), tmp_path / "elevation.png", native=native)
    assert torch.allclose(seen[0, 0, :, : SIZE // 2], torch.tensor(-0.5))
    assert torch.allclose(seen[0, 0, :, SIZE // 2 :], torch.tensor(0.5))
