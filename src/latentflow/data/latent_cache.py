"""Encode images once, read their moments back memory-mapped.

A cache is a folder: `plan.json` (what is being encoded), `shard-*.safetensors` with a `shard-*.json`
beside each (counts, checksum, sums), and at the end `index.json`, which makes the cache complete.
Moments are stored raw, so that scaling can change without encoding anew. A shard appears complete or
not at all; repeating the command encodes what is missing or damaged and nothing else.

Legend: N images of a shard, M moment channels (C or 2C), h and w latent height and width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from latentflow.artifacts import make_folder, open_tensors, read_json, sha256_file, write_json, write_tensors
from latentflow.autoencoder import Autoencoder, latent_mean, to_unit_range
from latentflow.data.images import BrokenImage
from latentflow.data.items import ImageItem, ImageSource
from latentflow.errors import ArtifactError, DataError

SCHEMA_VERSION = 1
CROP_RULE = "adm-center"
_PRECISIONS = {"float16": torch.float16, "float32": torch.float32}


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CachePlan(_Record):
    """What a cache holds; two runs may share a cache only if their plans are equal."""

    schema_version: Literal[1] = SCHEMA_VERSION
    autoencoder: str
    autoencoder_hash: str
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    image_size: int
    crop_rule: str = CROP_RULE
    flips: bool
    precision: Literal["float16", "float32"]
    source: str
    source_fingerprint: str
    num_source_images: int
    shard_size: int
    num_channels: int
    moments_shape: tuple[int, int, int]
    class_names: list[str]

    @property
    def num_shards(self) -> int:
        return -(-self.num_source_images // self.shard_size)


class ShardRecord(_Record):
    """One finished shard: its checks and its share of the statistics (sums over images and positions)."""

    file: str
    num_images: int
    num_bytes: int
    sha256: str
    num_values: int
    channel_sum: list[float]
    channel_sum_of_squares: list[float]
    broken: list[str]


class CacheIndex(_Record):
    """The complete cache: its plan, its shards, per-channel statistics of the raw latents."""

    plan: CachePlan
    num_images: int
    channel_mean: list[float]
    channel_std: list[float]
    shards: list[ShardRecord]
    broken: list[str]


class ChannelSums:
    """Running per-channel sums of raw latents, posterior variance included: what normalisation needs."""

    def __init__(self, num_channels: int):
        self.num_channels = num_channels
        self.num_values = 0
        self.sum = torch.zeros(num_channels, dtype=torch.float64)
        self.sum_of_squares = torch.zeros(num_channels, dtype=torch.float64)

    def add(self, moments: Tensor) -> None:
        """Count moments [B, C or 2C, h, w]. E[z^2] = mean^2 + variance for every latent value."""
        mean = latent_mean(moments, self.num_channels).double().cpu()
        square = mean**2
        if moments.shape[1] > self.num_channels:
            square = square + moments[:, self.num_channels :].double().cpu().exp()
        self.num_values += mean[:, 0].numel()
        self.sum += mean.sum((0, 2, 3))
        self.sum_of_squares += square.sum((0, 2, 3))

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Per-channel mean and standard deviation, C numbers each."""
        mean = self.sum / self.num_values
        variance = (self.sum_of_squares / self.num_values - mean**2).clamp(min=1e-12)
        return mean.tolist(), variance.sqrt().tolist()


