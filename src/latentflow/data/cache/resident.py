"""A latent cache, or images, in the memory of one device, where a batch is one indexed read per tensor.

Legend: N images, H and W image height and width, C channels, V mask variants and A augmented variants of an image;
other shapes as in `reader`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator
from torch import Tensor
from torch.utils.data import Dataset

from latentflow.data.cache.reader import LatentCache, described, mirrored
from latentflow.data.cache.schema import column_tensor
from latentflow.data.column_tensors import joined_rows, stored_values
from latentflow.data.items import ImageSource, stack_pixels
from latentflow.data.painting.latent_size import mask_input, shares
from latentflow.data.prefetch import Reading, images_read_together, prefetch
from latentflow.errors import ConfigError
from latentflow.progress import image_progress
from latentflow.shapes import moved_about

Switch = Annotated[
    Literal["auto", "true", "false"],
    BeforeValidator(lambda given: str(given).lower() if isinstance(given, bool) else given),
]

_SHARE = {"cuda": 1 / 3, "cpu": 1 / 4}  # of the free memory, up to which "auto" loads a cache
_OF_VARIANTS = (
    *("known_moments", "hole_counts", "variant_moments", "variant_numbers", "variant_class_counts"),
    *("variant_inputs", "variant_input_moments"),
)


class ResidentCache:
    """The tensors of a latent cache that training reads, all of them on one device.

    It has the reading methods of `LatentCache`, which take tensors on its device.

    Args:
        names: tensors to load, without those of mirrored images.
        flips: whether to load mirrored images, too; the cache must have them.
        bucket: whose images are loaded.
    """

    def __init__(
        self, cache: LatentCache, names: Collection[str], *, flips: bool, device: torch.device, bucket: int = 0
    ):
        self.device = device
        rows, shards = cache.ranges[bucket], cache.plan.shards_of(bucket)
        self._plan, self._num_images, self._first = cache.plan, len(rows), rows.start
        self._tensors: dict[str, Tensor] = {}
        with image_progress("loading", len(rows)) as on_images:
            for name in names:
                parts = _parts(name, flips)
                like = cache.tensor(shards.start, name)
                whole = torch.empty(len(parts), len(rows), *like.shape[1:], dtype=like.dtype, device=device)
                for part, stored in zip(whole, parts, strict=True):
                    start = 0
                    for shard in shards:
                        num_images = cache.index.shards[shard].num_images
                        part[start : start + num_images] = cache.tensor(shard, stored)
                        start += num_images
                        on_images(num_images if stored == "moments" else 0)
                self._tensors[name] = whole.flatten(0, 2 if name in _OF_VARIANTS else 1)

    def moments(self, indices: Tensor, flipped: Tensor | None = None, variants: Tensor | None = None) -> Tensor:
        """See `LatentCache.moments`."""
        return self._varied("moments", self._rows(indices, flipped), variants)

    def class_fractions(self, indices: Tensor, flipped: Tensor | None = None, variants: Tensor | None = None) -> Tensor:
        """See `LatentCache.class_fractions`."""
        counts = self._varied("class_counts", self._own(indices), variants)
        return shares(mirrored(counts, flipped), self._plan.factor)

    def augmentation(self, indices: Tensor, flipped: Tensor | None, variants: Tensor) -> Tensor:
        """See `LatentCache.augmentation`."""
        numbers = self._tensors["variant_numbers"].index_select(0, self._varied_rows(self._own(indices), variants))
        return described(numbers, flipped, variants)

    def known(self, indices: Tensor, mask_variants: Tensor, flipped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `LatentCache.known`."""
        num = self._plan.mask_variants
        moments = self._tensors["known_moments"].index_select(0, self._rows(indices, flipped) * num + mask_variants)
        counts = self._tensors["hole_counts"].index_select(0, self._own(indices) * num + mask_variants)
        return moments, mask_input(shares(mirrored(counts, flipped), self._plan.factor), self._plan.masks.told_as)

    def inputs(self, indices: Tensor, flipped: Tensor | None = None, variants: Tensor | None = None) -> Tensor:
        """See `LatentCache.inputs`."""
        name = self._plan.input_tensor
        if name == "inputs":
            return mirrored(self._varied(name, indices, variants), flipped)
        return self._varied(name, self._rows(indices, flipped), variants)

    def labels(self, indices: Tensor) -> Tensor | None:
        """See `LatentCache.labels`."""
        return self._tensors["labels"].index_select(0, self._own(indices)) if "labels" in self._tensors else None

    def column_rows(self, indices: Tensor, chosen: Sequence[int]) -> Tensor:
        """See `LatentCache.column_rows`."""
        own = self._own(indices)
        stored = [self._tensors[column_tensor(number)].index_select(0, own) for number in chosen]
        return joined_rows([self._plan.columns[number] for number in chosen], stored)

    def _varied(self, name: str, rows: Tensor, variants: Tensor | None) -> Tensor:
        """Rows of a tensor of the images, or of that of their variants where `variants` is not 0."""
        own = self._tensors[name].index_select(0, rows)
        if variants is None:
            return own
        # Both are read for every image, as it would take a wait for the device to count those that need one.
        varied = self._tensors[f"variant_{name}"].index_select(0, self._varied_rows(rows, variants))
        return torch.where((variants > 0).reshape(-1, *[1] * (own.dim() - 1)), varied, own)

    def _varied_rows(self, rows: Tensor, variants: Tensor) -> Tensor:
        """Rows in a tensor of augmented variants; where `variants` is 0 that of the first one."""
        return rows * self._plan.variants + (variants - 1).clamp(min=0)

    def _rows(self, indices: Tensor, flipped: Tensor | None) -> Tensor:
        """Rows of images in a tensor whose second half holds them mirrored."""
        own = self._own(indices)
        return own if flipped is None else own + flipped * self._num_images

    def _own(self, indices: Tensor) -> Tensor:
        """The places of images among those of the bucket."""
        return indices - self._first if self._first else indices


