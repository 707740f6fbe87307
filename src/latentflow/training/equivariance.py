"""Equivariance of a first stage: a turned or shrunken latent should decode to the turned or shrunken image.

Flows learned such latents faster in the paper, which finds in them less of the fine structure that only the decoder can
read (EQ-VAE, arXiv 2502.09509, section 3). On small photographs they did not (docs/how-to/autoencoder.md).

Legend: B images, P channels of the pixels, H and W height and width of the training crops, C latent channels,
h = H / factor, w = W / factor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from latentflow.randomness import ImageRandom
from latentflow.shapes import image_mean, send, shrink
from latentflow.sizes import Size

_PARTS = 4  # sides are multiples of a quarter of the latent's: the paper draws scales from 1/4 to 1


def equivariance_loss(
    decode: Callable[[Tensor], Tensor], latents: Tensor, pixels: Tensor, random: ImageRandom
) -> Tensor:
    """|D(tau z) - tau x|, the mean absolute error of each image: [B] float32 (EQ-VAE's implicit regularisation).

    tau turns by 0 to 3 quarters of a circle, or by 0 or 2 where crops are not square, then shrinks to a quarter, a
    half, three quarters or all of the side, each with the same chance. On average the second decoding costs 0.47 times
    the first.

    Args:
        decode: D: raw latents [b, C, k, l] => pixels [b, P, k factor, l factor].
        latents: z [B, C, h, w].
        pixels: x [B, P, H, W] in [-1, 1].
        random: on the CPU; decides tau of each image.
    """
    size = Size(*latents.shape[-2:])
    factor = pixels.shape[-1] // size.width
    draws = random.uniform(2)
    turns = send((draws[:, 0] * 4).long() if size.is_square else 2 * (draws[:, 0] * 2).long(), latents.device)
    latents, pixels = quarter_turned(latents, turns), quarter_turned(pixels, turns)
    parts = ((draws[:, 1] * _PARTS).long() + 1).tolist()
    sizes = [Size(*(max(part * side // _PARTS, 1) for side in size)) for part in parts]
    rows, losses = [], []
    for smaller in sorted(set(sizes)):
        of_this_size = send(torch.tensor([row for row, one in enumerate(sizes) if one == smaller]), latents.device)
        decoded = decode(shrink(latents[of_this_size], smaller)).float()
        losses.append(image_mean((decoded - shrink(pixels[of_this_size], smaller.times(factor))).abs()))
        rows.append(of_this_size)
    return torch.cat(losses)[torch.cat(rows).argsort()]


def quarter_turned(images: Tensor, quarters: Tensor) -> Tensor:
    """Images [B, ..., H, W], each turned anticlockwise by its number of quarters.

    Args:
        quarters: [B] int64, 0 to 3; where images are not square, 0 or 2.
    """
    step = 1 if images.shape[-2] == images.shape[-1] else 2
    each_way = torch.stack([torch.rot90(images, turn, (-2, -1)) for turn in range(0, 4, step)])
    return each_way[quarters // step, torch.arange(len(images), device=images.device)]
