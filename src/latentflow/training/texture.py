"""Terms of a first stage's loss that ask for texture, where the absolute error alone prefers blur.

Legend: B images, P channels of the pixels, S side of the training crops.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from latentflow.data.pictures.shown import as_colours
from latentflow.networks.feature_network import FeatureNetwork
from latentflow.networks.patch_discriminator import PatchDiscriminator
from latentflow.shapes import image_mean


def perceptual_loss(judge: FeatureNetwork, decoded: Tensor, pixels: Tensor) -> Tensor:
    """Squared distance of the features at each place, as unit vectors, over places and levels: [B] in [0, 2].

    LPIPS (arXiv 1801.03924, equation 1) without learned weights, on the judge's features. The images are not resized to
    the side that the judge learned at: texture would be lost.

    Args:
        judge: frozen.
        decoded, pixels: [B, P, S, S] in [-1, 1]; the judge sees `as_colours` of them.
    """
    with torch.no_grad():
        targets = [_unit(features) for features in judge.maps(as_colours(pixels))]
    found = [_unit(features) for features in judge.maps(as_colours(decoded))]
    levels = [image_mean((f - t).square().sum(1)) for f, t in zip(found, targets, strict=True)]
    return torch.stack(levels).mean(0)


def _unit(features: Tensor) -> Tensor:
    """Features [B, D, h, w] of length 1 at each place; those of length 0 stay."""
    return F.normalize(features.float(), dim=1, eps=1e-6)


def adversarial_losses(
    discriminator: PatchDiscriminator, decoded: Tensor, pixels: Tensor, begins: bool
) -> tuple[Tensor, Tensor]:
    """What the autoencoder and the discriminator minimise, [B] float32 each: the hinge losses of arXiv 1705.02894.

    autoencoder: -D(x'), which does not reach the discriminator's weights.
    discriminator: (max(0, 1 - D(x)) + max(0, 1 + D(x'))) / 2, which does not reach the autoencoder's.

    Args:
        decoded, pixels: x' and x, [B, P, S, S] in [-1, 1].
        begins: whether it is time; before, both are 0.
    """
    if not begins:
        nothing = torch.zeros(len(pixels), device=pixels.device)
        return nothing, nothing
    deceived = image_mean(-discriminator.frozen(decoded).float())
    on_decoded, on_pixels = discriminator(decoded.detach()).float(), discriminator(pixels).float()
    learned = 0.5 * (image_mean(F.relu(1 - on_pixels)) + image_mean(F.relu(1 + on_decoded)))
    return deceived, learned
