"""Training a first stage: a small variational autoencoder of diffusers' class AutoencoderKL.

With x the pixels, q(z|x) = N(mean, variance) the encoder's posterior, z drawn from it and x' the decoded z,

    loss = |x' - x| + edge_weight * |grad x' - grad x| + kl_weight * KL(q(z|x) || N(0, 1))
           + equivariance_weight * |D(tau z) - tau x|
           + perceptual_weight * distance of features(x', x) + adversarial_weight * -verdict(x')

each term a mean over its elements; D is the decoder, and tau turns and shrinks (see `training.equivariance`). The
last two lines are off unless asked for; see `training.texture` for the last one. The discriminator learns in the same
steps, from a loss that only reaches its own weights.

Legend: B images, P channels of the pixels, H and W height and width of the training crops, C latent channels,
h = H / factor, w = W / factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from latentflow.autoencoder import sample_latents
from latentflow.data.batches import Batch, TrainingImages
from latentflow.data.pixel_choice import EIGHT_BIT_RGB, PixelChoice
from latentflow.data.table_options import TableFiles
from latentflow.errors import ConfigError
from latentflow.networks.feature_network import FeatureNetwork
from latentflow.networks.in_training import sampled_part
from latentflow.networks.patch_discriminator import JudgedAutoencoder, PatchDiscriminator
from latentflow.pixel_format import RGB, PixelFormat
from latentflow.randomness import ImageRandom, derive_seed
from latentflow.records import Record
from latentflow.runtime import Runtime
from latentflow.shapes import image_mean
from latentflow.sizes import ImageSize, Size, bounded
from latentflow.training.changes import ChangeRules
from latentflow.training.checkpoint import Keeping
from latentflow.training.config import LARGEST_IMAGE, LARGEST_SEED, MOST_STEPS, RECIPES, find_recipe
from latentflow.training.equivariance import equivariance_loss
from latentflow.training.interruption import Outcome
from latentflow.training.loop import Job, MicroBatches, run_loop
from latentflow.training.memory import require_memory, state_bytes
from latentflow.training.optim import OptimizerConfig
from latentflow.training.settings import load_settings
from latentflow.training.texture import adversarial_losses, perceptual_loss
from latentflow.weights import without_memory

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

AUTOENCODER_RECIPES = RECIPES / "autoencoders"
_KEPT_BYTES = 42  # per residual block, channel and pixel, for the backward pass in float32; measured


class AutoencoderData(PixelChoice, TableFiles):
    """Where the images come from, and what their pixels are read as."""

    path: str = Field("", description="Images as for `encode`: a folder, zip, table, parquet, 'synthetic:COUNT', ...")
    image_size: Annotated[ImageSize, bounded(1, LARGEST_IMAGE)] = Field(
        Size(64, 64), description="Size of the images in pixels: 64 for squares, or WIDTHxHEIGHT, like 192x128."
    )
    crop: int | None = Field(
        None,
        ge=1,
        description="Side of random crops to train on; null: whole images. Small crops train faster.",
    )
    flip: bool = Field(True, description="Flip images at random.")
    held_out: float = Field(
        0.02, gt=0, lt=1, description="Fraction of the images, at most 256, held out to measure reconstruction."
    )
    num_workers: int | None = Field(
        None, ge=0, le=256, description="Worker processes that read ahead; null: automatic, none on a CPU."
    )


class AutoencoderNetwork(Record):
    """Convolutions and residual blocks; each entry of `channels` is a level, half the side of the one before."""

    channels: list[Annotated[int, Field(ge=1, le=4096)]] = Field(
        [16, 32, 64], min_length=1, max_length=8, description="Width of each level, from the pixels inwards."
    )
    latent_channels: int = Field(4, ge=1, le=1024, description="Channels C of the latents.")
    layers_per_block: int = Field(1, ge=1, le=16, description="Residual blocks per level; one more in the decoder.")
    norm_groups: int = Field(
        4, ge=1, le=4096, description="Groups of every group normalisation; must divide each width."
    )
    attention: bool = Field(False, description="Self-attention at the lowest resolution; costly on a CPU.")

    @property
    def factor(self) -> int:
        """Image side divided by latent side: every level but the first halves it."""
        return 2 ** (len(self.channels) - 1)

    @model_validator(mode="after")
    def _groups_divide_widths(self) -> AutoencoderNetwork:
        for width in self.channels:
            if width % self.norm_groups:
                raise ValueError(f"norm_groups = {self.norm_groups} does not divide the width {width} in channels")
        return self


class AutoencoderLoss(Record):
    """Weights of the terms of the loss, relative to the absolute error."""

    edge_weight: float = Field(
        0.5, ge=0, le=1e6, description="Weight of the absolute error of differences between neighbouring pixels."
    )
    kl_weight: float = Field(
        1e-4,
        ge=0,
        le=1e6,
        description="Weight of the KL divergence from N(0, 1) per latent value; larger: smoother latents, less detail.",
    )
    equivariance_weight: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="Weight of the absolute error of turned and shrunken latents, decoded, against the turned and "
        "shrunken images (EQ-VAE): latents that turn and shrink with the image, for 1.4 times the time; 0: off.",
    )
    perceptual_weight: float = Field(
        0.0, ge=0, le=1e6, description="Weight of the distance between features of the judge in `judge`; 0: off."
    )
    judge: str = Field("", description="The folder of a judge, by `latentflow train-features` on your images.")
    adversarial_weight: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="Weight of the verdict of a discriminator of patches: sharper texture, less PSNR; 0: off.",
    )
    adversarial_after: int = Field(
        0, ge=0, le=MOST_STEPS, description="Steps before the discriminator begins to learn and to judge."
    )

    @model_validator(mode="after")
    def _perception_has_its_judge(self) -> AutoencoderLoss:
        if self.perceptual_weight and not self.judge:
            raise ValueError(
                f"perceptual_weight = {self.perceptual_weight:g} needs loss.judge=FOLDER, by latentflow train-features"
            )
        return self


class DiscriminatorConfig(Record):
    """The discriminator of `loss.adversarial_weight`."""

    width: int = Field(
        32, ge=8, le=2048, multiple_of=8, description="Channels of the first level; each next has twice."
    )
    levels: int = Field(
        3, ge=1, le=6, description="Each has half the side; with 3, a verdict is on a patch of 38 pixels."
    )


class AutoencoderTraining(Record):
    """How long, how fast, and how carefully."""

    steps: int = Field(20_000, ge=1, le=MOST_STEPS, description="Optimizer steps.")
    batch_size: int = Field(16, ge=1, le=2**20, description="Images per optimizer step.")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Seed of weights, data order, crops and noise.")
    precision: Literal["auto", "fp32", "tf32", "bf16"] = Field(
        "auto", description="fp32, tf32, bf16, or auto: bf16 on a GPU that has it, else fp32."
    )
    ema_decay: float = Field(0.999, ge=0, lt=1, description="Decay of the saved weight average; 0: no averaging.")
    log_every: int = Field(50, ge=1, le=MOST_STEPS, description="Steps between lines of metrics.jsonl.")
    checkpoint_every: int = Field(500, ge=1, le=MOST_STEPS, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, le=MOST_STEPS, description="How many of the newest checkpoints to keep.")

    def is_saved(self, step: int) -> bool:
        """Whether a checkpoint is written after `step` steps, if the run does not end there."""
        return step % self.checkpoint_every == 0


class AutoencoderRecipe(Record):
    """Everything `latentflow train-autoencoder` needs to know."""

    description: str = Field("", description="One line, shown by `latentflow recipes`.")
    out: str = Field("", description="The run folder; empty: runs/NAME_autoencoder, with the NAME of the recipe.")
    data: AutoencoderData = AutoencoderData()
    network: AutoencoderNetwork = AutoencoderNetwork()
    loss: AutoencoderLoss = AutoencoderLoss()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-3, betas=(0.9, 0.99), warmup_steps=100, schedule="cosine"
    )
    training: AutoencoderTraining = AutoencoderTraining()
    save_dtype: Literal["float32", "float16"] = Field("float32", description="Dtype of the saved weights.")

    @model_validator(mode="after")
    def _has_no_hidden_matrices(self) -> AutoencoderRecipe:
        if self.optimizer.kind == "muon":
            raise ValueError(
                "optimizer.kind = muon is for the blocks of velocity networks, whose layers declare their matrices; an "
                "autoencoder's do not, so use adamw"
            )
        return self

    def require_fitting_sizes(self) -> None:
        """Check the sizes of images and crops against the reduction factor.

        Raises:
            ConfigError: a size is not a multiple of it, or the crop is larger than the image.
        """
        size, crop, factor = self.data.image_size, self.data.crop, self.network.factor
        for key, value in (("image_size", size), ("crop", Size.of(crop or size))):
            if not value.is_multiple_of(factor):
                fitting = value.nearest(factor)[: 1 if min(value) < factor else 2]
                raise ConfigError(
                    f"data.{key} = {value} is not a multiple of {factor}, the reduction factor of "
                    f"{len(self.network.channels)} levels; use {' or '.join(map(str, fitting))}"
                )
        seen, least = crop or min(size), 2**self.discriminator.levels
        if self.loss.adversarial_weight and seen < least:
            raise ConfigError(
                f"discriminator.levels = {self.discriminator.levels} needs images or crops of {least} pixels, not of "
                f"{seen}; use fewer levels"
            )
        if crop and crop > min(size):
            raise ConfigError(f"data.crop = {crop} is larger than data.image_size = {size}; use null for whole images")


CHANGES = ChangeRules(
    free=(
        "description",
        "out",
        "data.path",
        "data.file_column",
        "data.allow_missing",
        "data.num_workers",
        "loss.judge",
        "training.steps",
        "training.log_every",
        "training.checkpoint_every",
        "training.keep_checkpoints",
        "save_dtype",
    ),
    fixed={
        "network": "its weights would not fit",
        "discriminator": "its weights would not fit",
        "loss.adversarial_weight": "the discriminator has learned with it",
        "data.image_size": "the held-out images would be others",
        "data.held_out": "images that were held out would be trained on",
        "training.seed": "images that were held out would be trained on",
        **dict.fromkeys(EIGHT_BIT_RGB, "it has learned other numbers"),
    },
    former=EIGHT_BIT_RGB,
)
"""What may change in a run of `latentflow train-autoencoder`."""


def load_autoencoder_recipe(name_or_file: str | Path, overrides: Sequence[str] = ()) -> AutoencoderRecipe:
    """A named recipe or a YAML file, with `key=value` overrides applied.

    Raises:
        ConfigError: no such recipe; a key or value that does not exist or fit (the nearest key is named).
    """
    return load_settings(AutoencoderRecipe, find_recipe(name_or_file, AUTOENCODER_RECIPES), overrides)


def build_autoencoder(config: AutoencoderNetwork, size: Size | int, seed: int, channels: int = 3) -> AutoencoderKL:
    """A fresh AutoencoderKL in training mode for images of so many channels P, its weights drawn from `seed`.

    Residual branches start at zero, so that colours pass straight through from the first step on (Fixup, Zhang et al.,
    arXiv 1901.09321); this helps short runs.
    """
    from diffusers import AutoencoderKL  # slow to import
    from diffusers.models.resnet import ResnetBlock2D

    num_levels = len(config.channels)
    torch.manual_seed(derive_seed(seed, "weights"))
    network = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * num_levels,
        up_block_types=("UpDecoderBlock2D",) * num_levels,
        block_out_channels=tuple(config.channels),
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        mid_block_add_attention=config.attention,
        sample_size=max(Size.of(size)),
        scaling_factor=1.0,
        force_upcast=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    for module in network.modules():
        if isinstance(module, ResnetBlock2D):
            torch.nn.init.zeros_(module.conv2.weight)
            torch.nn.init.zeros_(module.conv2.bias)
    return network.train()


def require_autoencoder_memory(recipe: AutoencoderRecipe, free: int | None, channels: int = 3) -> None:
    """Refuse an autoencoder or a batch that does not fit into `free` bytes of memory, before it is built.

    Args:
        channels: of the pixels.

    Raises:
        ConfigError: with the estimate and what would fit.
    """
    config, size = recipe.network, Size.of(recipe.data.crop or recipe.data.image_size)
    with without_memory():
        network = _with_discriminator(build_autoencoder(config, size, recipe.training.seed, channels), recipe)
    volume = sum(width * size.over(2**level).area for level, width in enumerate(config.channels))
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    require_memory(
        f"an autoencoder of {len(config.channels)} levels",
        num_parameters,
        state_bytes(num_parameters),
        per_image=volume * _kept_blocks(recipe) * _KEPT_BYTES,
        images=recipe.training.batch_size,
        free=free,
        key="training.batch_size",
    )


def _kept_blocks(recipe: AutoencoderRecipe) -> int:
    """Residual blocks per level that keep something for the backward pass, of an encoder and one or two decoders."""
    encoder, decoder = recipe.network.layers_per_block, recipe.network.layers_per_block + 1
    return encoder + decoder * (2 if recipe.loss.equivariance_weight else 1)


@dataclass(frozen=True)
class AutoencoderStep:
    """The loss of each image of one batch and its terms, all [B] float32.

    Attributes:
        loss: the weighted sum, with its graph.
        reconstruction: mean absolute error of the pixels, which lie in [-1, 1].
        edges: mean absolute error of differences between neighbouring pixels.
        kl: KL divergence of the posterior from N(0, 1) in nats per latent value.
        posterior_std: mean standard deviation of the posterior.
        equivariance: mean absolute error of turned and shrunken latents, decoded; None: not part of the loss, as below.
        perceptual: distance of the judge's features, 0 to 2.
        adversarial: minus the mean verdict on the patches of the reconstruction.
        discriminator: the loss of the discriminator, which is part of `loss`.
    """

    loss: Tensor
    reconstruction: Tensor
    edges: Tensor
    kl: Tensor
    posterior_std: Tensor
    equivariance: Tensor | None = None
    perceptual: Tensor | None = None
    adversarial: Tensor | None = None
    discriminator: Tensor | None = None


def autoencoder_step(
    network: nn.Module,
    batch: Batch,
    *,
    recipe: AutoencoderRecipe,
    runtime: Runtime,
    judge: FeatureNetwork | None = None,
    pixel_format: PixelFormat = RGB,
) -> AutoencoderStep:
    """Encode, sample from the posterior, decode, compare.

    Args:
        network: an AutoencoderKL, or a `JudgedAutoencoder` with one.
        judge: whose features are compared; needed with `loss.perceptual_weight`.
        pixel_format: of the batch.
    """
    seed, device, weights = recipe.training.seed, runtime.device, recipe.loss
    coder: AutoencoderKL = sampled_part(network)
    pixels = pixel_format.to_unit(_random_crops(batch, recipe.data.crop, seed).to(device, non_blocking=True))
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    with runtime.autocast():
        moments = coder.encode(pixels).latent_dist.parameters.float()
        latents = sample_latents(
            moments, recipe.network.latent_channels, ImageRandom.at(seed, "posterior", batch.positions, device)
        )
        decoded = coder.decode(latents).sample.float()
    reconstruction = image_mean((decoded - pixels).abs())
    edges = sum(image_mean((ours - theirs).abs()) for ours, theirs in zip(_edges(decoded), _edges(pixels), strict=True))
    mean, log_variance = moments.chunk(2, dim=1)
    kl = image_mean(0.5 * (mean**2 + log_variance.exp() - 1 - log_variance))  # KL(N(mean, variance) || N(0, 1))
    loss = reconstruction + weights.edge_weight * edges + weights.kl_weight * kl
    more: dict[str, Tensor] = {}
    with runtime.autocast():
        if weights.equivariance_weight:
            random = ImageRandom.at(seed, "equivariance", batch.positions)
            more["equivariance"] = equivariance_loss(lambda z: coder.decode(z).sample, latents, pixels, random)
            loss = loss + weights.equivariance_weight * more["equivariance"]
        if weights.perceptual_weight and judge is not None:
            more["perceptual"] = perceptual_loss(judge, decoded, pixels)
            loss = loss + weights.perceptual_weight * more["perceptual"]
        if isinstance(network, JudgedAutoencoder):
            begins = int(batch.positions[0]) >= weights.adversarial_after * recipe.training.batch_size
            deceived, learned = adversarial_losses(network.discriminator, decoded, pixels, begins)
            more |= {"adversarial": deceived, "discriminator": learned}
            loss = loss + weights.adversarial_weight * deceived + learned
    posterior_std = image_mean((0.5 * log_variance).exp())
    return AutoencoderStep(loss, reconstruction, edges, kl, posterior_std, **more)


def train_first_stage(
    recipe: AutoencoderRecipe,
    network: AutoencoderKL,
    images: TrainingImages,
    run: Path,
    runtime: Runtime,
    judge: FeatureNetwork | None = None,
) -> Outcome:
    """Train `network` until the recipe's last step, or until SIGTERM or Ctrl-C; see `run_loop`.

    In the end the network has its average weights.

    Args:
        judge: see `autoencoder_step`.

    Raises:
        NonFiniteError: a gradient was not finite; the checkpoints are from before that step.
    """
    config, judge = recipe.training, judge and judge.eval().requires_grad_(False).to(runtime.device)
    job = Job(
        network=_with_discriminator(network, recipe).to(runtime.device),
        compare=partial(
            autoencoder_step, recipe=recipe, runtime=runtime, judge=judge, pixel_format=images.source.pixel_format
        ),
        meter=partial(MeanTerms, terms_of(recipe.loss)),
        images=images,
        run=run,
        runtime=runtime,
        config=config,
        optimizer=recipe.optimizer,
        parts=MicroBatches(config.batch_size, 1),
        num_workers=recipe.data.num_workers,
        keeping=Keeping(config.keep_checkpoints),
    )
    outcome, average = run_loop(job)
    network.load_state_dict(average)
    return outcome


def _with_discriminator(network: AutoencoderKL, recipe: AutoencoderRecipe) -> nn.Module:
    """The autoencoder, with a fresh discriminator where the loss has one."""
    if not recipe.loss.adversarial_weight:
        return network
    torch.manual_seed(derive_seed(recipe.training.seed, "discriminator"))
    config = recipe.discriminator
    return JudgedAutoencoder(network, PatchDiscriminator(network.config.in_channels, config.width, config.levels))


def _random_crops(batch: Batch, side: int | None, seed: int) -> Tensor:
    """A random square of `side` pixels of each image, or the whole image: stored values [B, P, H, W]."""
    assert batch.pixels is not None
    if side is None:
        return batch.pixels
    room = torch.tensor(batch.pixels.shape[-2:]) - side + 1
    corners = (ImageRandom.at(seed, "crop", batch.positions).uniform(2) * room).long().tolist()
    return torch.stack(
        [x[:, top : top + side, left : left + side] for x, (top, left) in zip(batch.pixels, corners, strict=True)]
    )


def _edges(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Differences between vertical and horizontal neighbours."""
    return pixels[..., 1:, :] - pixels[..., :-1, :], pixels[..., 1:] - pixels[..., :-1]


def terms_of(weights: AutoencoderLoss) -> list[str]:
    """The terms of the loss by their names in `AutoencoderStep`, without one that is off."""
    of_weights = {
        "equivariance": weights.equivariance_weight,
        "perceptual": weights.perceptual_weight,
        "adversarial": weights.adversarial_weight,
        "discriminator": weights.adversarial_weight,
    }
    return [field.name for field in fields(AutoencoderStep) if of_weights.get(field.name, True)]


class MeanTerms:
    """Means of the terms of a loss, summed on the device and read once per log line.

    Args:
        names: of the terms, fields of the record of one batch.
    """

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names = list(names)
        self.sums = torch.zeros(len(self.names), device=device)
        self.num_steps = 0

    def add(self, result: Any) -> None:
        """Take in one batch."""
        self.sums += torch.stack([getattr(result, name).detach().mean() for name in self.names])
        self.num_steps += 1

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Each term by its name; `reduce` sums over processes, which did equally many steps."""
        processes = reduce(torch.ones((), device=self.sums.device))
        return dict(zip(self.names, (reduce(self.sums) / processes / self.num_steps).tolist(), strict=True))
