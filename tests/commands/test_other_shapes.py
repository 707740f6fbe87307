"""Images that are not square, from the data to the scores: every step keeps height and width apart."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from latentflow.api import LatentFlow
from latentflow.autoencoder import Autoencoder
from latentflow.commands.encode import encode
from latentflow.commands.train import train
from latentflow.commands.train_autoencoder import train_autoencoder
from latentflow.commands.train_features import train_features
from latentflow.data.cache.reader import LatentCache
from latentflow.data.request import EncodeRequest
from latentflow.data.sources.images import open_images
from latentflow.errors import ConfigError
from latentflow.metrics.features.judge_folder import read_judge
from latentflow.model.config import ModelConfig
from latentflow.sizes import Size
from latentflow.training.first_stage import AutoencoderRecipe
from latentflow.training.request import TrainFeaturesRequest
from tests import tiny
from tests.processes import run_here

WIDE = Size(16, 24)
"""24 wide and 16 high: latents of 8 x 12, 4 x 6 patches."""


@pytest.fixture
def command(capsys, monkeypatch):
    """`latentflow ARGS`, which must succeed; what it prints as JSON."""

    def run(*args: object) -> dict:
        result = run_here((*args, "--json"), capsys, monkeypatch)
        assert result.code == 0, result.err
        return json.loads(result.out)

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory, segmented, kl_folder):
    """A cache of wide images with maps, holes and variants, and a run on it."""
    folder = tmp_path_factory.mktemp("wide")
    request = EncodeRequest(
        data=segmented, autoencoder=kl_folder, image_size="24x16", flips=True, mask_variants=1, dtype="float32"
    )
    encode(request, folder / "cache", runtime=tiny.CPU)
    recipe = tiny.recipe(
        data={"path": folder / "cache", "image_size": "24x16", "flip": True},
        autoencoder=kl_folder,
        conditioning={"inpainting": True, "semantic_map": True},
        training={"steps": 2, "preview_every": 2},
        out=folder / "run",
    )
    train(recipe, runtime=tiny.CPU)
    return folder


def test_a_cache_holds_the_whole_shape(folder, segmented, kl):
    cache, source = LatentCache(folder / "cache"), open_images(segmented, "24x16")
    assert (cache.plan.image_size, cache.plan.factor) == (WIDE, 2)
    assert json.loads((folder / "cache" / "plan.json").read_text())["image_size"] == "24x16"
    assert cache.plan.moments_shape == (8, 8, 12)
    item = source[3]
    assert item.pixels.shape == (16, 24, 3) and item.semantic_map.shape == (16, 24)
    shares = cache.class_fractions([3])[0].numpy()
    counted = np.stack([(item.semantic_map == k).reshape(8, 2, 12, 2).mean((1, 3)) for k in range(3)])
    assert np.allclose(shares, counted)
    assert cache.known([3], [0])[1].shape == (1, 1, 8, 12)


def test_a_model_draws_its_shape(folder):
    model = LatentFlow.from_pretrained(folder / "run", runtime=tiny.CPU)
    config = model.config
    assert (config.image_size, config.latent_shape) == (WIDE, (4, 8, 12))
    assert json.loads((folder / "run" / "model" / "config.json").read_text())["image_size"] == "24x16"
    assert "24 x 16" in (folder / "run" / "model" / "README.md").read_text(encoding="utf-8")
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config
    assert model.sample(num=2).pixels.shape == (2, 3, 16, 24)
    assert model.image_to_image(Image.new("RGB", (50, 20), "red")).pixels.shape == (1, 3, 16, 24)
    painted = model.mask_to_image(np.zeros((20, 60), np.uint8))
    assert painted.pixels.shape == (1, 3, 16, 24)
    with Image.open(folder / "run" / "samples" / "step-00000002.png") as preview:
        columns = 8
        assert preview.width == columns * 24 + (columns - 1) * 2
        assert (preview.height + 2) % 18 == 0


def test_a_hole_is_seen_in_the_shape_that_was_learned(folder):
    """A window of 3 to 2 around the hole; everything outside of it keeps its value."""
    model = LatentFlow.from_pretrained(folder / "run", runtime=tiny.CPU)
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    hole = np.zeros((64, 96), np.uint8)
    hole[30:38, 40:46] = 1
    samples = model.inpaint(picture, hole)
    left, top, right, bottom = map(int, samples.drawing.inputs["frame"].split())
    assert (right - left, bottom - top) == (24, 16) and samples.drawing.image_size == WIDE
    assert left <= 40 and right >= 46 and top <= 30 and bottom >= 38
    assert np.array_equal(samples.pixels[0].permute(1, 2, 0).numpy()[hole == 0], picture[hole == 0])
    whole = model.inpaint(picture[:, :32], hole[:, 20:52], fit="whole")
    assert whole.drawing.image_size == (48, 24)  # which covers 24 x 16


def test_scores_of_a_model_and_of_its_files(folder, command, tmp_path, segmented):
    fast = ("--features", "random", "--metrics", "fd", "--num", 6, "--resamples", 0)
    report = command("evaluate", folder / "run", "--data", segmented, *fast, "--out", tmp_path / "a.json")
    assert report["protocol"]["image_size"] == report["protocol"]["reference"]["image_size"] == "24x16"
    command("sample", folder / "run", "--num", 6, "--out", tmp_path / "drawn")
    of_files = command("evaluate", tmp_path / "drawn", "--data", segmented, *fast, "--out", tmp_path / "b.json")
    assert of_files["scores"]["fd"]["value"] == pytest.approx(report["scores"]["fd"]["value"], rel=1e-6)
    holes = command("evaluate", folder / "run", "--task", "inpaint", "--data", segmented, *fast[:2], "--num", 6)
    assert holes["protocol"]["image_size"] == "24x16"


def test_what_is_said_of_it(folder, command):
    assert command("info", folder / "run")["image size"] == command("info", folder / "cache")["image size"] == "24x16"
    plan = command("plan", folder / "run" / "recipe.yaml", "--device-memory", 8, "--device-tflops", 1)
    assert plan["latents"] == [4, 8, 12]


def test_sizes_that_do_not_divide_name_the_nearest(tmp_path, capsys, monkeypatch, images, kl_folder):
    given = ("encode", images, "--autoencoder", kl_folder, "--out", tmp_path / "cache", "--image-size")
    result = run_here((*given, "25x16"), capsys, monkeypatch)
    assert (result.code, "image size 25x16 is not a multiple of 2" in result.error) == (2, True)
    assert "use 24x16 or 26x16" in result.error
    assert run_here((*given, "16:9"), capsys, monkeypatch).error == (
        "latentflow: --image-size '16:9' is no size; give one number for a square, or WIDTHxHEIGHT like 192x128"
    )
    recipe = tiny.recipe(data={"path": images, "image_size": "26x16"}, autoencoder=kl_folder, out=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"latents of 13 x 8 do not fit .* multiple of 4, such as 24x16 or 28x16"):
        train(recipe, runtime=tiny.CPU)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("crop", [None, 8])
def test_an_autoencoder_and_a_judge_of_wide_images(tmp_path, crop):
    recipe = AutoencoderRecipe.model_validate(
        {
            "data": {"path": "synthetic:20", "image_size": "24x16", "crop": crop, "held_out": 0.1},
            "network": {"channels": [8, 8], "norm_groups": 2},
            "loss": {"equivariance_weight": 0.25},
            "training": {"steps": 2, "batch_size": 4},
            "out": str(tmp_path / "stage"),
        }
    )
    train_autoencoder(recipe, runtime=tiny.CPU)
    autoencoder = Autoencoder.from_pretrained(tmp_path / "stage" / "autoencoder")
    assert autoencoder.latent_size("24x16") == (8, 12)
    if crop is None:
        request = TrainFeaturesRequest(
            data="synthetic:260", out=tmp_path / "judge", image_size="24x16", side=16, width=8, steps=2, batch_size=16
        )
        train_features(request, runtime=tiny.CPU)
        assert read_judge(tmp_path / "judge").image_size == WIDE
