"""What the tests of metrics share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from latentflow.data.sources.synthetic import SyntheticShapes
from latentflow.metrics.features.inception import InceptionV3, build_inception
from tests.metrics import published


@pytest.fixture(scope="session")
def inception_weights() -> dict[str, Tensor]:
    """Random weights of the Inception network, by the recipe of the published fixture."""
    return published.drawn_weights(published.untrained_shapes())


@pytest.fixture(scope="session")
def inception(inception_weights) -> InceptionV3:
    """The Inception network with random weights; not to be changed."""
    return build_inception(inception_weights)


@pytest.fixture(scope="session")
def metric_values(shared):
    """The published features, logits and scores: name => tensor."""
    return published.tensors(shared, "metrics")


@pytest.fixture(scope="session")
def shapes() -> Tensor:
    """600 images of the built-in dataset: [600, 3, 32, 32] uint8."""
    source = SyntheticShapes(600, 32)
    return torch.from_numpy(np.stack([source[index].pixels for index in range(600)])).permute(0, 3, 1, 2)
