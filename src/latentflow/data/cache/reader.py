"""Images encoded once, read back memory-mapped.

A cache is a folder: `plan.json` (what is being encoded), `source.json` (names and checksums of the images),
`shard-*.safetensors` with a `shard-*.json` beside each (counts, checksum, sums), and at the end `index.json`, which
makes the cache complete.
Moments are stored raw, so that scaling can change without encoding anew; semantic maps and masks are stored at
latent size, as counts of pixels. `cache_writer.py` fills a cache, this file knows what is in it.

Legend: N images of a shard, M moment channels (C or 2C), h and w latent height and width, K classes of the semantic
map, V mask variants of an image.

    moments, moments_flipped                    [N, M, h, w] float16 or float32
    labels                                      [N] int64
    class_counts                                [N, K, h, w] uint8 or int16
    known_moments, known_moments_flipped        [N, V, M, h, w], of the images without their holes
    hole_counts                                 [N, V, 1, h, w] uint8 or int16
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from latentflow.artifacts import checksum_of, open_tensors, read_json, sha256_file, verifies
from latentflow.autoencoder import Autoencoder, latent_mean
from latentflow.data.painting.latent_size import shares, told_mask
from latentflow.data.painting.mask_rules import MaskRules
from latentflow.errors import ArtifactError, DataError
from latentflow.ledger import Ledger
from latentflow.records import Record, explain

SCHEMA_VERSION = 1
CROP_RULE = "adm-center"

Indices = Sequence[int] | np.ndarray | Tensor
Flags = Sequence[bool] | np.ndarray | Tensor


class CachePlan(Record):
    """What a cache holds; two runs may share a cache only if their plans are equal."""

    schema_version: Literal[1] = SCHEMA_VERSION
    autoencoder: str
    autoencoder_hash: str
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    image_size: int
    crop_rule: str = CROP_RULE
    pixel_rules: str = "profiles ignored"  # of caches that do not say; see `PIXEL_RULES`
    flips: bool
    precision: Literal["float16", "float32"]
    source: str
    source_fingerprint: str
    identity: Literal["sizes", "contents"] = "sizes"
    """What the fingerprint follows beside names; caches that do not say followed the sizes of files."""
    num_source_images: int
    shard_size: int
    num_channels: int
    moments_shape: tuple[int, int, int]
    class_names: list[str]
    map_class_names: list[str] = Field([])
    map_palette: list[tuple[int, int, int]] = Field([])
    masks: MaskRules | None = None
    masks_fingerprint: str = ""
    mask_variants: int = 0

    @property
    def factor(self) -> int:
        """Image side divided by latent side."""
        return self.image_size // self.moments_shape[-1]

    @property
    def num_shards(self) -> int:
        return -(-self.num_source_images // self.shard_size)


class ShardRecord(Record):
    """One finished shard: its checks and its share of the statistics (sums over images and positions)."""

    file: str
    num_images: int
    num_bytes: int
    sha256: str
    num_values: int
    channel_sum: list[float]
    channel_sum_of_squares: list[float]
    broken: list[str]
    source_fingerprint: str = ""  # of this shard's images
    cut_sum: float = 0.0  # of the shares that the squares leave out of their pictures
    cut_most: float = 0.0
    checksum: int | None = None  # of this record


class CachedSource(Record):
    """The images that a cache was made from, one after the other; read only where something has changed."""

    names: list[str]
    contents: list[str]


class CacheIndex(Record):
    """The complete cache: its plan, its shards, per-channel statistics of the raw latents."""

    plan: CachePlan
    num_images: int
    channel_mean: list[float]
    channel_std: list[float]
    shards: list[ShardRecord]
    broken: list[str]
    checksum: int | None = None  # of this record

    @property
    def cut(self) -> tuple[float, float]:
        """Share of the pictures that their squares leave out: of all on average, and of the worst."""
        total = sum(shard.cut_sum for shard in self.shards)
        return total / max(self.num_images, 1), max((shard.cut_most for shard in self.shards), default=0.0)


class ChannelSums:
    """Running per-channel sums of raw latents, posterior variance included: what normalisation needs.

    They are kept where the moments are.
    """

    def __init__(self, num_channels: int):
        self.num_channels = num_channels
        self.num_values = 0
        self.sum = torch.zeros(num_channels, dtype=torch.float64)
        self.sum_of_squares = torch.zeros(num_channels, dtype=torch.float64)

    def add(self, moments: Tensor) -> None:
        """Count moments [B, C or 2C, h, w]. E[z^2] = mean^2 + variance for every latent value."""
        moments = (moments.cpu() if moments.device.type == "mps" else moments).double()
        mean = latent_mean(moments, self.num_channels)
        square = mean**2
        if moments.shape[1] > self.num_channels:
            square = square + moments[:, self.num_channels :].exp()
        if not self.num_values:
            self.sum, self.sum_of_squares = torch.zeros_like(mean[0, :, 0, 0]), torch.zeros_like(mean[0, :, 0, 0])
        self.num_values += mean[:, 0].numel()
        self.sum += mean.sum((0, 2, 3))
        self.sum_of_squares += square.sum((0, 2, 3))

    def send_home(self) -> None:
        """Begin to copy the sums to the CPU; they are there once all that is queued on the device is done."""
        for name in ("sum", "sum_of_squares"):
            home = torch.empty(self.num_channels, dtype=torch.float64, pin_memory=True)
            setattr(self, name, home.copy_(getattr(self, name), non_blocking=True))

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Per-channel mean and standard deviation, C numbers each."""
        mean = self.sum / self.num_values
        variance = (self.sum_of_squares / self.num_values - mean**2).clamp(min=1e-12)
        return mean.tolist(), variance.sqrt().tolist()


