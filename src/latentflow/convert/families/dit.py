"""Diffusion transformers of DiT, SiT and LFM: one architecture, three conventions.

    family   output                             time            table of labels
    lfm      velocity                           1 = noise       a null row only if labels were dropped
    sit      velocity in the other direction    0 = noise       with a null row
    dit      noise and its variance             step 0 to 999   with a null row

The output of every family may have an unused second half (learn_sigma). All differences go into the weights: reversing
time rotates the sinusoids by a fixed angle, and a sign or an unused half belongs to the last layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from latentflow.convert.architecture import Architecture, PublishedOptions
from latentflow.convert.keymap import Constant, KeyMap, Rule
from latentflow.convert.rules import layer
from latentflow.errors import ConfigError
from latentflow.networks.dit import DiTConfig
from latentflow.networks.layers import sincos_positions

Family = Literal["lfm", "sit", "dit"]
_MOST_POSITIONS = 2**27  # one gigabyte in double precision


class DiTOptions(PublishedOptions):
    """Arguments of the published classes; where LFM's name differs from that of DiT and SiT, both are accepted."""

    input_size: int = Field(32, gt=0, le=512, alias="img_resolution", description="height and width of the latents")
    patch_size: int = Field(2, gt=0, le=256)
    in_channels: int = Field(4, gt=0, le=65_536)
    hidden_size: int = Field(gt=0, le=65_536)
    depth: int = Field(gt=0, le=512)
    num_heads: int = Field(gt=0, le=4096)
    mlp_ratio: float = Field(4.0, gt=0, le=64)
    class_dropout_prob: float = Field(0.1, ge=0, lt=1, alias="label_dropout")
    num_classes: int = Field(1000, gt=0, le=1_000_000)
    learn_sigma: bool | None = Field(
        None, description="twice as many output channels; by default true for DiT and SiT, false for LFM"
    )


def dit(options: DiTOptions, family: Family) -> Architecture:
    """A published transformer as our `DiT`; the second half of a doubled output is dropped.

    Raises:
        ConfigError: more positions than any published network has.
    """
    doubled = family != "lfm" if options.learn_sigma is None else options.learn_sigma
    has_null = options.class_dropout_prob > 0 or family != "lfm"
    constant_label = options.num_classes == 1 and not has_null
    config = DiTConfig(
        depth=options.depth,
        hidden_size=options.hidden_size,
        num_heads=options.num_heads,
        patch_size=options.patch_size,
        mlp_ratio=options.mlp_ratio,
        time_scale=1.0,
    )
    rules = [*layer("patch_embedding", "x_embedder.proj"), *_time_rules(family, constant_label)]
    if not constant_label:
        rules.append(_table(has_null))
    for index in range(options.depth):
        ours, theirs = f"blocks.{index}", f"blocks.{index}"
        rules += layer(f"{ours}.modulation", f"{theirs}.adaLN_modulation.1")
        rules += layer(f"{ours}.attention.qkv", f"{theirs}.attn.qkv")  # both [q|k|v][head][channel]
        rules += layer(f"{ours}.attention.out", f"{theirs}.attn.proj")
        rules += layer(f"{ours}.mlp.up", f"{theirs}.mlp.fc1")
        rules += layer(f"{ours}.mlp.down", f"{theirs}.mlp.fc2")
    rules += layer("final_modulation", "final_layer.adaLN_modulation.1")
    last = _LastLayer(options.in_channels, drops=doubled, sign=-1 if family == "sit" else 1)
    rules += [
        Rule(f"final_linear.{part}", (f"final_layer.linear.{part}",), last.forth, last.back, not last.drops)
        for part in ("weight", "bias")
    ]
    side = options.input_size // options.patch_size
    if side * side * options.hidden_size > _MOST_POSITIONS:
        raise ConfigError(
            f"input_size {options.input_size}: {side} x {side} tokens of {options.hidden_size} channels are more than "
            "any published network has"
        )
    positions = Constant("pos_embed", sincos_positions(side, side, options.hidden_size)[None])
    return Architecture(
        config,
        options.in_channels,
        options.in_channels,
        keys=KeyMap(rules, [positions]),
        num_classes=0 if constant_label else options.num_classes,
    )


