"""The endless stream of training images, and the record of one batch.

Position p of the stream is image `order_e[p mod n]` of epoch e = p div n, where order_e is a permutation
drawn from (seed, epoch). So the order of the data depends neither on the number of processes nor on
where a run was interrupted, and an epoch may end in the middle of a batch.
"""

from __future__ import annotations

import resource
import shutil
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latentflow.data.items import ImageSource
from latentflow.data.latent_cache import LatentCache
from latentflow.data.latent_size import class_counts, hide, hole_counts, shares, told_mask
from latentflow.data.masks import MaskRules, draw_mask
from latentflow.errors import DataError, LatentFlowError
from latentflow.randomness import ImageRandom, derive_seed

_LEAST_SHARED_BYTES = 16 << 20  # of /dev/shm, for a few batches of latents
_FILES_OF_BATCHES, _FILES_OF_A_WORKER = 128, 8  # open ones: tensors on their way, pipes


@dataclass(frozen=True)
class Batch:
    """Images of one training step. One of `moments` and `pixels` is there, and what the model is to be told.

    Attributes:
        positions: [B] int64, places in the endless stream; they seed each image's randomness.
        indices: [B] int64, which images of the data set these are.
        labels: [B] int64 class indices, None for unlabelled data.
        moments: [B, M, h, w] float32, encoded beforehand.
        pixels: [B, 3, S, S] uint8, to be encoded in the step.
        mask: [B, 1, h, w] float32, share of each latent pixel in the hole, for inpainting.
        known_moments: [B, M, h, w] float32, of the images without their holes, encoded beforehand.
        known_pixels: [B, 3, S, S] uint8, images without their holes, to be encoded in the step.
        class_fractions: [B, K, h, w] float32, share of each map class in each latent pixel.
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

    def to(self, device: torch.device | str) -> Batch:
        """Move what is computed with; positions and indices stay on the CPU, where randomness is seeded."""
        stay = ("positions", "indices")
        return self._map(lambda name, x: x if name in stay else x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Pin every tensor, so that copies to the device do not block; called by the data loader."""
        return self._map(lambda name, x: x.pin_memory())

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: None if x is None else change(name, x) for name, x in values.items()})


@dataclass(frozen=True)
class SpatialData:
    """What spatial conditions training reads beside the images.

    Attributes:
        factor: image side divided by latent side.
        holes: which holes there are, for inpainting; None: no holes. They are drawn anew each time an image is seen.
        cached_holes: take the mask variants that the latent cache holds instead.
        maps: read semantic maps.
        pictures: the images of a latent cache, from which holes are cut; None: the source itself holds pixels.
    """

    factor: int
    holes: MaskRules | None = None
    cached_holes: bool = False
    maps: bool = False
    pictures: ImageSource | None = None


