"""guided-diffusion's `UNetModel` (arXiv 2105.05233), which LFM builds with --use_origin_adm."""

from __future__ import annotations

import torch
from pydantic import Field, PositiveInt

from latentflow.convert.architecture import Architecture, PublishedOptions
from latentflow.convert.keymap import KeyMap, Rule
from latentflow.convert.rules import attention, layer
from latentflow.networks.unet import UNetConfig


class GuidedUNetOptions(PublishedOptions):
    """Arguments of `UNetModel` that shape the network."""

    in_channels: int = Field(gt=0, le=65_536)
    model_channels: int = Field(gt=0)
    out_channels: int = Field(gt=0, le=65_536)
    num_res_blocks: int = Field(gt=0)
    attention_resolutions: tuple[int, ...] = Field(
        description="downsampling factors; factors that no level has are ignored"
    )
    dropout: float = Field(0.0, ge=0, lt=1)
    channel_mult: tuple[PositiveInt, ...] = Field((1, 2, 4, 8), min_length=1, max_length=12)
    conv_resample: bool = True
    num_classes: int | None = Field(None, ge=0, le=1_000_000)
    num_heads: int = Field(1, gt=0)
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_new_attention_order: bool = False


def guided_unet(
    options: GuidedUNetOptions, *, inpainting: bool = False, num_map_classes: int = 0, channels: int | None = None
) -> Architecture:
    """A `UNetModel` as our `UNet`.

    Args:
        inpainting, num_map_classes: the meaning of the input channels after the latents.
        channels: latent channels; None: all input channels.
    """
    factors = {2**level for level in range(len(options.channel_mult))}
    by_channels = options.num_head_channels != -1
    config = UNetConfig(
        variant="adm",
        channels=options.model_channels,
        multipliers=options.channel_mult,
        blocks_per_level=options.num_res_blocks,
        attention_factors=[factor for factor in dict.fromkeys(options.attention_resolutions) if factor in factors],
        num_heads=None if by_channels else options.num_heads,
        head_channels=options.num_head_channels if by_channels else None,
        num_decoder_heads=None if by_channels or options.num_heads_upsample == -1 else options.num_heads_upsample,
        resample="block" if options.resblock_updown else "conv" if options.conv_resample else "plain",
        modulation="scale_shift" if options.use_scale_shift_norm else "shift",
        time_scale=1.0,
        dropout=options.dropout,
    )
    return Architecture(
        config,
        channels or options.in_channels,
        options.out_channels,
        KeyMap([*_rules(options, config), *([_map_encoder()] if num_map_classes else [])]),
        num_classes=options.num_classes or 0,
        inpainting=inpainting,
        num_map_classes=num_map_classes,
    )


def _rules(options: GuidedUNetOptions, config: UNetConfig) -> list[Rule]:
    levels, per_level = len(config.multipliers), config.blocks_per_level
    rules = [*layer("embedding.linear1", "time_embed.0"), *layer("embedding.linear2", "time_embed.2")]
    if options.num_classes:
        rules.append(_table())
    rules += layer("stem", "input_blocks.0.0")
    width, number = config.stem_channels, 1
    skips = [width]
    for level, multiplier in enumerate(config.multipliers):
        if level:
            rules += _resize(config, f"encoder.{level}.resize", f"input_blocks.{number}.0", "op")
            skips.append(width)
            number += 1
        for index in range(per_level):
            wanted = config.channels * multiplier
            ours, theirs = f"encoder.{level}.blocks.{index}", f"input_blocks.{number}"
            rules += _block(ours, f"{theirs}.0", skip=width != wanted)
            if 2**level in config.attention_factors:
                rules += _attention(f"{ours}.attention", f"{theirs}.1", config.heads(wanted), options)
            width = wanted
            skips.append(width)
            number += 1
    rules += _block("middle.0", "middle_block.0", skip=False)
    rules += _attention("middle.0.attention", "middle_block.1", config.heads(width), options)
    rules += _block("middle.1", "middle_block.2", skip=False)
    number = 0
    for stage, level in enumerate(reversed(range(levels))):
        wanted = config.channels * config.multipliers[level]
        for index in range(per_level + 1):
            ours, theirs = f"decoder.{stage}.blocks.{index}", f"output_blocks.{number}"
            rules += _block(ours, f"{theirs}.0", skip=width + skips.pop() != wanted)
            behind = 1
            if 2**level in config.attention_factors:
                heads = config.heads(wanted, decoder=True)
                rules += _attention(f"{ours}.attention", f"{theirs}.1", heads, options)
                behind = 2
            if level and index == per_level:
                rules += _resize(config, f"decoder.{stage}.resize", f"{theirs}.{behind}", "conv")
            width = wanted
            number += 1
    return [*rules, *layer("out_norm", "out.0"), *layer("out_conv", "out.2")]


def _table() -> Rule:
    """The published table has no null row; ours gets an untrained one of zeros."""
    return Rule(
        "embedding.label.weight",
        ("label_emb.weight",),
        forth=lambda table: torch.cat([table, torch.zeros_like(table[:1])]),
        back=lambda table: (table[:-1],),
    )


def _map_encoder() -> Rule:
    """The 1x1 convolution of LFM's `SpatialRescaler`; its downsampling is part of our data pipeline."""
    return Rule("spatial.map_encoder.mix.weight", ("cond_stage_model.channel_mapper.weight",))


def _block(ours: str, theirs: str, *, skip: bool) -> list[Rule]:
    rules = [
        *layer(f"{ours}.norm1", f"{theirs}.in_layers.0"),
        *layer(f"{ours}.conv1", f"{theirs}.in_layers.2"),
        *layer(f"{ours}.modulation", f"{theirs}.emb_layers.1"),  # both [scale|shift]
        *layer(f"{ours}.norm2", f"{theirs}.out_layers.0"),
        *layer(f"{ours}.conv2", f"{theirs}.out_layers.3"),
    ]
    return [*rules, *(layer(f"{ours}.skip", f"{theirs}.skip_connection") if skip else [])]


def _attention(ours: str, theirs: str, num_heads: int, options: GuidedUNetOptions) -> list[Rule]:
    names = {"norm": f"{theirs}.norm", "qkv": f"{theirs}.qkv", "out": f"{theirs}.proj_out"}
    order = "qhc" if options.use_new_attention_order else "hqc"
    return attention(ours, names, num_heads, order, num_spatial=1)


def _resize(config: UNetConfig, ours: str, theirs: str, conv: str) -> list[Rule]:
    if config.resample == "block":
        return _block(ours, theirs, skip=False)
    return layer(f"{ours}.conv", f"{theirs}.{conv}") if config.resample == "conv" else []
