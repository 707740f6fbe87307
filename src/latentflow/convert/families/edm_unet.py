"""EDM's `DhariwalUNet` and `SongUNet` (arXiv 2206.00364), which LFM calls adm, ddpm++ and ncsn++."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from latentflow.convert.architecture import Architecture, PublishedOptions
from latentflow.convert.keymap import Constant, KeyMap, Rule
from latentflow.convert.rules import attention, layer
from latentflow.errors import ConfigError
from latentflow.networks.unet import UNetConfig

_CHANNELS_PER_HEAD = 64  # of DhariwalUNet; narrower maps do not attend


class EdmUNetOptions(PublishedOptions):
    """Arguments of `DhariwalUNet` (model_type "adm") and `SongUNet` ("ddpm++", "ncsn++") that shape the network."""

    model_type: Literal["adm", "ddpm++", "ncsn++"]
    img_resolution: int = Field(gt=0, le=4096)
    in_channels: int = Field(gt=0, le=65_536)
    out_channels: int = Field(gt=0, le=65_536)
    label_dim: int = Field(0, ge=0, le=1_000_000)
    augment_dim: int = Field(
        0, ge=0, description="augmentation labels; they are zero in sampling, so their weights are left out"
    )
    model_channels: int = Field(gt=0)
    channel_mult: tuple[PositiveInt, ...] = Field(min_length=1, max_length=12)
    channel_mult_emb: int = 4
    num_blocks: int = Field(gt=0)
    attn_resolutions: tuple[int, ...] = Field(description="feature-map sizes; sizes that no level has are ignored")
    dropout: float = Field(0.0, ge=0, lt=1)
    label_dropout: float = Field(0.0, ge=0, lt=1)
    embedding_type: Literal["positional", "fourier"] | None = None
    channel_mult_noise: int | None = None
    encoder_type: Literal["standard", "residual", "skip"] | None = None
    decoder_type: Literal["standard", "skip"] = "standard"
    resample_filter: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _supported(self) -> EdmUNetOptions:
        if self.channel_mult_emb != 4:
            raise ConfigError(f"channel_mult_emb {self.channel_mult_emb}: only 4 is supported, as published")
        song_only = [self.embedding_type, self.channel_mult_noise, self.encoder_type, self.resample_filter]
        if self.model_type == "adm" and any(value is not None for value in song_only):
            raise ConfigError(
                "embedding_type, channel_mult_noise, encoder_type and resample_filter are arguments of SongUNet "
                "(model_type ddpm++ or ncsn++); DhariwalUNet (adm) has none of them"
            )
        if self.encoder_type == "skip" or self.decoder_type == "skip":
            raise ConfigError("encoders and decoders of type 'skip' are not supported; no published network has them")
        if self.resample_filter not in (None, (1, 1), (1, 3, 3, 1)):
            raise ConfigError(f"resample_filter {self.resample_filter}: (1, 1) and (1, 3, 3, 1) are supported")
        return self


def edm_unet(options: EdmUNetOptions) -> Architecture:
    """A network of EDM as our `UNet`."""
    song = options.model_type != "adm"
    sides = [options.img_resolution >> level for level in range(len(options.channel_mult))]
    wide_enough = [song or options.model_channels * m >= _CHANNELS_PER_HEAD for m in options.channel_mult]
    factors = [2**level for level, side in enumerate(sides) if side in options.attn_resolutions and wide_enough[level]]
    given = {"time_features": {"positional": "sinusoid", "fourier": "fourier"}.get(options.embedding_type)}
    if options.channel_mult_noise is not None:
        given["time_channels"] = options.model_channels * options.channel_mult_noise
    if options.encoder_type is not None:
        given["input_on_every_level"] = options.encoder_type == "residual"
    if options.resample_filter is not None:
        given["resample_filter"] = "binomial" if len(options.resample_filter) == 4 else "box"
    config = UNetConfig(
        variant="dhariwal" if not song else options.model_type,
        channels=options.model_channels,
        multipliers=options.channel_mult,
        blocks_per_level=options.num_blocks,
        attention_factors=factors,
        middle_attention=wide_enough[-1],
        stem_channels=options.model_channels if song else None,
        time_scale=1.0,
        dropout=options.dropout,
        **{key: value for key, value in given.items() if value is not None},
    )
    fourier = config.time_features == "fourier"
    rules = [*_embedding_rules(options, fourier), *_map_rules(options, config, sides)]
    constants = [
        Constant(f"{module}.resample_filter", _filter(config.resample_filter)) for module in _resampled(config, sides)
    ]
    unused = {"map_augment.weight": "augmentation labels"} if options.augment_dim else {}
    return Architecture(
        config,
        options.in_channels,
        options.out_channels,
        KeyMap(rules, constants, unused),
        num_classes=options.label_dim,
    )


def block_rules(ours: str, theirs: str, *, skip: bool = False, num_heads: int = 0) -> list[Rule]:
    """The rules of one `UNetBlock`.

    Args:
        ours, theirs: the modules' names, with their last dot, or empty.
        skip: whether there is a 1x1 convolution on the skip.
        num_heads: of its attention; 0: none.
    """
    rules = [
        *layer(f"{ours}norm1", f"{theirs}norm0"),
        *layer(f"{ours}conv1", f"{theirs}conv0"),
        *layer(f"{ours}modulation", f"{theirs}affine"),  # both [scale|shift]
        *layer(f"{ours}norm2", f"{theirs}norm1"),
        *layer(f"{ours}conv2", f"{theirs}conv1"),
    ]
    if skip:
        rules += layer(f"{ours}skip", f"{theirs}skip")
    if num_heads:
        names = {"norm": f"{theirs}norm2", "qkv": f"{theirs}qkv", "out": f"{theirs}proj"}
        rules += attention(f"{ours}attention", names, num_heads, "hcq", num_spatial=2)
    return rules


def _embedding_rules(options: EdmUNetOptions, fourier: bool) -> list[Rule]:
    song, classes = options.model_type != "adm", options.label_dim
    swap = {"forth": swap_halves, "back": lambda weight: (swap_halves(weight),)} if song else {}
    rules = [
        Rule("embedding.linear1.weight", ("map_layer0.weight",), **swap),
        Rule("embedding.linear1.bias", ("map_layer0.bias",)),
        *layer("embedding.linear2", "map_layer1"),
    ]
    if fourier:
        rules.append(Rule("embedding.frequencies", ("map_noise.freqs",)))
    if classes and song:  # W (sqrt(classes) one_hot) + b; without a label, b
        root = classes**0.5
        rules.append(
            Rule(
                "embedding.label.weight",
                ("map_label.weight", "map_label.bias"),
                forth=lambda w, b: swap_halves(torch.cat([w.T * root + b, b[None]])),
                back=lambda table: (_label_weight(swap_halves(table), root), swap_halves(table)[-1]),
            )
        )
    elif classes:  # W one_hot; without a label, 0
        rules.append(
            Rule(
                "embedding.label.weight",
                ("map_label.weight",),
                forth=lambda w: torch.cat([w.T, torch.zeros_like(w.T[:1])]),
                back=lambda table: (table[:-1].T,),
            )
        )
    return rules


def _label_weight(table: Tensor, root: float) -> Tensor:
    return ((table[:-1] - table[-1:]) / root).T


def swap_halves(x: Tensor) -> Tensor:
    """Reorder columns [sines|cosines], as in SongUNet's time features, to [cosines|sines]; its own inverse."""
    return torch.cat(x.chunk(2, dim=1)[::-1], dim=1)


