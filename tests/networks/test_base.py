"""What every velocity network refuses."""

import pytest
import torch

from latentflow.networks.base import check_inputs

FACTS = {"channels": 4, "multiple": 4, "num_classes": 3}


@pytest.mark.parametrize(
    ("shape", "labels", "num_classes"),
    [
        ((2, 4, 8, 8), None, 0),
        ((2, 4, 4, 12), [0, 3], 3),  # 3 is the null label
        ((1, 4, 16, 8), [2], 3),
        ((0, 4, 4, 4), [], 3),
    ],
)
def test_what_fits_passes(shape, labels, num_classes):
    labels = None if labels is None else torch.tensor(labels, dtype=torch.int64)
    facts = {**FACTS, "num_classes": num_classes}
    assert check_inputs(torch.zeros(shape), torch.zeros(shape[0]), labels, **facts) is None


@pytest.mark.parametrize(
    ("shape", "time_shape", "message"),
    [
        ((2, 4, 6, 8), (2,), "latents of 6 x 8 do not fit this network: height and width must be multiples of 4"),
        ((2, 4, 8, 9), (2,), "latents of 8 x 9 do not fit this network: height and width must be multiples of 4"),
        ((2, 3, 8, 8), (2,), r"expected latents \[B, 4, H, W\], got \[2, 3, 8, 8\]"),
        ((4, 8, 8), (4,), r"expected latents \[B, 4, H, W\], got \[4, 8, 8\]"),
        ((2, 4, 8, 8), (), r"expected one time per image, shape \[2\], got \[\]"),
        ((2, 4, 8, 8), (1,), r"expected one time per image, shape \[2\], got \[1\]"),
        ((2, 4, 8, 8), (2, 1), r"expected one time per image, shape \[2\], got \[2, 1\]"),
    ],
)
def test_shapes_that_do_not_fit(shape, time_shape, message):
    with pytest.raises(ValueError, match=message):
        check_inputs(torch.zeros(shape), torch.zeros(time_shape), torch.zeros(2, dtype=torch.int64), **FACTS)


@pytest.mark.parametrize(
    ("num_classes", "labels", "message"),
    [
        (0, [1, 0], r"labels \[1, 0\] given to a network without labels"),
        (3, None, r"labels are missing; a network of 3 classes needs one per image \(3 is the null label\)"),
        (3, [0, 4], "label 4 is out of range: 0 to 2, or 3 for the null label"),
        (3, [-1, 0], "label -1 is out of range"),
        (3, [0], r"expected one label per image, shape \[2\], got \[1\]"),
        (3, [[0], [1]], r"expected one label per image, shape \[2\], got \[2, 1\]"),
    ],
)
def test_labels_that_do_not_fit(num_classes, labels, message):
    labels = None if labels is None else torch.tensor(labels)
    facts = {**FACTS, "num_classes": num_classes}
    with pytest.raises(ValueError, match=message):
        check_inputs(torch.zeros(2, 4, 8, 8), torch.zeros(2), labels, **facts)


def test_the_range_is_looked_at_on_the_cpu_only():
    # A device that computes by itself would have to be waited for.
    facts = {**FACTS, "num_classes": 3}
    labels = torch.full((2,), 9)
    with pytest.raises(ValueError, match="label 9 is out of range"):
        check_inputs(torch.zeros(2, 4, 8, 8), torch.zeros(2), labels, **facts)
    check_inputs(torch.zeros(2, 4, 8, 8), torch.zeros(2), labels.to("meta"), **facts)
