"""The flow matching objective."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from latentflow.flow.path import Path
from latentflow.shapes import image_mean


def flow_matching_loss(
    velocity: Callable[[Tensor, Tensor], Tensor], path: Path, data: Tensor, noise: Tensor, time: Tensor
) -> Tensor:
    """The flow matching loss of each image: the mean over C, H, W of |v(x_t, t) - u|^2.

    The objective of arXiv 2307.08698 before the expectation over images, noise and time.

    Args:
        velocity: a function of x [B, C, H, W] and t [B].
        path: the path between data and noise.
        data: [B, C, H, W], clean latents.
        noise: [B, C, H, W], standard normal.
        time: [B] in [0, 1].

    Returns:
        [B], in float32 whatever `velocity` computes in (float64 for float64 data).
    """
    dtype = torch.promote_types(data.dtype, torch.float32)
    data, noise = data.to(dtype), noise.to(dtype)
    x_t = path.interpolate(data, noise, time)
    return image_mean((velocity(x_t, time).to(dtype) - path.target(data, noise, time)).square())


ALIGN_BETA = 0.05


def align_loss(predicted: Tensor, data: Tensor) -> Tensor:
    """The loss of each image between its latents and those that an early block predicts (SRA 2, arXiv 2601.17830).

    The mean over C, H, W of the smooth L1 distance: with d = |predicted - data|,

        d^2 / (2 beta) where d < beta, and d - beta / 2 elsewhere; beta = 0.05.

    Args:
        predicted: [B, C, H, W].
        data: [B, C, H, W], clean latents.

    Returns:
        [B], in float32 (float64 for float64 data).
    """
    dtype = torch.promote_types(data.dtype, torch.float32)
    return image_mean(smooth_l1_loss(predicted.to(dtype), data.to(dtype), reduction="none", beta=ALIGN_BETA))
