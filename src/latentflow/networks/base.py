"""The inputs that all velocity networks share, and the checks on them.

Legend: B images, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentflow.networks.column_embedding import ColumnInput
from latentflow.networks.running import BlockNetwork
from latentflow.networks.spatial_encoder import SpatialInputs
from latentflow.shapes import Condition

FORMER_OPTIONS = ("gradient_checkpointing",)
"""Network options of earlier versions that no longer exist; they are ignored in old models."""


@dataclass(frozen=True)
class VectorInputs:
    """What a velocity network adds to the embedding of the time, as one vector per image each.

    Args:
        num_classes: number of labels; the embedding table has one more row, `null_label`. 0: a network without labels.
        num_augmentations: numbers that describe an augmented variant; 0: no such input.
        columns: named columns, whose vectors are added where that of the label is.
        constant_embedding: add a learned vector, the same for all images, where that of a label would be; a finetuned
            model has it in place of labels or columns of its source.
        jumps: whether it is a student, whose output is the average velocity over the span of the condition.
        guided: whether its guidance scale is an input as well; of a student.
    """

    num_classes: int = 0
    num_augmentations: int = 0
    columns: Sequence[ColumnInput] = ()
    constant_embedding: bool = False
    jumps: bool = False
    guided: bool = False

    @property
    def null_label(self) -> int | None:
        """Index of the label that stands for "no label"; None for a network without labels."""
        return self.num_classes if self.num_classes else None

    def check(self, num_images: int, condition: Condition) -> None:
        """Refuse a condition whose columns, numbers of variants or inputs of a student do not fit.

        Raises:
            ValueError: one is missing, unexpected or of another shape than [num_images, ...].
        """
        widths = {"augmentation": self.num_augmentations, "columns": sum(one.row.width for one in self.columns)}
        for name, width in widths.items():
            given = getattr(condition, name)
            wanted = (num_images, width) if width else None
            found = None if given is None else tuple(given.shape)
            if found != wanted:
                raise ValueError(f"condition.{name}: this network wants {wanted or 'none'}, got {found or 'none'}")
        for name, is_input in {"span": self.jumps, "guidance": self.guided}.items():
            given = getattr(condition, name)
            if given is not None and not (is_input and given.shape == (num_images,)):
                wanted = f"[{num_images}] or none" if is_input else "none, as it is no student"
                raise ValueError(f"condition.{name}: this network wants {wanted}, got {list(given.shape)}")


class VelocityNetwork(BlockNetwork):
    """Base class of velocity networks, which are called as network(latents, time, condition) => velocity.

    Args:
        config: sizes and options, with `size_multiple`.
        in_channels: channels of the latents.
        out_channels: channels of the velocity.
        inpainting, num_map_classes, input_channels: what is concatenated to the latents; see `SpatialInputs`.
        vectors: fields of `VectorInputs`: what is added to the embedding of the time.
    """

    def __init__(
        self,
        config: Any,
        *,
        in_channels: int,
        out_channels: int,
        inpainting: bool = False,
        num_map_classes: int = 0,
        input_channels: int = 0,
        **vectors: Any,
    ):
        super().__init__()
        self.config = config
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.spatial = SpatialInputs(
            in_channels, inpainting=inpainting, num_map_classes=num_map_classes, input_channels=input_channels
        )
        self.vectors = VectorInputs(**vectors)

    @property
    def input_layers(self) -> list[nn.Conv2d]:
        """The layers that read latents and spatial conditions, in the order of `spatial.channels_of`."""
        raise NotImplementedError

    @property
    def condition_layers(self) -> dict[str, nn.Module | nn.Parameter | None]:
        """What makes vectors of "label", "columns" and "augmentation", and the "constant"; None: there is none."""
        raise NotImplementedError

    def joined(self, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Latents and spatial conditions, joined along channels: [B, C, H, W] => [B, spatial.num_channels, H, W].

        Raises:
            ValueError: see `check_inputs`, `VectorInputs` and `SpatialInputs`.
        """
        check_inputs(
            latents,
            time,
            condition.labels,
            channels=self.in_channels,
            multiple=self.config.size_multiple,
            num_classes=self.vectors.num_classes,
        )
        self.vectors.check(latents.shape[0], condition)  # len() would fix the number of images in an exported network
        return self.spatial(latents, condition)


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
