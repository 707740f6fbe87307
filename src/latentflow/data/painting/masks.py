"""Masks for inpainting: holes for training, drawn from a seed by `MaskRules` or chosen from a folder of mask files.

A mask is uint8 [H, W]: 0 is known and preserved, 1 is repainted.

Legend: H height and W width in pixels. Positions are shares of width and height, in [0, 1].
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from latentflow.console import notice
from latentflow.data.painting.mask_reader import read_mask
from latentflow.data.painting.mask_rules import BOX_MARGIN, HoleKind, MaskRules
from latentflow.data.stores.files import FolderStore, is_image
from latentflow.data.stores.layout import counted, unread_pictures
from latentflow.errors import DataError
from latentflow.progress import image_progress

# LaMa's numbers, which are pixels of a 256 px image there.
_MOST_PIECES: dict[HoleKind, int] = {"strokes": 5, "boxes": 4}  # drawn uniformly from 1 up to this
_MOST_SEGMENTS = 5
_STROKE_LENGTHS = (10 / 256, 200 / 256)  # of one segment
_NARROWEST_STROKE = 5 / 100  # of the widest
_MOST_ANGLE = 4.0  # radians off the heading
_SMALLEST_BOX_SIDE = 30 / 150  # of the largest

_MOST_DRAWN = 300  # pieces of one mask, over all attempts; the default rules need 2.5 on average


def draw_mask(rules: MaskRules, height: int, width: int, seed: int) -> np.ndarray:
    """Draw one random mask: equal arguments give equal masks, and other sizes nearly always show the same scene.

    Strokes and boxes are added until the hole is large enough, and a hole that is too large is drawn again. If `rules`
    cannot be met (few pixels, shares close together), the mask is a box in the middle, as near to them as whole pixels
    allow. A mask is never empty and never full.

    Args:
        rules: what the holes are like.
        height, width: in pixels, >= 2.
        seed: >= 0.

    Returns:
        [H, W] uint8: 1 is repainted, 0 is known.

    Raises:
        DataError: a side is shorter than 2 pixels, or a mask file of `rules.folder` cannot be used.
    """
    if min(height, width) < 2:
        raise DataError(f"a mask of {width} x {height} pixels (width x height) is too small; give at least 2 x 2")
    if rules.folder:
        files = mask_files(rules.folder)
        return _fitted(files[int(len(files) * _random(seed).random())], height, width)
    random = _random(seed)
    kind = _kind(rules, random)
    num_pixels = height * width
    least = max(rules.least_share * num_pixels, 1)
    most = min(rules.most_share * num_pixels, num_pixels - 1)
    pieces_left = 0
    for _ in range(_MOST_DRAWN):
        if pieces_left == 0:
            mask = np.zeros((height, width), np.uint8)
            pieces_left = 1 + int(_MOST_PIECES.get(kind, 1) * random.random())
        _PAINT[kind](rules, random, mask)
        pieces_left -= 1
        painted = np.count_nonzero(mask)
        if pieces_left == 0 and least <= painted <= most:
            return mask
        if painted > most:
            pieces_left = 0
        elif pieces_left == 0 and kind in _MOST_PIECES:
            pieces_left = 1
    return _middle_box((least + most) / 2, height, width)


def mask_files(folder: str | Path) -> list[Path]:
    """The mask files of a folder and its sub-folders, in any image format, sorted by name.

    Raises:
        DataError: there are none.
    """
    found, unread = _listed(str(folder))
    if not found:
        some = f", but {unread}" if unread else ""
        raise DataError(f"no mask files in {folder}{some}; put PNG masks there, white where to repaint")
    if unread:
        notice(f"{folder}: some files are skipped: {unread}")
    return found


def masks_fingerprint(rules: MaskRules) -> str:
    """A hash of the content of a folder of masks; "" for random holes, which follow from the rules."""
    if not rules.folder:
        return ""
    files = [str(file.relative_to(rules.folder)) for file in mask_files(rules.folder)]
    contents = FolderStore(Path(rules.folder)).contents(files)
    text = "".join(f"{name}\0{content}\0" for name, content in zip(files, contents, strict=True))
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def check_masks(rules: MaskRules, height: int, width: int) -> None:
    """Read every mask file that `draw_mask` might choose for images of this size; random holes need no check.

    Raises:
        DataError: there are none, or one cannot be used.
    """
    if rules.folder:
        files = mask_files(rules.folder)
        with image_progress("checking masks,", len(files)) as on_files:
            for file in files:
                _fitted(file, height, width)
                on_files(1)


@lru_cache(maxsize=4)
def _listed(folder: str) -> tuple[list[Path], str]:
    """The masks in a folder, and a list of pictures there that are not read."""
    if not Path(folder).is_dir():
        return [], ""
    store = FolderStore(Path(folder))
    files = store.files()
    masks = [Path(folder) / files[name].path for name in sorted(files) if is_image(name)]
    others = [name for name in files if not is_image(name)]
    return masks, counted(unread_pictures(others, lambda name: store.mark(files[name].path)))


def _fitted(file: Path, height: int, width: int) -> np.ndarray:
    """A mask file stretched to a size: [H, W] uint8, 1 wherever any of the hole is."""
    return np.unpackbits(_packed(file, height, width), count=height * width).reshape(height, width)


@lru_cache(maxsize=512)  # 64 MB of masks of 1024 x 1024
def _packed(file: Path, height: int, width: int) -> np.ndarray:
    whole = Image.fromarray(read_mask(file).astype(np.float32))
    mask = np.asarray(whole.resize((width, height), Image.Resampling.BOX)) > 0
    if mask.all():
        raise DataError(f"the mask {file} covers the whole image at {width} x {height} pixels; remove it")
    return np.packbits(mask)


# Kinds of holes. Each paints one piece onto `mask`; how many random numbers it draws does not depend on the size.


def _paint_stroke(rules: MaskRules, random: np.random.Generator, mask: np.ndarray) -> None:
    """A thick polyline with round joints, whose segments swing from side to side of a heading."""
    height, width = mask.shape
    thickness = _between(random, _NARROWEST_STROKE, 1) * rules.widest_stroke * min(height, width)
    points = [(random.random(), random.random())]
    heading, side = 2 * math.pi * random.random(), 1
    for _ in range(1 + int(_MOST_SEGMENTS * random.random())):
        angle, length = heading + side * _MOST_ANGLE * random.random(), _between(random, *_STROKE_LENGTHS)
        x, y = points[-1][0] + length * math.cos(angle), points[-1][1] + length * math.sin(angle)
        points.append((min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)))
        side = -side

    image = Image.new("L", (width, height))
    pen = ImageDraw.Draw(image)
    corners = [(x * width - 0.5, y * height - 0.5) for x, y in points]  # pixel i spans i - 0.5 to i + 0.5
    pen.line(corners, fill=1, width=max(1, round(thickness)))
    radius = (thickness - 1) / 2
    if radius > 0:
        for x, y in corners:
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
    mask |= np.asarray(image)


def _paint_box(rules: MaskRules, random: np.random.Generator, mask: np.ndarray) -> None:
    spans = []
    for pixels in mask.shape:
        length = _between(random, _SMALLEST_BOX_SIDE, 1) * rules.largest_box
        spans.append(_span(_between(random, BOX_MARGIN, 1 - BOX_MARGIN - length), length, pixels))
    mask[spans[0], spans[1]] = 1


def _paint_half(rules: MaskRules, random: np.random.Generator, mask: np.ndarray) -> None:
    """The left, right, top or bottom: exactly one half every second time, else a share uniform in `REACH`."""
    low, high = rules.reach("halves")
    exact, side = random.random() < 0.5, int(4 * random.random())
    share = _between(random, low, high)
    if exact:
        share = min(max(0.5, low), high)
    span = _span(0.0 if side % 2 else 1 - share, share, mask.shape[side // 2])
    mask[(span, slice(None)) if side < 2 else (slice(None), span)] = 1


def _paint_border(rules: MaskRules, random: np.random.Generator, mask: np.ndarray) -> None:
    """All but a rectangle: half of the time a frame, otherwise any of the 15 sets of sides."""
    known = 1 - _between(random, *rules.reach("borders"))
    frame, choice = random.random() < 0.5, 1 + int(15 * random.random())
    sides = (3, 3) if frame else divmod(choice, 4)  # of each axis; bit 1: top or left, bit 2: bottom or right
    # The known part is the product of two lengths; an axis without a border keeps its whole length.
    split = _between(random, 0.3, 0.7) if all(sides) else float(sides[0] > 0)
    spans = []
    for side, exponent, pixels in zip(sides, (split, 1 - split), mask.shape, strict=True):
        length = known**exponent
        before = _between(random, 0.25, 0.75) if side == 3 else float(side == 1)  # share of the border, top or left
        spans.append(_span(before * (1 - length), length, pixels))
    mask[:] = 1
    mask[spans[0], spans[1]] = 0


_PAINT = {"strokes": _paint_stroke, "boxes": _paint_box, "halves": _paint_half, "borders": _paint_border}


def _middle_box(num_pixels: float, height: int, width: int) -> np.ndarray:
    """A box of about `num_pixels` in the middle of an image of at least 2 x 2, never all of it."""
    mask = np.zeros((height, width), np.uint8)
    rows = min(max(round(height * math.sqrt(num_pixels / (height * width))), 1), height)
    columns = min(max(round(num_pixels / rows), 1), width - (rows == height))
    top, left = (height - rows) // 2, (width - columns) // 2
    mask[top : top + rows, left : left + columns] = 1
    return mask


def _kind(rules: MaskRules, random: np.random.Generator) -> HoleKind:
    weights = rules.weights()
    ends = list(accumulate(weights.values()))
    return list(weights)[bisect(ends, random.random() * ends[-1], hi=len(ends) - 1)]


def _random(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def _between(random: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * random.random()


def _span(start: float, length: float, pixels: int) -> slice:
    """The pixels of an interval that is given in shares of the side."""
    return slice(round(start * pixels), round((start + length) * pixels))
