"""The convolutional U-Net as a velocity network: one class for the networks that LFM calls ADM.

Four published U-Nets differ in details. Each detail is an option here, and a `variant` sets them all:

    adm        guided-diffusion's UNetModel (arXiv 2105.05233)
    dhariwal   EDM's reimplementation, DhariwalUNet (arXiv 2206.00364): residual blocks change the resolution
    ddpm++     EDM's SongUNet (arXiv 2011.13456), positional time features, sums scaled by sqrt(1/2)
    ncsn++     the same with Fourier time features, binomial resampling and the input on every level

Legend: B images, C latent channels, H and W latent height and width, D channels of a feature map, E channels of the
embedding of time and label.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import silu

from latentflow.errors import ConfigError, nearest
from latentflow.networks.base import FORMER_OPTIONS, VectorInputs, VelocityNetwork
from latentflow.networks.column_embedding import ColumnEmbedding
from latentflow.networks.layers import AugmentationEmbedding, JumpEmbedding, JumpInputs, time_sinusoid
from latentflow.networks.unet_blocks import (
    BlockOptions,
    Downsample,
    InputBranch,
    MapAttention,
    ResidualBlock,
    Upsample,
    group_norm,
)
from latentflow.records import Record
from latentflow.shapes import Condition

_ADM = {
    "num_heads": 4,
    "decoder_attention": "every",
    "resample": "conv",
    "resample_filter": "box",
    "resample_skip_conv": False,
    "modulation": "scale_shift",
    "time_features": "sinusoid",
    "time_scale": 1000.0,
    "sinusoid_endpoint": False,
    "label_joins": "embedding",
    "input_on_every_level": False,
    "residual_scale": 1.0,
    "norm_group_channels": 1,
    "norm_eps": 1e-5,
}
_DDPMPP = {
    **_ADM,
    "num_heads": 1,
    "decoder_attention": "last",
    "resample": "block",
    "resample_skip_conv": True,
    "modulation": "shift",
    "sinusoid_endpoint": True,
    "label_joins": "features",
    "residual_scale": math.sqrt(0.5),
    "norm_group_channels": 4,
    "norm_eps": 1e-6,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "adm": _ADM,
    "dhariwal": {
        **{key: value for key, value in _ADM.items() if key != "num_heads"},
        "head_channels": 64,
        "resample": "block",
        "norm_group_channels": 4,
    },
    "ddpm++": _DDPMPP,
    "ncsn++": {
        **_DDPMPP,
        "time_features": "fourier",
        "time_scale": 1.0,
        "resample_filter": "binomial",
        "input_on_every_level": True,
    },
}


class UNetConfig(Record):
    """A U-Net: its sizes, and a `variant` that sets the options not given.

    A config is resolved when it is created: every size and option has a value, so a saved config needs no defaults.
    The levels with attention are given as `attention_factors`, or as `attention_sizes` for latents of height and width
    `latent_size`; the config stores the factors.

    Raises:
        ConfigError: unknown option or variant, or sizes that do not fit together.
    """

    model_config = ConfigDict(validate_default=True)
    also_given: ClassVar[Mapping[str, Any]] = {"attention_sizes": tuple[int, ...], "latent_size": int | None}

    kind: Literal["unet"] = "unet"
    channels: int = Field(gt=0, le=65_536, description="of the feature maps, times the multiplier of their level")
    multipliers: tuple[Annotated[int, Field(gt=0, le=1024)], ...] = Field(
        min_length=1, max_length=12, description="one per level, from full resolution downwards"
    )
    blocks_per_level: int = Field(
        2, gt=0, le=64, description="residual blocks per encoder level; decoder levels have one more"
    )
    attention_factors: tuple[int, ...] = Field(
        (),
        max_length=12,
        description="attention on the levels that are smaller than the latents by these factors: 1, 2, 4, ...",
    )
    middle_attention: bool = Field(True, description="attention in the first block between encoder and decoder")
    variant: Literal["adm", "dhariwal", "ddpm++", "ncsn++"] = Field(
        "adm", description="a published U-Net, which gives the defaults of the options below"
    )
    num_heads: int | None = Field(None, gt=0, le=4096, description="attention heads; null: by head_channels")
    num_decoder_heads: int | None = Field(None, gt=0, le=4096, description="decoder heads; null: as in the encoder")
    head_channels: int | None = Field(
        None,
        gt=0,
        le=65_536,
        description="channels per head, instead of num_heads",
    )
    decoder_attention: Literal["every", "last"] = Field(
        description="which blocks of a level with attention have it in the decoder"
    )
    resample: Literal["conv", "block", "plain"] = Field(
        description="what changes the resolution between levels: conv = a convolution, block = a residual block, "
        "plain = means of 2 x 2 and repeated pixels"
    )
    resample_filter: Literal["box", "binomial"] = Field(
        description="how a residual block changes the resolution: box = means and repeated pixels, binomial = 1 3 3 1"
    )
    resample_skip_conv: bool = Field(description="a 1x1 convolution on the skip where a block changes the resolution")
    modulation: Literal["scale_shift", "shift"] = Field(
        description="how time and label modulate: scale and shift after the norm, or shift before it"
    )
    time_features: Literal["sinusoid", "fourier"] = Field(
        description="sinusoid = periods 2 pi to 20,000 pi; fourier = random frequencies, drawn once"
    )
    time_channels: int = Field(
        default_factory=lambda values: values.get("channels", 0) * (1 + (values.get("time_features") == "fourier")),
        gt=0,
        le=131_072,
        multiple_of=2,
        description="number of time features",
    )
    time_scale: float = Field(
        gt=0,
        le=1e6,
        description="the time in [0, 1] is multiplied by this; Fourier features and published LFM weights need 1.0",
    )
    sinusoid_endpoint: bool = Field(description="whether the sinusoids include the longest period")
    label_joins: Literal["features", "embedding"] = Field(
        description="what the label embedding is added to: the time features, or the time embedding made from them"
    )
    input_on_every_level: bool = Field(description="add the resized input after every change of resolution")
    residual_scale: float = Field(gt=0, le=1, description="factor of every residual sum; sqrt(1/2) keeps the variance")
    stem_channels: int = Field(
        default_factory=lambda values: values.get("channels", 0) * values.get("multipliers", (0,))[0],
        gt=0,
        le=2**26,
        description="channels of the first convolution",
    )
    norm_groups: int = Field(32, gt=0, le=65_536, description="groups of a norm at most")
    norm_group_channels: int = Field(
        gt=0, le=65_536, description="channels of a group at least; narrow maps have fewer groups"
    )
    norm_eps: float = Field(gt=0, le=1, description="added to variances")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout rate in every block")

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        explicit = {key: value for key, value in given.items() if value is not None and key not in FORMER_OPTIONS}
        names = [*cls.model_fields, *cls.also_given]
        for key in explicit:
            if key not in names:
                raise ConfigError(f"unknown network option {key!r}: {nearest(key, names)}")
        missing = [key for key in ("channels", "multipliers") if key not in explicit]
        if missing:
            raise ConfigError(
                f"network without {', '.join(missing)}: give them, for example channels: 256, multipliers: [1, 2, 3, 4]"
            )
        variant = str(explicit.get("variant", "adm"))
        if variant not in VARIANTS:
            raise ConfigError(f"unknown network variant {variant!r}: {nearest(variant, VARIANTS)}")
        preset = dict(VARIANTS[variant])
        if explicit.keys() & {"num_heads", "head_channels"}:
            preset = {key: value for key, value in preset.items() if key not in ("num_heads", "head_channels")}
        return {**preset, **_factors_from_sizes(explicit)}

    @model_validator(mode="after")
    def _check(self) -> UNetConfig:
        if (self.num_heads is None) == (self.head_channels is None):
            raise ConfigError(
                f"network.num_heads = {self.num_heads} and network.head_channels = {self.head_channels}: give one"
            )
        if self.head_channels is not None and self.num_decoder_heads is not None:
            raise ConfigError("network.num_decoder_heads goes with num_heads, not with head_channels")
        if self.sinusoid_endpoint and self.time_channels < 4:
            raise ConfigError(f"network.sinusoid_endpoint needs time_channels of 4 or more, not {self.time_channels}")
        factors = [2**level for level in range(len(self.multipliers))]
        for factor in self.attention_factors:
            if factor not in factors:
                raise ConfigError(
                    f"network.attention_factors: no level is smaller by {factor}; the {len(factors)} levels of "
                    f"multipliers {list(self.multipliers)} are smaller by {', '.join(map(str, factors))}"
                )
        for level, multiplier in enumerate(self.multipliers):
            attends = 2**level in self.attention_factors
            if attends or (self.middle_attention and level == len(self.multipliers) - 1):
                self.heads(self.channels * multiplier)
            if attends:
                self.heads(self.channels * multiplier, decoder=True)
        return self

    @property
    def title(self) -> str:
        """Name for messages and reports."""
        return f"U-Net ({self.variant}) of {self.channels} x {', '.join(map(str, self.multipliers))} channels"

    @property
    def size_multiple(self) -> int:
        """What height and width of the latents must be multiples of."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def embedding_channels(self) -> int:
        """E."""
        return 4 * self.channels

    def heads(self, channels: int, *, decoder: bool = False) -> int:
        """Attention heads of a feature map with this many channels.

        Raises:
            ConfigError: they do not divide the channels.
        """
        if self.head_channels is not None:
            count = channels // self.head_channels
        else:
            count = (self.num_decoder_heads if decoder else None) or self.num_heads
        if not count or channels % count:
            raise ConfigError(
                f"network: {channels} channels cannot be shared by {count} attention heads "
                f"(num_heads {self.num_heads}, head_channels {self.head_channels}); let fewer levels attend or change "
                "the heads"
            )
        return count