def _map_rules(options: EdmUNetOptions, config: UNetConfig, sides: list[int]) -> list[Rule]:
    """Rules for everything but the embedding, in the order of the forward pass."""
    song, levels = options.model_type != "adm", len(sides)
    project = config.resample_skip_conv
    rules = layer("stem", f"enc.{sides[0]}x{sides[0]}_conv")
    width = config.stem_channels
    skips = [width]
    for level, side in enumerate(sides):
        theirs = f"enc.{side}x{side}"
        if level:
            rules += block_rules(f"encoder.{level}.resize.", f"{theirs}_down.", skip=project)
            skips.append(width)
            if config.input_on_every_level:
                rules += layer(f"encoder.{level}.input_branch.conv", f"{theirs}_aux_residual")
        for index in range(config.blocks_per_level):
            wanted = config.channels * config.multipliers[level]
            heads = config.heads(wanted) if 2**level in config.attention_factors else 0
            names = f"encoder.{level}.blocks.{index}.", f"{theirs}_block{index}."
            rules += block_rules(*names, skip=width != wanted, num_heads=heads)
            width = wanted
            skips.append(width)
    deepest = f"dec.{sides[-1]}x{sides[-1]}"
    heads = config.heads(width) if config.middle_attention else 0
    rules += block_rules("middle.0.", f"{deepest}_in0.", num_heads=heads)
    rules += block_rules("middle.1.", f"{deepest}_in1.")
    for stage, level in enumerate(reversed(range(levels))):
        theirs = f"dec.{sides[level]}x{sides[level]}"
        if stage:
            rules += block_rules(f"decoder.{stage - 1}.resize.", f"{theirs}_up.", skip=project)
        for index in range(config.blocks_per_level + 1):
            wanted = config.channels * config.multipliers[level]
            attends = 2**level in config.attention_factors and (not song or index == config.blocks_per_level)
            names = f"decoder.{stage}.blocks.{index}.", f"{theirs}_block{index}."
            heads = config.heads(wanted) if attends else 0
            rules += block_rules(*names, skip=width + skips.pop() != wanted, num_heads=heads)
            width = wanted
    top = f"dec.{sides[0]}x{sides[0]}_aux"
    rules += layer("out_norm", f"{top}_norm" if song else "out_norm")
    return [*rules, *layer("out_conv", f"{top}_conv" if song else "out_conv")]


def _resampled(config: UNetConfig, sides: list[int]) -> list[str]:
    """The foreign modules that store a copy of the resampling filter."""
    modules = []
    for side in sides[1:]:
        modules += [f"enc.{side}x{side}_down.conv0", f"enc.{side}x{side}_down.skip"]
        modules += [f"enc.{side}x{side}_aux_residual"] if config.input_on_every_level else []
    for side in sides[:-1]:
        modules += [f"dec.{side}x{side}_up.conv0", f"dec.{side}x{side}_up.skip"]
    return modules


def _filter(name: str) -> Tensor:
    row = torch.tensor([1.0, 1.0] if name == "box" else [1.0, 3.0, 3.0, 1.0])
    return (torch.outer(row, row) / row.sum() ** 2)[None, None]
