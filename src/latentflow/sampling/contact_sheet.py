"""Contact sheets: many pictures as one, with what they show written beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from unicodedata import normalize

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from latentflow.artifacts import atomic_file
from latentflow.console import printable

_LEAST_SIDE = 64  # pixels of a picture under or beside a caption; smaller ones are shown enlarged
_TEXT, _LINE = 11, 15  # height of the letters and of a caption, in pixels


def image_grid(pixels: Tensor, columns: int, *, captions: Sequence[str] = (), gap: int = 2) -> Image.Image:
    """Lay [B, 3, S, S] uint8 pictures out in rows of `columns`, `gap` white pixels apart.

    Args:
        captions: what the pictures show, one each, or none. Where columns or rows show one thing each it is written
            once, above or at the left; else under every picture. Pictures below 64 pixels are then enlarged by a whole
            number.
    """
    num_images, _, height, width = pixels.shape
    columns = min(columns, num_images)
    if captions:
        scale = -(-_LEAST_SIDE // min(height, width)) if min(height, width) < _LEAST_SIDE else 1
        pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        height, width = height * scale, width * scale
    rows = -(-num_images // columns)
    of_columns = [list(dict.fromkeys(captions[column::columns])) for column in range(columns)] if captions else []
    of_rows = [
        list(dict.fromkeys(captions[row * columns : (row + 1) * columns])) for row in range(rows if captions else 0)
    ]
    above = captions and all(len(found) == 1 for found in of_columns)
    beside = captions and not above and all(len(found) == 1 for found in of_rows)
    under = _LINE if captions and not above and not beside else 0
    left = min(160, gap + max(_width(found[0]) for found in of_rows)) if beside else 0
    top = _LINE if above else 0
    size = (left + columns * (width + gap) - gap, top + rows * (height + under + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    write = ImageDraw.Draw(sheet)
    for number, picture in enumerate(pixels):
        x, y = left + number % columns * (width + gap), top + number // columns * (height + under + gap)
        sheet.paste(Image.fromarray(picture.permute(1, 2, 0).numpy()), (x, y))
        if under:
            _caption(write, (x, y + height), captions[number], width)
    for column in range(columns if above else 0):
        _caption(write, (column * (width + gap), 0), of_columns[column][0], width)
    for row in range(rows if beside else 0):
        _caption(write, (0, row * (height + gap) + (height - _LINE) // 2), of_rows[row][0], left - gap)
    return sheet


def save_grid(file: str | Path, pixels: Tensor, columns: int, *, captions: Sequence[str] = ()) -> Path:
    """Write a contact sheet as PNG, complete or not at all; see `image_grid`."""
    with atomic_file(file) as temporary:
        image_grid(pixels, columns, captions=captions).save(temporary)
    return Path(file)


def _caption(write: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, room: int) -> None:
    """One line of text, cut short where it does not fit in `room` pixels."""
    shown = _legible(text)
    while len(shown) > 1 and _width(shown) > room:
        shown = shown.removesuffix("…")[:-1] + "…"
    write.text((corner[0], corner[1] + 1), shown, fill="black", font=_font())


def _width(text: str) -> int:
    return int(_font().getlength(_legible(text))) + 1


def _legible(text: str) -> str:
    """`text` in letters that Pillow's own font has: others without their accents, or else as their codes."""
    return "".join(c if c.isascii() or _is_drawn(c) else _rewritten(c) for c in printable(normalize("NFC", text)))


def _rewritten(letter: str) -> str:
    plain = normalize("NFKD", letter).encode("ascii", "ignore").decode()
    return plain or f"\\u{ord(letter):04x}"


def _is_drawn(letter: str) -> bool:
    font = _font()
    return bytes(font.getmask(letter)) != bytes(font.getmask("\uffff")) and letter <= "\uffff"


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(_TEXT)
