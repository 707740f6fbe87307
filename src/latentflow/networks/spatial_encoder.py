"""Spatial conditions of a velocity network, concatenated to the noisy latents: a known part, a semantic map, an input.

Legend: B images, C latent channels, H and W latent height and width, K classes of the semantic map, I channels of a
paired input.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor, nn

from latentflow.shapes import Condition


class SpatialEncoder(nn.Module):
    """The learned encoder of a semantic map: the fraction of each of K classes in each latent pixel => C channels.

    The published encoder halves a one-hot map with a linear filter until it has latent size, and then mixes the
    classes with a 1x1 convolution. Halving an even size is averaging, so only the fraction of each class in each latent
    pixel remains of the map. These fractions are computed once, with the data; only the mixing is learned. There is no
    bias: the encoding of a pixel without a class is zero.
    """

    def __init__(self, num_map_classes: int, channels: int):
        super().__init__()
        self.mix = nn.Conv2d(num_map_classes, channels, kernel_size=1, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights: the embedding of a class has about the norm of a latent pixel."""
        nn.init.normal_(self.mix.weight)

    def forward(self, class_fractions: Tensor) -> Tensor:
        """class_fractions [B, K, H, W] in [0, 1] => [B, C, H, W]."""
        return self.mix(class_fractions)


class SpatialInputs(nn.Module):
    """Joins latents and spatial conditions along channels: latents, masked latents, mask, encoded map (LFM, section 4),
    input (as SR3 and LDM have it, arXiv 2104.07636 and 2112.10752).

    Args:
        channels: C.
        inpainting: whether masked latents and mask are read (C + 1 channels more).
        num_map_classes: K; 0: no semantic map (else C channels more).
        input_channels: I; 0: no paired input (else I channels more).
    """

    def __init__(self, channels: int, *, inpainting: bool = False, num_map_classes: int = 0, input_channels: int = 0):
        super().__init__()
        self.channels = channels
        self.inpainting = inpainting
        self.num_map_classes = num_map_classes
        self.input_channels = input_channels
        self.map_encoder = SpatialEncoder(num_map_classes, channels) if num_map_classes else None

    @property
    def num_channels(self) -> int:
        """Channels of the result: C, C + 1 more for a known part, C more for a map, I more for an input."""
        known = self.channels + 1 if self.inpainting else 0
        return self.channels * (2 if self.num_map_classes else 1) + known + self.input_channels

    @property
    def channels_of(self) -> dict[str, slice]:
        """Which channels of the result the latents are, and each field of the condition that is there."""
        widths = {
            "latents": self.channels,
            "masked_latents": self.channels if self.inpainting else 0,
            "mask": 1 if self.inpainting else 0,
            "class_fractions": self.channels if self.num_map_classes else 0,
            "input": self.input_channels,
        }
        ends = list(accumulate(widths.values()))
        places = {name: slice(end - width, end) for (name, width), end in zip(widths.items(), ends, strict=True)}
        return {name: place for name, place in places.items() if widths[name]}

    def forward(self, latents: Tensor, condition: Condition) -> Tensor:
        """latents [B, C, H, W] and the condition's spatial fields => [B, num_channels, H, W].

        Raises:
            ValueError: a field is missing, unexpected or of another shape.
        """
        num_images, _, height, width = latents.shape
        shapes = {
            "masked_latents": self.channels if self.inpainting else 0,
            "mask": 1 if self.inpainting else 0,
            "class_fractions": self.num_map_classes,
            "input": self.input_channels,
        }
        joined = [latents]
        for name, channels in shapes.items():
            value = getattr(condition, name)
            wanted = (num_images, channels, height, width) if channels else None
            found = None if value is None else tuple(value.shape)
            if found != wanted:
                raise ValueError(f"condition.{name}: this network wants {wanted or 'none'}, got {found or 'none'}")
            if value is not None:
                value = value.to(latents.dtype)
                joined.append(self.map_encoder(value) if name == "class_fractions" else value)
        return torch.cat(joined, dim=1) if len(joined) > 1 else latents
