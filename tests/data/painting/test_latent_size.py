"""Masks and maps at latent size: every pixel counted once, and nothing else."""

import numpy as np
import pytest
import torch

from latentflow.data.items import UNLABELLED
from latentflow.data.painting.latent_size import HOLE_GRAY, class_counts, hide, hole_counts, mask_input, shares


def counted(semantic_map: np.ndarray, num_classes: int, factor: int) -> list:
    """By brute force, pixel for pixel: counts[class][row][column]."""
    height, width = semantic_map.shape[0] // factor, semantic_map.shape[1] // factor
    counts = [[[0] * width for _ in range(height)] for _ in range(num_classes)]
    for row in range(height * factor):
        for column in range(width * factor):
            index = int(semantic_map[row, column])
            if index < num_classes:
                counts[index][row // factor][column // factor] += 1
    return counts


def drawn_map(height: int, width: int, values: list[int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array(values, np.uint8), (height, width))


@pytest.mark.parametrize("factor", [1, 2, 3, 8])
@pytest.mark.parametrize(("height", "width"), [(24, 24), (24, 48), (26, 25)])
def test_counts_are_those_of_a_loop_over_pixels(factor, height, width):
    semantic_map = drawn_map(height, width, [0, 1, 2, 3, UNLABELLED])
    found = class_counts(semantic_map, 4, factor)
    assert found.dtype == torch.int64
    assert found.tolist() == counted(semantic_map, 4, factor)


def test_counts_of_a_mirrored_view():
    """Batches hand over views with negative strides."""
    semantic_map = drawn_map(12, 12, [0, 1, UNLABELLED])
    assert torch.equal(class_counts(semantic_map[:, ::-1], 2, 3), class_counts(semantic_map, 2, 3).flip(-1))


def test_unlabelled_pixels_count_for_no_class():
    everything = np.full((8, 8), UNLABELLED, np.uint8)
    assert class_counts(everything, 3, 4).sum() == 0
    assert class_counts(everything, UNLABELLED, 4).sum() == 0  # even where there are as many classes as there can be
    everything[0, 0] = UNLABELLED - 1
    assert class_counts(everything, UNLABELLED, 4)[UNLABELLED - 1].tolist() == [[1, 0], [0, 0]]


def test_shares_of_all_classes_fill_a_labelled_map():
    fractions = shares(class_counts(drawn_map(24, 24, [0, 1, 2]), 3, 8), 8)
    assert fractions.dtype == torch.float32
    assert torch.equal(fractions.sum(0), torch.ones(3, 3))
    assert shares(class_counts(np.ones((16, 16), np.uint8), 2, 16), 16).tolist() == [[[0]], [[1]]]


@pytest.mark.parametrize("factor", [2, 3, 8])
def test_holes_are_counted_alike(factor):
    mask = drawn_map(24, 24, [0, 1])
    found = hole_counts(mask, factor)
    assert found.shape == (1, 24 // factor, 24 // factor)
    assert found.tolist() == [counted(mask, 2, factor)[1]]
    assert hole_counts(np.ones_like(mask), factor).unique().tolist() == [factor**2]
    assert hole_counts(np.zeros_like(mask), factor).unique().tolist() == [0]


@pytest.mark.parametrize("row", range(8))
def test_thin_strokes_do_not_vanish(row):
    """Wherever in a latent pixel they lie; nearest neighbour would keep one in eight."""
    mask = np.zeros((24, 24), np.uint8)
    mask[8 + row] = 1
    assert torch.equal(shares(hole_counts(mask, 8), 8)[0], torch.tensor([0, 1 / 8, 0])[:, None].expand(3, 3))
    assert torch.equal(shares(class_counts(mask, 2, 8), 8)[1], torch.tensor([0, 1 / 8, 0])[:, None].expand(3, 3))


def test_hide_paints_the_hole_gray_and_nothing_else():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    mask = np.random.default_rng(1).integers(0, 2, (6, 5), dtype=np.uint8)
    before, hidden = pixels.copy(), hide(pixels, mask)
    assert hidden.dtype == np.uint8
    assert HOLE_GRAY == 128
    for row in range(6):
        for column in range(5):
            expected = [HOLE_GRAY] * 3 if mask[row, column] else pixels[row, column].tolist()
            assert hidden[row, column].tolist() == expected
    assert (pixels == before).all()


def test_holes_by_sign():
    """The form of the published inpainting models: black, and +1 or -1 by the first pixel of each latent pixel."""
    mask = np.zeros((4, 8), np.uint8)
    mask[0, 0] = 1  # the first pixel of the first latent pixel
    mask[1:, 5:] = 1  # most of the second, without its first pixel
    counts = hole_counts(mask, 4, "sign")
    assert counts.tolist() == [[[16, 0]]]
    assert mask_input(shares(counts, 4), "sign").tolist() == [[[1, -1]]]
    plain = shares(hole_counts(mask, 4), 4)
    assert plain.tolist() == [[[1 / 16, 9 / 16]]]
    assert mask_input(plain, "share") is plain
    white = np.full((4, 8, 3), 255, np.uint8)
    assert hide(white, mask, "sign")[0, 0].tolist() == [0, 0, 0]
    assert hide(white, mask, "sign")[0, 1].tolist() == [255] * 3
