"""Images to measure a model on: in a random order, encoded as in training, with their labels and named conditions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from latentflow.analysis.bound import Reconstruction, reconstruction_term
from latentflow.console import notice
from latentflow.data.batches import epoch_order
from latentflow.data.buckets import Croppable, in_sizes
from latentflow.data.cache.reader import is_cache
from latentflow.data.items import ImageItem, ImageSource
from latentflow.data.pictures.decode import BrokenImage
from latentflow.data.sources.images import open_images, table_with
from latentflow.data.table_options import TableOptions
from latentflow.errors import ConfigError, DataError, NonFiniteError
from latentflow.model.conditioning import CONDITION_NAMES, NOTHING, Conditioning, ConditionName
from latentflow.model.flow_model import FlowModel
from latentflow.progress import image_progress
from latentflow.randomness import ImageRandom
from latentflow.sampling.row_conditions import RowConditions, known_columns, row_conditions, why_unknown
from latentflow.shapes import Condition

Velocity = Callable[[Tensor, Tensor], Tensor]
"""A function of x [B, ...] and t [B]."""
Opened = TypeVar("Opened")

_READ_AT_ONCE = 32  # images of a batch that are not decoded


@dataclass(frozen=True)
class ReferenceLatents:
    """Images in a random order, encoded as in training; on the CPU.

    Attributes:
        source: where they come from.
        indices: which images of it.
        latents: [N, C, h, w] float32, normalised.
        given: the condition of each, `labels` and `columns` of it; what is None is not given.
        named: the columns that are given.
    """

    source: ImageSource
    indices: list[int]
    latents: Tensor
    given: Condition = NOTHING
    named: tuple[ConditionName, ...] = ()

    def rows(self, rows: Tensor | slice) -> ReferenceLatents:
        """A part of the images."""
        rows = torch.arange(len(self.indices))[rows]
        indices = [self.indices[row] for row in rows.tolist()]
        return replace(self, indices=indices, latents=self.latents[rows], given=self.given.select(rows))

    def with_columns(
        self, conditioning: Conditioning, among: Collection[ConditionName] | None = None
    ) -> ReferenceLatents:
        """The same, given the named conditions that the images have; of those `among` some, if they are named.

        Raises:
            ConfigError: see `known_columns`.
        """
        rows = row_conditions(conditioning, self.source, self.indices, self.given.labels, seed=0, among=among)
        columns = rows.columns if rows.named else None
        return replace(self, given=replace(self.given, columns=columns), named=rows.named)

    def for_others(self, seed: int) -> RowConditions | None:
        """The conditions of these images for others; None: no columns are given.

        Args:
            seed: of the order.
        """
        return RowConditions(self.given.labels, self.given.columns, seed, self.named) if self.named else None

    @property
    def told(self) -> str:
        """The condition in words."""
        names = [*(() if self.given.labels is None else ("label",)), *self.named]
        *first, last = names or [""]
        return (
            f"the {' and '.join([*([', '.join(first)] if first else []), last])} of each image" if last else "nothing"
        )


def with_columns_of(
    conditioning: Conditioning,
    data: str | Path,
    opened: Callable[[TableOptions], Opened],
    source_of: Callable[[Opened], ImageSource | None],
) -> Opened:
    """Open images with those columns of a model that they have; a notice names the others, which are left out.

    Args:
        opened: opens the images with the columns of a table.
        source_of: the images of what it opened; None: they have no columns.

    Raises:
        ConfigError, DataError: as `opened` does; also, they lack a column that the model requires.
    """
    every, optional = conditioning.columns, [one for one in conditioning.columns if one.dropout > 0]
    required = [one for one in every if one not in optional]
    names = conditioning.class_names
    try:
        found = opened(table_with(data, [one.column for one in every], class_names=names, partly=True))
        reasons = {one.name: why_unknown(one, source) for one in optional} if (source := source_of(found)) else {}
    except (ConfigError, DataError) as error:
        if not optional:
            raise
        found = opened(table_with(data, [one.column for one in required], class_names=names))
        reasons = {", ".join(one.name for one in optional): str(error)}
    if (source := source_of(found)) is not None:
        known_columns(conditioning, source)
    for name, reason in reasons.items():
        if reason:
            notice(f"{reason}; conditions left out: {name}")
    return found


def open_images_for(flow: FlowModel, data: str | Path) -> ImageSource:
    """Images that a model can be measured on, conditioned on their labels and named columns.

    Those of a model of several sizes are in its buckets; `part_of_own` gives those of one size.

    Raises:
        ConfigError: they are a latent cache or have other classes, or the model requires another condition.
        DataError: there are no images.
    """
    if is_cache(data):
        raise ConfigError(f"{data} is a latent cache, which holds no pixels to compare with; give the images")
    conditioning = flow.config.conditioning
    for name in conditioning.required:
        if name in CONDITION_NAMES and name != "label":
            raise ConfigError(
                f"this model requires the condition {name}, but only labels and named columns are given here; this can "
                f"be measured for models trained with {conditioning.kinds[name].dropout_key} above 0"
            )

    def opened(table: TableOptions) -> ImageSource:
        return open_images(data, flow.config.image_size, pixels=flow.config.pixel_format, table=table)

    source = with_columns_of(conditioning, data, opened, lambda source: source)
    if conditioning.num_classes and source.class_names and list(source.class_names) != conditioning.class_names:
        raise ConfigError(
            f"{data} has the classes {list(source.class_names)}, but the model knows {conditioning.class_names}"
        )
    if conditioning.num_classes and not source.class_names and conditioning.label_dropout == 0:
        raise ConfigError(
            f"{data} has no labels, and this model requires a label: it was trained with label_dropout = 0; "
            "give labelled images"
        )
    return in_sizes(source, flow.config.sizes) if isinstance(source, Croppable) else source


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
    return ReferenceLatents(source, indices, torch.cat(latents), Condition(labels=label_of_each)), whole


def _without_broken(source: ImageSource, order: Iterator[int]) -> Iterator[tuple[int, ImageItem]]:
    """The images at some indices, without the broken ones."""
    for index in order:
        with suppress(BrokenImage):
            yield index, source[index]


def velocity_given(flow: FlowModel, given: Condition, count: int) -> Velocity:
    """The model's velocity of `count` images under the conditions `given`, in the dtype and on the device of x."""
    shape = (count, *flow.config.latent_shape)
    condition = flow.config.conditioning.build(shape, flow.device, given)

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        return flow.velocity(x.to(flow.device, torch.float32), time.to(flow.device, torch.float32), condition).to(x)

    return velocity
