"""The discriminator of patches: what a verdict sees, and where its gradient goes."""

import pytest
import torch

from latentflow.networks.in_training import sampled_part
from latentflow.networks.patch_discriminator import JudgedAutoencoder, PatchDiscriminator


def made(channels: int = 3, levels: int = 3) -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(channels, width=8, levels=levels)


def pixels(channels: int = 3, side: int = 64) -> torch.Tensor:
    return torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("channels", "levels"), [(1, 1), (3, 2), (4, 3)])
def test_a_verdict_for_each_place(channels, levels):
    assert made(channels, levels)(pixels(channels)).shape == (2, 1, 64 >> levels, 64 >> levels)


@pytest.mark.parametrize(("levels", "side"), [(1, 8), (2, 18), (3, 38)])
def test_the_convolutions_see_a_patch(levels, side):
    network = made(levels=levels)
    network.norms = torch.nn.ModuleList(torch.nn.Identity() for _ in network.norms)  # they see the whole image
    images = pixels(side=128).requires_grad_()
    verdicts = network(images)
    verdicts[0, 0, verdicts.shape[2] // 2, verdicts.shape[3] // 2].backward()
    rows = images.grad[0].abs().sum((0, 2)).nonzero()[:, 0]
    assert int(rows[-1] - rows[0]) + 1 == side


def test_an_image_is_judged_by_itself():
    network, images = made(), pixels()
    torch.testing.assert_close(network(images)[1:], network(images[1:]))


def test_frozen_weights_get_no_gradient_and_pixels_do():
    network, images = made(), pixels().requires_grad_()
    assert torch.equal(network.frozen(images), network(images))
    network.frozen(images).sum().backward()
    assert images.grad.abs().max() > 0
    assert all(weight.grad is None for weight in network.parameters())


def test_the_autoencoder_is_what_is_sampled():
    network = torch.nn.Conv2d(3, 3, 1)
    assert sampled_part(JudgedAutoencoder(network, made())) is network
