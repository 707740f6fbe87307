"""The endless stream of training images, and the record of one batch.

Position p of the stream is image `order_e[p mod n]` of epoch e = p div n, where order_e is a permutation drawn from
(seed, epoch). So the order depends neither on the number of processes nor on where a run was interrupted, and an epoch
may end in the middle of a batch. A cache of several buckets has such a stream for each of them, and each batch goes on
with one: see `bucket_order`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from latentflow.columns import Column
from latentflow.data.bucket_order import BucketOrder, epoch_order
from latentflow.data.buckets import BucketedImages
from latentflow.data.cache.reader import LatentCache
from latentflow.data.cache.resident import ResidentCache, ResidentImages
from latentflow.data.cache.schema import column_tensor
from latentflow.data.column_tensors import rows_of, stored_values
from latentflow.data.items import ImageSource, stack_pixels
from latentflow.data.painting.input_pixels import stack_inputs
from latentflow.data.painting.latent_size import class_counts, hide, hole_counts, mask_input, shares
from latentflow.data.painting.mask_rules import MaskRules
from latentflow.data.painting.masks import draw_mask
from latentflow.data.prefetch import Reading, room_for_workers, stream_processes, usable_cpus
from latentflow.randomness import ImageRandom, derive_seed

_MOST_DECODING, _MOST_READING = 16, 4  # processes for one GPU
_DRAWN_TOGETHER = 8192  # positions
MEASURED_TOGETHER = 16
"""Images of one bucket in a measurement, few enough that it sees all buckets."""


@dataclass(frozen=True)
class Batch:
    """Images of one training step, as `moments` or as `pixels`, with their conditions.

    Attributes:
        positions: [B] int64, positions in the endless stream; they seed each image's randomness.
        indices: [B] int64, indices of the images in the data set.
        labels: [B] int64 class indices, None for unlabelled data.
        moments: [B, M, h, w], from a cache; in the precision of the cache until moved, then float32.
        pixels: [B, C, H, W], stored values in the source's `pixel_format`, encoded in the step.
        mask: [B, 1, h, w] float32, share of each latent pixel in the hole, for inpainting.
        known_moments: [B, M, h, w], of the images with their holes filled, from a cache; in the same dtype.
        known_pixels: [B, C, H, W], the images with their holes filled, encoded in the step.
        class_fractions: [B, K, h, w] float32, share of each map class in each latent pixel.
        columns: [B, W] float32, the values of the columns that training reads; see `latentflow.columns.ColumnRow`.
        augmentation: [B, P] float32, the numbers of the variant that an image is seen as; 0: the image itself.
        inputs: [B, c, S / N, S / N], the paired inputs: stored values if they are uint8, else in [-1, 1].
        input_moments: [B, M, h, w], those of inputs that are given as latents, from a cache; in the same dtype.
    """

    positions: Tensor
    indices: Tensor
    labels: Tensor | None = None
    moments: Tensor | None = None
    pixels: Tensor | None = None
    mask: Tensor | None = None
    known_moments: Tensor | None = None
    known_pixels: Tensor | None = None
    class_fractions: Tensor | None = None
    columns: Tensor | None = None
    augmentation: Tensor | None = None
    inputs: Tensor | None = None
    input_moments: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Move to a device, moments as float32; positions and indices stay on the CPU."""

        def moved(name: str, x: Tensor) -> Tensor:
            x = x if name in ("positions", "indices") else x.to(device, non_blocking=True)
            return x.float() if name.endswith("moments") else x

        return self._map(moved)

    def pin_memory(self) -> Batch:
        """Pin every CPU tensor, so that copies to the device do not block; called by the data loader."""
        return self._map(lambda name, x: x.pin_memory() if x.device.type == "cpu" else x)

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: None if x is None else change(name, x) for name, x in values.items()})


@dataclass(frozen=True)
class SpatialData:
    """Which spatial conditions training reads along with the images.

    Attributes:
        factor: image side divided by latent side.
        holes: random holes for inpainting, resampled each time an image is seen; None: no holes.
        cached_holes: use the mask variants in the latent cache instead.
        maps: read semantic maps.
        pictures: the images of a latent cache, for cutting holes; None: the source itself has pixels.
        inputs: read the paired inputs.
    """

    factor: int
    holes: MaskRules | None = None
    cached_holes: bool = False
    maps: bool = False
    pictures: ImageSource | None = None
    inputs: bool = False


_NOTHING = SpatialData(factor=1)


