"""Edits without training: exact where the velocity is known, and one seed, one picture as everywhere."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.api import LatentFlow
from latentflow.autoencoder import to_unit_range
from latentflow.data.pictures.crop import center_crop
from latentflow.errors import ConfigError, DataError
from latentflow.sampling.drawing import Drawing
from latentflow.sampling.edits import variation_seed
from latentflow.sampling.pipeline import Given, draw_all, initial_noise
from tests import tiny
from tests.fields import LinearField

ROUNDING = 1e-5
"""As in test_pipeline: matrix products round differently in batches of different sizes."""


@pytest.fixture(scope="module")
def model(kl) -> LatentFlow:
    return tiny.model(kl, time_scale=20.0)


@pytest.fixture
def still(kl) -> LatentFlow:
    """A model whose velocity is zero: what drawing starts from is what comes out."""
    return LatentFlow(tiny.model(kl).config, LinearField(), kl)


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """A picture of 40 x 30 pixels."""
    file = tmp_path_factory.mktemp("photos") / "photo.png"
    coarse = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((40, 30), Image.Resampling.BICUBIC).save(file)
    return file


def latents_of(model: LatentFlow, photo: Path) -> torch.Tensor:
    pixels = center_crop(Image.open(photo).convert("RGB"), tiny.IMAGE_SIZE)
    return model.encode(to_unit_range(torch.from_numpy(pixels).permute(2, 0, 1)[None]))


def noise_of(model: LatentFlow, *seeds: int) -> torch.Tensor:
    return initial_noise(model, Drawing(seeds=list(seeds)))


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=ROUNDING)


# Image-to-image


@pytest.mark.parametrize("strength", [0.01, 0.3, 1.0])
def test_drawing_starts_on_the_path(still, photo, strength):
    drawn = still.image_to_image(photo, strength=strength, num=3, seed=4)
    latents, noise = latents_of(still, photo).expand(3, -1, -1, -1), noise_of(still, 4, 5, 6)
    close(drawn.latents, still.config.path.interpolate(latents, noise, torch.full((3,), strength)))


def test_full_strength_leaves_nothing_of_the_image(model, photo):
    drawn = model.image_to_image(photo, strength=1.0, num=2, classes=["berry"], seed=4)
    close(drawn.latents, model.sample(num=2, classes=["berry"], seed=4).latents)


def test_little_strength_leaves_the_image(model, photo):
    drawn = model.image_to_image(photo, strength=1e-4, classes=["berry"])
    assert (drawn.latents - latents_of(model, photo)).abs().max() < 1e-2


def test_the_solver_starts_at_the_strength(kl, photo):
    """v = x: one Euler step from s to 0 multiplies x_s by 1 - s."""
    model = LatentFlow(tiny.model(kl).config, LinearField(rate=1.0), kl)
    drawn = model.image_to_image(photo, strength=0.25, seed=4, solver="euler", steps=1)
    x = model.config.path.interpolate(latents_of(model, photo), noise_of(model, 4), torch.tensor([0.25]))
    close(drawn.latents, x * (1 - 0.25))


def test_an_image_in_memory_is_one_in_a_file(model, photo):
    with Image.open(photo) as image:
        one, other = model.image_to_image(image, seed=2), model.image_to_image(photo, seed=2)
    assert torch.equal(one.latents, other.latents)
    assert one.drawing.inputs == {}
    assert list(other.drawing.inputs) == ["image"]
    assert other.drawing.inputs["image"].startswith("photo.png sha256:")


def test_small_pictures_are_enlarged_but_not_from_nothing(model):
    red = Image.new("RGB", (tiny.FACTOR, tiny.FACTOR), "red")
    large = Image.new("RGB", (50, 50), "red")
    assert torch.equal(model.image_to_image(red).latents, model.image_to_image(large).latents)
    with pytest.raises(DataError, match="latent pixel"):
        model.image_to_image(red.resize((tiny.FACTOR - 1, 50)))


def test_what_is_no_image_is_refused(model):
    with pytest.raises(DataError, match="image None: give a file or a Pillow image"):
        model.image_to_image(None)


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.5, math.nan])
def test_strengths_that_mean_nothing(model, photo, strength):
    with pytest.raises(ConfigError, match="strength"):
        model.image_to_image(photo, strength=strength)


# Interpolation


def test_noise_goes_along_a_great_circle(still):
    drawn = still.interpolate(seeds=(3, 8), num=5)
    a, b = noise_of(still, 3, 8)
    for frame, w in enumerate([0, 0.25, 0.5, 0.75, 1]):
        close(drawn.latents[frame], math.cos(w * math.pi / 2) * a + math.sin(w * math.pi / 2) * b)


def test_velocities_are_mixed_in_proportion(kl):
    """v = c_label: each frame ends in noise - (1 - w) c_from - w c_to."""
    levels = torch.tensor([0.0, 1.0, 5.0, 100.0])
    model = LatentFlow(tiny.model(kl).config, LinearField(levels=levels), kl)
    drawn = model.interpolate(seeds=(3, 3), classes=["berry", "cherry"], num=5)
    expected = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).reshape(5, 1, 1, 1)
    close(drawn.latents, noise_of(model, 3) - expected)


@pytest.mark.parametrize(
    ("seeds", "classes", "ends"),
    [
        ((3, 8), [], ([], [])),
        ((3, 8), None, (None, None)),
        ((3, 5), None, (None, None)),
        ((3, 8), ["berry"], (["berry"], ["berry"])),
        ((3, 3), ["berry", "apple"], (["berry"], ["apple"])),
        ((3, 8), ["#1", 0], (["berry"], ["apple"])),
        ((3, 8), "berry", (["berry"], ["berry"])),
    ],
)
def test_the_ends_are_plain_samples(model, seeds, classes, ends):
    drawn = model.interpolate(seeds=seeds, classes=classes, num=3, steps=4)
    for row, seed, classes in ((0, seeds[0], ends[0]), (2, seeds[1], ends[1])):
        close(drawn.latents[row], model.sample(seed=seed, classes=classes, steps=4).latents[0])
    assert (drawn.latents[1] - drawn.latents[0]).abs().max() > 0.1
    assert (drawn.latents[1] - drawn.latents[2]).abs().max() > 0.1


def test_guidance_holds_for_both_classes(model):
    drawn = model.interpolate(seeds=(3, 8), classes=["berry", "apple"], num=2, guidance=3.0)
    close(drawn.latents[1], model.sample(seed=8, classes=["apple"], guidance=3.0).latents[0])
    assert drawn.evaluations.tolist() == [8, 8]  # two Euler steps, guided, for two classes


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"seeds": (1,)}, "seeds (1,): give two seeds, from and to"),
        ({"seeds": (1, 2, 3)}, "seeds (1, 2, 3): give two seeds, from and to"),
        ({"seeds": 3}, "seeds 3: give two seeds, from and to"),
        ({"num": 1}, "number of frames 1: give a whole number from 2"),
        ({"classes": ["apple", "berry", "cherry"]}, "3 classes"),
        ({"classes": ["aple", "berry"]}, "did you mean 'apple'?"),
        ({"classes": ["apple", "bery"]}, "did you mean 'berry'?"),
        ({"classes": ["none", "berry"]}, "no class is named 'none'"),
        ({"seeds": (0, -1)}, "seeds -1"),
    ],
)
def test_interpolations_that_cannot_be_drawn(model, given, said):
    with pytest.raises(ConfigError) as caught:
        model.interpolate(**given)
    assert said in str(caught.value)


# Variation


def test_variations_turn_the_noise(still):
    drawn = still.vary(seed=3, num=2, amount=0.3)
    own, first, second = noise_of(still, 3, variation_seed(3, 0), variation_seed(3, 1))
    turned = [math.cos(0.15 * math.pi) * own + math.sin(0.15 * math.pi) * other for other in (first, second)]
    close(drawn.latents, torch.stack(turned))


def test_variation_seeds_are_fixed():
    """Written in PNG files, so they may never change."""
    assert [variation_seed(5, number) for number in range(3)] == [1590563709, 2049325538, 3408987535]


@pytest.mark.parametrize("asked", [{}, {"classes": []}, {"classes": "cherry"}, {"classes": [1]}])
def test_no_variation_is_the_picture_itself(model, asked):
    own = model.sample(seed=4, **asked).latents
    close(model.vary(seed=4, num=2, amount=0.0, **asked).latents, own.expand(2, -1, -1, -1))


def test_more_variation_is_farther_away(model):
    own = model.sample(seed=3, classes=["berry"]).latents
    far = [
        (model.vary(seed=3, num=8, amount=amount, classes=["berry"]).latents - own).square().mean()
        for amount in (0.05, 0.2, 0.6)
    ]
    assert 0 < far[0] < far[1] < far[2]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"amount": 2.0}, "amount 2"),
        ({"amount": -0.1}, "amount -0.1"),
        ({"amount": math.nan}, "amount nan"),
        ({"num": 0}, "number of variations 0: give a whole number from 1"),
        ({"classes": ["apple", "berry"]}, "2 classes"),
    ],
)
def test_variations_that_cannot_be_drawn(model, given, said):
    with pytest.raises(ConfigError) as caught:
        model.vary(**given)
    assert said in str(caught.value)


# All of them


def edits(model: LatentFlow, photo: Path, **options):
    """One of each kind."""
    return {
        "image-to-image": model.image_to_image(photo, num=5, classes=["berry", "apple"], seed=3, **options),
        "interpolate": model.interpolate(seeds=(3, 8), num=5, classes=["berry", "apple"], **options),
        "vary": model.vary(seed=3, num=5, classes=["berry"], **options),
    }


@pytest.mark.parametrize(
    "solver",
    [{"solver": "heun", "steps": 3}, {"solver": "dopri5", "rtol": 1e-2, "atol": 1e-2}],
    ids=lambda given: given["solver"],
)
def test_an_edit_does_not_depend_on_its_batch(model, photo, solver):
    whole, parts = (edits(model, photo, batch_size=size, guidance=2.0, **solver) for size in (16, 2))
    for task in whole:
        close(parts[task].latents, whole[task].latents)
        assert torch.equal(parts[task].evaluations, whole[task].evaluations)


def test_a_png_holds_what_draws_it_again(model, photo, tmp_path):
    given = {"image-to-image": Given(latents=latents_of(model, photo))}
    for task, drawn in edits(model, photo, guidance=2.0, solver="heun", steps=3).items():
        files = drawn.save(tmp_path)
        assert len(set(files)) == 5
        for row in (0, 3):
            with Image.open(files[row]) as image:
                stored = json.loads(image.text["latentflow"])
                pixels = np.array(image).astype(int)
            assert stored["task"] == task
            assert stored["evaluations"] == drawn.evaluations[row]
            request = Drawing.model_validate({key: stored[key] for key in Drawing.model_fields if key in stored})
            again = draw_all(model, request, given.get(task, Given()))
            close(again.latents[0], drawn.latents[row])
            assert np.abs(np.array(again.images[0]).astype(int) - pixels).max() <= 1


def test_the_presets_guidance_applies_only_where_a_condition_is_given(kl, photo):
    model = tiny.model(kl, time_scale=20.0, guidance=3.0)
    assert model.interpolate(seeds=(3, 8), num=2, classes=[]).drawing.sampling.guidance == 1
    assert model.interpolate(seeds=(3, 8), num=2).drawing.sampling.guidance == 3
    assert model.interpolate(seeds=(3, 8), num=2, classes=["apple"]).drawing.sampling.guidance == 3
    assert model.sample(classes=[]).drawing.sampling.guidance == 1
    with pytest.raises(ConfigError, match="use guidance 1"):
        model.vary(guidance=3.0, classes="none")


def test_conditions_of_space_are_null(kl, photo):
    model = tiny.model(kl, time_scale=20.0, conditioning=tiny.SPATIAL)
    for drawn in edits(model, photo).values():
        assert drawn.drawing.told == ["label"]
        assert drawn.latents.isfinite().all()


def test_a_condition_that_cannot_be_done_without(kl, photo):
    model = tiny.model(kl, conditioning={**tiny.SPATIAL, "map_dropout": 0.0})
    for draw in (lambda: model.image_to_image(photo), lambda: model.interpolate(), lambda: model.vary()):
        with pytest.raises(ConfigError, match="mask-to-image"):
            draw()
    labelled = tiny.model(kl, label_dropout=0.0)
    with pytest.raises(ConfigError, match="give --classes"):
        labelled.vary(classes=[])
    assert len(labelled.vary(classes=["apple"], num=1).pixels) == 1
