"""What every velocity network asks of its inputs.

Legend: B images, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_inputs(
    latents: Tensor, time: Tensor, labels: Tensor | None, *, channels: int, multiple: int, num_classes: int
) -> None:
    """Refuse latents, times and labels that a network cannot take.

    Args:
        latents: [B, C, H, W] is wanted, with C = `channels`, and H and W multiples of `multiple`.
        time: [B].
        labels: [B] int64 in [0, num_classes], the last being the null label; None where `num_classes` is 0.

    Raises:
        ValueError: a shape does not fit, or labels are missing, unexpected or out of range. The range is looked at
            on the CPU only, as elsewhere it would make the device wait.
    """
    if latents.dim() != 4 or latents.shape[1] != channels:
        raise ValueError(f"expected latents [B, {channels}, H, W], got {list(latents.shape)}")
    if latents.shape[2] % multiple or latents.shape[3] % multiple:
        raise ValueError(
            f"latents of {latents.shape[2]} x {latents.shape[3]} do not fit this network: "
            f"height and width must be multiples of {multiple}"
        )
    if time.shape != latents.shape[:1]:
        raise ValueError(f"expected one time per image, shape [{latents.shape[0]}], got {list(time.shape)}")
    if labels is None:
        if num_classes:
            raise ValueError(
                f"labels are missing; a network of {num_classes} classes needs one per image "
                f"({num_classes} is the null label)"
            )
        return
    if not num_classes:
        raise ValueError(f"labels {labels.tolist()[:8]} given to a network without labels")
    if labels.shape != latents.shape[:1]:
        raise ValueError(f"expected one label per image, shape [{latents.shape[0]}], got {list(labels.shape)}")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = labels[(labels < 0) | (labels > num_classes)]
        if outside.numel():
            raise ValueError(
                f"label {outside[0].item()} is out of range: 0 to {num_classes - 1}, "
                f"or {num_classes} for the null label"
            )
