"""A small network that tells patches of reconstructions from patches of images (arXiv 1611.07004, section 3.2.2).

Legend: B images, P channels of the pixels, S side, s = S / 2^levels side of the map of verdicts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from latentflow.networks.in_training import InTraining

_GROUP = 8  # channels; of every group normalisation
_SLOPE = 0.2


class PatchDiscriminator(nn.Module):
    """Strided convolutions, each to half the side and twice the width; every verdict sees one patch.

    Groups of channels are normalised, so that no verdict depends on the other images of a batch.

    Args:
        channels: P.
        width: channels of the first level, a multiple of 8.
        levels: strided convolutions; with 3, a verdict sees a patch of 38 pixels.
    """

    def __init__(self, channels: int, width: int, levels: int):
        super().__init__()
        widths = [width * 2**level for level in range(levels)]
        self.down = nn.ModuleList(
            nn.Conv2d(before, after, 4, stride=2, padding=1)
            for before, after in zip([channels, *widths], widths, strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(after // _GROUP, after) for after in widths[1:])
        self.verdict = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, P, S, S] in [-1, 1] => [B, 1, s, s], high where a patch looks like one of an image."""
        first, *others = self.down
        x = F.leaky_relu(first(pixels), _SLOPE)
        for down, norm in zip(others, self.norms, strict=True):
            x = F.leaky_relu(norm(down(x)), _SLOPE)
        return self.verdict(x)

    def frozen(self, pixels: Tensor) -> Tensor:
        """`forward`, whose gradient reaches the pixels and not the weights."""
        weights: Mapping[str, Tensor] = {name: weight.detach() for name, weight in self.named_parameters()}
        return functional_call(self, dict(weights), (pixels,))


class JudgedAutoencoder(InTraining):
    """An autoencoder in training, with the discriminator that it is to deceive."""

    def __init__(self, network: nn.Module, discriminator: PatchDiscriminator):
        super().__init__()
        self.network = network
        self.discriminator = discriminator
