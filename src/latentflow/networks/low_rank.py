"""Low-rank adaptation (LoRA, arXiv 2106.09685): every matrix of a frozen network learns a difference of low rank.

    W' = W + strength * (alpha / rank) * B A        A of rank x in, B of out x rank; B = 0 at the start

The factors are sublayers of the layer that they adapt, so that the names of a network's own weights stay. The layer
computes W x + (alpha / rank) B (A x): the product B A is never made in training, neither are gradients of W, and what
is kept for the backward pass is that of an ordinary layer.

A layer that holds several matrices, such as queries, keys and values in one, gets one A and one B. The matrices share
the `rank` directions of the input that A reads, and each has its own rows of B. Of each matrix the difference has the
same rank as if it had factors of its own, for two thirds of the numbers (4 rank D in place of 6 for queries, keys and
values), one product with the input in place of three, and the file layout that peft has for such a layer.

Convolutions of the blocks are matrices of [out, in * height * width]: A is a convolution of the same window, B one of
1 x 1.

Legend: D channels.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from latentflow.networks.column_embedding import ColumnEmbedding
from latentflow.networks.lean import LowRankLinear
from latentflow.networks.spatial_encoder import SpatialInputs

FACTOR_A, FACTOR_B = "lora_A.weight", "lora_B.weight"
"""The ends of the names of the factors, as in peft; what stands before them is the name of the layer."""


class LowRankConv2d(nn.Conv2d):
    """A convolution of frozen weights, plus one of low rank.

    Args:
        layer: whose parameters it takes over; without groups.
        rank, scale: see `LowRankLinear`.
    """

    def __init__(self, layer: nn.Conv2d, rank: int, scale: float):
        window: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        bias, channels = layer.bias is not None, (layer.in_channels, layer.out_channels)
        size = (layer.kernel_size[0], layer.kernel_size[1])
        super().__init__(*channels, size, **window, bias=bias, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        place: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        self.scale = scale
        self.lora_A = nn.utils.skip_init(nn.Conv2d, channels[0], rank, size, **window, bias=False, **place)
        self.lora_B = nn.utils.skip_init(nn.Conv2d, rank, channels[1], 1, bias=False, **place)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(super().forward(x), self.lora_B(self.lora_A(x)), alpha=self.scale)


def add_low_rank(
    network: nn.Module, rank: int, *, alpha: float | None = None, seed: int = 0, also: Collection[str] = ()
) -> list[str]:
    """Give every matrix of a network factors, in place, and freeze everything else; returns the names of the layers.

    The network computes the same as before, bit for bit, until B is no longer zero.

    Args:
        network: a velocity network, wrapped or not; it has no factors yet.
        rank: of the factors.
        alpha: the scale of the differences is alpha / rank; None: `rank`, a scale of 1.
        seed: of A, whose entries are uniform in +-1 / sqrt(in), as those of a new linear layer of torch.
        also: names of parameters of the network that are trained as a whole, such as the vectors of new classes.

    Raises:
        ValueError: the network has factors already, or there is no parameter of a name in `also`.
    """
    if any(name.endswith(FACTOR_A) for name, _ in network.named_parameters()):
        raise ValueError("the network has low-rank factors already; merge them first")
    if unknown := sorted(set(also) - {name for name, _ in network.named_parameters()}):
        raise ValueError(f"the network has no parameter {unknown[0]!r}")
    layers = low_rank_layers(network)
    network.requires_grad_(False)
    for name in also:
        network.get_parameter(name).requires_grad_()
    scale = (rank if alpha is None else alpha) / rank
    generator = torch.Generator().manual_seed(seed)
    for name in layers:
        parent, _, child = name.rpartition(".")
        layer = network.get_submodule(name)
        adapted: LowRankLinear | LowRankConv2d
        if isinstance(layer, nn.Conv2d):
            adapted = LowRankConv2d(layer, rank, scale)
        else:
            assert isinstance(layer, nn.Linear)
            adapted = LowRankLinear(layer, rank, scale)
        _start(adapted, generator)
        setattr(network.get_submodule(parent), child, adapted.train(layer.training))
    return layers


@torch.no_grad()
def _start(layer: LowRankLinear | LowRankConv2d, generator: torch.Generator) -> None:
    """A of random numbers, the same on every device, and B of zeros."""
    a, b = layer.lora_A.weight, layer.lora_B.weight
    bound = 1 / math.sqrt(a[0].numel())
    if not a.is_meta:
        a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))
        b.zero_()


def low_rank_layers(network: nn.Module) -> list[str]:
    """The names of the layers that get factors: linear layers, and the convolutions of blocks.

    Not those of conditions other than the time: what is new in them is trained as a whole.
    """
    inside = [
        f"{name}."
        for name, module in network.named_modules()
        if isinstance(module, ColumnEmbedding | SpatialInputs)  # of conditions
    ]
    convolutions = {
        f"{name}.{child}".strip(".")
        for name, module in network.named_modules()
        for child in getattr(module, "hidden_matrices", {})
        if type(getattr(module, child)) is nn.Conv2d
    }
    return [
        name
        for name, module in network.named_modules()
        if (type(module) is nn.Linear or name in convolutions) and not any(name.startswith(one) for one in inside)
    ]


def low_rank_of(network: nn.Module) -> tuple[int, float] | None:
    """The rank and the scale, alpha / rank, of a network's factors; None: it has none."""
    found = (module for module in network.modules() if isinstance(module, LowRankLinear | LowRankConv2d))
    return next(((layer.lora_A.weight.shape[0], layer.scale) for layer in found), None)


def factors(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The name of each layer with factors, A and B, from weights by name."""
    for name, a in weights.items():
        if name.endswith(f".{FACTOR_A}"):
            layer = name.removesuffix(f".{FACTOR_A}")
            yield layer, a, weights[f"{layer}.{FACTOR_B}"]


def merge_low_rank(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The weights of an ordinary network that computes what one with factors does.

    Sums are in float64 on the CPU, and rounded once: they are the same wherever the network is, and W where B is zero
    or the scale is.

    Args:
        weights: by name, with factors.
        scale: strength * alpha / rank.
    """
    pairs = {f"{layer}.weight": (a, b) for layer, a, b in factors(weights)}
    others = {name: tensor for name, tensor in weights.items() if not name.endswith((FACTOR_A, FACTOR_B))}
    return {name: _merged(w, *pairs[name], scale) if name in pairs else w for name, w in others.items()}


def _merged(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale * B A, in the shape and dtype of W, on the CPU."""
    wide, a, b = (tensor.detach().cpu().double().flatten(1) for tensor in (w, a, b))
    return torch.addmm(wide, b, a, alpha=scale).view(w.shape).to(w.dtype)
