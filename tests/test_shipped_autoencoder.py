"""The autoencoder that comes with the package: small, of the promised shape, and as good as its README says."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from latentflow.api import LatentFlow
from latentflow.autoencoder import BUILT_IN, Autoencoder, latent_mean, to_unit_range
from latentflow.data.batches import TrainingImages
from latentflow.data.pictures.user_picture import psnr
from latentflow.data.sources.synthetic import SyntheticShapes
from latentflow.model.config import AUTOENCODER_FOLDER
from latentflow.training.first_stage import load_autoencoder_recipe
from latentflow.training.fresh_model import build_model
from tests import tiny

FOLDER = BUILT_IN["shapes"]


@pytest.fixture(scope="module")
def shapes() -> Autoencoder:
    return Autoencoder.from_pretrained("shapes")


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    """32 images of a seed that nothing was trained on, uint8."""
    source = SyntheticShapes(32, 32, seed=20_000)
    return torch.from_numpy(np.stack([item.pixels for item in source])).permute(0, 3, 1, 2)


def test_it_is_what_it_is_said_to_be(shapes):
    assert shapes.reference == "shapes"
    assert (shapes.factor, shapes.num_channels, shapes.num_moments) == (4, 4, 8)
    assert next(shapes.model.parameters()).dtype == torch.float32
    assert sum(file.stat().st_size for file in FOLDER.rglob("*")) <= 2_000_000
    assert {file.name for file in FOLDER.iterdir()} == {
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }


def test_the_recipe_still_describes_it(shapes):
    recipe = load_autoencoder_recipe("shapes")
    assert tuple(recipe.network.channels) == tuple(shapes.model.config.block_out_channels)
    assert recipe.network.norm_groups == shapes.model.config.norm_num_groups
    assert recipe.network.factor == shapes.factor
    assert "latentflow train-autoencoder shapes" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_it_reconstructs_as_well_as_its_readme_says(shapes, pixels):
    promised = re.search(r"([\d.]+) dB", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert psnr(pixels, shapes.reconstruct(pixels)).mean().item() > float(promised[1]) - 1


def test_its_latents_suit_the_flow(shapes, pixels):
    latents = shapes.normalisation.normalise(latent_mean(shapes.encode(to_unit_range(pixels)), 4))
    assert latents.std().item() == pytest.approx(1, abs=0.1)
    assert latents.std((0, 2, 3)).tolist() == pytest.approx([1] * 4, abs=0.4)
    assert latents.mean((0, 2, 3)).tolist() == pytest.approx([0] * 4, abs=0.6)
    assert latents.abs().max() < 8


def test_a_model_folder_holds_a_copy(tmp_path, shapes, pixels):
    """So that the model stays whole when a later version ships another first stage."""
    images = TrainingImages(SyntheticShapes(12, 64), seed=0, flip=False)
    model = build_model(
        tiny.recipe(data={"path": "synthetic:12", "image_size": 64}, autoencoder="shapes"), shapes, images
    )
    model.save_pretrained(tmp_path / "model")
    loaded = LatentFlow.from_pretrained(tmp_path / "model", device="cpu")
    assert loaded.autoencoder.reference == str(tmp_path / "model" / AUTOENCODER_FOLDER)
    assert loaded.autoencoder.content_hash == shapes.content_hash
    assert torch.equal(loaded.autoencoder.encode(to_unit_range(pixels[:2])), shapes.encode(to_unit_range(pixels[:2])))
