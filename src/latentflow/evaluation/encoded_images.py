"""Images to measure a model on: in a random order, encoded as in training, conditioned on labels only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from latentflow.analysis.bound import Reconstruction, reconstruction_term
from latentflow.data.batches import epoch_order
from latentflow.data.cache.reader import is_cache
from latentflow.data.items import ImageItem, ImageSource
from latentflow.data.pictures.decode import BrokenImage
from latentflow.data.sources.images import open_images, table_with
from latentflow.errors import ConfigError, DataError, NonFiniteError
from latentflow.model.flow_model import FlowModel
from latentflow.progress import image_progress
from latentflow.randomness import ImageRandom
from latentflow.shapes import Condition

Velocity = Callable[[Tensor, Tensor], Tensor]
"""A function of x [B, ...] and t [B]."""

_READ_AT_ONCE = 32  # images of a batch that are not decoded


@dataclass(frozen=True)
class ReferenceLatents:
    """Images in a random order, encoded as in training; on the CPU.

    Attributes:
        source: where they come from.
        indices: which images of it.
        latents: [N, C, h, w] float32, normalised.
        labels: [N] int64, the condition of each; None: unconditional.
    """

    source: ImageSource
    indices: list[int]
    latents: Tensor
    labels: Tensor | None

    def rows(self, rows: Tensor | slice) -> ReferenceLatents:
        """A part of the images."""
        indices = torch.tensor(self.indices)[rows].tolist()
        labels = None if self.labels is None else self.labels[rows]
        return ReferenceLatents(self.source, indices, self.latents[rows], labels)

    @property
    def told(self) -> str:
        """The condition in words."""
        return "nothing" if self.labels is None else "the label of each image"


def open_images_for(flow: FlowModel, data: str | Path) -> ImageSource:
    """Images that a model can be measured on, conditioned on their labels only.

    Raises:
        ConfigError: they are a latent cache or have other classes, or the model requires another condition.
        DataError: there are no images.
    """
    if is_cache(data):
        raise ConfigError(f"{data} is a latent cache, which holds no pixels to compare with; give the images")
    conditioning = flow.config.conditioning
    table = table_with(data, (), class_names=conditioning.class_names)
    source = open_images(data, flow.config.image_size, pixels=flow.config.pixel_format, table=table)
    for name in conditioning.required:
        if name != "label":
            raise ConfigError(
                f"this model requires the condition {name}, but only labels are given here; this can be measured for "
                f"models trained with {conditioning.kinds[name].dropout_key} above 0"
            )
    if conditioning.num_classes and source.class_names and list(source.class_names) != conditioning.class_names:
        raise ConfigError(
            f"{data} has the classes {list(source.class_names)}, but the model knows {conditioning.class_names}"
        )
    if conditioning.num_classes and not source.class_names and conditioning.label_dropout == 0:
        raise ConfigError(
            f"{data} has no labels, and this model requires a label: it was trained with label_dropout = 0; "
            "give labelled images"
        )
    return source


@torch.no_grad()
def encode_reference(
    flow: FlowModel,
    source: ImageSource,
    num: int,
    *,
    least: int,
    batch_size: int,
    seed: int,
    num_decoded: int = 0,
    visit: Callable[[Tensor, Tensor], None] = lambda pixels, latents: None,
) -> tuple[ReferenceLatents, Reconstruction | None]:
    """Encode the first `num` images of a random order, without broken ones, and decode some of them again.

    Args:
        num: how many; fewer if there are no more.
        least: fewer than these are refused.
        num_decoded: how many reconstructions are compared with their images.
        visit: called with each batch: pixels [B, P, H, W] on the CPU, and latents [B, C, h, w] on the device.

    Raises:
        DataError: too few images can be read.
        NonFiniteError: latents are not finite.
    """
    labelled = bool(flow.config.conditioning.num_classes and source.class_names)
    indices: list[int] = []
    labels: list[int] = []
    latents: list[Tensor] = []
    reconstructions: list[Reconstruction] = []
    order = iter(epoch_order(seed, len(source), 0).tolist())
    with image_progress("encoding", min(num, len(source))) as on_images:
        while len(indices) < num:
            size = batch_size if len(indices) < num_decoded else _READ_AT_ONCE
            items = list(islice(_without_broken(source, order), min(size, num - len(indices))))
            if not items:
                break
            found = [index for index, _ in items]
            labels += [item.label for _, item in items if labelled]
            batch = torch.stack([torch.from_numpy(item.pixels).permute(2, 0, 1) for _, item in items])
            images = source.pixel_format.to_unit(batch).to(flow.device)
            encoded = flow.encode(images, ImageRandom.at(seed, "posterior", found, flow.device))
            if not encoded.isfinite().all():
                raise NonFiniteError("the autoencoder's latents of these images are not finite")
            missing = num_decoded - len(indices)
            if missing > 0:
                reconstructions.append(reconstruction_term(images[:missing], flow.decode(encoded[:missing])))
            visit(batch, encoded)
            indices += found
            latents.append(encoded.float().cpu())
            on_images(len(found))
    if len(indices) < least:
        raise DataError(
            f"{source.description}: {len(indices)} images can be read, and {least} are needed; "
            f"give more images, or --num {max(len(indices), 2)}"
        )
    label_of_each = torch.tensor(labels) if labelled else None
    whole = reconstructions[0] if reconstructions else None
    for part in reconstructions[1:]:
        whole = whole + part
    return ReferenceLatents(source, indices, torch.cat(latents), label_of_each), whole


def _without_broken(source: ImageSource, order: Iterator[int]) -> Iterator[tuple[int, ImageItem]]:
    """The images at some indices, without the broken ones."""
    for index in order:
        with suppress(BrokenImage):
            yield index, source[index]


def velocity_given(flow: FlowModel, labels: Tensor | None, count: int) -> Velocity:
    """The model's velocity of `count` images conditioned on `labels` only, in the dtype and on the device of x."""
    shape = (count, *flow.config.latent_shape)
    condition = flow.config.conditioning.build(shape, flow.device, Condition(labels=labels))

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        return flow.velocity(x.to(flow.device, torch.float32), time.to(flow.device, torch.float32), condition).to(x)

    return velocity
