"""A small residual network that turns pictures into features, to compare sets of images by.

Legend: B images, H and W height and width of the images in pixels, S side that the network reads, D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from latentflow.records import Record

_GROUP = 8  # channels; of every group normalisation
_SLICE = 64  # images at a time, when features are taken


class FeatureNetworkConfig(Record):
    """The sizes of a feature network."""

    side: int = Field(32, ge=16, le=512, description="Images are resized to this side in pixels, S.")
    widths: tuple[Annotated[int, Field(ge=_GROUP, le=2048, multiple_of=_GROUP)], ...] = Field(
        (64, 128, 256), min_length=1, max_length=6, description="Channels of each level; the first has half the side."
    )

    @property
    def dim(self) -> int:
        """D: the mean of every channel of every level."""
        return sum(self.widths)

    @property
    def multiply_adds(self) -> int:
        """Multiplications with an addition for one image, in convolutions: one into each level, two in its block."""
        area, total, before, taps = (self.side // 2) ** 2, 0, 3, 16
        for width in self.widths:
            total += area * width * (taps * before + 2 * 9 * width)
            area, before, taps = area // 4, width, 9
        return total


class _Block(nn.Module):
    """x + convolution(relu(norm(convolution(relu(norm(x)))))): a residual block with pre-activation, arXiv 1603.05027.

    Groups of channels are normalised (arXiv 1803.08494), so that no image depends on the others of its batch.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(width // _GROUP, width) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        nn.init.zeros_(self.conv2.weight)  # the block is the identity at first

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] => [B, C, h, w]."""
        x_in = x
        x = self.conv1(F.relu(self.norm1(x)))
        return x_in + self.conv2(F.relu(self.norm2(x)))


class FeatureNetwork(nn.Module):
    """Levels of a strided convolution and a residual block, each at half the side of the one before."""

    rule = "bilinear with antialias, [-1, 1]; mean over space of each channel of each level"

    def __init__(self, config: FeatureNetworkConfig):
        super().__init__()
        self.config = config
        first, *others = config.widths
        self.down = nn.ModuleList([nn.Conv2d(3, first, 4, stride=2, padding=1)])
        for before, width in zip(config.widths, others, strict=False):
            self.down.append(nn.Conv2d(before, width, 3, stride=2, padding=1))
        self.blocks = nn.ModuleList(_Block(width) for width in config.widths)
        self.norms = nn.ModuleList(nn.GroupNorm(width // _GROUP, width, affine=False) for width in config.widths)

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] of any size => the input of the network: [B, 3, S, S] float32 in [-1, 1]."""
        x = images.float()
        size = (self.config.side, self.config.side)
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
        return (x / 127.5 - 1).contiguous(memory_format=torch.channels_last)

    def maps(self, pixels: Tensor) -> Iterator[Tensor]:
        """Pixels [B, 3, H, W] in [-1, 1] => the features of each level at their places, [B, width, h, w] >= 0."""
        x = pixels
        for down, block, norm in zip(self.down, self.blocks, self.norms, strict=True):
            x = block(down(x))
            yield F.relu(norm(x))

    def levels(self, pixels: Tensor) -> list[Tensor]:
        """Prepared pixels [B, 3, S, S] => for each level the mean over space of its channels, [B, width] float32."""
        return [features.float().mean((2, 3)) for features in self.maps(pixels)]

    def forward(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] of any size => features [B, D] float32."""
        parts = images.split(_SLICE)
        return torch.cat([torch.cat(self.levels(self.prepare(part)), 1) for part in parts])
