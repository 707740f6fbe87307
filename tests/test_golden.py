"""Numbers that may not change: a new version must draw the pictures of an old one, and go on with its runs."""

from __future__ import annotations

import pytest
import torch

from latentflow.data.batches import Batch
from latentflow.flow.times import TrainingTimes
from latentflow.training.step import training_step
from tests import tiny


@pytest.fixture(scope="module")
def model(kl):
    return tiny.model(kl)


def test_a_training_step(model):
    """Times, posterior noise, noise and dropped labels of four positions, all of which the losses depend on."""
    moments = torch.linspace(-1, 1, 4 * 8 * 64).reshape(4, 8, 8, 8)
    batch = Batch(
        positions=torch.tensor([0, 1, 17, 2**33]),
        indices=torch.arange(4),
        labels=torch.tensor([0, 1, 2, 0]),
        moments=moments,
    )
    times = TrainingTimes(distribution="logit_normal")
    result = training_step(model, model.network, batch, times=times, batch_size=4, seed=3)
    torch.testing.assert_close(
        result.time, torch.tensor([0.840838, 0.273619, 0.801382, 0.590273]), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        result.loss.detach(), torch.tensor([2.70345, 2.21147, 2.43274, 2.64494]), rtol=1e-4, atol=0
    )


def test_pictures_of_seeds(model):
    drawn = model.sample(num=3, seed=4, classes=["apple", "cherry"], guidance=2.0, solver="heun", steps=4)
    torch.testing.assert_close(
        drawn.latents[:, 1, 2, 3], torch.tensor([1.08411, 1.58416, -2.59942]), rtol=1e-3, atol=1e-4
    )
    assert drawn.drawing.seeds == [4, 5, 6]