def write_cache(
    source: ImageSource,
    autoencoder: Autoencoder,
    folder: str | Path,
    *,
    flips: bool = False,
    precision: Literal["float16", "float32"] = "float16",
    shard_size: int = 1024,
    batch_size: int = 32,
    strict: bool = False,
    process: tuple[int, int] = (0, 1),
    on_images: Callable[[int], None] = lambda num_images: None,
) -> CacheIndex | None:
    """Encode every image of `source` into `folder`, leaving out what is already there.

    Args:
        flips: also encode the mirrored images (an encoder does not commute with mirroring).
        precision: how moments are stored; float16 rounds by at most 1 part in 2048.
        shard_size: images per shard, the unit of work that is lost by a kill.
        strict: a broken image is an error, not an omission.
        process: (rank, number of processes); process r encodes shards r, r + n, r + 2n, ...
        on_images: told the number of images just finished, shards found complete included.

    Returns:
        The index, or None where other processes are still at work; the last one to finish writes it.

    Raises:
        ArtifactError: the folder holds something else, or cannot be written.
        DataError: no image could be read, or, with `strict`, one is broken.
    """
    plan = _plan(source, autoencoder, flips=flips, precision=precision, shard_size=shard_size)
    folder = make_folder(folder)
    _claim(folder, plan)
    rank, num_processes = process
    for number in range(rank, plan.num_shards, num_processes):
        rows = range(number * shard_size, min((number + 1) * shard_size, len(source)))
        if _finished(folder, number) is None:
            _write_shard(folder, number, source, rows, autoencoder, plan, batch_size, strict, on_images)
        else:
            on_images(len(rows))
    return _finish(folder, plan)


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
        self.index = _parse(CacheIndex, self.folder / "index.json")
        self.plan = self.index.plan
        for shard in self.index.shards:
            _check_size(self.folder, shard)
        self._first_rows = np.cumsum([0] + [shard.num_images for shard in self.index.shards])
        self._open: dict[tuple[int, str], Tensor] = {}
        self._names: list[str] | None = None

    def __len__(self) -> int:
        return self.index.num_images

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # each worker process maps the files itself

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.plan.class_names)

    def moments(self, indices: Sequence[int], flipped: Sequence[bool]) -> Tensor:
        """The stored moments of some images, as float32 [B, M, h, w].

        Args:
            indices: which images, in [0, len).
            flipped: per image, whether its mirror image is wanted (needs a cache encoded with flips).
        """
        if any(flipped) and not self.plan.flips:
            raise DataError(
                f"{self.folder} holds no mirrored images; encode it with --flips, or train with data.flip=false"
            )
        rows = [
            self._row("moments_flipped" if flip else "moments", i) for i, flip in zip(indices, flipped, strict=True)
        ]
        return torch.stack(rows).float()

    def labels(self, indices: Sequence[int]) -> Tensor | None:
        """Class indices [B] int64; None for an unlabelled cache."""
        return torch.stack([self._row("labels", i) for i in indices]) if self.class_names else None

    def names(self) -> list[str]:
        """The images' names inside their source, one per image."""
        if self._names is None:
            files = [open_tensors(self.folder / shard.file) for shard in self.index.shards]
            self._names = [name for file in files for name in json.loads(file.metadata()["names"])]
        return self._names

    def verify(self) -> None:
        """Compare every shard with its checksum.

        Raises:
            ArtifactError: one differs.
        """
        for shard in self.index.shards:
            if sha256_file(self.folder / shard.file) != shard.sha256:
                raise ArtifactError(
                    f"{self.folder / shard.file} does not match its checksum; run `latentflow encode` again"
                )

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

    def _row(self, tensor: str, index: int) -> Tensor:
        shard = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        if (shard, tensor) not in self._open:
            self._open[shard, tensor] = open_tensors(self.folder / self.index.shards[shard].file).get_tensor(tensor)
        return self._open[shard, tensor][index - int(self._first_rows[shard])]


def _plan(source: ImageSource, autoencoder: Autoencoder, *, flips: bool, precision: str, shard_size: int) -> CachePlan:
    side = autoencoder.latent_side(source.image_size)
    return CachePlan(
        autoencoder=autoencoder.reference,
        autoencoder_hash=autoencoder.content_hash,
        image_size=source.image_size,
        flips=flips,
        precision=precision,
        source=source.description,
        source_fingerprint=source.fingerprint(),
        num_source_images=len(source),
        shard_size=shard_size,
        num_channels=autoencoder.num_channels,
        moments_shape=(autoencoder.num_moments, side, side),
        class_names=list(source.class_names),
    )