class TrainingImages(Dataset):
    """Batches by stream position, from a latent cache or straight from images.

    Args:
        source: a complete latent cache, or images, which are encoded in the step.
        seed: for the order, the flips and the holes.
        flip: mirror each image with probability 1/2, independently each time it is seen.
        kept: indices of the images to use; None: all.
        spatial: holes, semantic maps and inputs; None: none of them.
        columns: names of the columns of the source that are read, in this order.
        augment: probability with which an image is seen as one of its variants in the latent cache, drawn each time.
        batch_size: images of a step, which are of one bucket; needed where the cache has several.
    """

    def __init__(
        self,
        source: LatentCache | ImageSource,
        *,
        seed: int,
        flip: bool,
        kept: Sequence[int] | None = None,
        spatial: SpatialData | None = None,
        columns: Sequence[str] = (),
        augment: float = 0.0,
        batch_size: int | None = None,
    ):
        self.source = source
        own = [column.name for column in source.columns]
        self._columns = [own.index(name) for name in columns]
        self.augment = augment
        self.seed = seed
        self.flip = flip
        self.kept = torch.arange(len(source)) if kept is None else torch.as_tensor(kept)
        self.spatial = spatial
        self.held: Sequence[ResidentCache | ResidentImages] = ()
        ranges = source.ranges if isinstance(source, LatentCache | BucketedImages) else [range(len(source))]
        self.buckets = [self.kept[(self.kept >= rows.start) & (self.kept < rows.stop)] for rows in ranges]
        self.batch_size = batch_size
        assert batch_size is not None or len(self.buckets) == 1
        self._remember()
        if spatial is not None and spatial.pictures is not None:
            rows = {spatial.pictures.name(row): row for row in range(len(spatial.pictures))}
            self._picture_of = torch.tensor([rows[name] for name in source.names()])

    def __len__(self) -> int:
        return len(self.kept)

    def images_per_class(self) -> list[int]:
        """The number of images used of each class of the source; empty if it is unlabelled."""
        labels = class_labels(self.source, self.kept.tolist())
        return [] if labels is None else labels.bincount(minlength=len(self.source.class_names)).tolist()

    def only(self, rows: Sequence[int], purpose: str) -> TrainingImages:
        """Other images of the same source, to measure on: never mirrored, and never as a variant.

        Args:
            rows: their indices in the source.
            purpose: gives them an order and holes other than those of training.
        """
        seed = derive_seed(self.seed, purpose)
        columns = [column.name for column in self.columns]
        size = None if self.batch_size is None else min(self.batch_size, MEASURED_TOGETHER)
        given = {"spatial": self.spatial, "columns": columns, "batch_size": size}
        return TrainingImages(self.source, seed=seed, flip=False, kept=rows, **given)

    def in_batches_of(self, batch_size: int) -> TrainingImages:
        """The same images in steps of another size, which orders those of several buckets in another way."""
        other = copy.copy(self)
        other.batch_size = batch_size
        other._remember()
        return other

    @property
    def columns(self) -> list[Column]:
        """The columns that are read."""
        return [self.source.columns[number] for number in self._columns]

    def column_values(self) -> list[Tensor]:
        """The values of each column that is read, of the images used, as they are stored; see `column_tensors`."""
        if isinstance(self.source, LatentCache):
            return [self.source.column_values(number, self.kept) for number in self._columns]
        values = [self.source.values(index) for index in self.kept.tolist()] if self._columns else []
        return [stored_values(self.source.columns[n], [one[n] for one in values]) for n in self._columns]

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_order", "_drawn", "_bucket_order", "held")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.held = ()
        self._remember()

    def _remember(self) -> None:
        """Set up the memory of what is drawn for many positions: the order of an epoch, the numbers of `_uniform`."""
        buckets, seed = self.buckets, self.seed
        counts = [len(rows) for rows in buckets]

        def ordered(bucket: int, epoch: int) -> Tensor:
            return buckets[bucket][epoch_order(seed, counts[bucket], epoch, bucket)]

        def drawn(purpose: str, block: int) -> Tensor:
            first = block * _DRAWN_TOGETHER
            return ImageRandom.at(seed, purpose, torch.arange(first, first + _DRAWN_TOGETHER)).uniform()

        self._bucket_order = BucketOrder(counts, self.batch_size or len(self), seed)
        self._order = lru_cache(maxsize=2 * len(buckets))(ordered)
        self._drawn = lru_cache(maxsize=4)(drawn)

    @property
    def decodes(self) -> bool:
        """Whether reading a batch decodes pictures."""
        return not isinstance(self.source, LatentCache) or (self.spatial or _NOTHING).pictures is not None

    @property
    def bytes_per_image(self) -> int:
        """Approximate size of one image in a batch."""
        cache, spatial, num_bytes = isinstance(self.source, LatentCache), self.spatial or _NOTHING, 64
        size = self.source.plan.image_size if cache else self.source.image_size
        if cache:
            names = [name for name in self.cached_tensors if not name.startswith("variant_")]  # in place of others
            tensors = [self.source.tensor(0, name) for name in names]
            num_bytes += sum(tensor.shape[1:].numel() * tensor.element_size() for tensor in tensors)
        inputs = 4 * self.source.input_format.channels * size.area if spatial.inputs and not cache else 0
        pictures = (not cache) + (spatial.holes is not None and not spatial.cached_holes)
        maps = len(self.source.map_class_names) * size.over(spatial.factor).area if spatial.maps else 0
        return num_bytes + pictures * self.source.pixel_format.bytes_per_pixel * size.area + 4 * maps + inputs

    @property
    def cached_tensors(self) -> list[str]:
        """The tensors that are read from a latent cache, without those of mirrored images; empty for other sources."""
        if not isinstance(self.source, LatentCache):
            return []
        spatial = self.spatial or _NOTHING
        read = {
            "moments": True,
            "labels": bool(self.source.class_names),
            "class_counts": spatial.maps,
            "known_moments": spatial.cached_holes,
            "hole_counts": spatial.cached_holes,
            "variant_moments": self.augment > 0,
            "variant_numbers": self.augment > 0,
            "variant_class_counts": self.augment > 0 and spatial.maps,
            self.source.plan.input_tensor: spatial.inputs,
            f"variant_{self.source.plan.input_tensor}": self.augment > 0 and spatial.inputs,
        }
        return [name for name, wanted in read.items() if wanted] + [column_tensor(n) for n in self._columns]

    def hold(self, device: torch.device, how: Reading | None = None) -> None:
        """Load the tensors of a latent cache, or all images, into the memory of `device`; read batches from there.

        Args:
            how: images, which must have neither holes nor maps, are read.
        """
        if isinstance(self.source, LatentCache):
            names, buckets = self.cached_tensors, range(len(self.buckets))
            self.held = [ResidentCache(self.source, names, flips=self.flip, device=device, bucket=b) for b in buckets]
        else:
            assert self.spatial is None
            self.held = [ResidentImages(self.source, self.kept, device=device, columns=self._columns, how=how)]

    def bucket_at(self, positions: Sequence[int] | Tensor) -> int:
        """The bucket that the images at some positions of one batch are of."""
        return self._placed(_as_tensor(positions))[0]

    def parts(self, positions: range) -> list[range]:
        """Consecutive positions, cut where a batch ends if there are several buckets: each part is of one of them."""
        if len(self.buckets) == 1:
            return [positions] if positions else []
        starts = range(positions.start - positions.start % self.batch_size, positions.stop, self.batch_size)
        cut = (range(max(start, positions.start), min(start + self.batch_size, positions.stop)) for start in starts)
        return [part for part in cut if part]

    def _placed(self, positions: Tensor) -> tuple[int, Tensor]:
        """The bucket of some positions of one batch, and the positions in the bucket's stream."""
        if len(self.buckets) == 1 or not len(positions):
            return 0, positions
        batches = positions // self.batch_size
        assert (batches == batches[0]).all(), "positions of several batches"
        bucket, before = self._bucket_order.at(int(batches[0]))
        return bucket, before * self.batch_size + positions % self.batch_size

    def indices_at(self, positions: Sequence[int] | Tensor) -> Tensor:
        """Indices of the images at some positions of the stream, [B] int64."""
        bucket, positions = self._placed(_as_tensor(positions))
        number = len(self.buckets[bucket])
        epochs, places = positions // number, positions % number
        if len(positions) and (epochs == epochs[0]).all():  # nearly always
            return self._order(bucket, int(epochs[0]))[places]
        indices = torch.empty_like(places)
        for epoch in epochs.unique().tolist():
            own = epochs == epoch
            indices[own] = self._order(bucket, epoch)[places[own]]
        return indices

    def names_at(self, positions: Sequence[int] | Tensor) -> list[str]:
        """The names of the images at some positions of the stream."""
        return image_names(self.source, self.indices_at(positions).tolist())

    def at(self, positions: Sequence[int] | Tensor, *, augmented: bool = True) -> Batch:
        """The batch at some positions of the stream; equal positions always give equal batches.

        Args:
            augmented: False: never a variant, but the images themselves.
        """
        positions = _as_tensor(positions)
        indices = self.indices_at(positions)
        flipped = self._uniform("flip", positions) < 0.5 if self.flip else None
        if not isinstance(self.source, LatentCache):
            return Batch(positions, indices, **self._pictures(positions, indices, flipped))
        variants = self._variants(positions) if augmented else None
        return Batch(positions, indices, **self._encoded(positions, indices, flipped, variants))

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        return self.at(positions)

    def _encoded(
        self, positions: Tensor, indices: Tensor, flipped: Tensor | None, variants: Tensor | None
    ) -> dict[str, Tensor | None]:
        """The fields of a batch from a latent cache."""
        cache, spatial, mask_variants = self.source, self.spatial or _NOTHING, None
        if self.held:
            cache = self.held[self.bucket_at(positions)]
        if spatial.cached_holes:
            mask_variants = (self._uniform("mask variant", positions) * self.source.plan.mask_variants).long()
        rows, flips, mask_variants, variants = self._sent(indices, flipped, mask_variants, variants)
        batch = {"labels": cache.labels(rows), "moments": cache.moments(rows, flips, variants)}
        if self._columns:
            batch["columns"] = cache.column_rows(rows, self._columns)
        if variants is not None:
            batch["augmentation"] = cache.augmentation(rows, flips, variants)
        if spatial.maps:
            batch["class_fractions"] = cache.class_fractions(rows, flips, variants)
        if spatial.inputs:
            batch[self.source.plan.input_tensor] = cache.inputs(rows, flips, variants)
        if spatial.cached_holes:
            batch["known_moments"], batch["mask"] = cache.known(rows, mask_variants, flips)
        elif spatial.holes:
            items = [spatial.pictures[row] for row in self._picture_of[indices].tolist()]
            batch |= self._holes(positions, _mirrored([item.pixels for item in items], flipped))
        return batch

    def _variants(self, positions: Tensor) -> Tensor | None:
        """Which augmented variant is seen at each position, counted from 1; 0: the image itself. [B] int64."""
        if not self.augment:
            return None
        uniform = self._uniform("augmented variant", positions)
        # Below `augment` it is uniform in [0, augment), and chooses among the variants.
        chosen = (uniform * (self.source.plan.variants / self.augment)).long().clamp(max=self.source.plan.variants - 1)
        return torch.where(uniform < self.augment, chosen + 1, 0)

    def _sent(self, *choices: Tensor | None) -> list[Tensor | None]:
        """Choices for each image, [B] each, on the device of what is held: one asynchronous copy."""
        if not self.held or self.held[0].device.type == "cpu":
            return list(choices)
        device = self.held[0].device
        together = torch.stack([choice.long() for choice in choices if choice is not None])
        together = together.pin_memory() if device.type == "cuda" else together
        sent = iter(together.to(device, non_blocking=True))
        return [None if choice is None else next(sent).to(choice.dtype) for choice in choices]

    def _uniform(self, purpose: str, positions: Tensor) -> Tensor:
        """A number in [0, 1) for each position, [B] float64; computed for many consecutive positions at once."""
        blocks = positions // _DRAWN_TOGETHER
        uniform = torch.empty(len(positions), dtype=torch.float64)
        for block in blocks.unique().tolist():
            own = blocks == block
            uniform[own] = self._drawn(purpose, block)[positions[own] % _DRAWN_TOGETHER]
        return uniform

    def _pictures(self, positions: Tensor, indices: Tensor, flipped: Tensor | None) -> dict[str, Tensor | None]:
        """The fields of a batch from images."""
        if self.held:
            rows, flips = self._sent(indices, flipped)
            held = self.held[0]
            columns = held.column_rows(rows) if self._columns else None
            return {"labels": held.labels(rows), "pixels": held.pixels(rows, flips), "columns": columns}
        items = [self.source[index] for index in indices.tolist()]
        pixels = _mirrored([item.pixels for item in items], flipped)
        labels = torch.tensor([item.label for item in items]) if self.source.class_names else None
        batch = {"labels": labels, "pixels": stack_pixels(pixels)}
        if self._columns:
            values = [self.source.values(index) for index in indices.tolist()]
            batch["columns"] = rows_of(self.columns, [[one[n] for n in self._columns] for one in values])
        if self.spatial is None:
            return batch
        if self.spatial.maps:
            factor, num_classes = self.spatial.factor, len(self.source.map_class_names)
            maps = _mirrored([item.semantic_map for item in items], flipped)
            counts = torch.stack([class_counts(semantic_map, num_classes, factor) for semantic_map in maps])
            batch["class_fractions"] = shares(counts, factor)
        if self.spatial.inputs:
            inputs = _mirrored([item.input for item in items], flipped)
            batch["inputs"] = stack_inputs(inputs, self.source.input_format)
        if self.spatial.holes:
            batch |= self._holes(positions, pixels)
        return batch

    def _holes(self, positions: Tensor, pixels: list[np.ndarray]) -> dict[str, Tensor]:
        """Cut a random hole into each image, seeded by its position."""
        seeds = [derive_seed(self.seed, "mask", position) for position in positions.tolist()]
        holes = [draw_mask(self.spatial.holes, *p.shape[:2], seed) for p, seed in zip(pixels, seeds, strict=True)]
        told_as, factor = self.spatial.holes.told_as, self.spatial.factor
        counts = torch.stack([hole_counts(hole, factor, told_as) for hole in holes])
        pixel_format = self.source.pixel_format
        hidden = [hide(picture, hole, told_as, pixel_format) for picture, hole in zip(pixels, holes, strict=True)]
        return {"known_pixels": stack_pixels(hidden), "mask": mask_input(shares(counts, factor), told_as)}


