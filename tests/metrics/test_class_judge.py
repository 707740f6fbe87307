"""The judge of classes: it finds the class of real images, and takes what is like none of them for wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from latentflow.data.sources.synthetic import CLASS_NAMES, SyntheticShapes
from latentflow.errors import DataError
from latentflow.metrics.class_judge import ClassJudge
from latentflow.metrics.features.extractors import RandomFeatures


def clouds(num: int, seed: int, *, dim: int = 6, apart: float = 8.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three normal clouds, `apart` standard deviations from each other."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 3
    return torch.randn(num, dim, generator=generator) + apart * torch.eye(dim)[labels], labels


@pytest.fixture(scope="module")
def judge() -> ClassJudge:
    return ClassJudge(*clouds(600, 0), 3)


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
        ClassJudge(*clouds(240, 0), 3)
    with pytest.raises(DataError, match="several of each class"):
        ClassJudge(*clouds(600, 0), 4)
    with pytest.raises(DataError, match="do not separate the classes"):
        ClassJudge(*clouds(600, 0, apart=0.0), 3)


def test_a_feature_that_never_varies_does_no_harm():
    features, labels = clouds(600, 0)
    constant = ClassJudge(torch.cat([features, torch.ones(600, 1)], 1), labels, 3)
    assert constant.accuracy == pytest.approx(ClassJudge(features, labels, 3).accuracy, abs=0.03)


def test_it_knows_the_built_in_shapes_and_sees_what_is_wrong_with_them():
    source = SyntheticShapes(640, 32, 0)
    labels = torch.tensor([source.label(index) for index in range(640)])
    pixels = torch.from_numpy(np.stack([item.pixels for item in source])).permute(0, 3, 1, 2)
    network = RandomFeatures()
    judge = ClassJudge(network(pixels), labels, len(CLASS_NAMES))
    assert judge.accuracy > 0.8
    held_out = SyntheticShapes(160, 32, 1)
    labels = torch.tensor([held_out.label(index) for index in range(160)])
    pixels = torch.from_numpy(np.stack([item.pixels for item in held_out])).permute(0, 3, 1, 2)
    assert judge.right(network(pixels), labels).double().mean() > 0.75
    torn = torch.cat([pixels[:, :, :, :16], pixels.roll(1, 0)[:, :, :, 16:]], 3)  # half of each and half of the last
    assert judge.right(network(torn), labels).double().mean() < 0.1
