"""How images of any number of channels are shown and judged: as three colours.

Legend: B images, P channels, H and W height and width in pixels.
"""

from __future__ import annotations

from torch import Tensor

_COLOURS = 3


def as_colours(pixels: Tensor) -> Tensor:
    """The first three channels; of fewer, the first one as gray: [B, P, H, W] => [B, 3, H, W], a view."""
    return pixels[:, :_COLOURS] if pixels.shape[1] >= _COLOURS else pixels[:, :1].expand(-1, _COLOURS, -1, -1)
