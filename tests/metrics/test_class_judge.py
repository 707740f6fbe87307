"""The judge of classes: it finds the class of real images, and takes what is like none of them for wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from latentflow.data.sources.synthetic import CLASS_NAMES, SyntheticShapes
from latentflow.errors import DataError
from latentflow.metrics.class_judge import ClassJudge, NotSeparatedError
from latentflow.metrics.features.extractors import RandomFeatures


def clouds(num: int, seed: int, *, dim: int = 6, apart: float = 8.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three normal clouds, `apart` standard deviations from each other."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 3
    return torch.randn(num, dim, generator=generator) + apart * torch.eye(dim)[labels], labels


@pytest.fixture(scope="module")
def judge() -> ClassJudge:
    return ClassJudge.of(*clouds(600, 0), 3)


def test_images_of_a_class_are_right_as_often_as_real_ones(judge):
    features, labels = clouds(3000, 1)
    right = float(judge.right(features, labels).double().mean())
    assert right == pytest.approx(judge.accuracy, abs=0.05)
    assert right == pytest.approx(0.95, abs=0.03)
    assert judge.num_held_out == 120


def test_another_class_is_wrong(judge):
    features, labels = clouds(300, 1)
    assert not judge.right(features, (labels + 1) % 3).any()


def test_what_is_like_no_class_is_wrong_though_some_class_is_nearest(judge):
    features, labels = clouds(300, 1)
    assert not judge.right(features + 8 * torch.eye(6)[5], labels).any()  # aside from all three, nearest to its own


def test_too_few_images_and_features_that_see_nothing_are_refused():
    with pytest.raises(DataError, match="are too few to judge classes by: 250 are needed"):
        ClassJudge.of(*clouds(240, 0), 3)
    with pytest.raises(DataError, match="several of each class"):
        ClassJudge.of(*clouds(600, 0), 4)
    with pytest.raises(DataError, match="are not shown to separate the classes"):
        ClassJudge.of(*clouds(600, 0, apart=0.0), 3)


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.95, 0.05), (0.98, 0.02), (0.9, 0.05, 0.05)])
def test_a_rare_class_is_judged_like_any_other(shares):
    """Although always naming the frequent one would be right more often than 95 of 100 times."""
    num, dim = 2000, 6
    labels = torch.repeat_interleave(torch.arange(len(shares)), torch.tensor([int(share * num) for share in shares]))
    noise = torch.randn(num, dim, generator=torch.Generator().manual_seed(0))
    judge = ClassJudge.of(noise + 8 * torch.eye(dim)[labels], labels, len(shares))
    assert judge.recognised == 1
    assert judge.by_class.nanmean() > 0.85
    with pytest.raises(NotSeparatedError, match="of 400 real images are recognised, as the mean over classes"):
        ClassJudge.of(noise, labels, len(shares))


def test_a_feature_that_never_varies_does_no_harm():
    features, labels = clouds(600, 0)
    constant = ClassJudge.of(torch.cat([features, torch.ones(600, 1)], 1), labels, 3)
    assert constant.accuracy == pytest.approx(ClassJudge.of(features, labels, 3).accuracy, abs=0.03)


def test_it_knows_the_built_in_shapes_and_sees_what_is_wrong_with_them():
    source = SyntheticShapes(640, 32, 0)
    labels = torch.tensor([source.label(index) for index in range(640)])
    pixels = torch.from_numpy(np.stack([item.pixels for item in source])).permute(0, 3, 1, 2)
    network = RandomFeatures()
    judge = ClassJudge.of(network(pixels), labels, len(CLASS_NAMES))
    assert judge.accuracy > 0.8
    held_out = SyntheticShapes(160, 32, 1)
    labels = torch.tensor([held_out.label(index) for index in range(160)])
    pixels = torch.from_numpy(np.stack([item.pixels for item in held_out])).permute(0, 3, 1, 2)
    assert judge.right(network(pixels), labels).double().mean() > 0.75
    torn = torch.cat([pixels[:, :, :, :16], pixels.roll(1, 0)[:, :, :, 16:]], 3)  # half of each and half of the last
    assert judge.right(network(torn), labels).double().mean() < 0.1


def test_fitting_and_measuring_on_separate_images(judge):
    fitted = ClassJudge.fitted(*clouds(480, 2), *clouds(3000, 3), 3)
    assert fitted.accuracy == pytest.approx(0.95, abs=0.005)  # near enough are 95 of 100, and hardly any is confused
    assert fitted.recognised == pytest.approx(1.0, abs=0.002)
    assert fitted.num_held_out == 3000
    assert fitted.by_class.mean() == pytest.approx(fitted.accuracy, abs=1e-6)  # equally many of each class


def test_classes_in_another_order_and_some_of_them(judge):
    features, labels = clouds(300, 1)
    right = judge.right(features, labels)
    turned = judge.for_classes(["apple", "berry", "cherry"], ["cherry", "apple", "berry"])
    assert torch.equal(turned.right(features, (labels + 1) % 3), right)
    some = judge.for_classes(["apple", "berry", "cherry"], ["cherry"])
    own = labels == 2
    assert torch.equal(some.right(features[own], torch.zeros(100, dtype=torch.int64)), right[own])
    assert not some.right(features[~own], torch.zeros(200, dtype=torch.int64)).any()


def test_the_ceiling_is_that_of_the_classes_that_are_drawn(judge):
    ceilings = [judge.ceiling(torch.tensor([label])) for label in range(3)]
    assert ceilings == judge.by_class.tolist()
    assert judge.ceiling(torch.tensor([0, 0, 2])) == pytest.approx((2 * ceilings[0] + ceilings[2]) / 3)
    assert judge.ceiling(torch.arange(3)) == pytest.approx(judge.accuracy, abs=0.02)
