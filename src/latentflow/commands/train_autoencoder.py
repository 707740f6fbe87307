"""`latentflow train-autoencoder`: a recipe => a run folder with a first stage in it, in diffusers' own layout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from latentflow.artifacts import atomic_folder, make_folder, write_json, write_text
from latentflow.autoencoder import Autoencoder, latent_mean, to_uint8, to_unit_range
from latentflow.commands.grid import save_grid
from latentflow.commands.train import environment
from latentflow.data.batches import TrainingImages, epoch_order
from latentflow.data.images import ImageSource, open_images, readable
from latentflow.data.latent_cache import ChannelSums, is_cache
from latentflow.data.pictures import psnr
from latentflow.errors import ConfigError, DataError
from latentflow.latent_flow import default_device
from latentflow.randomness import derive_seed
from latentflow.training.autoencoder import (
    CHANGES,
    AutoencoderRecipe,
    build_autoencoder,
    train_autoencoder,
)
from latentflow.training.changes import RECIPE_FILE, check_changes
from latentflow.training.interruption import Outcome
from latentflow.training.settings import to_yaml

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

AUTOENCODER_FOLDER = "autoencoder"
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


def train_first_stage(
    recipe: AutoencoderRecipe, *, cpu: bool = False, allow_change: Sequence[str] = ()
) -> AutoencoderResult:
    """Train an autoencoder, scale its latents to unit variance, measure and save it; a repeated call resumes exactly.

    Everything that can be wrong is found before the run folder is touched.

    Args:
        recipe: checked; `out` and `data.path` must be set.
        cpu: stay on the CPU even if there is a GPU.
        allow_change: keys of the recipe that may differ from the run's although they alter what is computed.

    Raises:
        ConfigError, DataError: before anything is written.
        NonFiniteError: during training.
    """
    if not recipe.data.path:
        raise ConfigError("data.path is not set; add data.path=FOLDER (images or a zip)")
    if not recipe.out:
        raise ConfigError("out is not set; add out=runs/NAME")
    recipe.require_fitting_sizes()
    if is_cache(recipe.data.path):
        raise ConfigError(f"data.path = {recipe.data.path!r} is a latent cache; an autoencoder is trained on images")
    run = Path(recipe.out)
    changes = check_changes(run, recipe, CHANGES, allow_change)
    source = open_images(recipe.data.path, recipe.data.image_size)
    usable, unreadable = readable(source)
    kept, held_out = split(usable, recipe.data.held_out, recipe.training.seed)
    device = torch.device("cpu") if cpu else default_device()
    network = build_autoencoder(recipe.network, recipe.data.image_size, recipe.training.seed)
    make_folder(run)
    if changes:
        changes.tell()
        changes.record()
    write_text(run / RECIPE_FILE, to_yaml(recipe))
    write_json(run / "environment.json", environment(device, num_processes=1))

    images = TrainingImages(source, seed=recipe.training.seed, flip=recipe.data.flip, kept=kept)
    outcome = train_autoencoder(recipe, network, images, run, device)
    report = finish(network, recipe, source, kept, held_out, outcome.step) if outcome.finished else None
    return AutoencoderResult(run, outcome, [error.name for error in unreadable], report)


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
        rebuilt = reconstruct(autoencoder, pixels)
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


def reconstruct(autoencoder: Autoencoder, pixels: Tensor) -> Tensor:
    """Encode to the posterior's mode and decode: [B, 3, S, S] uint8 => the same shape, uint8, on the CPU."""
    moments = autoencoder.encode(to_unit_range(pixels))
    return to_uint8(autoencoder.decode(latent_mean(moments, autoencoder.num_channels))).cpu()


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
