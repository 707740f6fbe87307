"""Equivariance of a first stage: a turned or shrunken latent should decode to the turned or shrunken image.

Flows learn such latents faster, because they have less of the fine structure that only the decoder can read
(EQ-VAE, arXiv 2502.09509, section 3).

Legend: B images, P channels of the pixels, S side of the training crops, C latent channels, h = w = S / factor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from latentflow.randomness import ImageRandom
from latentflow.shapes import image_mean, send, shrink

_PARTS = 4  # sides are multiples of a quarter of the latent's: the paper draws scales from 1/4 to 1


def equivariance_loss(
    decode: Callable[[Tensor], Tensor], latents: Tensor, pixels: Tensor, random: ImageRandom
) -> Tensor:
    """|D(tau z) - tau x|, the mean absolute error of each image: [B] float32 (EQ-VAE's implicit regularisation).

    tau turns by 0 to 3 quarters of a circle, then shrinks to a quarter, a half, three quarters or all of the side, each
    with the same chance. On average the second decoding costs 0.47 times the first.

    Args:
        decode: D: raw latents [b, C, k, k] => pixels [b, P, k factor, k factor].
        latents: z [B, C, h, h].
        pixels: x [B, P, S, S] in [-1, 1].
        random: on the CPU; decides tau of each image.
    """
    side = latents.shape[-1]
    factor = pixels.shape[-1] // side
    draws = random.uniform(2)
    turns = send((draws[:, 0] * 4).long(), latents.device)
    latents, pixels = quarter_turned(latents, turns), quarter_turned(pixels, turns)
    sides = (((draws[:, 1] * _PARTS).long() + 1) * side).div(_PARTS, rounding_mode="floor").clamp(min=1)
    rows, losses = [], []
    for smaller in sorted(set(sides.tolist())):
        of_this_side = send((sides == smaller).nonzero()[:, 0], latents.device)
        decoded = decode(shrink(latents[of_this_side], smaller)).float()
        losses.append(image_mean((decoded - shrink(pixels[of_this_side], smaller * factor)).abs()))
        rows.append(of_this_side)
    return torch.cat(losses)[torch.cat(rows).argsort()]


def quarter_turned(images: Tensor, quarters: Tensor) -> Tensor:
    """Square images [B, ..., S, S], each turned anticlockwise by its number of quarters ([B] int64, 0 to 3)."""
    each_way = torch.stack([torch.rot90(images, turn, (-2, -1)) for turn in range(4)])
    return each_way[quarters, torch.arange(len(images), device=images.device)]
