"""Shape recognition for the built-in dataset: which coloured shape does a picture show, if any?

It judges the samples of a generative model: does a sample of the class "red circle" show one? Every step can reject the
picture, so that noise, blur, an empty background or two shapes are recognised as nothing.

Legend: S image size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from latentflow.data.sources.synthetic import COLOURS, SHAPES, signed_distance, unit_area

_SIZE = 64  # pictures are judged at this size, in pixels
_LEAST_CONTRAST = 0.2  # chroma of the shape minus that of the background; real shapes have 0.3 to 0.7
_LEAST_AREA, _MOST_AREA = 0.025, 0.5  # share of the image; real shapes cover 0.05 to 0.42
_LEAST_SHARPNESS = 0.11  # slope of the outline, in contrasts per pixel; less is a haze without a shape
_MOST_LITTER = 0.12  # area of all other colourful pixels, relative to the main blob
_HUE_WINDOW = 0.09  # largest distance of a hue from its colour; green and blue are 0.21 apart
_LEAST_ONE_COLOUR = 0.85  # share of the blob that has the blob's colour
_LEAST_OVERLAP = 0.85  # intersection over union with the ideal shape; real shapes have 0.9 to 1
_MOST_DEVIATION = 0.15  # of the blob's outline from the ideal one, in radii; real shapes have 0.08
_LEAST_LEAD = 0.02  # of the best shape's overlap over the second best's
_SYMMETRY = {"circle": 0.0, "square": math.pi / 2, "triangle": 2 * math.pi / 3, "cross": math.pi / 2}
_ANGLE_STEP = math.radians(7.5)


@dataclass(frozen=True)
class Recognition:
    """What a picture shows.

    Attributes:
        shape: one of `SHAPES`.
        colour: one of `COLOURS`.
        overlap: intersection over union of the blob with the ideal shape, in [0, 1].
        mask: [S, S] bool, the blob.
    """

    shape: str
    colour: str
    overlap: float
    mask: np.ndarray

    @property
    def class_name(self) -> str:
        """The class this is a picture of, one of `CLASS_NAMES`."""
        return f"{self.colour} {self.shape}"


def recognise(pixels: np.ndarray) -> Recognition | None:
    """Find the one coloured shape in a picture.

    Args:
        pixels: [S, S, 3] uint8 RGB.

    Returns:
        The shape, or None where there is nothing colourful, more than one thing, no clear colour, or an
        outline that no shape fits.
    """
    picture = np.asarray(_resize(pixels, _SIZE), dtype=np.float32) / 255
    mask = _main_blob(picture)
    if mask is None:
        return None
    colour = _colour(picture[mask])
    shape, overlap = _shape(mask)
    if colour is None or shape is None:
        return None
    return Recognition(shape, colour, overlap, _resize(mask * np.uint8(255), len(pixels)) > 127)


def recover_map(pixels: np.ndarray) -> np.ndarray:
    """The semantic map of a picture, [S, S] uint8 as in `MAP_CLASS_NAMES`; all ground where nothing is recognised."""
    found = recognise(pixels)
    if found is None:
        return np.zeros(pixels.shape[:2], np.uint8)
    return found.mask.astype(np.uint8) * np.uint8(SHAPES.index(found.shape) + 1)


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    if len(image) == size:
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def _main_blob(picture: np.ndarray) -> np.ndarray | None:
    """The one connected region that is clearly more colourful than the rest, [S, S] bool."""
    chroma = picture.max(-1) - picture.min(-1)
    smooth = _blur(chroma)
    peak, ground = np.quantile(smooth, 0.98), np.quantile(smooth, 0.3)
    if peak - ground < _LEAST_CONTRAST:
        return None
    colourful = smooth > (peak + ground) / 2  # half-way is where the outline passes, however soft it is
    main = _grow(np.where(colourful, smooth, -1).argmax(), colourful)
    main = _blur(_blur(main.astype(np.float32))) > 0.5  # without the whiskers that noise leaves on the rim
    litter = colourful.sum() - main.sum()
    if not _LEAST_AREA < main.mean() < _MOST_AREA or litter > _MOST_LITTER * main.sum():
        return None
    slope = np.hypot(*np.gradient(smooth))[main & (_blur(main.astype(np.float32)) < 1)].mean()
    return main if slope > _LEAST_SHARPNESS * (peak - ground) else None


def _blur(image: np.ndarray) -> np.ndarray:
    """A 3 x 3 binomial filter, against noise."""
    for axis in (0, 1):
        rim = np.concatenate([image.take([0], axis), image, image.take([-1], axis)], axis)
        size = image.shape[axis]
        image = sum(w * rim.take(range(k, k + size), axis) for k, w in enumerate((0.25, 0.5, 0.25)))
    return image


def _grow(start: int, mask: np.ndarray) -> np.ndarray:
    """The part of `mask` that is connected, by edges, with the pixel at flat index `start`."""
    region = np.zeros_like(mask)
    region.flat[start] = True
    area = 0
    while area != (area := int(region.sum())):
        region[1:] |= region[:-1] & mask[1:]
        region[:-1] |= region[1:] & mask[:-1]
        region[:, 1:] |= region[:, :-1] & mask[:, 1:]
        region[:, :-1] |= region[:, 1:] & mask[:, :-1]
    return region


def _colour(paint: np.ndarray) -> str | None:
    """The colour of the blob's pixels, [N, 3]; None when they are of no colour, or of several."""
    red, green, blue = paint.T
    hue = np.arctan2(math.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * math.pi)
    weight = paint.max(-1) - paint.min(-1)  # pale pixels on the rim have the hue of a mixture
    for name, (centre, _, _) in COLOURS.items():
        away = np.abs((hue - centre + 0.5) % 1 - 0.5)
        if weight[away < _HUE_WINDOW].sum() > _LEAST_ONE_COLOUR * weight.sum():
            return name
    return None


def _shape(mask: np.ndarray) -> tuple[str | None, float]:
    """The shape that fits the blob best, and the overlap; None when none fits well or two fit alike."""
    rows, columns = np.nonzero(mask)
    y = np.arange(mask.shape[0])[:, None] - rows.mean()
    x = np.arange(mask.shape[1])[None, :] - columns.mean()

    fits = []
    for shape in SHAPES:  # each with the blob's centre of gravity and area, in every orientation
        radius = math.sqrt(len(rows) / unit_area(shape))
        distances = [signed_distance(shape, x, y, radius, angle) for angle in _angles(shape)]
        overlaps = [(mask & (d < 0)).sum() / (mask | (d < 0)).sum() for d in distances]
        distance = distances[int(np.argmax(overlaps))]
        deviation = np.abs(distance).max(where=mask != (distance < 0), initial=0) / radius
        fits.append((float(max(overlaps)), float(deviation), shape))
    (second, _, _), (best, deviation, shape) = sorted(fits)[-2:]
    clear = best > _LEAST_OVERLAP and best - second > _LEAST_LEAD and deviation < _MOST_DEVIATION
    return shape if clear else None, best


def _angles(shape: str) -> np.ndarray:
    return np.arange(0, _SYMMETRY[shape], _ANGLE_STEP) if _SYMMETRY[shape] else np.zeros(1)