def is_cache(path: str | Path) -> bool:
    """Whether `path` is a folder that encoding has begun to fill."""
    return (Path(path) / "plan.json").is_file()


class LatentCache:
    """A complete cache, read memory-mapped.

    Args:
        folder: as written by `write_cache`.

    Raises:
        ArtifactError: the cache is missing, unfinished or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "index.json").is_file():
            unfinished = "its encoding is not finished" if is_cache(folder) else "there is no index.json in it"
            raise ArtifactError(
                f"{folder} is not a complete latent cache: {unfinished}; run `latentflow encode` (again)"
            )
        self.index = parse_record(CacheIndex, self.folder / "index.json")
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
    def map_class_names(self) -> tuple[str, ...]:
        return tuple(self.plan.map_class_names)

    @property
    def map_palette(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(self.plan.map_palette)

    def moments(self, indices: Indices, flipped: Flags | None = None) -> Tensor:
        """The moments of some images, [B, M, h, w] in the precision they are stored in.

        Args:
            indices: which images, in [0, len).
            flipped: per image, whether its mirror image is wanted (needs a cache encoded with flips); None: of none.
        """
        return self._gather("moments", indices, self._mirror(flipped))

    def class_fractions(self, indices: Indices, flipped: Flags | None = None) -> Tensor:
        """Shares of the map's classes in each latent pixel, [B, K, h, w] float32; for a cache with semantic maps."""
        return shares(mirrored(self._gather("class_counts", indices), flipped), self.plan.factor)

    def known(self, indices: Indices, variants: Indices, flipped: Flags | None = None) -> tuple[Tensor, Tensor]:
        """Images without a hole: moments [B, M, h, w] in the precision they are stored in, and what is told of the
        hole in each latent pixel [B, 1, h, w] float32.

        Args:
            variants: per image, which of its `plan.mask_variants` holes.
        """
        moments = self._gather("known_moments", indices, self._mirror(flipped), variants)
        hole_shares = shares(mirrored(self._gather("hole_counts", indices, None, variants), flipped), self.plan.factor)
        return moments, told_mask(hole_shares, self.plan.masks.told_as)

    def labels(self, indices: Indices) -> Tensor | None:
        """Class indices [B] int64; None for an unlabelled cache."""
        if not self.class_names:
            return None
        if self._labels is None:
            self._labels = torch.from_numpy(
                np.concatenate([self._stored(number, "labels") for number in range(len(self.index.shards))])
            )
        return self._labels[torch.as_tensor(indices)]

    def tensor(self, shard: int, name: str) -> Tensor:
        """A tensor of one shard as it is stored, memory-mapped; see the legend."""
        return torch.from_numpy(self._stored(shard, name))

    def names(self) -> list[str]:
        """The images' names inside their source, one per image."""
        if self._names is None:
            files = [open_tensors(self.folder / shard.file) for shard in self.index.shards]
            self._names = [name for file in files for name in json.loads(file.metadata()["names"])]
        return self._names

    def verify(self, on_images: Callable[[int], None] = lambda num_images: None) -> None:
        """Compare every shard with its checksum; a file that was found right once is not read again until it changes.

        Args:
            on_images: told the number of images just found right.

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
                        "which encodes this shard anew"
                    )
                on_images(shard.num_images)

    def require_autoencoder(self, autoencoder: Autoencoder) -> None:
        """Refuse another latent space than the one the cache was made in.

        Raises:
            ArtifactError: the content hashes differ.
        """
        if autoencoder.content_hash != self.plan.autoencoder_hash:
            made_with = f"{self.plan.autoencoder} (hash {self.plan.autoencoder_hash[:12]})"
            given = f"{autoencoder.reference} (hash {autoencoder.content_hash[:12]})"
            raise ArtifactError(
                f"{self.folder} was encoded with {made_with}, not with {given}; use the former or encode a new cache"
            )

    def _mirror(self, flipped: Flags | None) -> np.ndarray | None:
        """Which images are to be mirrored; None where none is."""
        if flipped is None or not (wanted := np.asarray(flipped)).any():
            return None
        if not self.plan.flips:
            raise DataError(
                f"{self.folder} holds no mirrored images; encode it with --flips, or train with data.flip=false"
            )
        return wanted

    def _gather(
        self, name: str, indices: Indices, flipped: np.ndarray | None = None, variants: Indices | None = None
    ) -> Tensor:
        """Some rows of a tensor: one read for each shard, and for its mirrored images."""
        indices = np.asarray(indices)
        shards = np.searchsorted(self._first_rows, indices, side="right") - 1
        rows = indices - self._first_rows[shards]
        if variants is not None:
            rows = rows * self.plan.mask_variants + np.asarray(variants)
        sources = 2 * shards if flipped is None else 2 * shards + flipped
        order = np.argsort(sources, kind="stable")
        ends = [*(np.flatnonzero(np.diff(sources[order])) + 1).tolist(), len(indices)]
        gathered = None
        for begin, end in pairwise([0, *ends]):
            places = order[begin:end]
            shard, flip = divmod(int(sources[places[0]]), 2)
            stored = self._stored(shard, f"{name}_flipped" if flip else name)
            if variants is not None:
                stored = stored.reshape(-1, *stored.shape[2:])
            if gathered is None:
                gathered = np.empty((len(indices), *stored.shape[1:]), stored.dtype)
            gathered[places] = stored[rows[places]]
        return torch.from_numpy(gathered)

    def _stored(self, shard: int, name: str) -> np.ndarray:
        check_size(self._files[shard], self.index.shards[shard])  # reading what was cut off would kill the process
        if (shard, name) not in self._open:
            self._open[shard, name] = open_tensors(self._files[shard]).get_tensor(name).numpy()
        return self._open[shard, name]


def mirrored(maps: Tensor, flipped: Flags | None) -> Tensor:
    """Maps [B, K, h, w], mirrored where `flipped`: unlike an encoder, counting commutes with mirroring."""
    if flipped is None:
        return maps
    return torch.where(torch.as_tensor(flipped, device=maps.device)[:, None, None, None], maps.flip(-1), maps)


def check_size(file: str | Path, shard: ShardRecord) -> None:
    """Refuse a shard whose file is missing or of another size.

    Raises:
        ArtifactError: with the remedy.
    """
    try:
        num_bytes = os.stat(file).st_size  # noqa: PTH116 - asked for each shard of each batch
    except OSError:
        num_bytes = 0
    if num_bytes != shard.num_bytes:
        raise ArtifactError(
            f"{file} is truncated or damaged: {num_bytes} bytes, not {shard.num_bytes}; "
            "run the same `latentflow encode` again, which encodes this shard anew"
        )


def parse_record(record: type[Record], file: Path) -> Any:
    """The `record` in a JSON file of a cache.

    Raises:
        ArtifactError: the file is damaged or of another schema.
    """
    try:
        found = record.model_validate(read_json(file))
    except ValidationError as error:
        raise ArtifactError(f"{file} does not fit latent cache schema {SCHEMA_VERSION} ({explain(error)})") from error
    checksum = getattr(found, "checksum", None)
    if checksum is not None and checksum != record_checksum(found):
        raise ArtifactError(
            f"{file} is damaged: it does not match its checksum; run the same `latentflow encode` again, which makes "
            "it anew"
        )
    return found


def record_checksum(record: Record) -> int:
    """The checksum of a record without the checksum in it; fields that later versions add do not change it."""
    return checksum_of(record.model_dump(mode="json", exclude={"checksum"}, exclude_defaults=True))


def sealed(record: Record) -> dict[str, Any]:
    """A record with its checksum, to be written as JSON."""
    return {**record.model_dump(mode="json"), "checksum": record_checksum(record)}
