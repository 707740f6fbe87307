"""A network that computes requests of one batch apart where the shape of the batch changes how sums are rounded.

On a CPU, libraries choose other methods for convolutions of another number of images, and for matrix products of very
few rows, such as one vector per image. Both are small parts of a transformer. Here they are computed for each request
by itself, in the very shapes that it would have alone; the large products, of all tokens, are computed together.

Legend: B images of a batch, of which each piece has some rows; a guided batch has 2 B: first B with the condition, then
B without.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from latentflow.model.flow_model import FlowModel


class _Rows:
    """Which rows of the batch that is being computed belong together."""

    def __init__(self) -> None:
        self.sizes: Sequence[int] = ()

    def apart(self, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """`compute` of the rows of each piece: [B, ...] or [2 B, ...] => the same rows."""
        total = sum(self.sizes)
        if len(self.sizes) < 2 or len(x) not in (total, 2 * total):
            return compute(x)
        if len(x) == total:
            return torch.cat([compute(part) for part in x.split(list(self.sizes))])
        given, null = (half.split(list(self.sizes)) for half in x.split(total))
        pairs = [compute(torch.cat(pair)).chunk(2) for pair in zip(given, null, strict=True)]
        return torch.cat([pair[side] for side in (0, 1) for pair in pairs])

    def vectors_apart(self, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """The same of one vector per image, [B, D]; equal pieces, such as one class at one time, are computed once."""
        found: dict[bytes, Tensor] = {}

        def once(part: Tensor) -> Tensor:
            key = part.numpy().tobytes()
            if key not in found:
                found[key] = compute(part)
            return found[key]

        return self.apart(x, once if x.dtype in (torch.float32, torch.float64) else compute)


class _ApartConv:
    """A convolution of each piece."""

    rows: _Rows

    def forward(self, x: Tensor) -> Tensor:
        return self.rows.apart(x, super().forward)  # type: ignore[misc]


class _ApartLinear:
    """A matrix product of each piece, of one vector per image; of tokens, [B, N, D], of all together."""

    rows: _Rows

    def forward(self, x: Tensor) -> Tensor:
        return self.rows.vectors_apart(x, super().forward) if x.dim() == 2 else super().forward(x)  # type: ignore[misc]


class PiecewiseModel:
    """A model that draws batches of several pieces; shares the weights of the one that it is made of.

    Attributes:
        flow: the model, for the batch whose `sizes` were set.
    """

    def __init__(self, model: FlowModel):
        self._rows = _Rows()
        self.flow = copy.copy(model)  # which does not hold the model itself, so that it can be forgotten
        self.flow.network = _apart(model.network, self._rows)
        self.flow.pixels = self._pixels  # type: ignore[method-assign]

    def of(self, sizes: Sequence[int]) -> FlowModel:
        """The model for a batch of pieces of so many images."""
        self._rows.sizes = tuple(sizes)
        return self.flow

    def _pixels(self, latents: Tensor) -> Tensor:
        sizes = self._rows.sizes
        if len(sizes) < 2 or sum(sizes) != len(latents):
            return self._decoded(latents)
        return torch.cat([self._decoded(part) for part in latents.split(list(sizes))])

    def _decoded(self, latents: Tensor) -> Tensor:
        return type(self.flow).pixels(self.flow, latents)


def _apart(network: nn.Module, rows: _Rows) -> nn.Module:
    """A copy of a network with the same weights, in other classes of layers."""
    shared: dict[int, Any] = {id(x): x for x in (*network.parameters(), *network.buffers())}
    copied = copy.deepcopy(network, shared)
    for module in copied.modules():
        kinds = {nn.Conv2d: _ApartConv, nn.Linear: _ApartLinear}
        for kind, apart in kinds.items():
            if isinstance(module, kind):
                module.rows = rows
                module.__class__ = type(f"Apart{type(module).__name__}", (apart, type(module)), {})
                break
    return copied