class TrainingImages(Dataset):
    """Batches by stream position, from a latent cache or straight from images.

    Args:
        source: a complete latent cache, or images that are encoded in the step.
        seed: of the order, the flips and the holes.
        flip: mirror each image with probability 1/2, drawn anew each time it is seen.
        kept: which images of the source take part; None: all.
        spatial: holes and semantic maps; None: neither.
    """

    def __init__(
        self,
        source: LatentCache | ImageSource,
        *,
        seed: int,
        flip: bool,
        kept: Sequence[int] | None = None,
        spatial: SpatialData | None = None,
    ):
        self.source = source
        self.seed = seed
        self.flip = flip
        self.kept = np.arange(len(source)) if kept is None else np.asarray(kept)
        self.spatial = spatial
        self._order = lru_cache(maxsize=2)(partial(epoch_order, seed, len(self.kept)))
        if spatial is not None and spatial.pictures is not None:
            rows = {spatial.pictures.name(row): row for row in range(len(spatial.pictures))}
            self._picture_of = np.array([rows[name] for name in source.names()])

    def __len__(self) -> int:
        return len(self.kept)

    def images_per_class(self) -> list[int]:
        """How many images take part of each class of the source; empty where it is unlabelled."""
        counts = [0] * len(self.source.class_names)
        if isinstance(self.source, LatentCache):
            of_kept = self.source.labels(self.kept.tolist()).tolist() if counts else []
        else:
            of_kept = [self.source.label(int(index)) for index in self.kept] if counts else []
        for label in of_kept:
            counts[label] += 1
        return counts

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_order"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=2)(partial(epoch_order, self.seed, len(self.kept)))

    def indices_at(self, positions: Sequence[int]) -> list[int]:
        """The images at some positions of the stream."""
        return [int(self.kept[self._order(p // len(self))[p % len(self)]]) for p in positions]

    def names_at(self, positions: Sequence[int]) -> list[str]:
        """The names of the images at some positions of the stream."""
        indices = self.indices_at(positions)
        if isinstance(self.source, LatentCache):
            return [self.source.names()[index] for index in indices]
        return [self.source.name(index) for index in indices]

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        indices = self.indices_at(positions)
        flipped = [False] * len(indices)
        if self.flip:
            flipped = (ImageRandom.at(self.seed, "flip", positions).uniform() < 0.5).tolist()
        read = self._encoded if isinstance(self.source, LatentCache) else self._pictures
        return Batch(torch.tensor(positions), torch.tensor(indices), **read(positions, indices, flipped))

    def _encoded(self, positions: Sequence[int], indices: list[int], flipped: list[bool]) -> dict[str, Tensor | None]:
        """What a latent cache gives."""
        cache, spatial = self.source, self.spatial
        batch = {"labels": cache.labels(indices), "moments": cache.moments(indices, flipped)}
        if spatial is None:
            return batch
        if spatial.maps:
            batch["class_fractions"] = cache.class_fractions(indices, flipped)
        if spatial.cached_holes:
            drawn = ImageRandom.at(self.seed, "mask variant", positions).uniform()
            variants = (drawn * cache.plan.mask_variants).long().tolist()
            batch["known_moments"], batch["mask"] = cache.known(indices, variants, flipped)
        elif spatial.holes:
            items = [spatial.pictures[int(self._picture_of[index])] for index in indices]
            batch |= self._holes(positions, _mirrored([item.pixels for item in items], flipped))
        return batch

    def _pictures(self, positions: Sequence[int], indices: list[int], flipped: list[bool]) -> dict[str, Tensor | None]:
        """What images give."""
        items = [self.source[index] for index in indices]
        pixels = _mirrored([item.pixels for item in items], flipped)
        labels = torch.tensor([item.label for item in items]) if self.source.class_names else None
        batch = {"labels": labels, "pixels": _to_tensor(pixels)}
        if self.spatial is None:
            return batch
        if self.spatial.maps:
            factor, num_classes = self.spatial.factor, len(self.source.map_class_names)
            maps = _mirrored([item.semantic_map for item in items], flipped)
            counts = torch.stack([class_counts(semantic_map, num_classes, factor) for semantic_map in maps])
            batch["class_fractions"] = shares(counts, factor)
        if self.spatial.holes:
            batch |= self._holes(positions, pixels)
        return batch

    def _holes(self, positions: Sequence[int], pixels: list[np.ndarray]) -> dict[str, Tensor]:
        """Cut a hole into each image, drawn by its position."""
        seeds = [derive_seed(self.seed, "mask", int(position)) for position in positions]
        holes = [draw_mask(self.spatial.holes, *p.shape[:2], seed) for p, seed in zip(pixels, seeds, strict=True)]
        told_as, factor = self.spatial.holes.told_as, self.spatial.factor
        counts = torch.stack([hole_counts(hole, factor, told_as) for hole in holes])
        hidden = [hide(picture, hole, told_as) for picture, hole in zip(pixels, holes, strict=True)]
        return {"known_pixels": _to_tensor(hidden), "mask": told_mask(shares(counts, factor), told_as)}


def _mirrored(arrays: Sequence[np.ndarray], flipped: Sequence[bool]) -> list[np.ndarray]:
    """Pictures or maps ([S, S, ...]), mirrored where `flipped`."""
    return [array[:, ::-1] if flip else array for array, flip in zip(arrays, flipped, strict=True)]


def _to_tensor(pictures: Sequence[np.ndarray]) -> Tensor:
    """Pictures [S, S, 3] uint8 => [B, 3, S, S] uint8."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def epoch_order(seed: int, num_images: int, epoch: int) -> Tensor:
    """The order of one epoch: a permutation of range(num_images), int64."""
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(derive_seed(seed, "order", epoch)))


class StreamPositions:
    """The micro-batches of positions that one process reads, without end.

    Step k of a run covers positions [k * batch_size, (k + 1) * batch_size); each process takes a
    contiguous share of them, in micro-batches.

    Args:
        first_position: where to begin: the number of images seen so far.
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

    def __iter__(self) -> Iterator[list[int]]:
        base = self.first_position + self.rank * self.share
        while True:
            for start in range(base, base + self.share, self.micro_batch_size):
                yield list(range(start, start + self.micro_batch_size))
            base += self.batch_size


def stream_batches(
    images: TrainingImages, positions: StreamPositions, *, num_workers: int, pin_memory: bool
) -> Generator[Batch, None, None]:
    """Read batches without end; with workers, ahead of time, until it is closed.

    Args:
        num_workers: processes that read and decode images; 0: in this process, enough for a latent cache.
        pin_memory: for copies to a GPU that do not block.
    """
    if num_workers:
        _require_shared_memory(num_workers)
        _require_open_files(num_workers)
    loader = DataLoader(
        _Told(images),
        batch_sampler=positions,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_as_is,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_leave_signals_to_the_run,
    )
    return _read(iter(loader), num_workers)


class _Told(Dataset):
    """Images whose faults are handed on as values: an exception from another process would bring its traceback."""

    def __init__(self, images: TrainingImages):
        self.images = images

    def __getitems__(self, positions: list[int]) -> Batch | DataError:
        try:
            return self.images.__getitems__(positions)
        except (LatentFlowError, OSError) as error:
            return DataError(str(error))


def _leave_signals_to_the_run(worker: int) -> None:
    """Terminals and batch systems signal all processes at once; the run needs images to end well, and ends this one.

    The second SIGTERM ends it: the first may be a batch system's, and at the end torch and Python send one each.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


@contextmanager
def lost_workers(num_workers: int) -> Iterator[None]:
    """A process that reads images ahead and dies is one line, wherever torch raises it: it does so in any place.

    Raises:
        DataError: with what was said of it, and the remedy.
    """
    try:
        yield
    except RuntimeError as error:
        if num_workers and "DataLoader worker" in str(error):
            raise _lost(num_workers, error) from error
        raise


def _read(batches: Iterator[Batch | DataError], num_workers: int) -> Generator[Batch, None, None]:
    try:
        while True:
            try:
                batch = next(batches)
            except (RuntimeError, OSError, EOFError) as error:
                if not num_workers:
                    raise
                raise _lost(num_workers, error) from error.with_traceback(None)  # which would keep `batches`
            if isinstance(batch, DataError):
                raise batch
            yield batch
    finally:
        del batches  # its last reference: torch ends the processes that read ahead


def _lost(num_workers: int, error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return DataError(
        f"one of {num_workers} processes that read images ahead was lost ({reason}); use data.num_workers=0, "
        "or give more memory, shared memory (/dev/shm) or open files (ulimit -n)"
    )


def _require_open_files(num_workers: int) -> None:
    """Each tensor that comes from another process is an open file; where they run out, torch fails in many ways."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    needed = _FILES_OF_BATCHES + _FILES_OF_A_WORKER * num_workers
    if allowed != resource.RLIM_INFINITY and allowed < needed:
        raise DataError(
            f"data.num_workers={num_workers} needs {needed} open files, and {allowed} are allowed; use "
            f"data.num_workers=0, or allow more with `ulimit -n {max(needed, 1024)}`"
        )


def _require_shared_memory(num_workers: int) -> None:
    """Batches of other processes come through /dev/shm; where there is none, torch waits for minutes."""
    try:
        num_bytes = shutil.disk_usage("/dev/shm").free
    except OSError:
        num_bytes = 0 if sys.platform == "linux" else _LEAST_SHARED_BYTES
    if num_bytes < _LEAST_SHARED_BYTES:
        raise DataError(
            f"data.num_workers={num_workers} needs shared memory, and /dev/shm has {num_bytes / 2**20:.0f} MiB; use "
            "data.num_workers=0, or start the container with --shm-size=1g"
        )


def _as_is(batch: Batch) -> Batch:
    return batch
