"""Training with conditions of space: every part learns and is kept, and a resumed run is the whole run, bit for bit."""

from __future__ import annotations

import signal
from functools import partial

import pytest
import torch

from latentflow.api import LatentFlow
from latentflow.artifacts import read_tensors
from latentflow.commands.info import describe
from latentflow.commands.train import train as train_command
from latentflow.data.batches import TrainingImages
from latentflow.data.painting.mask_rules import MaskRules
from latentflow.errors import ConfigError
from latentflow.model.flow_model import read_config
from latentflow.training import velocity
from latentflow.training.checkpoint import newest_checkpoint
from latentflow.training.fresh_model import build_model
from latentflow.training.training_data import open_source, spatial_data
from tests import tiny
from tests.training.test_loop import at_step, final, largest_difference

TOLD = {"inpainting": True, "semantic_map": True}
ENCODER = "spatial.map_encoder.mix.weight"


@pytest.fixture
def recipe(tmp_path, segmented, segmented_cache, kl_folder):
    """The tiny recipe with all three conditions; `source`: a key of the dict below."""
    sources = {
        "images": {"path": segmented},
        "cache": {"path": segmented_cache},
        "cache and images": {"path": segmented_cache, "images": segmented},
    }

    def make(name: str, source: str = "cache", **given):
        data = {**sources[source], **given.pop("data", {})}
        return tiny.recipe(**{"autoencoder": kl_folder, "conditioning": TOLD, **given}, data=data, out=tmp_path / name)

    return make


@pytest.fixture
def train(recipe):
    """Train into the run folder `name`; returns the folder."""
    return lambda *args, **given: train_command(recipe(*args, **given), runtime=tiny.CPU).run


@pytest.mark.parametrize("source", ["images", "cache"])
def test_the_map_encoder_learns_and_is_kept(recipe, train, kl, source):
    """The published code never gave its encoder to the optimizer."""
    made, run = recipe("run", source), train("run", source)
    images = open_source(made)
    spatial = spatial_data(made, images, kl.factor)
    before = build_model(made, kl, TrainingImages(images, seed=0, flip=False, spatial=spatial)).network.state_dict()
    checkpoint = newest_checkpoint(run)
    after, average, moments = (
        read_tensors(checkpoint / f"{name}.safetensors") for name in ("network", "ema", "optimizer")
    )
    kept = LatentFlow.from_pretrained(run, device="cpu").network.state_dict()
    assert before[ENCODER].shape == (4, len(tiny.MAP_CLASSES), 1, 1)
    for key in (ENCODER, "patch_embedding.weight"):  # of the latter, also the channels of known part, mask and map
        assert (after[key] != before[key]).all(), key
        assert (average[key] != before[key]).all(), key
        assert not torch.equal(average[key], after[key])
        assert torch.equal(kept[key], average[key])
    assert (after[ENCODER] - before[ENCODER]).abs().max() > 1e-3
    assert moments[f"{ENCODER}/step"] == 10


def test_the_model_folder_names_its_conditions(train):
    run = train("run", conditioning={**TOLD, "map_dropout": 0.25}, data={"masks": {"policy": "boxes"}})
    config = read_config(run / "model")
    conditioning = config.conditioning
    assert conditioning.dropout == {"label": 0.1, "inpainting": 0.1, "semantic_map": 0.25}
    assert tuple(conditioning.map_class_names) == tiny.MAP_CLASSES
    assert tuple(conditioning.map_palette) == tiny.MAP_PALETTE
    assert config.masks == MaskRules()  # those stored in the cache go first
    facts = describe(run)
    assert facts["told"] == ["label", "inpainting", "semantic_map"]
    assert facts["map classes"] == list(tiny.MAP_CLASSES)
    assert facts["holes"] == "mixed"
    drawn = read_config(train("drawn", "images", data={"masks": {"policy": "boxes"}}) / "model")
    assert drawn.masks == MaskRules(policy="boxes")


@pytest.mark.parametrize("source", ["images", "cache", "cache and images"])
def test_resume_is_exact(train, source):
    given = {
        "data": {"flip": True},
        "training": {"micro_batch_size": 2, "checkpoint_every": 2, "steps": 6},
        "times": {"stratified": True},
        "conditioning": {**TOLD, "label_dropout": 0.3, "inpainting_dropout": 0.3, "map_dropout": 0.3},
    }
    whole = train("whole", source, **given)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(velocity, "training_step", at_step(5, partial(signal.raise_signal, signal.SIGTERM)))
        train("parts", source, **given)
    assert newest_checkpoint(whole.with_name("parts")).name == "step-00000003"
    assert final(train("parts", source, **given)) == final(whole)


def test_resume_with_worker_processes(train):
    whole = train("whole", "images", training={"steps": 4})
    train("parts", "images", training={"steps": 2})
    assert final(train("parts", "images", training={"steps": 4}, data={"num_workers": 1})) == final(whole)


def test_cache_and_images_train_alike(train):
    """Holes are cut into the same pictures by position; only the float16 of the cache differs."""
    given = {"data": {"flip": True}, "training": {"steps": 3}}
    one, other = (train(source.replace(" ", "-"), source, **given) for source in ("images", "cache and images"))
    assert largest_difference(one, other) < 1e-4


@pytest.mark.parametrize("condition", ["inpainting", "semantic_map"])
def test_a_run_belongs_to_its_conditions(train, condition):
    train("run", training={"steps": 1})
    with pytest.raises(ConfigError, match=f"conditioning.{condition}"):
        train("run", conditioning={**TOLD, condition: False}, training={"steps": 1})
