"""A latent cache: images encoded once by `writer`, read back memory-mapped.

A cache is a folder: `plan.json` (what is being encoded), `source.json` (names and checksums of the images),
`shard-*.safetensors`, each with a `shard-*.json` (counts, checksum, sums), and at the end `index.json`, which makes the
cache complete.

Moments are stored raw, so that scaling can change without encoding again. Semantic maps and masks are stored at latent
size, as counts of pixels.

A mirrored variant is the mirror image of a variant, not a variant drawn for the mirror image.

Legend: N images of a shard, M moment channels (C or 2C), h and w latent height and width, K classes of the semantic
map, V mask variants and A augmented variants of an image, P numbers of each of the latter, c channels and H_in and W_in
height and width of a paired input.

    moments, moments_flipped                    [N, M, h, w] float16 or float32
    labels                                      [N] int64
    class_counts                                [N, K, h, w] uint8 or int16
    known_moments, known_moments_flipped        [N, V, M, h, w], of the images without their holes
    hole_counts                                 [N, V, 1, h, w] uint8 or int16
    variant_moments, variant_moments_flipped    [N, A, M, h, w]
    variant_numbers                             [N, A, P] float32
    variant_class_counts                        [N, A, K, h, w] uint8 or int16
    column_0, column_1, ...                     [N, ...], the values of each column; see `data.column_tensors`
    inputs                                      [N, c, H_in, W_in], where their form is pixels: stored values if they
                                                are uint8, else float16 or float32 in [-1, 1]
    input_moments, input_moments_flipped        [N, M, h, w], where it is latents
    variant_inputs                              [N, A, c, H_in, W_in], likewise
    variant_input_moments, ..._flipped          [N, A, M, h, w]
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from latentflow.artifacts import open_tensors, sha256_file, verifies
from latentflow.columns import Column
from latentflow.data.cache.schema import INDEX_FILE, CacheIndex, check_size, column_tensor, read_cache_record
from latentflow.data.column_tensors import joined_rows
from latentflow.data.painting.latent_size import mask_input, shares
from latentflow.data.pictures.variants import mirrored_numbers
from latentflow.errors import ArtifactError, DataError
from latentflow.ledger import Ledger
from latentflow.pixel_format import PixelFormat
from latentflow.plans import PLAN_FILE
from latentflow.shapes import moved_about

Indices = Sequence[int] | np.ndarray | Tensor
Flags = Sequence[bool] | np.ndarray | Tensor


class KnownAutoencoder(Protocol):
    """An autoencoder, or what a model's config knows of it."""

    @property
    def reference(self) -> str: ...

    @property
    def content_hash(self) -> str: ...


def is_cache(path: str | Path) -> bool:
    """Whether `path` is a latent cache, finished or not."""
    return (Path(path) / PLAN_FILE).is_file()