def learns_sigma(weights: Mapping[str, Tensor]) -> bool | None:
    """Whether a published transformer has twice as many output as input channels, by the shapes of its weights.

    None if the weights are not those of such a transformer.
    """
    first, last = weights.get("x_embedder.proj.weight"), weights.get("final_layer.linear.weight")
    if first is None or last is None or first.dim() != 4:
        return None
    return last.shape[0] == 2 * first[0].numel()  # patch x patch x channels of the input


def _time_rules(family: Family, constant_label: bool) -> list[Rule]:
    ours, theirs = "time_embedding.mlp", "t_embedder.mlp"
    turn = {"forth": turn_time, "back": lambda weight: (turn_time(weight),)} if family == "sit" else {}
    rules = [
        Rule(f"{ours}.0.weight", (f"{theirs}.0.weight",), **turn),
        Rule(f"{ours}.0.bias", (f"{theirs}.0.bias",)),
        Rule(f"{ours}.2.weight", (f"{theirs}.2.weight",)),
    ]
    if not constant_label:
        return [*rules, Rule(f"{ours}.2.bias", (f"{theirs}.2.bias",))]
    # A table of one row is a constant, which is added to the bias.
    return [
        *rules,
        Rule(
            f"{ours}.2.bias",
            (f"{theirs}.2.bias", "y_embedder.embedding_table.weight"),
            forth=lambda bias, row: bias + row[0],
            back=lambda bias: (bias, torch.zeros_like(bias)[None]),
            exact_back=False,
        ),
    ]


def turn_time(weight: Tensor) -> Tensor:
    """Weights [D, 256] on the sinusoids of t that equal `weight` on the sinusoids of 1 - t; its own inverse.

    With cosines first: cos(w (1 - t)) = cos w cos wt + sin w sin wt, and sin(w (1 - t)) = sin w cos wt - cos w sin wt.
    """
    half = weight.shape[1] // 2
    exponents = torch.arange(half, dtype=torch.float64, device=weight.device) / half
    frequencies = torch.exp(-math.log(10_000.0) * exponents)
    cosine, sine = frequencies.cos().to(weight.dtype), frequencies.sin().to(weight.dtype)
    on_cosines, on_sines = weight[:, :half], weight[:, half:]
    return torch.cat([on_cosines * cosine + on_sines * sine, on_cosines * sine - on_sines * cosine], dim=1)


def _table(has_null: bool) -> Rule:
    theirs = ("y_embedder.embedding_table.weight",)
    if has_null:
        return Rule("label_embedding.weight", theirs)
    # Without a label the published network takes the last row, which is a class here.
    return Rule(
        "label_embedding.weight",
        theirs,
        forth=lambda table: torch.cat([table, table[-1:]]),
        back=lambda table: (table[:-1],),
    )


class _LastLayer:
    """The rows of the last layer, [row in patch][column in patch][channel], without the unused half of the channels."""

    def __init__(self, channels: int, *, drops: bool, sign: int):
        self.channels, self.drops, self.sign = channels, drops, sign

    def forth(self, theirs: Tensor) -> Tensor:
        kept = theirs.unflatten(0, (-1, 2 * self.channels))[:, : self.channels].flatten(0, 1) if self.drops else theirs
        return self.sign * kept

    def back(self, ours: Tensor) -> tuple[Tensor, ...]:
        ours = self.sign * ours
        if not self.drops:
            return (ours,)
        rows = ours.unflatten(0, (-1, self.channels))
        return (torch.cat([rows, torch.zeros_like(rows)], dim=1).flatten(0, 1),)
