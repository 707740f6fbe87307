"""What a recipe leaves open is fitted to data and machine, by rules that are the same everywhere."""

from __future__ import annotations

import dataclasses

import pytest

from latentflow.sizes import Size
from latentflow.training.config import Recipe, load_recipe
from latentflow.training.fitting import FITTED, Situation, fit, is_set, value_of, with_values
from latentflow.training.memory import micro_batch_that_fits
from latentflow.training.settings import keys_of

GIB = 2**30
UNET = "{kind: unet, channels: 64, multipliers: [1, 2]}"
GPU = Situation(num_images=10_000, num_classes=10, size=Size(32, 32), gpu=True, memory=80 * GIB)
CPU = Situation(num_images=10_000, num_classes=10, size=Size(32, 32), gpu=False, memory=16 * GIB)


def fitted(situation: Situation, *overrides: str, **changes) -> Recipe:
    recipe, _ = fit(load_recipe("own_images", overrides), dataclasses.replace(situation, **changes))
    return recipe


def test_the_keys_exist():
    assert set(FITTED) <= set(keys_of(Recipe()))


@pytest.mark.parametrize(
    ("num_images", "name"),
    [(50, "DiT-S/2"), (19_999, "DiT-S/2"), (20_000, "DiT-B/2"), (199_999, "DiT-B/2"), (1_000_000, "DiT-L/2")],
)
def test_networks_on_a_gpu(num_images, name):
    assert fitted(GPU, num_images=num_images).network.name == name


@pytest.mark.parametrize(
    ("memory", "name"), [(80 * GIB, "DiT-L/2"), (12 * GIB, "DiT-B/2"), (4 * GIB, "DiT-S/2"), (1, "DiT-S/2")]
)
def test_a_smaller_network_where_memory_is_short(memory, name):
    assert fitted(GPU, num_images=1_000_000, memory=memory).network.name == name


@pytest.mark.parametrize(("num_images", "size"), [(5, (6, 192)), (1999, (6, 192)), (2000, (8, 256)), (10**6, (8, 256))])
def test_networks_on_a_cpu(num_images, size):
    network = fitted(CPU, num_images=num_images).network
    assert (network.depth, network.hidden_size) == size


