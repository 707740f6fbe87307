"""Mask-to-image: a map means the same however it is stored, and the model sees the condition that training gives."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from latentflow.api import LatentFlow
from latentflow.autoencoder import to_uint8
from latentflow.data.batches import SpatialData, TrainingImages
from latentflow.data.items import UNLABELLED
from latentflow.data.painting.latent_size import class_counts, shares
from latentflow.data.painting.semantic_maps import colour_map
from latentflow.data.pictures.crop import crop_map
from latentflow.data.sources.images import open_images
from latentflow.errors import ConfigError, DataError
from latentflow.flow.times import TrainingTimes
from latentflow.model.conditioning import CONDITION_NAMES
from latentflow.shapes import Condition
from latentflow.training.step import training_step
from tests import tiny

SIZE, FACTOR = tiny.IMAGE_SIZE, tiny.FACTOR
MAPS_ALONE = {key: value for key, value in tiny.SPATIAL.items() if key != "inpainting"}


class Attentive(LatentFlow):
    """A model that records its condition."""

    def velocity(self, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
        self.conditions.append(condition)
        return super().velocity(latents, time, condition)


@pytest.fixture(scope="module")
def model(kl) -> Attentive:
    """A model conditioned on labels, the known part, and maps."""
    made = tiny.model(kl, conditioning=tiny.SPATIAL, time_scale=20.0)
    attentive = Attentive(made.config, made.network, made.autoencoder)
    attentive.conditions = []
    return attentive


def a_map(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Blocks of all classes, thin lines and unlabelled pixels."""
    generator = np.random.default_rng(seed)
    blocks = generator.choice([0, 1, 2, UNLABELLED], (-(-height // 5), -(-width // 5)))
    indices = np.kron(blocks, np.ones((5, 5)))[:height, :width].astype(np.uint8)
    indices[generator.integers(height)] = 2
    indices[:, generator.integers(width)] = 1
    return indices


def told_fractions(model: Attentive, semantic_map, **request) -> Tensor:
    """The map in the condition of the model: [K, h, w]."""
    model.conditions.clear()
    model.mask_to_image(semantic_map, **request)
    fractions = model.conditions[0].class_fractions
    assert all(torch.equal(condition.class_fractions, fractions) for condition in model.conditions)
    return fractions[0]


# The condition


@pytest.mark.parametrize("size", [(16, 16), (23, 41), (90, 64), (9, 12)], ids=str)
def test_the_square_middle_as_in_training(model, size):
    indices = a_map(*size)
    cropped = crop_map(indices, SIZE)
    assert torch.equal(told_fractions(model, indices), shares(class_counts(cropped, 3, FACTOR), FACTOR))
    result = model.mask_to_image(indices)
    assert result.pixels.shape == (1, 3, SIZE, SIZE)
    assert result.drawing.image_size == (SIZE, SIZE)


def test_the_condition_is_that_of_training(model, segmented):
    """The batch that training would make of the same file; equal to the bit."""
    source = open_images(segmented, SIZE)
    stream = TrainingImages(source, seed=3, flip=False, spatial=SpatialData(factor=FACTOR, maps=True))
    batch = stream.__getitems__([2])
    in_training = []

    def network(x, t, condition):
        in_training.append(condition)
        return torch.zeros_like(x)

    chosen = {"times": TrainingTimes(), "batch_size": 1, "seed": 3, "conditions": CONDITION_NAMES}
    training_step(model, network, batch, **chosen)
    file = (segmented / "masks" / source.name(int(batch.indices[0]))).with_suffix(".png")
    conditions = told_fractions(model, file, classes=[int(batch.labels[0])])
    assert torch.equal(conditions, in_training[0].class_fractions[0])
    assert torch.equal(model.conditions[0].labels, in_training[0].labels)
    assert model.conditions[0].mask.min() == 1  # no known part, as it is dropped in training
    assert model.conditions[0].masked_latents.abs().max() == 0


def test_native_is_the_map_as_it_is(model):
    indices = a_map(20, 36)
    assert torch.equal(told_fractions(model, indices, native=True), shares(class_counts(indices, 3, FACTOR), FACTOR))
    result = model.mask_to_image(indices, native=True)
    assert result.pixels.shape == (1, 3, 20, 36)
    assert torch.equal(to_uint8(model.decode(result.latents)), result.pixels)
    with pytest.raises(ConfigError, match=r"37 x 20 pixels .* multiples of 4; resize to 36 x 20"):
        model.mask_to_image(a_map(20, 37), native=True)


def test_unlabelled_pixels_say_nothing(model):
    assert told_fractions(model, np.full((SIZE, SIZE), UNLABELLED, np.uint8)).abs().max() == 0
    indices = np.zeros((SIZE, SIZE), np.uint8)
    indices[:, : SIZE // 2] = UNLABELLED
    indices[0, 0] = 2
    conditions = told_fractions(model, indices)
    assert conditions[:, :, : SIZE // FACTOR // 2].sum() == 1 / FACTOR**2
    assert (conditions[0, :, SIZE // FACTOR // 2 :] == 1).all()
    silent = model.mask_to_image(np.full((SIZE, SIZE), UNLABELLED, np.uint8), seed=4)
    assert torch.equal(silent.pixels, model.sample(num=1, classes=[], seed=4).pixels)


def test_the_map_matters(model):
    first, second = (model.mask_to_image(a_map(SIZE, SIZE, seed)).pixels for seed in (0, 1))
    assert (first != second).any(1).float().mean() > 0.5


# One map, many files


def test_every_way_to_store_a_map_gives_the_same_picture(model, tmp_path):
    indices = a_map(30, 22)
    grey, palette = Image.fromarray(indices), Image.fromarray(indices)
    palette.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])  # colours do not matter
    colours = Image.fromarray(colour_map(indices, tiny.MAP_PALETTE))
    wanted = model.mask_to_image(indices, num=2)
    pictures = {"grey": grey, "palette": palette, "rgb": colours, "deep": Image.fromarray(indices.astype(np.uint16))}
    for name, picture in pictures.items():
        picture.save(tmp_path / f"{name}.png")
        for given in (picture, tmp_path / f"{name}.png", str(tmp_path / f"{name}.png")):
            assert torch.equal(model.mask_to_image(given, num=2).pixels, wanted.pixels), name
    for dtype in (np.int64, np.uint16):
        assert torch.equal(model.mask_to_image(indices.astype(dtype), num=2).pixels, wanted.pixels)


def test_the_png_says_how_it_was_drawn(model, tmp_path):
    file = tmp_path / "map.png"
    Image.fromarray(a_map(20, 24)).save(file)
    asked = {"classes": ["cherry", "apple"], "seed": 5, "steps": 3, "native": True}
    samples = model.mask_to_image(file, num=3, batch_size=2, **asked)
    files = samples.save_as(tmp_path / "out.png")
    assert [f.name for f in files] == [
        f"out_{c}_seed-{s:08d}.png" for c, s in (("cherry", 5), ("apple", 6), ("cherry", 7))
    ]
    said = json.loads(Image.open(files[1]).text["latentflow"])
    assert (said["task"], said["seeds"], said["class_name"]) == ("mask-to-image", [6], "apple")
    assert said["told"] == ["label", "semantic_map"]
    assert said["image_size"] == [20, 24]
    assert said["inputs"]["map"].startswith("map.png sha256:")
    again = model.mask_to_image(file, classes=said["labels"], seed=6, native=True, **said["sampling"])
    difference = np.asarray(again.images[0]).astype(int) - np.asarray(Image.open(files[1]))
    assert abs(difference).max() <= 1  # in a batch of another size
    assert torch.equal(model.mask_to_image(file, num=3, batch_size=2, **asked).pixels, samples.pixels)


def test_seeds_differ_and_do_not_depend_on_the_batch(model):
    indices = a_map(SIZE, SIZE)
    together = model.mask_to_image(indices, num=5, seed=3, batch_size=2)
    for row in range(5):
        alone = model.mask_to_image(indices, seed=3 + row)
        torch.testing.assert_close(alone.latents[0], together.latents[row], atol=1e-5, rtol=1e-5)
        assert all((together.pixels[row] != together.pixels[other]).any() for other in range(row))


# Guidance


def test_guidance_by_the_map_and_by_the_label(model):
    indices = a_map(SIZE, SIZE)
    assert model.mask_to_image(indices).evaluations.tolist() == [2]
    for guided_by in (["semantic_map"], ["label"], None):
        model.conditions.clear()
        guided = model.mask_to_image(indices, classes=[1], guidance=2.0, guided_by=guided_by)
        assert guided.evaluations.tolist() == [4]
        labels, fractions = model.conditions[0].labels, model.conditions[0].class_fractions
        assert (labels[0] != labels[1]) == (guided_by != ["semantic_map"])
        assert torch.equal(fractions[0], fractions[1]) == (guided_by == ["label"])
    with pytest.raises(ConfigError, match="not given"):
        model.mask_to_image(indices, guidance=2.0, guided_by=["label"])
    with pytest.raises(ConfigError, match="not given"):
        model.mask_to_image(indices, guidance=2.0, guided_by=["inpainting"])


def test_a_map_that_was_never_dropped_cannot_guide(kl):
    model = tiny.model(kl, conditioning={**MAPS_ALONE, "map_dropout": 0.0})
    indices = a_map(SIZE, SIZE)
    assert model.mask_to_image(indices).drawing.told == ["semantic_map"]
    with pytest.raises(ConfigError, match=r"_dropout = 0"):
        model.mask_to_image(indices, guidance=2.0)
    with pytest.raises(ConfigError, match="latentflow mask-to-image"):
        model.sample(num=1)


# Bad input


@pytest.mark.parametrize(
    ("semantic_map", "message"),
    [
        (np.full((16, 16), 3), "class 3"),
        (np.full((16, 16), -1), "class -1"),
        (np.zeros((16, 16, 3), np.uint8), r"\[16, 16, 3\]"),
        (np.zeros((16, 16)), "float64"),
        (np.zeros((16, 16), bool), "bool"),
        (np.zeros((1, 16), np.uint8), "smaller than one latent pixel"),
        (Image.new("RGB", (16, 16), (1, 2, 3)), "belongs to no class"),
        (Image.new("RGBA", (16, 16), (*tiny.MAP_PALETTE[0], 90)), "not opaque"),
        (Image.new("F", (16, 16)), "mode F"),
    ],
)
def test_maps_that_are_refused(model, semantic_map, message):
    model.conditions.clear()
    with pytest.raises(DataError, match=message):
        model.mask_to_image(semantic_map)
    assert not model.conditions


def test_requests_that_are_refused(model, kl):
    indices = a_map(SIZE, SIZE)
    with pytest.raises(ConfigError, match="not trained with the condition semantic_map"):
        tiny.model(kl).mask_to_image(indices)
    for request, message in [({"num": 0}, "number of images 0"), ({"classes": [9]}, "class #9")]:
        with pytest.raises(ConfigError, match=message):
            model.mask_to_image(indices, **request)
