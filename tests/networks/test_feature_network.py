"""Features at their places, and their means, which images are compared by."""

import pytest
import torch

from latentflow.networks.feature_network import FeatureNetwork, FeatureNetworkConfig


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    torch.manual_seed(0)
    return FeatureNetwork(FeatureNetworkConfig(side=16, widths=(8, 16))).eval()


def test_features_are_the_means_of_the_maps(network):
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    maps = list(network.maps(network.prepare(images)))
    assert [tuple(one.shape) for one in maps] == [(3, 8, 8, 8), (3, 16, 4, 4)]
    assert all(one.min() == 0 for one in maps)
    assert torch.equal(network(images), torch.cat([one.mean((2, 3)) for one in maps], 1))


def test_maps_of_any_size(network):
    assert [tuple(one.shape[2:]) for one in network.maps(torch.zeros(1, 3, 24, 40))] == [(12, 20), (6, 10)]