class LatentCache:
    """A complete cache, read memory-mapped.

    Args:
        folder: as written by `write_cache`.

    Raises:
        ArtifactError: the cache is missing, unfinished or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / INDEX_FILE).is_file():
            why = "its encoding is not finished" if is_cache(folder) else f"there is no {INDEX_FILE} in it"
            raise ArtifactError(f"{folder} is not a complete latent cache: {why}; run `latentflow encode` (again)")
        self.index = read_cache_record(CacheIndex, self.folder / INDEX_FILE)
        self.plan = self.index.plan
        self._files = [os.fspath(self.folder / shard.file) for shard in self.index.shards]
        for file, shard in zip(self._files, self.index.shards, strict=True):
            check_size(file, shard)
        self._first_rows = np.cumsum([0] + [shard.num_images for shard in self.index.shards])
        self._open: dict[tuple[int, str], np.ndarray] = {}
        self._names: list[str] | None = None
        self._labels: Tensor | None = None

    def __len__(self) -> int:
        return self.index.num_images

    def __reduce__(self) -> tuple[type[LatentCache], tuple[Path]]:
        return LatentCache, (self.folder,)  # each worker process maps the files itself

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.plan.class_names)

    @property
    def pixel_format(self) -> PixelFormat:
        return self.plan.pixel_format

    @property
    def map_class_names(self) -> tuple[str, ...]:
        return tuple(self.plan.map_class_names)

    @property
    def input_format(self) -> PixelFormat | None:
        return self.plan.input_format

    @property
    def map_palette(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(self.plan.map_palette)

    @cached_property
    def ranges(self) -> list[range]:
        """The indices of the images of each bucket; the images that are read together must be of one."""
        shards = (self.plan.shards_of(bucket) for bucket in range(len(self.plan.sizes)))
        return [range(int(self._first_rows[one.start]), int(self._first_rows[one.stop])) for one in shards]

    def moments(self, indices: Indices, flipped: Flags | None = None, variants: Indices | None = None) -> Tensor:
        """The moments of some images, [B, M, h, w] in the precision they are stored in.

        Args:
            indices: of the images, in [0, len).
            flipped: whether to return the mirror image, per image (needs a cache encoded with flips); None: never.
            variants: which of its `plan.variants` augmented variants to return, counted from 1, per image; 0: the image
                itself; None: always the image itself.
        """
        return self._gather_varied("moments", indices, variants, self._mirror(flipped))

    def class_fractions(
        self, indices: Indices, flipped: Flags | None = None, variants: Indices | None = None
    ) -> Tensor:
        """Shares of the map classes in each latent pixel, [B, K, h, w] float32; for a cache with semantic maps."""
        return shares(mirrored(self._gather_varied("class_counts", indices, variants), flipped), self.plan.factor)

    def augmentation(self, indices: Indices, flipped: Flags | None, variants: Indices) -> Tensor:
        """The numbers of some images' variants, [B, P] float32; zero for the images themselves."""
        variants = np.asarray(variants)
        stored = self._gather("variant_numbers", indices, None, np.maximum(variants - 1, 0))
        return described(stored, flipped, torch.as_tensor(variants))

    def known(self, indices: Indices, mask_variants: Indices, flipped: Flags | None = None) -> tuple[Tensor, Tensor]:
        """Images with a hole filled: moments [B, M, h, w] in the precision they are stored in, and the mask at latent
        size [B, 1, h, w] float32.

        Args:
            mask_variants: which of its `plan.mask_variants` holes, per image.
        """
        moments = self._gather("known_moments", indices, self._mirror(flipped), mask_variants)
        counts = self._gather("hole_counts", indices, None, mask_variants)
        hole_shares = shares(mirrored(counts, flipped), self.plan.factor)
        return moments, mask_input(hole_shares, self.plan.masks.told_as)

    def inputs(self, indices: Indices, flipped: Flags | None = None, variants: Indices | None = None) -> Tensor:
        """The paired inputs of some images as they are stored: pixels [B, c, H_in, W_in], or moments [B, M, h, w]."""
        name = self.plan.input_tensor
        if name == "inputs":
            return mirrored(self._gather_varied(name, indices, variants), flipped)
        return self._gather_varied(name, indices, variants, self._mirror(flipped))

    def labels(self, indices: Indices) -> Tensor | None:
        """Class indices [B] int64; None for an unlabelled cache."""
        if not self.class_names:
            return None
        if self._labels is None:
            self._labels = torch.from_numpy(
                np.concatenate([self._stored(number, "labels") for number in range(len(self.index.shards))])
            )
        return self._labels[torch.as_tensor(indices)]

    @property
    def columns(self) -> tuple[Column, ...]:
        return tuple(self.plan.columns)

    def column_rows(self, indices: Indices, chosen: Sequence[int]) -> Tensor:
        """The values of some columns, [B, W] float32, as a network gets them.

        Args:
            chosen: which of `columns`, in order.
        """
        stored = [self._gather(column_tensor(number), indices) for number in chosen]
        return joined_rows([self.columns[number] for number in chosen], stored)

    def column_values(self, number: int, indices: Indices) -> Tensor:
        """The values of one of `columns`, [B, ...] as they are stored."""
        return self._gather(column_tensor(number), indices)

    def tensor(self, shard: int, name: str) -> Tensor:
        """A stored tensor of one shard, memory-mapped; see the legend."""
        return torch.from_numpy(self._stored(shard, name))

    def names(self) -> list[str]:
        """The names of the images inside their source."""
        if self._names is None:
            files = [open_tensors(self.folder / shard.file) for shard in self.index.shards]
            self._names = [name for file in files for name in json.loads(file.metadata()["names"])]
        return self._names

    def verify(self, on_images: Callable[[int], None] = lambda num_images: None) -> None:
        """Compare every shard with its checksum; a file that matched once is not read again until it changes.

        Args:
            on_images: called with the number of images just verified.

        Raises:
            ArtifactError: one differs.
        """
        if not verifies():
            return
        with Ledger("sha256", self.folder) as ledger:
            for shard in self.index.shards:
                file = self.folder / shard.file
                status = file.stat()
                found = ledger.get(shard.file, status)
                if found is None:
                    ledger.put(shard.file, status, found := sha256_file(file))
                if found != shard.sha256:
                    raise ArtifactError(
                        f"{file} is damaged: it does not match its checksum; run the same `latentflow encode` again, "
                        "which restores this shard"
                    )
                on_images(shard.num_images)

    def require_autoencoder(self, autoencoder: KnownAutoencoder) -> None:
        """Refuse an autoencoder other than the one that the cache was encoded with.

        Raises:
            ArtifactError: the content hashes differ.
        """
        if autoencoder.content_hash != self.plan.autoencoder_hash:
            made_with = f"{self.plan.autoencoder} (hash {self.plan.autoencoder_hash[:12]})"
            given = f"{autoencoder.reference} (hash {autoencoder.content_hash[:12]})"
            raise ArtifactError(
                f"{self.folder} was encoded with {made_with}, not with {given}; use the former, or encode a new cache"
            )

    def _mirror(self, flipped: Flags | None) -> np.ndarray | None:
        """Which images to mirror; None if none."""
        if flipped is None or not (wanted := np.asarray(flipped)).any():
            return None
        if not self.plan.flips:
            raise DataError(
                f"{self.folder} holds no mirrored images; encode it with --flips, or train with data.flip=false"
            )
        return wanted

    def _gather_varied(
        self, name: str, indices: Indices, variants: Indices | None, flipped: np.ndarray | None = None
    ) -> Tensor:
        """Rows of a tensor of the images, or of that of their variants where `variants` is not 0."""
        if variants is None:
            return self._gather(name, indices, flipped)
        indices, variants = np.asarray(indices), np.asarray(variants)
        gathered = None
        for tensor, is_varied in ((name, False), (f"variant_{name}", True)):
            if len(places := np.flatnonzero((variants > 0) == is_varied)):
                own = None if flipped is None else flipped[places]
                rows = self._gather(tensor, indices[places], own, variants[places] - 1 if is_varied else None)
                gathered = rows.new_empty(len(indices), *rows.shape[1:]) if gathered is None else gathered
                gathered[torch.from_numpy(places)] = rows
        return gathered

    def _gather(
        self, name: str, indices: Indices, flipped: np.ndarray | None = None, variants: Indices | None = None
    ) -> Tensor:
        """Rows of a tensor, or of its second axis as well, with one read for each shard and for its mirrored images."""
        indices = np.asarray(indices)
        shards = np.searchsorted(self._first_rows, indices, side="right") - 1
        rows = indices - self._first_rows[shards]
        within = () if variants is None else (np.asarray(variants),)
        sources = 2 * shards if flipped is None else 2 * shards + flipped
        order = np.argsort(sources, kind="stable")
        ends = [*(np.flatnonzero(np.diff(sources[order])) + 1).tolist(), len(indices)]
        gathered = None
        for begin, end in pairwise([0, *ends]):
            places = order[begin:end]
            shard, flip = divmod(int(sources[places[0]]), 2)
            stored = self._stored(shard, f"{name}_flipped" if flip else name)
            if gathered is None:
                gathered = np.empty((len(indices), *stored.shape[1 + len(within) :]), stored.dtype)
            gathered[places] = stored[(rows[places], *(one[places] for one in within))]
        return torch.from_numpy(gathered)

    def _stored(self, shard: int, name: str) -> np.ndarray:
        check_size(self._files[shard], self.index.shards[shard])  # reading beyond the end would kill the process
        if (shard, name) not in self._open:
            self._open[shard, name] = open_tensors(self._files[shard]).get_tensor(name).numpy()
        return self._open[shard, name]


def described(numbers: Tensor, flipped: Flags | None, variants: Tensor) -> Tensor:
    """Numbers of variants [B, P], of the mirrored ones where `flipped`, and zero where `variants` is 0."""
    numbers = numbers * (variants > 0)[:, None]
    if flipped is None:
        return numbers
    flipped = torch.as_tensor(flipped, device=numbers.device)
    return torch.where(flipped[:, None], mirrored_numbers(numbers), numbers)


def mirrored(maps: Tensor, flipped: Flags | None) -> Tensor:
    """Maps [B, K, h, w] or pictures, mirrored where `flipped`; unlike encoding, counting commutes with mirroring."""
    if flipped is None:
        return maps
    rows = torch.as_tensor(flipped, device=maps.device)[:, None, None, None]
    return moved_about(lambda x: torch.where(rows, x.flip(-1), x), maps)
