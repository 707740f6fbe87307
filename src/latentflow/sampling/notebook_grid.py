"""How drawn pictures show themselves in a notebook: as a grid with captions, in PNG and in HTML."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Sequence
from html import escape

from PIL import Image
from torch import Tensor

from latentflow.console import printable
from latentflow.sampling.contact_sheet import image_grid, sheet_columns
from latentflow.shapes import shrink
from latentflow.sizes import Size

MOST_SHOWN = 64
"""Pictures in a notebook; the file of a notebook holds them all."""
_MOST_SIDE = 512  # pixels of a picture that is shown; larger ones are shrunk
_LEAST_SIDE = 96  # pixels on the screen; smaller pictures are enlarged


def grid_png(shown: Tensor, captions: Sequence[str]) -> bytes:
    """One PNG of the first `MOST_SHOWN` pictures.

    Args:
        shown: [B, 3, H, W] uint8.
        captions: one each, or none.
    """
    pixels, captions = _small(shown[:MOST_SHOWN]), captions[:MOST_SHOWN]
    written = io.BytesIO()
    image_grid(pixels, sheet_columns(captions), captions=captions).save(written, format="PNG")
    return written.getvalue()


def grid_html(shown: Tensor, captions: Sequence[str], seeds: Sequence[str]) -> str:
    """The first `MOST_SHOWN` pictures as HTML that loads nothing; captions may hold any text.

    Args:
        shown: [B, 3, H, W] uint8.
        captions: one each, or none.
        seeds: a second line below each picture.
    """
    pixels = _small(shown[:MOST_SHOWN])
    width = max(pixels.shape[3], _LEAST_SIDE)
    lines = [(*captions[row : row + 1], seeds[row]) for row in range(len(pixels))]
    figures = [_figure(picture, width, texts) for picture, texts in zip(pixels, lines, strict=True)]
    more = len(shown) - len(pixels)
    note = f'<p style="margin:0">and {more:,} more</p>' if more else ""
    wide = f"max-width:{sheet_columns(captions[:MOST_SHOWN]) * (width + 8)}px"
    return f'<div style="display:flex;flex-wrap:wrap;gap:8px;{wide}">{"".join(figures)}</div>{note}'


def _figure(picture: Tensor, width: int, texts: Sequence[str]) -> str:
    written = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(written, format="PNG")
    lines = [escape(printable(text)) for text in texts if text]
    style = f"width:{width}px;max-width:100%" + (";image-rendering:pixelated" if picture.shape[2] < width else "")
    source = f"data:image/png;base64,{b64encode(written.getvalue()).decode()}"
    image = f'<img alt="{", ".join(lines)}" style="{style}" src="{source}">'
    words = f"font-size:12px;max-width:{width}px;overflow-wrap:anywhere"
    return f'<figure style="margin:0">{image}<figcaption style="{words}">{"<br>".join(lines)}</figcaption></figure>'


def _small(pixels: Tensor) -> Tensor:
    """The pictures, shrunk where a side is longer than `_MOST_SIDE`."""
    height, width = pixels.shape[2:]
    if max(height, width) <= _MOST_SIDE:
        return pixels
    scale = _MOST_SIDE / max(height, width)
    size = Size(max(1, round(height * scale)), max(1, round(width * scale)))
    return shrink(pixels.float(), size).round().clamp(0, 255).byte()
