"""`latentflow train-autoencoder`: a recipe => a run folder with a first stage in it, in diffusers' own layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from latentflow.artifacts import (
    atomic_folder,
    make_folder,
    read_json,
    require_apart,
    require_writable,
    write_json,
    write_text,
)
from latentflow.autoencoder import Autoencoder, to_unit_range
from latentflow.commands.train import environment, times, usable_name
from latentflow.data.batches import TrainingImages, epoch_order
from latentflow.data.cache.reader import is_cache
from latentflow.data.latent_statistics import ChannelSums
from latentflow.data.pictures.single import psnr
from latentflow.data.sources.images import ImageSource, open_images, readable
from latentflow.errors import ConfigError, DataError
from latentflow.locks import writes
from latentflow.randomness import derive_seed
from latentflow.runtime import Runtime, open_runtime
from latentflow.sampling.contact_sheet import save_grid
from latentflow.training.changes import RECIPE_FILE, Changes, as_begun, check_changes
from latentflow.training.first_stage import (
    CHANGES,
    AutoencoderRecipe,
    build_autoencoder,
    require_autoencoder_memory,
    train_autoencoder,
)
from latentflow.training.interruption import Outcome
from latentflow.training.memory import free_memory
from latentflow.training.settings import to_yaml

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

AUTOENCODER_FOLDER = "autoencoder"
_IMAGES_FILE = "images.json"
_MOST_HELD_OUT = 256
_STATISTICS_IMAGES = 2048  # enough for the scale of the latents to three digits
_PICTURED = 8
_SLICE = 16  # images measured at a time


@dataclass(frozen=True)
class AutoencoderReport:
    """What a finished first stage is, written to metrics/report.json.

    Attributes:
        psnr: peak signal-to-noise ratio in dB of 8-bit reconstructions, the mean over the held-out images.
        num_held_out: how many those are.
        factor: image side divided by latent side.
        num_channels: latent channels.
        num_parameters: weights of encoder and decoder.
        num_bytes: of the finished folder.
        scaling_factor, shift_factor: the normalisation (raw - shift) * scaling that its config asks for.
        channel_mean, channel_std: of the normalised latents of training images, per channel, posterior noise included.
        largest: the largest absolute value among these latents' means.
        posterior_std: mean deviation of the posterior, in units of the normalised latents.
        steps: optimizer steps.
    """

    psnr: float
    num_held_out: int
    factor: int
    num_channels: int
    num_parameters: int
    num_bytes: int
    scaling_factor: float
    shift_factor: float
    channel_mean: list[float]
    channel_std: list[float]
    largest: float
    posterior_std: float
    steps: int


@dataclass(frozen=True)
class AutoencoderResult:
    """What `train_first_stage` did.

    Attributes:
        run: the run folder.
        outcome: of the loop.
        broken: names of images that could not be read.
        report: None where a signal ended the run early.
    """

    run: Path
    outcome: Outcome
    broken: list[str]
    report: AutoencoderReport | None


@dataclass(frozen=True)
class Prepared:
    """A run that has been checked, before anything of it is written.

    Attributes:
        recipe: checked.
        runtime: what it runs on.
        network: with fresh weights.
        images: what it learns from.
        held_out: places in their source of the images it is measured on.
        broken: names of images that could not be read.
        changes: of the recipe since the run began; None for a new run.
    """

    recipe: AutoencoderRecipe
    runtime: Runtime
    network: AutoencoderKL
    images: TrainingImages
    held_out: list[int]
    broken: list[str]
    changes: Changes | None

    @property
    def run(self) -> Path:
        return Path(self.recipe.out)

    def describe(self) -> dict[str, str]:
        """The run in about ten lines."""
        data, network, training = self.recipe.data, self.recipe.network, self.recipe.training
        passes = training.steps * training.batch_size / len(self.images)
        crops = f", in random squares of {data.crop}" if data.crop else ""
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        rows = {
            "data": f"{len(self.images):,} images of {data.image_size} x {data.image_size}{crops}: {data.path}",
            "held out": f"{len(self.held_out)} images",
            "network": f"{len(network.channels)} levels of {network.channels} channels, {parameters:,} parameters",
            "latents": f"{network.latent_channels} channels, factor {network.factor}",
            "training": f"{training.steps:,} steps of {training.batch_size} images, {times(passes)} over the data",
            "device": f"{self.runtime.device_name}, {self.runtime.precision}",
            "run": f"{self.run}, " + (f"going on after step {self.changes.step:,}" if self.changes else "new"),
        }
        return {**rows, "left out": f"{len(self.broken)} images that cannot be read"} if self.broken else rows


@writes(lambda given: given["recipe"].out)
def train_first_stage(
    recipe: AutoencoderRecipe,
    *,
    allow_change: Sequence[str] = (),
    on_prepared: Callable[[Prepared], None] = lambda prepared: None,
    runtime: Runtime | None = None,
) -> AutoencoderResult:
    """Train an autoencoder, scale its latents to unit variance, measure and save it; a repeated call resumes exactly.

    Everything that can be wrong is found before the run folder is touched.

    Args:
        recipe: checked; `out` and `data.path` must be set.
        allow_change: keys of the recipe that may differ from the run's although they alter what is computed.
        on_prepared: called once all has been checked.
        runtime: where to train; the recipe says in what precision. None: see `open_runtime`.

    Raises:
        ConfigError, DataError: before anything is written.
        NonFiniteError: during training.
    """
    prepared = prepare(recipe, runtime or open_runtime(alone=True), allow_change=allow_change)
    on_prepared(prepared)
    run, network, images, recipe = make_folder(prepared.run), prepared.network, prepared.images, prepared.recipe
    if prepared.changes:
        prepared.changes.tell()
        prepared.changes.record()
    write_text(run / RECIPE_FILE, to_yaml(recipe))
    write_json(run / "environment.json", environment(prepared.runtime))
    facts = {"data": images.source.description, "fingerprint": images.source.fingerprint()}
    write_json(run / _IMAGES_FILE, facts)
    outcome = train_autoencoder(recipe, network, images, run, prepared.runtime)
    report = None
    if outcome.finished:
        report = finish(network, recipe, images.source, images.kept.tolist(), prepared.held_out, outcome.step)
    return AutoencoderResult(run, outcome, prepared.broken, report)


def prepare(recipe: AutoencoderRecipe, runtime: Runtime, *, allow_change: Sequence[str] = ()) -> Prepared:
    """Check a recipe and what it names; nothing is written.

    Raises:
        ConfigError, DataError: see `train_first_stage`.
    """
    if not recipe.data.path:
        raise ConfigError("data.path is not set; add data.path=FOLDER (images or a zip)")
    if not recipe.out:
        raise ConfigError("out is not set; add out=runs/NAME")
    recipe.require_fitting_sizes()
    if is_cache(recipe.data.path):
        raise ConfigError(f"data.path = {recipe.data.path!r} is a latent cache; an autoencoder is trained on images")
    run = require_writable(usable_name(recipe.out, "out"))
    usable_name(recipe.data.path, "data.path")
    require_apart(run, recipe.data.path, replaced=(AUTOENCODER_FOLDER, "checkpoints", "samples"))
    recipe = as_begun(recipe, run)
    changes = check_changes(run, recipe, CHANGES, allow_change)
    runtime = runtime.with_precision(recipe.training.precision)
    require_autoencoder_memory(recipe, free_memory(runtime.device))
    source = open_images(recipe.data.path, recipe.data.image_size)
    _require_same_images(run, source)
    usable, unreadable = readable(source)
    kept, held_out = split(usable, recipe.data.held_out, recipe.training.seed)
    network = build_autoencoder(recipe.network, recipe.data.image_size, recipe.training.seed)
    images = TrainingImages(source, seed=recipe.training.seed, flip=recipe.data.flip, kept=kept)
    return Prepared(recipe, runtime, network, images, held_out, [error.name for error in unreadable], changes)


def _require_same_images(run: Path, source: ImageSource) -> None:
    """Images may have moved since the run began; what is in them must be the same."""
    file = run / _IMAGES_FILE
    if file.exists() and (before := read_json(file))["fingerprint"] != source.fingerprint():
        raise ConfigError(
            f"{run} was trained on other images ({before['data']}) than data.path holds now ({source.description}); "
            "restore them or choose another out"
        )


def split(usable: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Deal images out by seed: (trained on, held out). Both are sorted; at least 1 and at most 256 are held out.

    Raises:
        DataError: there are fewer than two images.
    """
    if len(usable) < 2:
        raise DataError(f"{len(usable)} readable image(s): one to train on and one to hold out are the least")
    num_held_out = min(max(round(share * len(usable)), 1), _MOST_HELD_OUT, len(usable) - 1)
    generator = torch.Generator().manual_seed(derive_seed(seed, "held out"))
    order = [usable[place] for place in torch.randperm(len(usable), generator=generator).tolist()]
    return sorted(order[num_held_out:]), sorted(order[:num_held_out])


