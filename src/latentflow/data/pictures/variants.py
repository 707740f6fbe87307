"""Augmented variants of a picture: windows of it that are zoomed, turned and shifted, and the numbers of each.

A network that gets the numbers learns from the variants without drawing any of them: all numbers are zero for the
picture itself, and zero in sampling (EDM, arXiv 2206.00364, section 5 and appendix F.2).

A place q in [-1, 1]^2 of the variant shows the place p of the picture, with edges at -1 and 1:

    p = m + R(a) q / z            R(a) = [[cos a, -sin a / r], [r sin a, cos a]]            r = width / height

with the zoom z, the angle a and the middle m; with r it is a rotation in pixels, not in these coordinates. Half the
width and half the height of the turned window are e = (cos a + sin |a| / r) / z and (cos a + r sin |a|) / z. Zoom and
middle are drawn such that |m| + e <= 1: every variant lies within the picture, and no border has to be made up.

Legend: n images, A variants of an image, P = 4 numbers of a variant, H and W image height and width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latentflow.randomness import ImageRandom

VARIANT_RULES = "windows"
"""The name of these rules; it changes when they give other variants."""

VARIANT_NUMBERS = ("zoom", "turn", "shift_x", "shift_y")
"""What the numbers of a variant mean. Zoom is in [0, 1], the others are in [-1, 1]; 0: as in the picture."""

_MOST_ZOOM = 1.5  # z = 1.5^zoom
_MOST_TURN = math.radians(10)  # a = 10 degrees * turn, clockwise on the screen, where y points down
_MOST_SHIFT = 1 - 1 / _MOST_ZOOM  # m = 1/3 * shift: what the strongest zoom leaves room for


def draw_variants(rows: Sequence[int], num_variants: int, aspect: float = 1.0) -> Tensor:
    """The numbers of the variants of images `rows` of a source: [n, A, P] float32.

    Each follows from the image's row and the variant's index alone, whatever n and A are. The turn is uniform; the
    logarithm of the zoom and the shifts are uniform in what remains within the picture.

    Args:
        aspect: width of the pictures divided by their height, r.
    """
    drawn = []
    for variant in range(num_variants):
        random = ImageRandom.at(variant, "augmented variant", list(rows))
        to_zoom, to_turn, to_x, to_y = random.uniform(len(VARIANT_NUMBERS)).unbind(1)  # [n] each, in [0, 1)
        turn = (2 * to_turn - 1) * _largest_turn(aspect)
        width, height = _turned_size(turn, aspect)
        least = torch.maximum(width, height).log() / math.log(_MOST_ZOOM)
        zoom = least + (1 - least).clamp(min=0) * to_zoom
        rooms = (((1 - extent / _MOST_ZOOM**zoom) / _MOST_SHIFT).clamp(max=1) for extent in (width, height))
        shifts = ((2 * uniform - 1) * room for uniform, room in zip((to_x, to_y), rooms, strict=True))
        drawn.append(torch.stack([zoom, turn, *shifts], dim=1))
    return torch.stack(drawn, dim=1).float()


def _largest_turn(aspect: float) -> float:
    """At most 1; less for pictures of 3:1 and longer, which a turn of 10 degrees would need more than the zoom for.

    With r the longer side over the shorter one, cos a + r sin a = sqrt(1 + r^2) cos(a - atan r) must not exceed it.
    """
    r = max(aspect, 1 / aspect)
    return min((math.atan(r) - math.acos(min(_MOST_ZOOM / math.hypot(1, r), 1.0))) / _MOST_TURN, 1.0)


def _turned_size(turn: Tensor, aspect: float) -> tuple[Tensor, Tensor]:
    """The width and height of a turned picture, in widths and heights of the picture: the least zoom of each."""
    angle = turn.abs() * _MOST_TURN
    return angle.cos() + angle.sin() / aspect, angle.cos() + angle.sin() * aspect


def mirrored_numbers(numbers: Tensor) -> Tensor:
    """The numbers that make the mirror image of a variant out of the mirror image of its picture: [..., P].

    With M = diag(-1, 1) the place M p of the mirrored picture is shown at M q, and M R(a) M = R(-a).
    """
    zoom, turn, shift_x, shift_y = numbers.unbind(-1)
    return torch.stack([zoom, -turn, -shift_x, shift_y], dim=-1)


def windows(numbers: Tensor, aspect: float = 1.0) -> Tensor:
    """The maps q => p of variants as matrices [R(a) / z | m]: [n, P] => [n, 2, 3].

    Args:
        aspect: width of the pictures divided by their height, r.
    """
    zoom, turn, shift_x, shift_y = numbers.unbind(-1)
    angle, scale = turn * _MOST_TURN, _MOST_ZOOM**-zoom
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    across = torch.stack([cosine, -sine / aspect, shift_x * _MOST_SHIFT], dim=-1)
    return torch.stack([across, torch.stack([sine * aspect, cosine, shift_y * _MOST_SHIFT], dim=-1)], dim=-2)


def variants_of(pixels: Tensor, numbers: Tensor) -> Tensor:
    """One variant of each picture, by bicubic interpolation.

    Args:
        pixels: [n, 3, H, W] in [-1, 1].
        numbers: [n, P], on the same device.

    Returns:
        [n, 3, H, W] in [-1, 1]; the pictures themselves where all numbers are zero, up to rounding.
    """
    device = pixels.device
    if device.type == "mps":  # which has no bicubic interpolation
        return variants_of(pixels.cpu(), numbers.cpu()).to(device)
    maps = windows(numbers, pixels.shape[3] / pixels.shape[2])
    places = F.affine_grid(maps, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, places, mode="bicubic", padding_mode="border", align_corners=False).clamp(-1, 1)


def variant_of_map(semantic_map: np.ndarray, numbers: Tensor) -> np.ndarray:
    """The same variant of a semantic map, [H, W] of any integers; each pixel takes the class at its centre.

    Args:
        numbers: [P].
    """
    height, width = semantic_map.shape
    maps = windows(numbers[None].double(), width / height)
    places = F.affine_grid(maps, [1, 1, height, width], align_corners=False)[0]  # [H, W, 2]
    columns, rows = (
        ((places[..., axis] + 1) * (length / 2)).floor().long().clamp(0, length - 1).numpy()
        for axis, length in enumerate((width, height))
    )
    return semantic_map[rows, columns]
