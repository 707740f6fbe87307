"""Training a feature network: on the classes of the images, or without labels by recognising two views of an image.

With labels: the cross-entropy of the class, labels smoothed. Without: the contrastive loss of SimCLR (arXiv 2002.05709,
equation 1). With z_i and z_j the normalised projections of the two views of an image, s(a, b) their scalar product,
and k over all other views of the batch,

    loss(i, j) = -log( exp(s(z_i, z_j) / temperature) / sum_{k != i} exp(s(z_i, z_k) / temperature) )

Contrastive learning needs one network and no memory of other images, its loss belongs to single images, and it takes
nothing for granted about upright pictures, which many industrial, medical and satellite images are not.

Legend: B images, S side of the network's input, K classes, P projected features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentflow.data.batches import Batch
from latentflow.networks.feature_network import FeatureNetwork, FeatureNetworkConfig
from latentflow.randomness import ImageRandom, on_device
from latentflow.runtime import Runtime

FeatureMethod = Literal["labels", "contrastive"]

_SMOOTHING = 0.1  # of labels
_TEMPERATURE = 0.2
_PROJECTED = 128  # P
_SHIFT = 1 / 8  # of labelled images, at most, as a share of their side
_LEAST_AREA = 0.3  # of a contrastive view
_JITTER = 0.4  # of brightness, contrast and saturation of a contrastive view
_GREY = 0.2  # share of contrastive views without colour


class FeatureLearner(nn.Module):
    """A feature network with the head that trains it and is thrown away afterwards.

    Args:
        num_classes: K; 0: without labels, the head projects to P numbers.
    """

    def __init__(self, config: FeatureNetworkConfig, num_classes: int):
        super().__init__()
        self.network = FeatureNetwork(config)
        width = config.widths[-1]
        if num_classes:
            self.head: nn.Module = nn.Linear(width, num_classes)
        else:
            self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, _PROJECTED))

    def forward(self, pixels: Tensor) -> Tensor:
        """Prepared pixels [B, 3, S, S] => logits [B, K], or projections [B, P]."""
        return self.head(self.network.levels(pixels)[-1]).float()


@dataclass(frozen=True)
class FeatureStep:
    """The loss of each image of one batch, and whether it is recognised; [B] float32.

    Attributes:
        loss: with its graph.
        accuracy: 1 where the class is the most likely one, or where the other view of the image is the nearest view.
    """

    loss: Tensor
    accuracy: Tensor


def feature_step(
    network: Callable[[Tensor], Tensor],
    batch: Batch,
    *,
    prepare: Callable[[Tensor], Tensor],
    method: FeatureMethod,
    seed: int,
    runtime: Runtime,
) -> FeatureStep:
    """Change the images at random, and compare the network's answer with their class or with each other.

    Args:
        network: a `FeatureLearner`, possibly distributed.
        prepare: of its feature network.
    """
    device = runtime.device
    positions = on_device(batch.positions, device)
    pixels = prepare(batch.pixels.to(device, non_blocking=True))
    if method == "labels":
        views = _shifted(pixels, ImageRandom.at(seed, "feature shift", positions, device))
    else:
        random = (ImageRandom.at(seed, f"feature view {number}", positions, device) for number in (1, 2))
        views = torch.cat([contrastive_view(pixels, one) for one in random])
    with runtime.autocast():
        found = network(views)
    if method == "labels":
        labels = batch.labels.to(device, non_blocking=True)
        loss = F.cross_entropy(found, labels, label_smoothing=_SMOOTHING, reduction="none")
        return FeatureStep(loss, (found.detach().argmax(1) == labels).float())
    loss, right = contrastive_loss(*found.chunk(2))
    return FeatureStep(loss, right)


def contrastive_loss(first: Tensor, second: Tensor, temperature: float = _TEMPERATURE) -> tuple[Tensor, Tensor]:
    """The loss of equation 1 of arXiv 2002.05709, the mean of loss(i, j) and loss(j, i) of each image.

    Args:
        first, second: [B, P], projections of the two views of each image.

    Returns:
        loss [B]; and [B] float32, the share of its two views whose nearest view is the other one.
    """
    count = len(first)
    z = F.normalize(torch.cat([first, second]), dim=1)
    similarity = z @ z.T / temperature  # s(z_i, z_k) / temperature
    similarity = similarity.masked_fill(torch.eye(2 * count, dtype=torch.bool, device=z.device), -math.inf)  # k != i
    partner = torch.arange(2 * count, device=z.device).roll(count)
    loss = F.cross_entropy(similarity, partner, reduction="none")  # -log(exp(s_ij) / sum_k exp(s_ik))
    right = (similarity.detach().argmax(1) == partner).float()
    return loss.view(2, count).mean(0), right.view(2, count).mean(0)


def _shifted(pixels: Tensor, random: ImageRandom) -> Tensor:
    """Images moved by whole pixels, up to an eighth of their side, with what they show mirrored at the rim."""
    side = pixels.shape[-1]  # the network reads squares
    most = int(side * _SHIFT)
    padded = F.pad(pixels, (most,) * 4, mode="reflect").permute(0, 2, 3, 1)
    corners = (random.uniform(2) * (2 * most + 1)).long()  # [B, 2]
    places = corners[:, :, None] + torch.arange(side, device=pixels.device)  # [B, 2, S]
    rows, columns = places[:, 0, :, None], places[:, 1, None, :]
    images = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    return padded[images, rows, columns].permute(0, 3, 1, 2)


def contrastive_view(pixels: Tensor, random: ImageRandom) -> Tensor:
    """A random part of each image at full size, mirrored or not, in other colours: [B, 3, S, S] => the same shape.

    The views of arXiv 2002.05709, appendix A, without blur and without other shapes than squares: features that blur
    does not change would not see that pictures are blurred.
    """
    u = random.uniform(8).float()
    zoom = (_LEAST_AREA + (1 - _LEAST_AREA) * u[:, 0]).sqrt()  # side of the part, as a share of the image's
    centre = (2 * u[:, 1:3] - 1) * (1 - zoom[:, None])  # in [-1, 1], so that the part lies within the image
    mirrored = torch.where(u[:, 3] < 0.5, -zoom, zoom)
    theta = torch.zeros(len(pixels), 2, 3, device=pixels.device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = mirrored, zoom, centre
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    view = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    brightness, contrast, saturation = (1 + _JITTER * (2 * u[:, 4:7] - 1)).T[..., None, None, None]
    saturation = torch.where(u[:, 7, None, None, None] < _GREY, 0.0, saturation)
    grey = view.mean(1, keepdim=True)
    view = grey + saturation * (view - grey)
    level = view.mean((1, 2, 3), keepdim=True)
    view = level + contrast * (view - level)
    return (((view + 1) * brightness) - 1).clamp(-1, 1).contiguous(memory_format=torch.channels_last)
