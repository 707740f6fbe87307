"""The input of the encoder: pictures of a source, with the labels, maps and holes that a cache stores.

Legend: n images, H and W image height and width, C channels of the pixels, h and w latent height and width, K classes
of the semantic map, V mask variants, A augmented variants, P numbers of each, c channels of the paired inputs, which
are N times smaller than the images.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from latentflow.console import notice
from latentflow.data.cache.schema import CachePlan
from latentflow.data.column_tensors import stored_values
from latentflow.data.items import ImageItem, ImageSource
from latentflow.data.painting.input_pixels import stack_inputs
from latentflow.data.painting.latent_size import class_counts, hole_counts
from latentflow.data.painting.masks import draw_mask
from latentflow.data.pictures.decode import BrokenImage
from latentflow.data.pictures.variants import draw_variants, variant_of_map
from latentflow.randomness import derive_seed
from latentflow.shapes import moved_about
from latentflow.sizes import Size

_SENT = ("pixels", "holes", "variant_numbers", "inputs")  # to the device


@dataclass(frozen=True)
class EncoderInput:
    """Consecutive images of a source, as far as they can be read.

    Attributes:
        num_rows: the number of images, including broken ones.
        broken: names of those that cannot be read, with the reasons.
        names: the n others.
        cuts: share of each picture that the crop leaves out.
        clips: share of each picture's values that lie outside the range of the pixel format.
        pixels: [n, H, W, C], stored values.
        labels: [n] int64; None for an unlabelled source.
        class_counts: [n, K, h, w] in the dtype they are stored in; None without maps.
        holes: [n, V, H, W] uint8, 1 in the hole; None if none are stored.
        hole_counts: [n, V, 1, h, w], in the same dtype.
        columns: the values of each column, as they are stored.
        variant_numbers: [n, A, P] float32; None without augmented variants.
        variant_class_counts: [n, A, K, h, w], of their maps; in the dtype of `class_counts`.
        inputs: [n, c, S / N, S / N], as `stack_inputs` gives them; None without inputs.
    """

    num_rows: int
    broken: list[tuple[str, str]]
    names: list[str]
    cuts: list[float]
    clips: list[float]
    pixels: Tensor | None = None
    labels: Tensor | None = None
    class_counts: Tensor | None = None
    holes: Tensor | None = None
    hole_counts: Tensor | None = None
    variant_numbers: Tensor | None = None
    variant_class_counts: Tensor | None = None
    inputs: Tensor | None = None
    columns: tuple[Tensor, ...] = ()

    def pin_memory(self) -> EncoderInput:
        """Pin the tensors that go to the device; called by the data loader."""
        sent = {name: getattr(self, name) for name in _SENT}
        return replace(self, **{name: None if x is None else x.pin_memory() for name, x in sent.items()})


class EncoderInputs(Dataset):
    """Reads the input of the encoder, in any thread or process.

    Args:
        source: the images.
        plan: the cache that is made of them.
    """

    def __init__(self, source: ImageSource, plan: CachePlan):
        self.source = source
        self.factor, self.num_map_classes = plan.factor, len(plan.map_class_names)
        self.masks, self.mask_variants, self.variants = plan.masks, plan.mask_variants, plan.variants
        self.counts = counts_dtype(plan)
        self.input_format, self.input_bytes = plan.input_format, 0
        if plan.inputs is not None:
            self.input_bytes = plan.input_format.bytes_per_pixel * plan.inputs.size(plan.image_size).area

    @property
    def bytes_per_image(self) -> int:
        """Approximate size of one image."""
        size = self.source.image_size
        counts = self.num_map_classes * (1 + self.variants) + self.mask_variants
        return (
            size.area * (self.source.pixel_format.bytes_per_pixel + self.mask_variants)
            + size.over(self.factor).area * counts
            + self.input_bytes
        )

    def __getitems__(self, rows: range) -> EncoderInput:
        """Read the images of `rows`."""
        items: list[tuple[int, ImageItem]] = []
        broken = []
        for row in rows:
            try:
                items.append((row, self.source[row]))
            except BrokenImage as error:
                broken.append((error.name, error.reason))
        _notice_constant([item for _, item in items])
        names, cuts = [item.name for _, item in items], [item.cut for _, item in items]
        clips = [self.source.pixel_format.share_outside(item.pixels) for _, item in items]
        read = EncoderInput(len(rows), broken, names, cuts, clips)
        if not items:
            return read
        tensors = {"pixels": torch.from_numpy(np.stack([item.pixels for _, item in items]))}
        if self.source.class_names:
            tensors["labels"] = torch.tensor([item.label for _, item in items])
        columns = self._columns([row for row, _ in items])
        if self.input_format is not None:
            tensors["inputs"] = stack_inputs([item.input for _, item in items], self.input_format)
        if self.num_map_classes:
            tensors["class_counts"] = self._counted([item.semantic_map for _, item in items])
        if self.mask_variants:
            tensors |= self._holes(items)
        if self.variants:
            tensors |= self._variants(items)
        return replace(read, columns=columns, **tensors)

    def _columns(self, rows: list[int]) -> tuple[Tensor, ...]:
        columns = self.source.columns
        if not columns:
            return ()
        values = [self.source.values(row) for row in rows]
        for row, own in zip(rows, values, strict=True):
            for column, value in zip(columns, own, strict=True):
                column.check(value, self.source.name(row))
        return tuple(stored_values(*pair) for pair in zip(columns, zip(*values, strict=True), strict=True))

    def _counted(self, maps: list[np.ndarray]) -> Tensor:
        counts = [class_counts(semantic_map, self.num_map_classes, self.factor) for semantic_map in maps]
        return torch.stack(counts).to(self.counts)

    def _variants(self, items: list[tuple[int, ImageItem]]) -> dict[str, Tensor]:
        numbers = draw_variants([row for row, _ in items], self.variants, _size_of(items).aspect)
        if not self.num_map_classes:
            return {"variant_numbers": numbers}
        pairs = zip(items, numbers, strict=True)
        maps = [variant_of_map(item.semantic_map, one) for (_, item), own in pairs for one in own]
        counts = self._counted(maps).unflatten(0, numbers.shape[:2])
        return {"variant_numbers": numbers, "variant_class_counts": counts}

    def _holes(self, items: list[tuple[int, ImageItem]]) -> dict[str, Tensor]:
        rows, size, told_as = [row for row, _ in items], _size_of(items), self.masks.told_as
        seeds = [derive_seed("mask variant", row, variant) for row in rows for variant in range(self.mask_variants)]
        holes = [draw_mask(self.masks, *size, seed) for seed in seeds]
        counts = torch.stack([hole_counts(hole, self.factor, told_as) for hole in holes]).to(self.counts)
        grouped = (len(rows), self.mask_variants)
        return {
            "holes": torch.from_numpy(np.stack(holes)).unflatten(0, grouped),
            "hole_counts": counts.unflatten(0, grouped),
        }


def _notice_constant(items: list[ImageItem]) -> None:
    for item in items:
        if (item.pixels == item.pixels[:1, :1]).all():
            notice(
                f"{item.name} has one value everywhere, {item.pixels[0, 0].tolist()}; such images are encoded like "
                "others, remove them if they are failed scans",
                kind="constant image",
            )


def _size_of(items: list[tuple[int, ImageItem]]) -> Size:
    """The size of images that are of one bucket."""
    return Size(*items[0][1].pixels.shape[:2])


def counts_dtype(plan: CachePlan) -> torch.dtype:
    """The dtype in which counts of pixels are stored."""
    return torch.uint8 if plan.factor**2 <= 255 else torch.int16


def joined(parts: list[EncoderInput], device: torch.device) -> EncoderInput:
    """Join parts in order and copy what is encoded to `device`, without waiting."""
    tensors = {}
    for field in fields(EncoderInput):
        values = [value for part in parts if isinstance(value := getattr(part, field.name), Tensor)]
        if field.name in _SENT:  # each separately: joined on the CPU they would not be pinned
            values = [value.to(device, non_blocking=device.type == "cuda") for value in values]
        if values:
            tensors[field.name] = values[0] if len(values) == 1 else moved_about(lambda *x: torch.cat(x), *values)
    of_columns = zip(*(part.columns for part in parts if part.names), strict=True)
    return EncoderInput(
        columns=tuple(torch.cat(values) for values in of_columns),
        num_rows=sum(part.num_rows for part in parts),
        broken=[one for part in parts for one in part.broken],
        names=[name for part in parts for name in part.names],
        cuts=[cut for part in parts for cut in part.cuts],
        clips=[clip for part in parts for clip in part.clips],
        **tensors,
    )
