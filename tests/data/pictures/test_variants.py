"""Augmented variants: windows inside the picture, each place shown where the numbers say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from latentflow.data.pictures.variants import (
    VARIANT_NUMBERS,
    draw_variants,
    mirrored_numbers,
    variant_of_map,
    variants_of,
    windows,
)

NUMBERS = draw_variants(range(500), 4)
SIDE = 16
CENTRES = (torch.arange(SIDE) + 0.5) * 2 / SIDE - 1


def gradient(matrices: torch.Tensor) -> torch.Tensor:
    """Pictures [n, 3, S, S] that show in their channels x / 2, y / 2 and (x - y) / 4 of the places `matrices` q."""
    y, x = torch.meshgrid(CENTRES, CENTRES, indexing="ij")
    places = matrices.double() @ torch.stack([x, y, torch.ones_like(x)]).flatten(1).double()  # [n, 2, S * S]
    shown = torch.stack([places[:, 0] / 2, places[:, 1] / 2, (places[:, 0] - places[:, 1]) / 4], dim=1)
    return shown.reshape(-1, 3, SIDE, SIDE).float()


PICTURE = gradient(torch.eye(2, 3)[None])


def test_every_window_lies_within_the_picture_and_some_reach_its_edge():
    corners = torch.tensor([[x, y, 1.0] for x in (-1, 1) for y in (-1, 1)])
    places = windows(NUMBERS.flatten(0, 1).double()) @ corners.T.double()  # [n, 2, 4]
    assert places.abs().max() <= 1 + 1e-6
    assert places.abs().max() > 0.99


def test_numbers_fill_their_ranges():
    zoom, *others = NUMBERS.flatten(0, 1).T
    assert (zoom.min() >= 0, zoom.max() <= 1) == (True, True)
    assert zoom.max() > 0.99
    turn, shift_x, shift_y = others
    assert turn.abs().max() <= 1
    for number, reached in ((turn, 0.99), (shift_x, 0.7), (shift_y, 0.7)):  # few of the strongest zooms are straight
        assert min(number.max(), -number.min()) > reached
        assert number.max() <= 1
        assert abs(number.mean()) < 0.05


def test_the_strongest_numbers_are_what_they_say():
    """A zoom of 1.5, a turn of 10 degrees and a shift of a third of half the side."""
    matrix = windows(torch.tensor([1.0, 0.0, 1.0, -1.0]))
    assert torch.allclose(matrix, torch.tensor([[2 / 3, 0, 1 / 3], [0, 2 / 3, -1 / 3]]))
    cosine, sine = math.cos(math.pi / 18), math.sin(math.pi / 18)
    matrix = windows(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert torch.allclose(matrix, torch.tensor([[cosine, -sine, 0], [sine, cosine, 0]]))


def test_a_variant_follows_from_row_and_index_alone():
    some = draw_variants([7, 499, 3], 2)
    assert torch.equal(some, NUMBERS[[7, 499, 3], :2])
    assert some.shape == (3, 2, len(VARIANT_NUMBERS))
    assert NUMBERS.flatten(0, 1).unique(dim=0).shape[0] == 2000  # no two alike


def test_each_pixel_shows_its_place():
    """To a twentieth of a pixel, as torch's bicubic kernel (a = -0.75) is on linear pictures, away from their edge."""
    numbers = NUMBERS[:50].flatten(0, 1)
    shown, expected = variants_of(PICTURE.expand(len(numbers), -1, -1, -1), numbers), gradient(windows(numbers))
    inside = (expected[:, :2].abs() < 0.5 - 2 / SIDE).all(1, keepdim=True).expand_as(shown)
    assert inside.float().mean() > 0.3
    pixel = 1 / SIDE  # by how much a channel changes from one pixel to the next
    assert (shown - expected)[inside].abs().max() < pixel / 20


@pytest.mark.parametrize("aspect", [1.5, 2 / 3, 2.5, 3.0, 0.2, 12.0])
def test_variants_of_pictures_that_are_not_square(aspect):
    """They lie within the picture, and turn it in pixels: its right angles stay right, and its scale is the zoom's."""
    numbers = draw_variants(range(200), 2, aspect).flatten(0, 1).double()
    maps = windows(numbers, aspect)
    corners = torch.tensor([[x, y, 1.0] for x in (-1, 1) for y in (-1, 1)])
    places = maps @ corners.T.double()
    assert 0.99 < places.abs().max() <= 1 + 1e-6
    in_pixels = torch.diag(torch.tensor([aspect, 1.0])).double()
    turned = in_pixels @ maps[..., :2] @ in_pixels.inverse()
    scales = turned.transpose(1, 2) @ turned
    assert torch.allclose(scales, torch.eye(2).double() * 1.5 ** (-2 * numbers[:, 0, None, None]))
    assert (numbers[:, 2:].abs().amax(0) > 0.6).all() and numbers.abs().max() <= 1
    assert numbers[:, 0].min() >= 0


def test_zero_is_the_picture_itself():
    picture = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.allclose(variants_of(picture, torch.zeros(2, 4)), picture, atol=1e-5)
    semantic_map = np.arange(81, dtype=np.uint8).reshape(9, 9)
    assert (variant_of_map(semantic_map, torch.zeros(4)) == semantic_map).all()


def test_values_stay_in_their_range():
    picture = torch.rand(20, 3, 9, 9, generator=torch.Generator().manual_seed(0)).round() * 2 - 1
    shown = variants_of(picture, NUMBERS[:20, 0])
    assert (shown.min(), shown.max()) == (-1, 1)


def test_mirroring_commutes_with_mirrored_numbers():
    picture = torch.rand(100, 3, 9, 9, generator=torch.Generator().manual_seed(0)) * 2 - 1
    numbers = NUMBERS[:100, 0]
    mirrored = variants_of(picture.flip(-1), mirrored_numbers(numbers))
    assert torch.allclose(mirrored, variants_of(picture, numbers).flip(-1), atol=1e-5)
    assert (mirrored - variants_of(picture.flip(-1), numbers)).abs().amax((1, 2, 3)).min() > 1e-3
    assert torch.equal(mirrored_numbers(mirrored_numbers(numbers)), numbers)


@pytest.mark.parametrize("row", range(5))
def test_a_map_follows_its_picture(row):
    """Four quarters as classes: the class of a pixel is that of its place."""
    semantic_map = np.kron([[1, 2], [3, 255]], np.ones((SIDE // 2, SIDE // 2))).astype(np.uint8)
    x, y, _ = gradient(windows(NUMBERS[row, :1]))[0].double()
    expected = np.where(y < 0, np.where(x < 0, 1, 2), np.where(x < 0, 3, 255))
    assert (variant_of_map(semantic_map, NUMBERS[row, 0]) == expected).all()
    assert len(np.unique(expected)) == 4