def _claim(folder: Path, plan: CachePlan) -> None:
    """Write the plan into an empty folder, or make sure that the plan found there is the same."""
    file = folder / "plan.json"
    # Listed before looking for the plan: what another process writes in between must not seem strange.
    strangers = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".plan.")]
    if not file.exists():
        if strangers:
            raise ArtifactError(
                f"{folder} is not empty ({strangers[0]}, ...) and not a latent cache; choose another --out"
            )
        write_json(file, plan.model_dump(mode="json"))
        return
    found = _parse(CachePlan, file).model_dump(exclude={"autoencoder", "source"})
    wanted = plan.model_dump(exclude={"autoencoder", "source"})
    differing = [f"{key} {found[key]!r}, not {wanted[key]!r}" for key in wanted if found[key] != wanted[key]]
    if differing:
        raise ArtifactError(
            f"{folder} was begun with {'; '.join(differing)}; choose another --out or delete the folder"
        )


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def _write_shard(folder, number, source, rows, autoencoder, plan, batch_size, strict, on_images) -> None:
    """Encode the images of `rows` into one shard; its record is written last and makes it count."""
    for leftover in folder.glob(f".{_shard_name(number)}.*"):  # of a process that was killed
        leftover.unlink()
    sums = ChannelSums(plan.num_channels)
    moments, flipped, labels, names, broken = [], [], [], [], []
    for read in _read_ahead(source, rows, batch_size):
        items = [item for item in read if isinstance(item, ImageItem)]
        failures = [error for error in read if isinstance(error, BrokenImage)]
        if failures and strict:
            raise failures[0]
        broken += [error.name for error in failures]
        if items:
            pixels = torch.from_numpy(np.stack([item.pixels for item in items])).to(autoencoder.device)
            pixels = to_unit_range(pixels.permute(0, 3, 1, 2))
            encoded = autoencoder.encode(pixels).cpu()
            sums.add(encoded)
            moments.append(encoded)
            if plan.flips:
                flipped.append(autoencoder.encode(pixels.flip(-1)).cpu())
            labels += [item.label for item in items]
            names += [item.name for item in items]
        on_images(len(read))
    dtype = _PRECISIONS[plan.precision]
    empty = torch.empty(0, *plan.moments_shape)
    tensors = {"moments": torch.cat([*moments, empty]).to(dtype)}
    if plan.flips:
        tensors["moments_flipped"] = torch.cat([*flipped, empty]).to(dtype)
    if plan.class_names:
        tensors["labels"] = torch.tensor(labels, dtype=torch.int64)
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise DataError(
            f"moments of {names[0]} ... {names[-1]} are not finite as {plan.precision}; "
            + ("store them with --precision float32" if plan.precision == "float16" else "the autoencoder is damaged")
        )
    file = folder / f"{_shard_name(number)}.safetensors"
    write_tensors(file, tensors, metadata={"names": json.dumps(names)})
    record = ShardRecord(
        file=file.name,
        num_images=len(names),
        num_bytes=file.stat().st_size,
        sha256=sha256_file(file),
        num_values=sums.num_values,
        channel_sum=sums.sum.tolist(),
        channel_sum_of_squares=sums.sum_of_squares.tolist(),
        broken=broken,
    )
    write_json(folder / f"{_shard_name(number)}.json", record.model_dump(mode="json"))


def _read_ahead(source: ImageSource, rows: range, batch_size: int) -> Iterator[list[ImageItem | BrokenImage]]:
    """Batches of decoded images in order; threads decode the next batch while the encoder works on this one."""

    def read(row: int) -> ImageItem | BrokenImage:
        try:
            return source[row]
        except BrokenImage as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        batches = (pool.map(read, rows[start : start + batch_size]) for start in range(0, len(rows), batch_size))
        current = next(batches, None)
        while current is not None:
            following = next(batches, None)
            yield list(current)
            current = following


def _finished(folder: Path, number: int) -> ShardRecord | None:
    """The record of a shard that is complete and undamaged, else None."""
    record = folder / f"{_shard_name(number)}.json"
    if not record.exists():
        return None
    shard = _parse(ShardRecord, record)
    try:
        _check_size(folder, shard)
    except ArtifactError:
        return None
    return shard if sha256_file(folder / shard.file) == shard.sha256 else None


def _finish(folder: Path, plan: CachePlan) -> CacheIndex | None:
    """Write the index once every shard is there. Processes that get here together write the same bytes."""
    records = [folder / f"{_shard_name(number)}.json" for number in range(plan.num_shards)]
    if not all(record.exists() for record in records):
        return None
    shards = [_parse(ShardRecord, record) for record in records]
    broken = [name for shard in shards for name in shard.broken]
    sums = ChannelSums(plan.num_channels)
    for shard in shards:
        sums.num_values += shard.num_values
        sums.sum += torch.tensor(shard.channel_sum, dtype=torch.float64)
        sums.sum_of_squares += torch.tensor(shard.channel_sum_of_squares, dtype=torch.float64)
    if not sums.num_values:
        raise DataError(f"none of the {len(broken)} images of {plan.source} can be read, for example {broken[0]}")
    mean, std = sums.mean_and_std()
    num_images = sum(shard.num_images for shard in shards)
    index = CacheIndex(
        plan=plan, num_images=num_images, channel_mean=mean, channel_std=std, shards=shards, broken=broken
    )
    write_json(folder / "index.json", index.model_dump(mode="json"))
    return index


def _check_size(folder: Path, shard: ShardRecord) -> None:
    file = folder / shard.file
    num_bytes = file.stat().st_size if file.exists() else 0
    if num_bytes != shard.num_bytes:
        raise ArtifactError(
            f"{file} is truncated or damaged: {num_bytes} bytes, not {shard.num_bytes}; "
            "run the same `latentflow encode` again, which encodes this shard anew"
        )


def _parse(record: type[_Record], file: Path) -> Any:
    try:
        return record.model_validate(read_json(file))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(
            f"{file} does not fit latent cache schema {SCHEMA_VERSION} ({where}: {first['msg']})"
        ) from error
