"""The JSON files of a latent cache: what it is made from, what each shard holds, and the finished index."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from latentflow.artifacts import checksum_of, read_json
from latentflow.columns import Column
from latentflow.data.buckets import Bucket
from latentflow.data.painting.input_rules import InputRules
from latentflow.data.painting.mask_rules import MaskRules
from latentflow.data.pictures.crop import CROP_RULE
from latentflow.errors import ArtifactError
from latentflow.pixel_format import PixelFormat
from latentflow.plans import PLAN_FILE
from latentflow.records import Record, explain
from latentflow.sizes import ImageSize, Size

SCHEMA_VERSION = 1
SOURCE_FILE, INDEX_FILE = "source.json", "index.json"  # `plans.PLAN_FILE` is the third

CacheRecord = TypeVar("CacheRecord", bound=Record)


class CachePlan(Record):
    """What a cache holds; two runs may share a cache only if their plans are equal."""

    schema_version: Literal[1] = SCHEMA_VERSION
    autoencoder: str
    autoencoder_hash: str
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    pixel_format: PixelFormat = PixelFormat()
    image_size: ImageSize
    crop_rule: str = CROP_RULE
    pixel_rules: str = "profiles ignored"  # in older caches, which do not say; see `PIXEL_RULES`
    flips: bool
    precision: Literal["float16", "float32"]
    source: str
    source_fingerprint: str
    identity: Literal["sizes", "contents"] = "sizes"
    """What the fingerprint hashes next to names; older caches, which do not say, hashed file sizes."""
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
    variants: int = 0  # augmented ones
    variant_rules: str = ""
    columns: list[Column] = Field([])
    inputs: InputRules | None = None  # of paired inputs
    input_format: PixelFormat | None = None  # of their pixels
    buckets: list[Bucket] = Field([], description="In the order of the shards; empty: all images have `image_size`.")

    @property
    def factor(self) -> int:
        """Image side divided by latent side."""
        return self.image_size.width // self.moments_shape[-1]

    @property
    def input_tensor(self) -> str:
        """The name of the tensor of inputs; "" without inputs."""
        if self.inputs is None:
            return ""
        return "inputs" if self.inputs.form == "pixels" else "input_moments"

    @property
    def num_shards(self) -> int:
        return self.shards_of(len(self._filled) - 1).stop

    @property
    def sizes(self) -> list[Size]:
        """Of the images, one for each bucket."""
        return [bucket.size for bucket in self._filled]

    def shards_of(self, bucket: int) -> range:
        """The shards that hold the images of a bucket, and no others."""
        numbers = [-(-one.num_images // self.shard_size) for one in self._filled[: bucket + 1]]
        return range(sum(numbers[:-1]), sum(numbers))

    def bucket_of(self, number: int) -> int:
        """The bucket that shard `number` is of."""
        return next(bucket for bucket in range(len(self._filled)) if number in self.shards_of(bucket))

    def rows(self, number: int) -> range:
        """The images of the source that shard `number` holds, broken ones included."""
        bucket = self.bucket_of(number)
        first = sum(one.num_images for one in self._filled[:bucket])
        start = first + (number - self.shards_of(bucket).start) * self.shard_size
        return range(start, min(start + self.shard_size, first + self._filled[bucket].num_images))

    def shape_of(self, number: int) -> tuple[int, int, int]:
        """The shape [M, h, w] of the moments of an image in shard `number`."""
        return self.moments_shape[0], *self.sizes[self.bucket_of(number)].over(self.factor)

    @property
    def _filled(self) -> list[Bucket]:
        return self.buckets or [Bucket(size=self.image_size, num_images=self.num_source_images)]


def column_tensor(number: int) -> str:
    """The name of the tensor of column `number` of the plan."""
    return f"column_{number}"


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
    cut_sum: float = 0.0  # of the shares that the crops leave out
    cut_most: float = 0.0
    clip_sum: float = 0.0  # of the shares of values that lie outside the range of the pixel format
    checksum: int | None = None  # of this record

    def is_broken(self, name: str) -> bool:
        """Whether image `name` could not be read when this shard was encoded."""
        return any(line.startswith(f"{name}: ") for line in self.broken)


class CachedSource(Record):
    """Names and content checksums of the images that a cache is made from; only read where something has changed."""

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
    def clipped(self) -> float:
        """Share of the values that lie outside the range of the pixel format, which -1 and 1 stand for."""
        return sum(shard.clip_sum for shard in self.shards) / max(self.num_images, 1)

    @property
    def cut(self) -> tuple[float, float]:
        """Share of the pictures that the crops leave out: the mean over all images, and the largest."""
        total = sum(shard.cut_sum for shard in self.shards)
        return total / max(self.num_images, 1), max((shard.cut_most for shard in self.shards), default=0.0)


def plan_of_cache(folder: str | Path) -> CachePlan | None:
    """The plan of a latent cache, finished or not; None if there is none."""
    try:
        return read_cache_record(CachePlan, Path(folder) / PLAN_FILE)
    except ArtifactError:  # what is wrong with the folder is said where it is written to
        return None


def shard_file(folder: Path, number: int) -> Path:
    """The tensors of a shard."""
    return folder / f"shard-{number:05d}.safetensors"


def record_file(folder: Path, number: int) -> Path:
    """The `ShardRecord` of a shard."""
    return folder / f"shard-{number:05d}.json"


def finished_shards(folder: Path, plan: CachePlan) -> Iterator[tuple[int, ShardRecord]]:
    """The shards that have a record, with their numbers.

    Raises:
        ArtifactError: a record is damaged.
    """
    for number in range(plan.num_shards):
        if (file := record_file(folder, number)).exists():
            yield number, read_cache_record(ShardRecord, file)


def check_size(file: str | Path, shard: ShardRecord) -> None:
    """Refuse a shard whose file is missing or of another size.

    Raises:
        ArtifactError: with the remedy.
    """
    try:
        num_bytes = os.stat(file).st_size  # noqa: PTH116 - called for each shard of each batch
    except OSError:
        num_bytes = 0
    if num_bytes != shard.num_bytes:
        raise ArtifactError(
            f"{file} is truncated or damaged: {num_bytes} bytes, not {shard.num_bytes}; "
            "run the same `latentflow encode` again, which restores this shard"
        )


def read_cache_record(kind: type[CacheRecord], file: Path) -> CacheRecord:
    """Read one JSON file of a cache.

    Raises:
        ArtifactError: the file is damaged or of another schema.
    """
    try:
        record = kind.model_validate(read_json(file))
    except ValidationError as error:
        raise ArtifactError(f"{file} does not fit latent cache schema {SCHEMA_VERSION} ({explain(error)})") from error
    checksum = getattr(record, "checksum", None)
    if checksum is not None and checksum != record_checksum(record):
        raise ArtifactError(
            f"{file} is damaged: it does not match its checksum; run the same `latentflow encode` again, which "
            "restores it"
        )
    return record


def record_checksum(record: Record) -> int:
    """The checksum of a record, without its own checksum and defaults: fields of later versions do not change it."""
    return checksum_of(record.model_dump(mode="json", exclude={"checksum"}, exclude_defaults=True))


def sealed(record: Record) -> dict[str, Any]:
    """A record with its checksum, to be written as JSON."""
    return {**record.model_dump(mode="json"), "checksum": record_checksum(record)}
