"""Network, batch size, steps and learning rate by data and machine, for recipes that leave them open (`fit: true`).

The rules, and where they come from:

    network    On a CPU at most 64 tokens and 8 blocks of 256 channels (6 of 192 below 2,000 images), which two cores
               train in about an hour; half as many channels with patch 1, where 64 tokens of 96 reached lower
               distances than 16 of 192 (benchmarks/ladder). Sides without a common divisor get patch 1, too, whatever
               the number of tokens. On a GPU at most 256 tokens and DiT-S below 20,000 images, DiT-B below 200,000,
               DiT-L above, smaller if memory requires: large networks memorise small data sets sooner.
    steps      100,000 on a GPU, where quality converges whatever the number of images, and 4,000 on a CPU; at most 30
               per image, but at least 1,000: the first copies of training images were seen after about 40 steps per
               image (training/memorisation_onset.py).
    batch      256 on a GPU, as in the published recipes: 512 reached lower distances in 6 s of an H200 with 8 blocks
               of 256 channels (benchmarks/ladder, two seeds), and is not measured at these sizes and lengths. 2,048
               tokens on a CPU, 8,192 up to 128 channels. At most the number of images.
    optimizer  Muon for transformers, which reaches lower distances than AdamW in equal time (benchmarks/ladder).
    rate       3e-3 with cosine decay on a CPU up to 256 channels; else 2e-3, 1e-3 and 5e-4 for as many channels as S, B
               and L have. With AdamW 1e-3; 5e-4, 2e-4 and 1e-4.
    average    over about 1,000 steps in runs of at most 10,000 steps, else over 10,000.
    guidance   1.5 for models with labels and label dropout, else 1.

Batch and rate are those of the transformer that the recipe sets, if it sets one. Other networks get those of the
transformer that would have been chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel

from latentflow.networks.dit import NAMES, SIZES, DiTConfig
from latentflow.sizes import Size
from latentflow.training.config import Recipe
from latentflow.training.memorisation_onset import SAFE_PER_IMAGE
from latentflow.training.memory import bytes_per_image, micro_batch_that_fits, state_bytes

Settings = TypeVar("Settings", bound=BaseModel)

FITTED = (
    "network",
    "training.steps",
    "training.batch_size",
    "training.micro_batch_size",
    "training.ema_decay",
    "training.checkpoint_every",
    "training.preview_every",
    "optimizer.kind",
    "optimizer.learning_rate",
    "optimizer.betas",
    "optimizer.warmup_steps",
    "optimizer.schedule",
    "sampling.guidance",
)
"""Keys that are fitted if a recipe leaves them open."""

_GPU_SIZES = (("L", 200_000), ("B", 20_000), ("S", 0))  # and the images from which on they are chosen
_RATES = (  # by the channels up to which they are used
    (SIZES["S"]["hidden_size"], {"adamw": 5e-4, "muon": 2e-3}),
    (SIZES["B"]["hidden_size"], {"adamw": 2e-4, "muon": 1e-3}),
    (math.inf, {"adamw": 1e-4, "muon": 5e-4}),
)
_FEWEST_STEPS = 1000
_CPU_CHANNELS = 256
_CPU_RATES = (_CPU_CHANNELS, {"adamw": 1e-3, "muon": 3e-3})


@dataclass(frozen=True)
class Situation:
    """What a recipe is fitted to.

    Attributes:
        num_images: in the training data.
        num_classes: 0 for an unconditional model.
        size: of the latents.
        other_sizes: of the latents in other buckets, which the patches must divide as well.
        gpu: whether it is trained on a GPU.
        memory: bytes that a process can use, None if unknown.
        num_processes: that share a batch.
    """

    num_images: int
    num_classes: int
    size: Size
    gpu: bool
    memory: int | None
    num_processes: int = 1
    other_sizes: tuple[Size, ...] = ()


def fit(recipe: Recipe, situation: Situation) -> tuple[Recipe, list[str]]:
    """The recipe with everything decided, and a few lines that explain it."""
    network = _network(recipe, situation)
    wanted = 256 if situation.gpu else _batch_on_a_cpu(network, situation)
    batch = power_of_two(min(wanted, max(situation.num_images, 1)))
    share = share_of(recipe, batch, situation.num_processes)
    target = 100_000 if situation.gpu else 4000
    steps = recipe.training.steps if is_set(recipe, "training.steps") else steps_by_images(situation.num_images, target)
    every = max(min(5000 if situation.gpu else 400, steps // 5), 1)
    kind = _optimizer(recipe)
    guided = situation.num_classes > 0 and recipe.conditioning.label_dropout > 0
    micro = _that_fits(network, share, situation)
    fitted = {
        "network": network,
        "training.steps": steps,
        "training.batch_size": share * situation.num_processes,
        "training.micro_batch_size": micro if 0 < micro < share else None,
        "training.ema_decay": 0.9999 if steps > 10_000 else 0.999,
        "training.checkpoint_every": every,
        "training.preview_every": every,
        "optimizer.kind": kind,
        "optimizer.learning_rate": _rates(network, situation)[kind],
        "optimizer.betas": (0.9, 0.99),
        "optimizer.warmup_steps": min(1000 if situation.gpu else 200, steps // 10),
        "optimizer.schedule": "constant" if situation.gpu else "cosine",
        "sampling.guidance": 1.5 if guided else 1.0,
    }
    open_keys = [key for key in FITTED if not is_set(recipe, key)]
    done = with_values(recipe, {"fit": False, **{key: fitted[key] for key in open_keys}})
    return done, _why(done, open_keys, situation, target)


def steps_by_images(num_images: int, usual: int) -> int:
    """As many steps as usual; over few images at most 30 per image, but at least 1,000 (`memorisation_onset`)."""
    return min(usual, max(SAFE_PER_IMAGE * num_images, _FEWEST_STEPS))


def why_steps(steps: int, usual: int, reason: str) -> str:
    """A line that explains `steps_by_images`."""
    if steps < usual:
        per_image = f"{SAFE_PER_IMAGE} per image; with more it would memorise them"
        reason = per_image if steps > _FEWEST_STEPS else "the minimum for small data sets"
    return f"steps: {steps:,}, {reason}"


def share_of(recipe: BaseModel, batch: int, num_processes: int) -> int:
    """Images of each process in a step: of the batch that the recipe sets, else of at least `batch`."""
    if is_set(recipe, "training.batch_size"):
        return max(value_of(recipe, "training.batch_size") // num_processes, 1)
    return -(-batch // num_processes)


def is_set(settings: BaseModel, key: str) -> bool:
    """Whether a recipe or an override sets this key; a section is set if any key of it is."""
    *path, last = key.split(".")
    for part in path:
        settings = getattr(settings, part)
    return last in settings.model_fields_set


def value_of(settings: BaseModel, key: str) -> Any:
    """The value of a key like "training.steps"."""
    for part in key.split("."):
        settings = getattr(settings, part)
    return settings


def with_values(recipe: Settings, values: Mapping[str, Any]) -> Settings:
    """A copy with some keys set."""
    for key, value in values.items():
        section, dot, entry = key.partition(".")
        new = getattr(recipe, section).model_copy(update={entry: value}) if dot else value
        recipe = recipe.model_copy(update={section: new})
    return recipe


def _optimizer(recipe: Recipe) -> str:
    """The kind of optimizer; Muon was compared with AdamW for transformers only."""
    if is_set(recipe, "optimizer.kind"):
        return recipe.optimizer.kind
    is_transformer = not is_set(recipe, "network") or isinstance(recipe.network, DiTConfig)
    return "muon" if is_transformer else "adamw"


def _network(recipe: Recipe, situation: Situation) -> DiTConfig:
    """The transformer that is set, or the one that data and machine suggest."""
    if is_set(recipe, "network") and isinstance(recipe.network, DiTConfig):
        return recipe.network
    if not situation.gpu:
        depth, width = (6, 192) if situation.num_images < 2000 else (8, _CPU_CHANNELS)
        patch = _patch(situation, most_tokens=64)
        hidden = width // 2 if patch == 1 else width
        shape = {"depth": depth, "hidden_size": hidden, "num_heads": width // 64, "patch_size": patch}
        return DiTConfig(**shape, variant="modern")
    patch = _patch(situation, most_tokens=256)
    networks = [_named(f"DiT-{size}", patch) for size, from_images in _GPU_SIZES if situation.num_images >= from_images]
    return next((one for one in networks if _that_fits(one, 16, situation) == 16), networks[-1])


def _rates(network: DiTConfig, situation: Situation) -> Mapping[str, float]:
    """Learning rates by the kind of optimizer."""
    known = _RATES if situation.gpu else (_CPU_RATES, *_RATES)
    return next(rates for most_channels, rates in known if network.hidden_size <= most_channels)


def _batch_on_a_cpu(network: DiTConfig, situation: Situation) -> int:
    """Images; with half as many channels a token takes a quarter of the time."""
    tokens = 8192 if network.hidden_size <= _CPU_CHANNELS // 2 else 2048
    of_an_image = max(situation.size.over(network.patch_size).area, 1)  # 0: larger patches are refused later
    return max(min(tokens // of_an_image, 128), 16)


def _named(name: str, patch: int) -> DiTConfig:
    """A published size with any patch size."""
    published = f"{name}/{patch}"
    if published in NAMES:
        return DiTConfig(name=published, variant="modern")
    return DiTConfig(**{**NAMES[f"{name}/1"], "patch_size": patch}, variant="modern")


def _patch(situation: Situation, *, most_tokens: int) -> int:
    """The smallest patch size with at most `most_tokens` tokens; 1 if the sides have no such divisor."""
    size, sizes = situation.size, (situation.size, *situation.other_sizes)
    dividing = (p for p in range(1, min(size) // 2 + 1) if all(one.is_multiple_of(p) for one in sizes))
    patches = [p for p in dividing if size.over(p).area <= most_tokens]
    return patches[0] if patches else 1


def _that_fits(network: DiTConfig, share: int, situation: Situation) -> int:
    """How many of `share` images fit into memory at a time."""
    num_parameters = 18 * network.depth * network.hidden_size**2  # 12 in attention and MLP, 6 in the modulation
    per_image = bytes_per_image(network, situation.size, half=situation.gpu)
    return micro_batch_that_fits(state_bytes(num_parameters, half=situation.gpu), per_image, share, situation.memory)


def power_of_two(number: int) -> int:
    """The largest power of two that is not above `number`."""
    return 1 << (number.bit_length() - 1)


def _why(recipe: Recipe, open_keys: list[str], situation: Situation, target: int) -> list[str]:
    machine = "a GPU" if situation.gpu else "a CPU"
    lines = []
    if "network" in open_keys:
        size = f"{recipe.network.depth} blocks of {recipe.network.hidden_size}, patch {recipe.network.patch_size}"
        lines.append(f"network: {size}, for {situation.num_images:,} images on {machine}")
    if "training.steps" in open_keys:
        lines.append(why_steps(recipe.training.steps, target, f"usual on {machine}"))
    if recipe.training.micro_batch_size and "training.micro_batch_size" in open_keys:
        lines.append(f"images at a time: {recipe.training.micro_batch_size}, which fit into memory")
    return lines