def image_names(source: LatentCache | ImageSource, rows: Sequence[int]) -> list[str]:
    """The names of some images of a cache or a source."""
    if isinstance(source, LatentCache):
        names = source.names()
        return [names[row] for row in rows]
    return [source.name(row) for row in rows]


def class_labels(source: LatentCache | ImageSource, rows: Sequence[int]) -> Tensor | None:
    """The labels of some images of a cache or a source, [n] int64; None if it is unlabelled."""
    if isinstance(source, LatentCache):
        return source.labels(rows)
    return torch.tensor([source.label(row) for row in rows]) if source.class_names else None


def _mirrored(arrays: Sequence[np.ndarray], flipped: Tensor | None) -> list[np.ndarray]:
    """Pictures or maps ([H, W, ...]), mirrored where `flipped`."""
    if flipped is None:
        return list(arrays)
    return [array[:, ::-1] if flip else array for array, flip in zip(arrays, flipped.tolist(), strict=True)]


def _as_tensor(positions: Sequence[int] | Tensor) -> Tensor:
    """[B] int64."""
    if isinstance(positions, range):
        return torch.arange(positions.start, positions.stop, positions.step)
    return torch.as_tensor(positions, dtype=torch.int64)


class StreamPositions:
    """The endless sequence of micro-batches of positions that one process reads.

    Step k of a run covers positions [k * batch_size, (k + 1) * batch_size); each process takes a
    contiguous share of them, in micro-batches.

    Args:
        first_position: where to start: the number of images seen so far.
        batch_size: images per optimizer step, over all processes.
        micro_batch_size: images per forward pass of one process.
    """

    def __init__(self, first_position: int, batch_size: int, micro_batch_size: int, rank: int, num_processes: int):
        assert batch_size % (micro_batch_size * num_processes) == 0
        self.first_position = first_position
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.share = batch_size // num_processes
        self.rank = rank

    def __iter__(self) -> Iterator[range]:
        base = self.first_position + self.rank * self.share
        while True:
            for start in range(base, base + self.share, self.micro_batch_size):
                yield range(start, start + self.micro_batch_size)
            base += self.batch_size


