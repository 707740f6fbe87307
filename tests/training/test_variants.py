"""Training on augmented variants: they teach the network, and do not show in its samples."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.api import LatentFlow
from latentflow.artifacts import read_tensors
from latentflow.autoencoder import LatentNormalisation
from latentflow.commands.info import describe
from latentflow.commands.train import train as train_command
from latentflow.data.batches import Batch
from latentflow.data.cache.reader import LatentCache
from latentflow.data.pictures.variants import VARIANT_NUMBERS, draw_variants, windows
from latentflow.data.sources.images import open_images
from latentflow.errors import ConfigError
from latentflow.flow.solvers import integrate
from latentflow.flow.times import TrainingTimes, sampling_times
from latentflow.model.conditioning import Conditioning
from latentflow.model.config import AutoencoderRecord, ModelConfig
from latentflow.model.flow_model import FlowModel, read_config
from latentflow.networks.dit import DiTConfig
from latentflow.training import velocity
from latentflow.training.checkpoint import newest_checkpoint
from latentflow.training.held_out import held_out_loss, images_for
from latentflow.training.step import training_step
from latentflow.training.training_data import with_cached
from tests import tiny
from tests.tiny import write_cache
from tests.training.test_loop import at_step, final

WEIGHT = "augmentation_embedding.weight"
SIDE, STEPS, BATCH = 4, 150, 32


@pytest.fixture(scope="module")
def varied_cache(tmp_path_factory, images, kl) -> Path:
    """A latent cache of `images` with 3 variants of each."""
    folder = tmp_path_factory.mktemp("caches") / "varied"
    write_cache(open_images(images, tiny.IMAGE_SIZE), kl, folder, flips=True, variants=3, shard_size=5)
    return folder


@pytest.fixture
def recipe(tmp_path, varied_cache, kl_folder):
    """The tiny recipe on variants."""

    def make(name: str, **given):
        data = {"path": varied_cache, "augment": 0.5, **given.pop("data", {})}
        return tiny.recipe(**{"autoencoder": kl_folder, **given}, data=data, out=tmp_path / name)

    return make


@pytest.fixture
def train(recipe):
    """Train into the run folder `name`; returns the folder."""
    return lambda *args, **given: train_command(recipe(*args, **given), runtime=tiny.CPU).run


# A toy: the picture is the gradient x, and its variants are zoomed, turned and shifted gradients


def plane() -> torch.Tensor:
    """x, y and 1 at the pixel centres: [3, S * S]."""
    centres = (torch.arange(SIDE) + 0.5) * 2 / SIDE - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)]).flatten(1)


def gradients(numbers: torch.Tensor) -> torch.Tensor:
    """The variants of the gradient: [n, P] => [n, 1, S, S]."""
    return (windows(numbers) @ plane())[:, :1].reshape(-1, 1, SIDE, SIDE)


def samples_after_training(augmentation: list[str]) -> torch.Tensor:
    """Slopes along x and y and mean of each sample, [256, 3], of a network that saw a variant every second time."""
    config = ModelConfig(
        image_size=SIDE,
        network=DiTConfig(depth=1, hidden_size=32, num_heads=2, patch_size=2),
        conditioning=Conditioning(augmentation=augmentation),
        autoencoder=AutoencoderRecord(reference="none", content_hash="0" * 64, factor=1, num_channels=1),
        normalisation=LatentNormalisation(shift=[0.0], scale=[1.0]),
    )
    torch.manual_seed(0)
    network = config.build_network()
    model = FlowModel(config, network, None)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    positions = torch.arange(STEPS * BATCH)
    numbers = draw_variants(positions, 1)[:, 0] * (positions % 2)[:, None]
    latents = gradients(numbers)
    for own in positions.split(BATCH):
        batch = Batch(own, own, moments=latents[own], augmentation=numbers[own])
        result = training_step(model, network, batch, times=TrainingTimes(), batch_size=BATCH, seed=0)
        optimizer.zero_grad()
        result.loss.mean().backward()
        optimizer.step()
        schedule.step()
    with torch.inference_mode():
        noise = torch.randn(256, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
        condition = config.conditioning.build(noise.shape, "cpu")
        drawn = integrate(lambda x, t: model.velocity(x, t.float(), condition), noise, sampling_times(16)).x
    return drawn.flatten(1) @ torch.linalg.pinv(plane())


def test_variants_do_not_leak_into_samples():
    """With their numbers, samples at zero are the picture; without them, half of the samples are variants."""
    upright = torch.tensor([1.0, 0.0, 0.0])
    told, untold = samples_after_training(list(VARIANT_NUMBERS)), samples_after_training([])
    share_told, share_untold = (((c - upright).abs().amax(1) < 0.1).float().mean() for c in (told, untold))
    assert share_told > 0.85  # measured: 0.97
    assert share_untold < 0.6  # measured: 0.36
    assert told.std(0).norm() < 0.5 * untold.std(0).norm()  # measured: 0.049 and 0.139


# A run


def test_the_input_learns_and_is_kept(train):
    run = train("run", training={"steps": 6})
    config = read_config(run / "model")
    assert config.conditioning.augmentation == list(VARIANT_NUMBERS)
    assert config.training.variants == describe(run)["variants"] == 3
    assert "3 of each image" in (run / "model" / "README.md").read_text(encoding="utf-8")
    for file in ("network", "ema"):
        weight = read_tensors(newest_checkpoint(run) / f"{file}.safetensors")[WEIGHT]
        assert weight.shape == (32, len(VARIANT_NUMBERS))
        assert (weight != 0).all()
    assert torch.equal(LatentFlow.from_pretrained(run, device="cpu").network.state_dict()[WEIGHT], weight)


def test_samples_and_held_out_loss_are_those_at_zero(train, cache):
    """Nothing but training gives numbers: other weights that read them change neither."""
    model = LatentFlow.from_pretrained(train("run", training={"steps": 6}), device="cpu")
    tiny.randomise(model.network)
    images = images_for(model, cache)

    def found() -> tuple[torch.Tensor, float]:
        drawn = model.sample(num=3, classes=[0, 1, 2], guidance=2.0)
        return drawn.latents, held_out_loss(model, images, ["label"], num_draws=32).loss

    latents, loss = found()
    torch.nn.init.constant_(model.network.augmentation_embedding.weight, 7.0)
    again, same_loss = found()
    assert torch.equal(latents, again)
    assert loss == same_loss


def test_resume_is_exact(train):
    given = {
        "data": {"flip": True},
        "training": {"micro_batch_size": 2, "checkpoint_every": 2, "steps": 6, "align_weight": 0.5},
        "optimizer": {"kind": "muon"},
        "network": {"value_residual": True},
        "times": {"stratified": True},
    }
    whole = train("whole", **given)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(velocity, "training_step", at_step(5, partial(signal.raise_signal, signal.SIGTERM)))
        train("parts", **given)
    assert newest_checkpoint(whole.with_name("parts")).name == "step-00000003"
    assert final(train("parts", **given)) == final(whole)


def test_a_preview_shows_the_maps_of_the_images_themselves(tmp_path, segmented, kl, kl_folder):
    """What it draws by is what it would draw by without variants."""
    write_cache(open_images(segmented, tiny.IMAGE_SIZE), kl, tmp_path / "maps", variants=2)
    rows = []
    for share in (0, 0.9):
        made = tiny.recipe(
            data={"path": tmp_path / "maps", "augment": share},
            autoencoder=kl_folder,
            conditioning={"semantic_map": True},
            training={"steps": 1, "preview_every": 1},
            out=tmp_path / f"run-{share}",
        )
        run = train_command(made, runtime=tiny.CPU).run
        with Image.open(run / "samples" / "step-00000001.png") as grid:
            rows.append(np.asarray(grid)[: grid.height * 2 // 5])  # images and maps, above three rows of samples
    assert np.array_equal(*rows)


def test_where_nothing_is_augmented_nothing_changes(train, cache):
    """A cache with variants trains as one without, where data.augment is 0."""
    given = {"training": {"steps": 4}}
    plain = train("plain", data={"path": cache, "augment": 0}, **given)
    assert final(train("varied", data={"augment": 0}, **given)) == final(plain)
    assert final(train("augmented", **given)) != final(plain)


def test_the_cache_decides_where_the_recipe_does_not(varied_cache, cache, recipe):
    open_recipe = tiny.recipe(data={"path": varied_cache})
    varied, plain = LatentCache(varied_cache).plan, LatentCache(cache).plan
    assert with_cached(open_recipe, varied).data.augment == 0.5
    assert with_cached(open_recipe, plain).data.augment == 0
    assert with_cached(recipe("set", data={"augment": 0.25}), varied).data.augment == 0.25
    holes = tiny.recipe(data={"path": varied_cache}, conditioning={"inpainting": True})
    assert with_cached(holes, varied).data.augment == 0


def test_data_without_variants_are_refused(train, cache, images):
    with pytest.raises(ConfigError, match=r"data.augment = 0.5, but .* holds no variants; encode it with --variants 4"):
        train("run", data={"path": cache})
    with pytest.raises(ConfigError, match=r"data.augment = 0.5, but .* is no latent cache"):
        train("run", data={"path": images})
    with pytest.raises(ConfigError, match="holes are cut into the images alone"):
        train("run", conditioning={"inpainting": True}, data={"images": str(images)})


def test_a_run_belongs_to_its_variants(train, tmp_path, images, kl):
    train("run", training={"steps": 1})
    with pytest.raises(ConfigError, match=r"data.augment: 0.5.*0.25.*cannot change"):
        train("run", data={"augment": 0.25}, training={"steps": 1})
    write_cache(open_images(images, tiny.IMAGE_SIZE), kl, tmp_path / "other", flips=True, variants=2)
    with pytest.raises(ConfigError, match=r"trained with 3 variants of each image, but .* holds 2"):
        train("run", data={"path": tmp_path / "other"}, training={"steps": 2})
