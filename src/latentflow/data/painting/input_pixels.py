"""Paired inputs as pixels and at latent size.

Legend: B images, H and W image height and width, N shrinking of the input, c channels of the input, C latent channels,
h and w latent height and width, u = max(factor / N, 1) pixels of the input along a latent pixel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latentflow.data.painting.input_rules import GRAY, InputRules
from latentflow.errors import ConfigError
from latentflow.pixel_format import PixelFormat

_LUMA = (19595, 38470, 7471)  # 0.299, 0.587 and 0.114 of 2^16


def derived_format(rules: InputRules, images: PixelFormat) -> PixelFormat:
    """The format of inputs that are made from images.

    Raises:
        ConfigError: gray needs images in RGB.
    """
    if rules.origin != GRAY:
        return images
    if images.mode != "rgb" or len(set(images.low)) > 1 or len(set(images.high)) > 1:
        raise ConfigError(f"inputs gray: the images are {images.title}, not RGB with one range; leave it out")
    return PixelFormat(channels=1, mode="gray", dtype=images.dtype, low=images.low[:1], high=images.high[:1])


def derived_inputs(pixels: Tensor, rules: InputRules) -> Tensor:
    """The inputs that are made from images: [B, C, H, W] => [B, c, H / N, W / N], both stored values of one dtype.

    Integers are rounded to the nearest, halves up; brightness is that of ITU-R BT.601, as Pillow rounds it.
    """
    if rules.origin == GRAY and pixels.is_floating_point():
        return (pixels * (_luma(pixels) / (1 << 16))).sum(1, keepdim=True)
    if rules.origin == GRAY:
        return ((pixels.long() * _luma(pixels)).sum(1, keepdim=True) + (1 << 15) >> 16).to(pixels.dtype)
    means = F.avg_pool2d(pixels.float(), rules.shrinking)
    return means if pixels.is_floating_point() else (means + 0.5).floor().to(pixels.dtype)


def _luma(pixels: Tensor) -> Tensor:
    return torch.tensor(_LUMA, device=pixels.device)[:, None, None]


def at_latent_size(inputs: Tensor, factor: int, shrinking: int) -> Tensor:
    """The pixels below each latent pixel as its channels: [B, c, H / N, W / N] => [B, c u^2, h, w].

    Divided by u, so that the values of one latent pixel together have the norm of c values. Where a pixel of the input
    covers several latent pixels (N above the factor), each of them gets its value.
    """
    if shrinking > factor:
        repeated = shrinking // factor
        return inputs.repeat_interleave(repeated, -1).repeat_interleave(repeated, -2)
    per_side = factor // shrinking
    return F.pixel_unshuffle(inputs, per_side) / per_side


def at_image_size(inputs: Tensor, shrinking: int, channels: int) -> Tensor:
    """The input as an image of `channels` channels: [B, c, H / N, W / N] => [B, C, H, W].

    Enlarged by bicubic interpolation, and gray repeated. Values are in [-1, 1].
    """
    if shrinking > 1:
        inputs = F.interpolate(
            inputs, scale_factor=shrinking, mode="bicubic", align_corners=False, antialias=True
        ).clamp(-1, 1)
    return inputs.expand(-1, channels, -1, -1) if inputs.shape[1] == 1 else inputs


def stack_inputs(inputs: Sequence[np.ndarray], pixel_format: PixelFormat) -> Tensor:
    """Inputs [H, W, c] in stored values => [n, c, H, W]: uint8 unchanged, all others as float32 in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(inputs)).permute(0, 3, 1, 2).contiguous()
    return stacked if stacked.dtype == torch.uint8 else pixel_format.to_unit(stacked)


def unit_inputs(inputs: Tensor, pixel_format: PixelFormat) -> Tensor:
    """Inputs as `stack_inputs` gives them, or a cache, [B, c, H, W] => float32 in [-1, 1]."""
    return pixel_format.to_unit(inputs) if inputs.dtype == torch.uint8 else inputs.float()
