"""The losses of feature networks: closed forms, and views that stay within the image."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from latentflow.data.batches import Batch
from latentflow.networks.feature_network import FeatureNetwork, FeatureNetworkConfig
from latentflow.randomness import ImageRandom
from latentflow.training.feature_step import (
    FeatureLearner,
    _shifted,
    contrastive_loss,
    contrastive_view,
    feature_step,
)
from tests import tiny

SMALL = FeatureNetworkConfig(side=16, widths=(8, 16))


def pictures(num: int, side: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (num, 3, side, side), generator=torch.Generator().manual_seed(0)).byte()


def learner(num_classes: int) -> FeatureLearner:
    torch.manual_seed(0)
    return FeatureLearner(SMALL, num_classes).to(memory_format=torch.channels_last)


def step(network: FeatureLearner, pixels: torch.Tensor, method: str, positions: range | None = None):
    positions = torch.arange(len(pixels)) if positions is None else torch.as_tensor(positions)
    batch = Batch(positions=positions, indices=positions, labels=positions % 3, pixels=pixels)
    how = {"prepare": network.network.prepare, "seed": 0, "runtime": tiny.CPU}
    return feature_step(network, batch, method=method, **how)


def test_contrastive_loss_of_orthogonal_images():
    """Views that agree, orthogonal to those of the other images: -log(e^(1/T) / (e^(1/T) + 2 (B - 1)))."""
    z = 3 * torch.eye(5)
    loss, right = contrastive_loss(z, 7 * z, temperature=0.5)
    expected = -math.log(math.exp(2) / (math.exp(2) + 8))
    assert loss.tolist() == pytest.approx([expected] * 5, rel=1e-6)
    assert right.tolist() == [1.0] * 5


def test_contrastive_loss_by_the_double_sum_of_the_paper():
    first, second = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).double()
    z = F.normalize(torch.stack([first, second], 1).flatten(0, 1), dim=1)  # views 2k and 2k + 1 are of one image

    def term(i: int, j: int) -> float:
        others = sum(math.exp(float(z[i] @ z[k]) / 0.2) for k in range(8) if k != i)
        return -math.log(math.exp(float(z[i] @ z[j]) / 0.2) / others)

    expected = [(term(2 * k, 2 * k + 1) + term(2 * k + 1, 2 * k)) / 2 for k in range(4)]
    assert contrastive_loss(first, second)[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_views_that_are_swapped_are_wrong():
    z = torch.eye(4)
    loss, right = contrastive_loss(z, z.roll(1, 0))
    assert right.tolist() == [0.0] * 4
    assert loss.min() > 1 / 0.2 - 1


def test_a_shifted_image_is_a_part_of_the_mirrored_surroundings():
    pixels = torch.arange(16 * 16.0).view(1, 1, 16, 16).expand(64, 3, 16, 16)
    shifted = _shifted(pixels, ImageRandom.at(0, "shift", range(64)))
    padded = F.pad(pixels, (2, 2, 2, 2), mode="reflect")
    found = set()
    for one in shifted:
        places = [(r, c) for r in range(5) for c in range(5) if torch.equal(one, padded[0, :, r : r + 16, c : c + 16])]
        assert len(places) == 1
        found |= set(places)
    assert len(found) > 20  # of 25


def test_a_view_shows_nothing_but_the_image():
    """Of an image whose pixels are their own columns."""
    ramp = torch.linspace(-0.5, 0.5, 16).expand(64, 3, 16, 16)
    views = contrastive_view(ramp, ImageRandom.at(0, "view", range(64)))
    spread = views.amax((1, 2, 3)) - views.amin((1, 2, 3))
    assert views.shape == ramp.shape
    assert views.abs().max() <= 1
    assert float(spread.min()) > 0.5 * 0.3 * 0.5  # a part of at least 0.55 of the side, at the least contrast
    assert torch.equal(views, contrastive_view(ramp, ImageRandom.at(0, "view", range(64))))
    assert not torch.allclose(views[0], views[1])


@pytest.mark.parametrize("method", ["labels", "contrastive"])
def test_gradients_reach_every_weight_and_the_loss_falls(method):
    network, pixels = learner(3 if method == "labels" else 0), pictures(12)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        found = step(network, pixels, method)
        assert found.loss.shape == found.accuracy.shape == (12,)
        found.loss.mean().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(found.loss.detach().mean()))
    assert losses[-1] < 0.8 * losses[0]


def test_labelled_images_do_not_depend_on_their_batch():
    network, pixels = learner(3), pictures(8)
    whole = step(network, pixels, "labels").loss
    parts = [step(network, pixels[part], "labels", range(*part.indices(8))).loss for part in (slice(0, 3), slice(3, 8))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)


def test_features_of_any_size_and_batch():
    network = FeatureNetwork(SMALL).eval()
    assert network(pictures(3, side=40)).shape == (3, SMALL.dim) == (3, 24)
    large = pictures(70)
    torch.testing.assert_close(network(large)[5:7], network(large[5:7]), rtol=1e-5, atol=1e-6)


def test_multiply_adds_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        FeatureNetwork(SMALL)(pictures(1))
    assert counter.get_total_flops() == 2 * SMALL.multiply_adds