class ResidentImages:
    """Images of a source, decoded once, all of them on one device.

    Args:
        rows: [N] int64, which images of the source.
        columns: which of the source's columns are kept, too.
        how: they are read; None: see `Reading`.

    Raises:
        DataError: an image cannot be read.
    """

    def __init__(
        self,
        source: ImageSource,
        rows: Tensor,
        *,
        device: torch.device,
        columns: Sequence[int] = (),
        how: Reading | None = None,
    ):
        size, wanted = source.image_size, rows.tolist()
        places = torch.zeros(len(source), dtype=torch.int64)
        places[rows] = torch.arange(len(rows))
        self.device, self._places = device, places.to(device)
        labels = torch.tensor([source.label(row) for row in wanted]) if source.class_names else None
        self._labels = None if labels is None else labels.to(device)
        self._columns = [source.columns[number] for number in columns]
        values = [source.values(row) for row in wanted] if columns else []
        self._stored = [
            stored_values(source.columns[number], [one[number] for one in values]).to(device) for number in columns
        ]
        pixels = source.pixel_format
        dtype = getattr(torch, pixels.dtype)
        self._pixels = torch.empty(len(rows), pixels.channels, *size, dtype=dtype, device=device)
        together, place = images_read_together(pixels.bytes_per_pixel * size.area), 0
        parts = [wanted[start : start + together] for start in range(0, len(wanted), together)]
        with image_progress("loading", len(rows)) as on_images, prefetch(_Pixels(source), parts, how) as read:
            for pixels in read:
                self._pixels[place : place + len(pixels)].copy_(pixels, non_blocking=pixels.is_pinned())
                place += len(pixels)
                on_images(len(pixels))

    def pixels(self, indices: Tensor, flipped: Tensor | None = None) -> Tensor:
        """Images of the source, which must be among `rows`, mirrored where `flipped`: [B, C, H, W]."""
        places = self._places.index_select(0, indices)
        return mirrored(moved_about(lambda x: x.index_select(0, places), self._pixels), flipped)

    def labels(self, indices: Tensor) -> Tensor | None:
        """Their labels, [B] int64; None for an unlabelled source."""
        return None if self._labels is None else self._labels.index_select(0, self._places.index_select(0, indices))

    def column_rows(self, indices: Tensor) -> Tensor:
        """The values of their columns, [B, W] float32, as a network gets them."""
        places = self._places.index_select(0, indices)
        return joined_rows(self._columns, [stored.index_select(0, places) for stored in self._stored])


class _Pixels(Dataset):
    """Reads pictures, in any thread or process."""

    def __init__(self, source: ImageSource):
        self.source = source

    def __getitems__(self, rows: Sequence[int]) -> Tensor:
        return stack_pixels([self.source[row].pixels for row in rows])


def resident_bytes(cache: LatentCache, names: Collection[str], *, flips: bool) -> int:
    """Memory that `ResidentCache` takes."""
    stored = [part for name in names for part in _parts(name, flips)]
    num_bytes = 0
    for bucket, rows in enumerate(cache.ranges):
        likes = (cache.tensor(cache.plan.shards_of(bucket).start, part) for part in stored)
        num_bytes += sum(len(rows) * like.shape[1:].numel() * like.element_size() for like in likes)
    return num_bytes


def stays_resident(wanted: Switch, num_bytes: int, device: torch.device, free: int | None, sharing: int = 1) -> bool:
    """Whether to load a cache into the memory of `device` for training.

    Args:
        wanted: the recipe's data.resident; auto: if it is a small part of the memory.
        num_bytes: size of the cache in memory.
        free: free bytes of the device's memory; None: unknown.
        sharing: processes that share this memory; each would load the whole cache.

    Raises:
        ConfigError: `wanted` is true, and the cache does not fit.
    """
    needed = num_bytes * sharing
    if wanted == "auto":
        return free is not None and needed <= _SHARE.get(device.type, 0) * free
    if wanted == "true" and free is not None and needed > free:
        what = "GPU memory" if device.type == "cuda" else "memory"
        each = f" in {sharing} processes" if sharing > 1 else ""
        raise ConfigError(
            f"data.resident = true, but the latent cache takes {needed / 2**30:.2f} GiB of {what}{each}, and "
            f"{free / 2**30:.2f} GiB are free; set data.resident=auto, which reads it from its files if it does "
            "not fit"
        )
    return wanted == "true"


def _parts(name: str, flips: bool) -> list[str]:
    """The stored tensors of one name, including that of mirrored images where those are encoded separately."""
    return [name, f"{name}_flipped"] if flips and name.endswith("moments") else [name]
