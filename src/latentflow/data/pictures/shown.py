"""How images of any pixel format are shown, judged and compared.

| channels | shown as |
|---|---|
| 1 | gray |
| 2 | the first one, as gray |
| 3 | red, green and blue |
| 4 and more | the first three, as red, green and blue |

The range of the format, low to high, becomes black to white. Where the last channel is opacity, the others are shown on
white. Feature networks see what is shown.

Legend: B images, P channels, H and W height and width in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentflow.pixel_format import RGB, PixelFormat

_COLOURS = 3


def as_colours(pixels: Tensor) -> Tensor:
    """The three channels that are shown: [B, P, H, W] => [B, 3, H, W], a view."""
    return pixels[:, :_COLOURS] if pixels.shape[1] >= _COLOURS else pixels[:, :1].expand(-1, _COLOURS, -1, -1)


def as_shown(pixels: Tensor, pixel_format: PixelFormat) -> Tensor:
    """Stored values [B, P, H, W] => what is shown of them, [B, 3, H, W] uint8."""
    if pixel_format == RGB:
        return pixels
    unit = pixel_format.to_unit(pixels)
    if pixel_format.has_alpha:
        opacity = (unit[:, -1:] + 1) / 2
        unit = 1 - opacity * (1 - unit[:, :-1])  # on white, which is 1
    return RGB.from_unit(as_colours(unit))


def as_levels(pixels: Tensor, pixel_format: PixelFormat) -> Tensor:
    """Stored values [B, P, H, W] => float64 numbers of which 0 is the format's low and 255 its high, not rounded.

    Scores that are defined for 8 bits, such as PSNR and SSIM, then have the same meaning in any format.
    """
    low, high = (
        torch.tensor(values, dtype=torch.float64, device=pixels.device)[:, None, None]
        for values in (pixel_format.low, pixel_format.high)
    )
    return (pixels.double() - low) * 255 / (high - low)
