"""Rules that the key maps of several published networks share."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from latentflow.convert.keymap import Rule


def layer(ours: str, theirs: str) -> list[Rule]:
    """Rules for the weight and the bias of a layer that is the same in both networks."""
    return [Rule(f"{ours}.{part}", (f"{theirs}.{part}",)) for part in ("weight", "bias")]


def attention(ours: str, theirs: dict[str, str], num_heads: int, order: str, num_spatial: int) -> list[Rule]:
    """Rules for the norm, the queries, keys and values, and the output of attention on feature maps.

    Args:
        ours: our `MapAttention`.
        theirs: names of its "norm", "qkv" and "out".
        order: layout of the rows of qkv in the foreign file: "qhc" (ours: `[q|k|v][head][channel]`), "hqc"
            (`[head][q|k|v][channel]`) or "hcq" (`[head][channel][q|k|v]`).
        num_spatial: trailing dimensions of size 1, where the foreign layers are 1x1 convolutions.
    """
    forth, back = partial(to_qhc, num_heads=num_heads, order=order), partial(from_qhc, num_heads=num_heads, order=order)
    pad = (1,) * num_spatial
    return [
        *layer(f"{ours}.norm", theirs["norm"]),
        Rule(
            f"{ours}.attention.qkv.weight",
            (f"{theirs['qkv']}.weight",),
            forth=lambda weight: forth(weight.flatten(1)),
            back=lambda weight: (back(weight).reshape(*weight.shape, *pad),),
        ),
        Rule(f"{ours}.attention.qkv.bias", (f"{theirs['qkv']}.bias",), forth=forth, back=lambda bias: (back(bias),)),
        Rule(
            f"{ours}.attention.out.weight",
            (f"{theirs['out']}.weight",),
            forth=lambda weight: weight.flatten(1),
            back=lambda weight: (weight.reshape(*weight.shape, *pad),),
        ),
        Rule(f"{ours}.attention.out.bias", (f"{theirs['out']}.bias",)),
    ]


def to_qhc(rows: Tensor, num_heads: int, order: str) -> Tensor:
    """Reorder the rows of qkv [3 * D, ...] from a foreign order to ours."""
    if order == "hqc":
        return rows.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    if order == "hcq":
        return rows.unflatten(0, (num_heads, -1, 3)).movedim(2, 0).flatten(0, 2)
    return rows


def from_qhc(rows: Tensor, num_heads: int, order: str) -> Tensor:
    """The inverse of `to_qhc`."""
    if order == "hqc":
        return rows.unflatten(0, (3, num_heads, -1)).transpose(0, 1).flatten(0, 2)
    if order == "hcq":
        return rows.unflatten(0, (3, num_heads, -1)).movedim(0, 2).flatten(0, 2)
    return rows