def finish(
    network: AutoencoderKL,
    recipe: AutoencoderRecipe,
    source: ImageSource,
    kept: Sequence[int],
    held_out: Sequence[int],
    num_steps: int,
) -> AutoencoderReport:
    """Set the latent scaling of a trained network, save it, and measure what was saved.

    Writes `autoencoder/`, `metrics/report.json` and `reconstructions.png` (originals above reconstructions).
    """
    run, dtype = Path(recipe.out), getattr(torch, recipe.save_dtype)
    stored = {name: weight.to(dtype) for name, weight in network.state_dict().items()}
    network.load_state_dict(stored)  # rounded as on disk: what is measured is what others will load
    autoencoder = Autoencoder(network, str(run / AUTOENCODER_FOLDER))
    places = epoch_order(recipe.training.seed, len(kept), epoch=0)[:_STATISTICS_IMAGES].tolist()
    scaling = _set_scaling(autoencoder, source, [kept[place] for place in places])
    with atomic_folder(run / AUTOENCODER_FOLDER) as temporary:
        torch.nn.Module.to(network, dtype).save_pretrained(temporary, safe_serialization=True)
    torch.nn.Module.float(network)

    decibels, pictures = [], []
    for pixels in _pixels(source, held_out):
        rebuilt = autoencoder.reconstruct(pixels)
        decibels += psnr(pixels, rebuilt).tolist()
        pictures.append(torch.stack([pixels, rebuilt]))
    shown = torch.cat(pictures, dim=1)[:, :_PICTURED]
    save_grid(run / "reconstructions.png", shown.flatten(0, 1), columns=shown.shape[1])
    report = AutoencoderReport(
        psnr=sum(decibels) / len(decibels),
        num_held_out=len(held_out),
        factor=autoencoder.factor,
        num_channels=autoencoder.num_channels,
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        num_bytes=sum(file.stat().st_size for file in (run / AUTOENCODER_FOLDER).iterdir()),
        steps=num_steps,
        **scaling,
    )
    write_json(run / "metrics" / "report.json", asdict(report))
    return report


