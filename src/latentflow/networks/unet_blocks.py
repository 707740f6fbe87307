"""Blocks of the U-Net: norms, attention on feature maps, residual blocks, and changes of resolution.

Legend: B images, D channels, E channels of the embedding of time and label, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentflow.errors import ConfigError
from latentflow.networks.layers import SelfAttention, kept_table


def binomial_filter(device: torch.device | str = "cpu") -> Tensor:
    """The four taps 1 3 3 1, of sum 1, that smooth before every second pixel is taken: [4, 4] float32."""
    place = torch.arange(4.0, device=device)
    row = (1 + place * (3 - place)) / 8  # arithmetic of the device: nothing is copied to it
    return torch.outer(row, row)


def halve(x: Tensor, resample_filter: str, padding: int = 1) -> Tensor:
    """[B, D, H, W] => [B, D, H / 2, W / 2]: means of 2 x 2 ("box"), or the binomial filter over 4 x 4.

    Args:
        padding: zeros around `x` for the binomial filter.
    """
    if resample_filter == "box":
        return F.avg_pool2d(x, 2)
    return F.conv2d(x, _taps(x), stride=2, padding=padding, groups=x.shape[1])


def double(x: Tensor, resample_filter: str) -> Tensor:
    """[B, D, H, W] => [B, D, 2H, 2W]: every pixel repeated ("box"), or interpolated by the binomial filter."""
    if resample_filter == "box":
        return F.interpolate(x, scale_factor=2, mode="nearest")
    return F.conv_transpose2d(x, 4 * _taps(x), stride=2, padding=1, groups=x.shape[1])


def _taps(x: Tensor) -> Tensor:
    return kept_table(binomial_filter, x.device).to(x.dtype).expand(x.shape[1], 1, 4, 4)


def group_norm(channels: int, *, groups: int, group_channels: int, eps: float) -> nn.GroupNorm:
    """A norm over `groups` groups, fewer where a group would have less than `group_channels` channels.

    Raises:
        ConfigError: the groups do not divide the channels.
    """
    groups = max(1, min(groups, channels // group_channels))
    if channels % groups:
        raise ConfigError(
            f"network: {channels} channels cannot be normalised in {groups} groups; choose network.channels as a "
            "multiple of network.norm_groups, or fewer groups"
        )
    return nn.GroupNorm(groups, channels, eps=eps)


class MapAttention(nn.Module):
    """Self-attention over the pixels of a feature map, added to it. [B, D, H, W] => [B, D, H, W].

    Args:
        norm: of D channels.
        num_heads: a divisor of D.
        residual_scale: factor of the sum.
    """

    def __init__(self, norm: nn.GroupNorm, num_heads: int, residual_scale: float):
        super().__init__()
        self.norm = norm
        self.attention = SelfAttention(norm.num_channels, num_heads)
        self.residual_scale = residual_scale

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, D, H, W] => [B, H * W, D]
        attended = self.attention(tokens).transpose(1, 2).unflatten(2, x.shape[2:])
        return (x + attended) * self.residual_scale


class Downsample(nn.Module):
    """[B, D, H, W] => [B, D, H / 2, W / 2], by a strided convolution or by means of 2 x 2."""

    hidden_matrices: ClassVar[Mapping[str, int]] = {"conv": 1}

    def __init__(self, channels: int, *, learned: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if learned else None

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return halve(x, "box") if self.conv is None else self.conv(x)


class Upsample(nn.Module):
    """[B, D, H, W] => [B, D, 2H, 2W]: pixels repeated, and a convolution after it if `learned`."""

    hidden_matrices: ClassVar[Mapping[str, int]] = {"conv": 1}

    def __init__(self, channels: int, *, learned: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if learned else None

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = double(x, "box")
        return x if self.conv is None else self.conv(x)


class InputBranch(nn.Module):
    """The network's input, or its branch on the level before, at half the resolution. [B, D_in, H, W] => [B, D, ...]

    It brings the input to every level (the "residual" encoder of arXiv 2011.13456).
    """

    def __init__(self, in_channels: int, channels: int, resample_filter: str):
        super().__init__()
        self.resample_filter = resample_filter
        # The convolution comes first, so its border is wide enough for the filter that follows.
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1 if resample_filter == "box" else 2)

    def forward(self, x: Tensor) -> Tensor:
        return halve(self.conv(x), self.resample_filter, padding=0)


@dataclass(frozen=True)
class BlockOptions:
    """What all residual blocks of a U-Net share.

    Attributes:
        embedding_channels: E.
        modulation: "scale_shift" or "shift".
        resample_filter: "box" or "binomial".
        skip_conv: a 1x1 convolution on the skip of every block that changes the resolution.
        residual_scale: factor of every sum.
        dropout: rate.
    """

    embedding_channels: int
    modulation: str = "scale_shift"
    resample_filter: str = "box"
    skip_conv: bool = False
    residual_scale: float = 1.0
    dropout: float = 0.0


class ResidualBlock(nn.Module):
    """Two convolutions with a skip connection, modulated by the embedding of time and label; then attention, if any.

        h = conv1(silu(norm1(x)));  h = conv2(dropout(silu(norm2(h) * (1 + scale) + shift)));  (skip(x) + h) * gain

    With modulation "shift" it is silu(norm2(h + shift)). A block that changes the resolution does so after its first
    activation and on its skip.

    Args:
        norm1, norm2: of `in_channels` and of `out_channels` channels.
        options: shared by all blocks; the gain is `residual_scale`.
        attention: applied after the sum; None: no attention.
        resize: "halve", "double" or None.
    """

    hidden_matrices: ClassVar[Mapping[str, int]] = {"conv1": 1, "conv2": 1, "skip": 1}

    def __init__(
        self,
        norm1: nn.GroupNorm,
        norm2: nn.GroupNorm,
        options: BlockOptions,
        *,
        attention: MapAttention | None = None,
        resize: str | None = None,
    ):
        super().__init__()
        in_channels, out_channels = norm1.num_channels, norm2.num_channels
        self.scales = options.modulation == "scale_shift"
        self.resize = resize
        self.resample_filter = options.resample_filter
        self.residual_scale = options.residual_scale
        self.norm1 = norm1
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(options.embedding_channels, (2 if self.scales else 1) * out_channels)
        self.norm2 = norm2
        self.dropout = nn.Dropout(options.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        has_conv = in_channels != out_channels or (options.skip_conv and resize is not None)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if has_conv else None
        self.attention = attention

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x [B, D_in, H, W] and c = silu(embedding) [B, E] => [B, D_out, H', W']."""
        h = self.conv1(self._resized(F.silu(self.norm1(x))))
        modulation = self.modulation(c)[:, :, None, None].to(h.dtype)
        if self.scales:
            scale, shift = modulation.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + modulation)
        h = self.conv2(self.dropout(F.silu(h)))
        x = self._resized(x)
        x = (h + (x if self.skip is None else self.skip(x))) * self.residual_scale
        return x if self.attention is None else self.attention(x)

    def _resized(self, x: Tensor) -> Tensor:
        if self.resize is None:
            return x
        return (halve if self.resize == "halve" else double)(x, self.resample_filter)
