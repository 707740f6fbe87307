"""A run of `latentflow train-autoencoder`: checked before its first step, scaled and measured after its last."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from latentflow.artifacts import atomic_folder, read_json, write_json
from latentflow.autoencoder import Autoencoder
from latentflow.autoencoder_files import PIXELS_FILE
from latentflow.data.batches import TrainingImages, epoch_order
from latentflow.data.cache.reader import is_cache
from latentflow.data.items import ImageSource
from latentflow.data.latent_statistics import ChannelSums
from latentflow.data.pictures.shown import as_levels, as_shown
from latentflow.data.pictures.user_picture import psnr
from latentflow.data.sources.images import open_images
from latentflow.data.sources.readable import readable
from latentflow.errors import ConfigError, DataError
from latentflow.model.config import AUTOENCODER_FOLDER
from latentflow.networks.feature_network import FeatureNetwork
from latentflow.pixel_format import RGB, PixelFormat
from latentflow.randomness import derive_seed
from latentflow.runtime import Runtime
from latentflow.training.changes import as_begun, check_changes
from latentflow.training.first_stage import (
    CHANGES,
    AutoencoderRecipe,
    build_autoencoder,
    require_autoencoder_memory,
)
from latentflow.training.memory import free_memory
from latentflow.training.run_folder import PreparedRun, check_places

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

_IMAGES_FILE = "images.json"
_MOST_HELD_OUT = 256
_STATISTICS_IMAGES = 2048  # enough for the scale of the latents to three digits
_SLICE = 16  # images measured at a time


@dataclass(frozen=True)
class OpenedJudge:
    """The network of a judge, and the hash of its weights."""

    network: FeatureNetwork
    hash: str


@dataclass(frozen=True)
class PreparedFirstStage(PreparedRun):
    """A checked run of an autoencoder.

    Attributes:
        network: with fresh weights.
        judge: compares features; None: the loss has no such term.
        held_out: indices in the source of the images that reconstruction is measured on.
    """

    recipe: AutoencoderRecipe
    network: AutoencoderKL
    held_out: list[int]
    judge: OpenedJudge | None = None

    def begin(self) -> None:
        super().begin()
        source = self.images.source
        learned_from = {"data": source.description, "fingerprint": source.fingerprint()}
        if source.pixel_format != RGB:
            learned_from["pixel_format"] = source.pixel_format.model_dump(mode="json")
        if self.judge:
            learned_from["judge"] = self.judge.hash
        write_json(self.run / _IMAGES_FILE, learned_from)

    def describe(self) -> dict[str, str]:
        """The run in about ten lines."""
        data, network = self.recipe.data, self.recipe.network
        crops = f", in random squares of {data.crop}" if data.crop else ""
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        return {
            "data": f"{len(self.images):,} images of {data.image_size.words}{crops}: {data.path}",
            "pixels": self.images.source.pixel_format.title,
            "held out": f"{len(self.held_out)} images",
            "network": f"{len(network.channels)} levels of {network.channels} channels, {parameters:,} parameters",
            **({"discriminator": self._discriminator()} if self.recipe.loss.adversarial_weight else {}),
            **({"judge": f"{self.recipe.loss.judge} ({self.judge.hash[:12]})"} if self.judge else {}),
            "latents": f"{network.latent_channels} channels, factor {network.factor}",
            **self.rows(),
        }

    def _discriminator(self) -> str:
        config, begins = self.recipe.discriminator, self.recipe.loss.adversarial_after
        after = f", after {begins:,} steps" if begins else ""
        return f"{config.levels} levels, {config.width} channels in the first{after}"


def prepare_first_stage(
    recipe: AutoencoderRecipe,
    runtime: Runtime,
    *,
    judge: OpenedJudge | None = None,
    allow_change: Sequence[str] = (),
) -> PreparedFirstStage:
    """Check a recipe and the data it names; nothing is written.

    Args:
        judge: that of the recipe's loss.
        allow_change: keys of the recipe that may differ from the run's although they change what is computed.

    Raises:
        ConfigError, DataError, ArtifactError: the first thing that is wrong.
    """
    recipe.require_fitting_sizes()
    run = check_places(recipe, "images or a zip", replaced=(AUTOENCODER_FOLDER, "checkpoints", "samples"))
    if is_cache(recipe.data.path):
        raise ConfigError(f"data.path = {recipe.data.path!r} is a latent cache; an autoencoder is trained on images")
    recipe = as_begun(recipe, run, CHANGES)
    changes = check_changes(run, recipe, CHANGES, allow_change)
    runtime = runtime.with_precision(recipe.training.precision)
    given = {"table": recipe.data.table, "pixels": recipe.data, "known": _known_format(run)}
    source = open_images(recipe.data.path, recipe.data.image_size, **given)
    _require_same_images(run, source)
    if judge:
        _require_same_judge(run, judge, recipe.loss.judge)
    usable, unreadable = readable(source)
    channels = source.pixel_format.channels
    require_autoencoder_memory(recipe, free_memory(runtime.device), channels)
    kept, held_out = split(usable, recipe.data.held_out, recipe.training.seed)
    return PreparedFirstStage(
        recipe=recipe,
        runtime=runtime,
        images=TrainingImages(source, seed=recipe.training.seed, flip=recipe.data.flip, kept=kept),
        broken=[error.name for error in unreadable],
        changes=changes,
        network=build_autoencoder(recipe.network, recipe.data.image_size, recipe.training.seed, channels),
        held_out=held_out,
        judge=judge,
    )


def _known_format(run: Path) -> PixelFormat | None:
    """The pixel format that the run began with; None: it is new, or as old as pixel formats."""
    file = run / _IMAGES_FILE
    found = read_json(file).get("pixel_format") if file.exists() else None
    return found and PixelFormat.model_validate(found)


def _require_same_images(run: Path, source: ImageSource) -> None:
    """Images may have moved since the run began; their content must be the same."""
    file = run / _IMAGES_FILE
    if file.exists() and (before := read_json(file))["fingerprint"] != source.fingerprint():
        raise ConfigError(
            f"{run} was trained on other images ({before['data']}) than data.path holds now ({source.description}); "
            "restore them or choose another out"
        )


def _require_same_judge(run: Path, judge: OpenedJudge, folder: str) -> None:
    """A judge may have moved since the run began; its weights must be the same."""
    file = run / _IMAGES_FILE
    if file.exists() and read_json(file).get("judge", judge.hash) != judge.hash:
        raise ConfigError(f"{run} was trained with another judge than {folder}; restore it or choose another out")


def split(usable: Sequence[int], share: float, seed: int, most: int = _MOST_HELD_OUT) -> tuple[list[int], list[int]]:
    """Split images at random, by seed: (trained on, held out), both sorted. At least 1 and at most `most` are held out.

    Raises:
        DataError: there are fewer than two images.
    """
    if len(usable) < 2:
        raise DataError(f"{len(usable)} readable image(s): at least 2 are needed, one to train on and one to hold out")
    num_held_out = min(max(round(share * len(usable)), 1), most, len(usable) - 1)
    generator = torch.Generator().manual_seed(derive_seed(seed, "held out"))
    order = [usable[place] for place in torch.randperm(len(usable), generator=generator).tolist()]
    return sorted(order[num_held_out:]), sorted(order[:num_held_out])


@dataclass(frozen=True)
class AutoencoderReport:
    """What a finished first stage is, written to metrics/report.json.

    Attributes:
        psnr: peak signal-to-noise ratio in dB of stored reconstructions, whose range is the peak; the mean over the
            held-out images.
        channel_psnr: the same of each channel of the pixels by itself.
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
    channel_psnr: list[float]
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


