"""A convolution pyramid with fixed random weights, which separates sets of images without any training.

Legend: B images, H and W image height and width in pixels, D features of an image.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CHANNELS = (3, 16, 48, 96, 96)
_SEED = 20230717
_GAIN = 1.5  # keeps the levels at the same scale, as brightness is removed
_SLICE = 64  # images at a time; bounds the memory of large batches


class RandomPyramid(nn.Module):
    """Four levels of 3x3 convolution and ReLU, each at half the resolution of the one before.

    The features are the mean and the standard deviation over space of each channel of each level: the amount of a
    pattern, and its concentration. Weights are normal (He) and sum to zero over a filter, so that it responds to
    patterns and not to brightness; half of those of the first level may respond to colours. numpy's legacy generator
    draws the same weights in every version.
    """

    side = 64
    recipe = f"random pyramid 1: bilinear 64, antialias, [-1, 1]; channels {_CHANNELS}, seed {_SEED}, gain {_GAIN}"

    def __init__(self):
        super().__init__()
        random = np.random.RandomState(_SEED)
        self.weights = nn.ParameterList()
        for inputs, outputs in pairwise(_CHANNELS):
            drawn = random.standard_normal((outputs, inputs, 3, 3)) * (2 / (9 * inputs)) ** 0.5
            if inputs == 3:
                drawn[: outputs // 2] -= drawn[: outputs // 2].mean((2, 3), keepdims=True)
            else:
                drawn = _GAIN * (drawn - drawn.mean((1, 2, 3), keepdims=True))
            self.weights.append(nn.Parameter(torch.from_numpy(drawn.astype(np.float32)), requires_grad=False))

    @property
    def dim(self) -> int:
        """D."""
        return 2 * sum(_CHANNELS[1:])

    def forward(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] of any size => [B, D] float32."""
        return torch.cat([self._pyramid(part.float()) for part in images.split(_SLICE)])

    def _pyramid(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True, align_corners=False)
        x = (x / 127.5 - 1).contiguous(memory_format=torch.channels_last)  # faster on a CPU
        features = []
        for level, weight in enumerate(self.weights):
            x = F.relu(F.conv2d(x if level == 0 else F.avg_pool2d(x, 2), weight, padding=1), inplace=True)
            mean = x.mean((2, 3), keepdim=True)
            features += [mean.flatten(1), (x - mean).square().mean((2, 3)).sqrt()]
        return torch.cat(features, 1)