@pytest.mark.parametrize(("num_images", "size"), [(1999, (6, 96, 3)), (2000, (8, 128, 4))])
def test_half_as_many_channels_on_a_cpu_for_patches_of_one(num_images, size):
    recipe = fitted(CPU, num_images=num_images, size=Size(8, 8))
    network = recipe.network
    assert network.patch_size == 1
    assert (network.depth, network.hidden_size, network.num_heads) == size
    assert recipe.training.batch_size == 128
    assert fitted(CPU, num_images=num_images, size=Size(16, 16)).training.batch_size == 32


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("side", [*range(1, 66), 96, 128, 256])
def test_every_size_of_latents_has_a_patch(gpu, side):
    recipe = fitted(GPU if gpu else CPU, size=Size(side, side))
    assert side % recipe.network.patch_size == 0
    tokens = (side // recipe.network.patch_size) ** 2
    assert tokens > 1 or side == 1
    if side in (8, 16, 28, 32, 64, 96, 128, 256):
        assert tokens <= (256 if gpu else 64)


@pytest.mark.parametrize(("num_images", "steps"), [(3, 1000), (100, 3000), (600, 18_000), (10_000, 100_000)])
def test_steps_stop_before_images_are_copied(num_images, steps):
    recipe = fitted(GPU, num_images=num_images)
    assert recipe.training.steps == steps
    assert recipe.training.checkpoint_every <= steps
    assert recipe.optimizer.warmup_steps <= steps // 10
    assert recipe.training.ema_decay == (0.9999 if steps > 10_000 else 0.999)


@pytest.mark.parametrize("num_processes", [1, 2, 3, 8])
@pytest.mark.parametrize("num_images", [1, 2, 5, 100, 10_000])
def test_a_batch_is_shared_evenly(num_images, num_processes):
    training = fitted(GPU, num_images=num_images, num_processes=num_processes).training
    assert training.batch_size % num_processes == 0
    assert training.batch_size <= max(num_images, num_processes) + num_processes
    share = training.batch_size // num_processes
    assert share % (training.micro_batch_size or share) == 0


def test_fewer_images_at_a_time_where_memory_is_short():
    assert fitted(GPU).training.micro_batch_size is None
    training = fitted(GPU, memory=6 * GIB).training
    assert training.batch_size == 256
    assert training.micro_batch_size in (16, 32, 64, 128)
    given = fitted(GPU, "training.batch_size=1536", memory=6 * GIB, num_processes=2).training
    assert 768 % given.micro_batch_size == 0 and 16 <= given.micro_batch_size < 256


def test_guidance_only_with_labels_and_label_dropout():
    assert fitted(GPU).sampling.guidance == 1.5
    assert fitted(GPU, num_classes=0).sampling.guidance == 1
    assert fitted(GPU, "conditioning.label_dropout=0").sampling.guidance == 1


def test_what_is_set_stays():
    given = ("network.name=DiT-B/4", "training.steps=7", "optimizer.learning_rate=1e-5", "sampling.guidance=3")
    recipe = fitted(CPU, *given)
    assert (recipe.network.name, recipe.training.steps) == ("DiT-B/4", 7)
    assert (recipe.optimizer.learning_rate, recipe.sampling.guidance) == (1e-5, 3)
    assert recipe.optimizer.warmup_steps == 0  # of seven steps
    assert not recipe.fit


@pytest.mark.parametrize(
    ("situation", "muon", "adamw"),
    [
        (CPU, 3e-3, 1e-3),
        (GPU, 2e-3, 5e-4),
        (dataclasses.replace(GPU, num_images=20_000), 1e-3, 2e-4),
        (dataclasses.replace(GPU, num_images=10**6), 5e-4, 1e-4),
    ],
)
def test_the_learning_rate_is_that_of_the_optimizer(situation, muon, adamw):
    assert fitted(situation).optimizer.kind == "muon"
    assert fitted(situation).optimizer.learning_rate == muon
    given = fitted(situation, "optimizer.kind=adamw").optimizer
    assert (given.kind, given.learning_rate) == ("adamw", adamw)


@pytest.mark.parametrize(
    ("situation", "name", "muon", "adamw"),
    [
        (GPU, "DiT-S/2", 2e-3, 5e-4),
        (dataclasses.replace(GPU, num_images=10**6), "DiT-S/2", 2e-3, 5e-4),
        (GPU, "DiT-B/4", 1e-3, 2e-4),
        (GPU, "DiT-XL/2", 5e-4, 1e-4),
        (CPU, "DiT-S/2", 2e-3, 5e-4),
        (CPU, "DiT-B/2", 1e-3, 2e-4),
    ],
)
def test_the_learning_rate_is_that_of_the_network_that_is_set(situation, name, muon, adamw):
    assert fitted(situation, f"network.name={name}").optimizer.learning_rate == muon
    assert fitted(situation, f"network.name={name}", "optimizer.kind=adamw").optimizer.learning_rate == adamw


def test_the_batch_is_that_of_the_network_that_is_set():
    """A large one is computed in parts, and one of few tokens takes more images on a CPU."""
    short = dataclasses.replace(GPU, memory=24 * GIB)
    assert fitted(short).training.micro_batch_size is None
    assert fitted(short, "network.name=DiT-XL/2").training.micro_batch_size == 16
    small = "network={depth: 6, hidden_size: 128, num_heads: 2, patch_size: 4}"
    assert fitted(CPU, small).training.batch_size == 128
    assert fitted(CPU, small.replace("128", "256")).training.batch_size == 32
    assert fitted(CPU, small.replace("size: 4", "size: 64")).training.batch_size == 128  # refused where it is built


@pytest.mark.parametrize(
    ("network", "kind"),
    [
        ("{name: DiT-S/2}", "muon"),
        ("{kind: dit, name: DiT-B/4}", "muon"),
        (UNET, "adamw"),
    ],
)
def test_muon_is_for_transformers(network, kind):
    """It was compared with AdamW for no other network."""
    assert fitted(GPU, f"network={network}").optimizer.kind == kind


def test_reasons_are_few_and_true():
    recipe, why = fit(load_recipe("own_images"), dataclasses.replace(GPU, num_images=100))
    assert any(f"{recipe.training.steps:,}" in line and "memorise" in line for line in why)
    assert len(why) <= 3
    assert fit(load_recipe("own_images", ["network.name=DiT-S/2", "training.steps=5"]), GPU)[1] == []


def test_values_by_key():
    recipe = with_values(Recipe(), {"training.steps": 3, "fit": True})
    assert value_of(recipe, "training.steps") == 3
    assert is_set(recipe, "training.steps")
    assert is_set(recipe, "fit")
    assert not is_set(recipe, "training.seed")
    assert not is_set(recipe, "optimizer.learning_rate")


@pytest.mark.parametrize(
    ("memory", "fits"),
    [(None, 12), (10**9, 12), (0, 0), (1223, 1), (1334, 2), (1445, 3), (1556, 4), (1778, 6), (2445, 12), (2444, 6)],
)
def test_parts_that_memory_holds(memory, fits):
    """1,000 bytes and 100 for each image; a tenth of the memory is left."""
    assert micro_batch_that_fits(1000, 100, 12, memory) == fits