def _factors_from_sizes(given: Mapping[str, Any]) -> dict[str, Any]:
    """`attention_sizes` of latents of `latent_size` as `attention_factors`."""
    rest = {key: value for key, value in given.items() if key not in ("attention_sizes", "latent_size")}
    if len(rest) == len(given):
        return rest
    sizes, side = given.get("attention_sizes"), given.get("latent_size")
    if sizes is None or side is None or "attention_factors" in given:
        raise ConfigError(
            "network.attention_sizes and network.latent_size go together, in place of network.attention_factors"
        )
    if not isinstance(sizes, list | tuple):
        raise ConfigError(f"network.attention_sizes = {sizes!r}: give a list, for example [16, 8]")
    for size in sizes:
        if not isinstance(size, int) or not isinstance(side, int) or size < 1 or side % size:
            raise ConfigError(f"network.attention_sizes: no level of latents of {side} x {side} has the size {size}")
    return {**rest, "attention_factors": [side // size for size in sizes]}


class Embedding(nn.Module):
    """Time, label, columns and numbers of a variant as one vector per image, after its activation: [B, E].

    The columns join where the label joins.
    The numbers join the time features, as in EDM's networks (arXiv 2206.00364, appendix F.2).
    """

    def __init__(self, config: UNetConfig, vectors: VectorInputs):
        super().__init__()
        self.config = config
        features, size = config.time_channels, config.embedding_channels
        self.label_joins_features = config.label_joins == "features"
        if config.time_features == "fourier":  # the scale of arXiv 2011.13456
            self.register_buffer("frequencies", 16 * torch.randn(features // 2))
        width = features if self.label_joins_features else size
        self.label = nn.Embedding(vectors.num_classes + 1, width) if vectors.num_classes else None
        self.columns = ColumnEmbedding(vectors.columns, width) if vectors.columns else None
        self.constant = nn.Parameter(torch.zeros(width)) if vectors.constant_embedding else None
        numbers = vectors.num_augmentations
        self.augmentation = AugmentationEmbedding(numbers, features) if numbers else None
        self.linear1 = nn.Linear(features, size)
        self.linear2 = nn.Linear(size, size)

    def forward(self, time: Tensor, condition: Condition, jump: JumpInputs | None = None) -> Tensor:
        """time [B] and the condition's labels [B], columns [B, W] and augmentation [B, P] => [B, E].

        Args:
            jump: of a student; its vector is added before the activation.
        """
        x = self._features(time * self.config.time_scale).to(self.linear1.weight.dtype)
        label = self.label(condition.labels) if self.label is not None else None
        if self.constant is not None:
            label = self.constant.expand(len(x), -1) if label is None else label + self.constant
        if self.columns is not None:
            columns = self.columns(condition.columns)
            label = columns if label is None else label + columns
        if label is not None and self.label_joins_features:
            x = x + label
        if self.augmentation is not None:
            x = x + self.augmentation(condition.augmentation.to(x.dtype))
        x = self.linear2(silu(self.linear1(x)))
        if label is not None and not self.label_joins_features:
            x = x + label
        return silu(x if jump is None else x + jump(time, condition))

    def _features(self, time: Tensor) -> Tensor:
        if self.config.time_features == "sinusoid":
            return time_sinusoid(time, self.config.time_channels, endpoint=self.config.sinusoid_endpoint)
        # Phases reach hundreds of radians: in half precision they would be noise.
        wide = torch.promote_types(torch.float32, time.dtype)
        phases = time.to(wide)[:, None] * (2 * math.pi * self.frequencies.float()).to(wide)
        return torch.cat([phases.cos(), phases.sin()], dim=1)


class Stage(nn.Module):
    """One level of encoder or decoder: its blocks, and what changes the resolution before or after them."""

    def __init__(self, resize: nn.Module | None, blocks: list[nn.Module], input_branch: nn.Module | None = None):
        super().__init__()
        self.resize = resize
        self.input_branch = input_branch
        self.blocks = nn.ModuleList(blocks)


class UNet(VelocityNetwork):
    """Velocity network of residual blocks on feature maps, first at falling and then at rising resolution.

    Untrained, it returns exactly zero. Latents may have any height and width that are multiples of
    `config.size_multiple`.

    Args:
        config: sizes and options.
        inputs: channels and conditions; see `VelocityNetwork`.

    Raises:
        ConfigError: norms or heads do not divide the channels.
    """

    def __init__(self, config: UNetConfig, **inputs: Any):
        super().__init__(config, **inputs)
        self.draws = config.dropout > 0
        vectors = self.vectors
        self.embedding = Embedding(config, vectors)
        self.jump_embedding = JumpInputs(config.embedding_channels, guided=vectors.guided) if vectors.jumps else None
        self.stem = nn.Conv2d(self.spatial.num_channels, config.stem_channels, 3, padding=1)

        width, aside = config.stem_channels, self.spatial.num_channels
        skips = [width]
        self.encoder = nn.ModuleList()
        for level, multiplier in enumerate(config.multipliers):
            resize = self._resize(width, "halve") if level else None
            branch = None
            if level and config.input_on_every_level:
                branch, aside = InputBranch(aside, width, config.resample_filter), width
            skips += [width] if level else []
            blocks = []
            for _ in range(config.blocks_per_level):
                blocks.append(self._block(width, config.channels * multiplier, attends=self._attends(level)))
                width = config.channels * multiplier
                skips.append(width)
            self.encoder.append(Stage(resize, blocks, branch))

        self.middle = nn.ModuleList(
            [self._block(width, width, attends=config.middle_attention), self._block(width, width, attends=False)]
        )

        self.decoder = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(config.multipliers))):
            blocks = []
            for index in range(config.blocks_per_level + 1):
                may = config.decoder_attention == "every" or index == config.blocks_per_level
                attends = may and self._attends(level)
                blocks.append(
                    self._block(width + skips.pop(), config.channels * multiplier, attends=attends, decoder=True)
                )
                width = config.channels * multiplier
            self.decoder.append(Stage(self._resize(width, "double") if level else None, blocks))

        self.out_norm = self._norm(width)
        self.out_conv = nn.Conv2d(width, self.out_channels, 3, padding=1)
        self.reset_parameters()

    @property
    def input_layers(self) -> list[nn.Conv2d]:
        branches = [stage.input_branch for stage in self.encoder if stage.input_branch is not None]
        return [self.stem, *(branch.conv for branch in branches[:1])]  # the others read the branch before them

    @property
    def condition_layers(self) -> dict[str, nn.Module | nn.Parameter | None]:
        own = self.embedding
        return {
            "label": own.label,
            "columns": own.columns,
            "augmentation": own.augmentation,
            "constant": own.constant,
        }

    def reset_parameters(self) -> None:
        """Draw new weights: every block starts as its skip connection, without attention, and the output is zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.GroupNorm):
                module.reset_parameters()
        if self.embedding.label is not None:
            nn.init.normal_(self.embedding.label.weight, std=0.02)
        if self.embedding.columns is not None:
            self.embedding.columns.reset_parameters()
        if self.embedding.constant is not None:
            nn.init.zeros_(self.embedding.constant)
        if self.spatial.map_encoder is not None:
            self.spatial.map_encoder.reset_parameters()
        last = [self.out_conv]
        for module in self.modules():
            if isinstance(module, JumpEmbedding):
                module.reset_parameters()
            if isinstance(module, ResidualBlock):
                last.append(module.conv2)
            if isinstance(module, MapAttention):
                last.append(module.attention.out)
        for layer in last:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """The velocity at `latents` and `time`.

        Args:
            latents: [B, in_channels, H, W], H and W multiples of `config.size_multiple`.
            time: [B] in [0, 1], 0 at data and 1 at noise.
            condition: labels [B] in [0, num_classes] if the network has labels, else None; the spatial fields as
                `SpatialInputs` wants them; augmentation [B, num_augmentations] and columns [B, W], else None; span and
                guidance [B] for a student.

        Returns:
            [B, out_channels, H, W], dtype of `latents`.

        Raises:
            ValueError: see `joined`.
        """
        x = aside = self.joined(latents, time, condition)
        c = self.embedding(time, condition, self.jump_embedding)  # [B, E]

        x = self.stem(x)
        skips = [x]
        for stage in self.encoder:
            if stage.resize is not None:
                x = self.run(stage.resize, x, c)
                if stage.input_branch is not None:
                    x = aside = (x + stage.input_branch(aside)) * self.config.residual_scale
                skips.append(x)
            for block in stage.blocks:
                x = self.run(block, x, c)
                skips.append(x)
        for block in self.middle:
            x = self.run(block, x, c)
        for stage in self.decoder:
            for block in stage.blocks:
                x = self.run(block, torch.cat([x, skips.pop()], dim=1), c)
            if stage.resize is not None:
                x = self.run(stage.resize, x, c)
        return self.run_once(self._last, x).to(latents.dtype)

    def _last(self, x: Tensor) -> Tensor:
        return self.out_conv(silu(self.out_norm(x)))

    def _attends(self, level: int) -> bool:
        return 2**level in self.config.attention_factors

    def _norm(self, channels: int) -> nn.GroupNorm:
        config = self.config
        return group_norm(
            channels, groups=config.norm_groups, group_channels=config.norm_group_channels, eps=config.norm_eps
        )

    def _block(
        self,
        in_channels: int,
        out_channels: int,
        *,
        attends: bool = False,
        decoder: bool = False,
        resize: str | None = None,
    ) -> ResidualBlock:
        config = self.config
        attention = None
        if attends:
            heads = config.heads(out_channels, decoder=decoder)
            attention = MapAttention(self._norm(out_channels), heads, config.residual_scale)
        return ResidualBlock(
            self._norm(in_channels),
            self._norm(out_channels),
            BlockOptions(
                embedding_channels=config.embedding_channels,
                modulation=config.modulation,
                resample_filter=config.resample_filter,
                skip_conv=config.resample_skip_conv,
                residual_scale=config.residual_scale,
                dropout=config.dropout,
            ),
            attention=attention,
            resize=resize,
        )

    def _resize(self, channels: int, direction: str) -> nn.Module:
        if self.config.resample == "block":
            return self._block(channels, channels, resize=direction)
        change = Downsample if direction == "halve" else Upsample
        return change(channels, learned=self.config.resample == "conv")
