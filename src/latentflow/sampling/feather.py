"""Feathering: the colours of a filled hole meet those of the image around it.

Legend: h and w height and width of the pictures, in pixels.
"""

from __future__ import annotations

import numpy as np


def feathered(filled: np.ndarray, image: np.ndarray, mask: np.ndarray, feather: int) -> np.ndarray:
    """Blend the colours of a filled hole into its surroundings, within `feather` pixels: [h, w, P] float64.

    The model's colours differ slightly from the known pixels at the border. That difference is extended into the hole
    by normalised convolution, blur(difference * known) / blur(known), and fades out. What was in the hole is not used.

    Args:
        filled: [h, w, P], the model's picture.
        image: [h, w, P], the image; only its known pixels are used.
        mask: [h, w], nonzero in the hole.
    """
    near = tuple(slice(max(int(span[0]) - feather, 0), int(span[-1]) + feather + 1) for span in hole_spans(mask))
    known = (mask[near] == 0).astype(np.float64)
    weight = _blur(known, feather)
    fading = np.minimum(2 * weight, 1)  # 1 at a straight border, where half of the neighbourhood is known
    strength = fading / np.maximum(weight, 1e-6)
    blended = filled.astype(np.float64)
    for channel in range(filled.shape[2]):
        painted = filled[near][..., channel].astype(np.float64)
        carried = _blur((image[near][..., channel] - painted) * known, feather) * strength
        blended[near][..., channel] = painted + carried
    return blended


def _blur(x: np.ndarray, reach: int) -> np.ndarray:
    """Blur [h, w] by three box filters, nearly a Gaussian of half width `reach`; cut off at the edges."""
    for part in range(3):
        radius = (reach + part) // 3
        for axis in (0, 1):
            places = np.arange(x.shape[axis])
            first, behind = np.maximum(places - radius, 0), np.minimum(places + radius + 1, len(places))
            x = stretch_sums(x, first, behind, axis) / np.expand_dims(behind - first, 1 - axis)
    return x


def stretch_sums(x: np.ndarray, first: np.ndarray, behind: np.ndarray, axis: int) -> np.ndarray:
    """The sum of each stretch x[first:behind] along an axis of x [h, w]."""
    sums = np.insert(np.cumsum(x, axis), 0, 0, axis)
    return np.take(sums, behind, axis) - np.take(sums, first, axis)


def hole_spans(mask: np.ndarray) -> list[np.ndarray]:
    """The rows and the columns, in order, in which a mask has a hole."""
    return [np.flatnonzero(mask.any(axis)) for axis in (1, 0)]