def stream_batches(
    images: TrainingImages,
    positions: StreamPositions,
    *,
    num_workers: int | None,
    pin_memory: bool,
    sharing: int = 1,
) -> Generator[Batch, None, None]:
    """Read batches endlessly, until the generator is closed.

    Args:
        num_workers: worker processes that read and decode images in the background; 0: this process reads; None: as
            many as pay off.
        pin_memory: pin batches, so that copies to a GPU do not block.
        sharing: processes of this machine that read in the same way.

    Raises:
        DataError: the machine has no room for what `num_workers` processes return.
    """
    num_bytes = positions.micro_batch_size * images.bytes_per_image
    if num_workers is None:
        num_workers = room_for_workers(_readers(images, pin_memory, sharing), num_bytes, sharing)
    if num_workers and not images.held:
        how = Reading(num_workers, num_bytes, pin_memory, sharing=sharing, option="data.num_workers")
        return stream_processes(images, positions, how)
    return _read_here(images, positions, pin_memory)


def _read_here(images: TrainingImages, positions: StreamPositions, pin_memory: bool) -> Generator[Batch, None, None]:
    for some in positions:
        batch = images.at(some)
        yield batch.pin_memory() if pin_memory else batch


def _readers(images: TrainingImages, for_gpu: bool, sharing: int) -> int:
    """How many worker processes pay off: none on a CPU, where they would compete with the computation."""
    if images.held or not for_gpu:
        return 0
    own = usable_cpus() // sharing
    return min(own - 1, _MOST_DECODING) if images.decodes else min(own // 2, _MOST_READING)
