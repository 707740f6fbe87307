"""The perceptual and the adversarial term: known values, and which weights they move."""

import pytest
import torch
from torch import nn

from latentflow.networks.feature_network import FeatureNetwork, FeatureNetworkConfig
from latentflow.networks.patch_discriminator import PatchDiscriminator
from latentflow.training.texture import adversarial_losses, perceptual_loss


@pytest.fixture(scope="module")
def judge() -> FeatureNetwork:
    torch.manual_seed(0)
    return FeatureNetwork(FeatureNetworkConfig(side=16, widths=(8, 16))).eval().requires_grad_(False)


def pixels(seed: int, channels: int = 3) -> torch.Tensor:
    return torch.rand(2, channels, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Maps(nn.Module):
    """A judge whose features are the three colours, above 0."""

    def maps(self, images):
        yield images.clamp(min=0)


def test_equal_images_have_no_distance(judge):
    assert torch.equal(perceptual_loss(judge, pixels(0), pixels(0)), torch.zeros(2))


def test_orthogonal_features_are_two_apart_whatever_their_length():
    red, green = torch.zeros(2, 1, 3, 4, 4).unbind()
    red[:, 0], green[:, 1] = 0.5, 0.25
    assert perceptual_loss(Maps(), red, green).tolist() == pytest.approx([2.0])
    half = torch.where(torch.arange(4) < 2, red, green)
    assert perceptual_loss(Maps(), half, green).tolist() == pytest.approx([1.0])


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_the_judge_sees_three_colours_of_any_channels(judge, channels):
    decoded = pixels(1, channels).requires_grad_()
    loss = perceptual_loss(judge, decoded, pixels(0, channels))
    assert ((loss > 0) & (loss < 2)).all()
    loss.sum().backward()
    reached = decoded.grad.abs().amax((0, 2, 3)) > 0
    assert reached.tolist() == [True, channels != 2, True, False, False][:channels]


def test_the_hinge_losses_have_their_values():
    class Level(nn.Module):
        """Judges a patch by its brightness."""

        def forward(self, images):
            return images.mean(1, keepdim=True)

        frozen = forward

    decoded, real = torch.full((1, 3, 4, 4), -0.5), torch.full((1, 3, 4, 4), 0.75)
    deceived, learned = adversarial_losses(Level(), decoded, real, begins=True)
    assert deceived.tolist() == pytest.approx([0.5])
    assert learned.tolist() == pytest.approx([0.5 * ((1 - 0.75) + (1 - 0.5))])
    sure = adversarial_losses(Level(), 3 * decoded, 2 * real, begins=True)[1]
    assert sure.tolist() == [0.0]


def test_neither_loss_reaches_the_weights_of_the_other():
    torch.manual_seed(0)
    discriminator, decoded = PatchDiscriminator(3, 8, 2), pixels(1).requires_grad_()
    deceived, learned = adversarial_losses(discriminator, decoded, pixels(0), begins=True)
    deceived.sum().backward(retain_graph=True)
    assert all(weight.grad is None for weight in discriminator.parameters())
    assert decoded.grad.abs().max() > 0
    decoded.grad = None
    learned.sum().backward()
    assert decoded.grad is None
    assert all(weight.grad is not None for weight in discriminator.parameters())


def test_before_its_time_the_discriminator_does_nothing():
    decoded = pixels(1).requires_grad_()
    deceived, learned = adversarial_losses(PatchDiscriminator(3, 8, 2), decoded, pixels(0), begins=False)
    assert deceived.tolist() == learned.tolist() == [0.0, 0.0]
    assert not deceived.requires_grad
