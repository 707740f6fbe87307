"""Contact sheets: many pictures as one, with captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from unicodedata import normalize

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from latentflow.artifacts import atomic_file
from latentflow.console import printable
from latentflow.sizes import Size

_GAP = 2  # white pixels between pictures
_LEAST_SIDE = 64  # pixels of a picture that has a caption; smaller ones are enlarged
_TEXT, _LINE = 11, 15  # height of the letters and of a caption, in pixels
_MOST_LEFT = 160  # pixels for the captions of rows


def image_grid(pixels: Tensor, columns: int, *, captions: Sequence[str] = ()) -> Image.Image:
    """Lay [B, 3, S, S] uint8 pictures out in rows of `columns`, two white pixels apart.

    Args:
        captions: what the pictures show, one each, or none. Where all pictures of each column or of each row share
            theirs, it is written once, above or on the left; otherwise below every picture. Pictures of less than 64
            pixels are then enlarged by a whole number.
    """
    if captions and min(pixels.shape[2:]) < _LEAST_SIDE:
        scale = -(-_LEAST_SIDE // min(pixels.shape[2:]))
        pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    layout = _Layout(len(pixels), columns, pixels.shape[3], pixels.shape[2], captions)
    sheet = Image.new("RGB", layout.size, "white")
    for number, picture in enumerate(pixels):
        sheet.paste(Image.fromarray(picture.permute(1, 2, 0).numpy()), layout.corner(number))
    write = ImageDraw.Draw(sheet)
    for text, corner, room in layout.captions():
        _caption(write, corner, text, room)
    return sheet


def sheet_columns(captions: Sequence[str], most: int = 12) -> int:
    """One column per caption if they cycle through few of them, else 8."""
    period = len(dict.fromkeys(captions))
    cycles = period and all(caption == captions[place % period] for place, caption in enumerate(captions))
    return period if cycles and 1 < period <= most else 8


class _Layout:
    """Where the pictures and captions of a sheet are, in pixels.

    Attributes:
        above, left, below: the captions of the columns, of the rows, or of all pictures; at most one is not empty.
    """

    def __init__(self, num: int, columns: int, width: int, height: int, captions: Sequence[str]):
        self.columns, self.width, self.height = min(columns, num), width, height
        self.rows = -(-num // self.columns)
        by_row = [captions[row * self.columns : (row + 1) * self.columns] for row in range(self.rows)]
        self.above = _shared([captions[column :: self.columns] for column in range(self.columns)])
        self.left = [] if self.above else _shared(by_row)
        self.below = [] if self.above or self.left else list(captions)
        self.margin_left = min(_MOST_LEFT, _GAP + max(map(_width, self.left))) if self.left else 0
        self.margin_top = _LINE if self.above else 0
        self.step_x, self.step_y = width + _GAP, height + (_LINE if self.below else 0) + _GAP

    @property
    def size(self) -> tuple[int, int]:
        """The width and height of the sheet."""
        width, height = self.columns * self.step_x - _GAP, self.rows * self.step_y - _GAP
        return self.margin_left + width, self.margin_top + height

    def corner(self, number: int) -> tuple[int, int]:
        """The upper left corner of a picture."""
        row, column = divmod(number, self.columns)
        return self.margin_left + column * self.step_x, self.margin_top + row * self.step_y

    def captions(self) -> Iterator[tuple[str, tuple[int, int], int]]:
        """Each caption, its upper left corner, and the width that it may take."""
        for column, text in enumerate(self.above):
            yield text, (column * self.step_x, 0), self.width
        for row, text in enumerate(self.left):
            yield text, (0, row * self.step_y + (self.height - _LINE) // 2), self.margin_left - _GAP
        for number, text in enumerate(self.below):
            x, y = self.corner(number)
            yield text, (x, y + self.height), self.width


def _shared(groups: Sequence[Sequence[str]]) -> list[str]:
    """The one caption of each group; empty if a group has none or several."""
    return [group[0] for group in groups] if all(len(set(group)) == 1 for group in groups) else []


def on_white(pixels: Tensor, size: Size) -> Tensor:
    """Pictures [B, C, H, W] uint8 in the middle of white ones of a larger size."""
    sheet = torch.full((*pixels.shape[:2], *size), 255, dtype=torch.uint8)
    top, left = ((room - own) // 2 for room, own in zip(size, pixels.shape[2:], strict=True))
    sheet[:, :, top : top + pixels.shape[2], left : left + pixels.shape[3]] = pixels
    return sheet


def save_grid(file: str | Path, pixels: Tensor, columns: int, *, captions: Sequence[str] = ()) -> Path:
    """Write a contact sheet as PNG, complete or not at all; see `image_grid`."""
    with atomic_file(file) as temporary:
        image_grid(pixels, columns, captions=captions).save(temporary)
    return Path(file)


def _caption(write: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, room: int) -> None:
    """Write one line of text, shortened to fit into `room` pixels."""
    shown = _legible(text)
    while len(shown) > 1 and _width(shown) > room:
        shown = shown.removesuffix("…")[:-1] + "…"
    write.text((corner[0], corner[1] + 1), shown, fill="black", font=_font())


def _width(text: str) -> int:
    return int(_font().getlength(_legible(text))) + 1


def _legible(text: str) -> str:
    """`text` in letters of Pillow's own font; others lose their accents, or are written as their codes."""
    return "".join(c if c.isascii() or _is_drawn(c) else _rewritten(c) for c in printable(normalize("NFC", text)))


def _rewritten(letter: str) -> str:
    plain = normalize("NFKD", letter).encode("ascii", "ignore").decode()
    return plain or f"\\u{ord(letter):04x}"


def _is_drawn(letter: str) -> bool:
    font = _font()
    return bytes(font.getmask(letter)) != bytes(font.getmask("\uffff")) and letter <= "\uffff"


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(_TEXT)