def finish(prepared: PreparedFirstStage, num_steps: int) -> tuple[AutoencoderReport, Tensor]:
    """Set the latent scaling of the trained network, save it, and measure what was saved.

    Writes `autoencoder/` and `metrics/report.json`.

    Returns:
        the report, and pictures as they are shown, [2, N, 3, H, W] uint8: the held-out images, and reconstructions.
    """
    network, recipe, run = prepared.network, prepared.recipe, prepared.run
    source, kept = prepared.images.source, prepared.images.kept.tolist()
    dtype = getattr(torch, recipe.save_dtype)
    stored = {name: weight.to(dtype) for name, weight in network.state_dict().items()}
    network.load_state_dict(stored)  # rounded as on disk: what is measured is what others will load
    autoencoder = Autoencoder(network, str(run / AUTOENCODER_FOLDER))
    places = epoch_order(recipe.training.seed, len(kept), epoch=0)[:_STATISTICS_IMAGES].tolist()
    scaling = _set_scaling(autoencoder, source, [kept[place] for place in places])
    with atomic_folder(run / AUTOENCODER_FOLDER) as temporary:
        torch.nn.Module.to(network, dtype).save_pretrained(temporary, safe_serialization=True)
        if source.pixel_format != RGB:
            write_json(temporary / PIXELS_FILE, source.pixel_format.model_dump(mode="json"))
    torch.nn.Module.float(network)

    decibels, by_channel, pictures = [], [], []
    for pixels in _pixels(source, prepared.held_out):
        pair = pixels, autoencoder.reconstruct(pixels, source.pixel_format)
        levels = [as_levels(one, source.pixel_format) for one in pair]
        decibels += psnr(*levels).tolist()
        by_channel.append(psnr(*(one.flatten(0, 1)[:, None] for one in levels)).reshape(pixels.shape[:2]))
        pictures.append(torch.stack([as_shown(one, source.pixel_format) for one in pair]))
    report = AutoencoderReport(
        psnr=sum(decibels) / len(decibels),
        channel_psnr=torch.cat(by_channel).mean(0).tolist(),
        num_held_out=len(prepared.held_out),
        factor=autoencoder.factor,
        num_channels=autoencoder.num_channels,
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        num_bytes=sum(file.stat().st_size for file in (run / AUTOENCODER_FOLDER).iterdir()),
        steps=num_steps,
        **scaling,
    )
    write_json(run / "metrics" / "report.json", asdict(report))
    return report, torch.cat(pictures, dim=1)


def _set_scaling(autoencoder: Autoencoder, source: ImageSource, indices: Sequence[int]) -> dict[str, object]:
    """Write 1 / std and mean of the latents into the config, as Stable Diffusion does; returns parts of the report."""
    sums, deviations, lowest, highest = ChannelSums(autoencoder.num_channels), [], math.inf, -math.inf
    for pixels in _pixels(source, indices):
        moments = autoencoder.encode(source.pixel_format.to_unit(pixels))
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
    """Images in slices of [B, P, H, W], stored values."""
    for start in range(0, len(indices), _SLICE):
        pixels = np.stack([source[index].pixels for index in indices[start : start + _SLICE]])
        yield torch.from_numpy(pixels).permute(0, 3, 1, 2)