def _set_scaling(autoencoder: Autoencoder, source: ImageSource, indices: Sequence[int]) -> dict[str, object]:
    """Write 1 / std and mean of the latents into the config, as Stable Diffusion does; returns parts of the report."""
    sums, deviations, lowest, highest = ChannelSums(autoencoder.num_channels), [], math.inf, -math.inf
    for pixels in _pixels(source, indices):
        moments = autoencoder.encode(to_unit_range(pixels))
        sums.add(moments)
        mean, log_variance = moments.chunk(2, dim=1)
        deviations.append((0.5 * log_variance).exp().mean(dim=(1, 2, 3)).cpu())
        lowest, highest = min(lowest, float(mean.min())), max(highest, float(mean.max()))
    means, stds = (np.array(values) for values in sums.mean_and_std())
    shift = float(means.mean())
    scale = float((stds**2 + (means - shift) ** 2).mean() ** -0.5)  # of all channels together
    autoencoder.model.register_to_config(scaling_factor=scale, shift_factor=shift)
    return {
        "scaling_factor": scale,
        "shift_factor": shift,
        "channel_mean": ((means - shift) * scale).tolist(),
        "channel_std": (stds * scale).tolist(),
        "largest": max(highest - shift, shift - lowest) * scale,
        "posterior_std": float(torch.cat(deviations).mean()) * scale,
    }


def _pixels(source: ImageSource, indices: Sequence[int]) -> Iterator[Tensor]:
    """Images in slices of [B, 3, S, S] uint8."""
    for start in range(0, len(indices), _SLICE):
        pixels = np.stack([source[index].pixels for index in indices[start : start + _SLICE]])
        yield torch.from_numpy(pixels).permute(0, 3, 1, 2)
