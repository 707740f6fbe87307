"""The real images of an evaluation: their features, computed once, kept next to the results, and reused.

Legend: M real images that can be read, D features of an image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentflow.artifacts import read_json, require_writable, sha256_file
from latentflow.data.buckets import BucketedImages
from latentflow.data.items import ImageSource
from latentflow.data.painting.input_rules import NO_INPUTS
from latentflow.data.paired_choice import PairedChoice
from latentflow.data.pictures.colour import PIXEL_RULES
from latentflow.data.pictures.crop import CROP_RULE
from latentflow.data.pixel_choice import PixelChoice
from latentflow.data.sources.images import open_images
from latentflow.data.table_options import TableOptions
from latentflow.errors import ArtifactError, DataError
from latentflow.evaluation.read_images import ImageReader
from latentflow.evaluation.shards import Columns, Work, compute_in_shards, join_columns, of_the_first
from latentflow.metrics.evaluation_report import ReferenceFacts
from latentflow.metrics.features.extractors import FeatureExtractor
from latentflow.metrics.statistics import FeatureStatistics, require_features
from latentflow.metrics.stored_statistics import FOREIGN_SUFFIXES, Provenance, Reference, load_reference
from latentflow.model.config import ModelConfig, TrainingRecord
from latentflow.model.own_images import part_of_own, rows_of_split
from latentflow.pixel_format import RGB, PixelFormat
from latentflow.requests import RequestError, Split
from latentflow.runtime import Runtime
from latentflow.sizes import Size

_OWN_SUFFIX = ".safetensors"
_RULES = f"{CROP_RULE}, {PIXEL_RULES}"


@dataclass(frozen=True)
class RealImages:
    """The reference of an evaluation, before its features are known.

    Attributes:
        data: what the user gave.
        source: the images; None where only statistics are there.
        stored: the statistics; None where they are still to be computed.
        fingerprint: of the images; of a foreign file of statistics, its SHA-256.
        image_size: of the images.
        notes: warnings for the user.
    """

    data: str
    source: ImageSource | None
    stored: Reference | None
    fingerprint: str
    image_size: Size
    notes: tuple[str, ...] = ()

    @property
    def pixel_format(self) -> PixelFormat:
        """What the images are read in; of statistics, 8-bit RGB."""
        return RGB if self.source is None else self.source.pixel_format

    @property
    def num_images(self) -> int:
        """M, broken images included; 0: not known."""
        return self.stored.statistics.n if self.source is None else len(self.source)

    def of_shape(self, config: ModelConfig, split: Split) -> RealImages:
        """The images whose shape is nearest to `image_size`, of the sizes of a model; of a part of its images.

        Raises:
            DataError: there are none.
            RequestError: as for `only`.
        """
        if self.source is None or not config.buckets:
            return self.only(split, config.training)
        images = BucketedImages.of(self.source, config.sizes)
        rows = None if split == "all" else rows_of_split(config.training, images, split)
        source = images.only(self.image_size, rows)
        return replace(self, source=source, fingerprint=source.fingerprint())

    def only(self, split: Split, training: TrainingRecord) -> RealImages:
        """A part of the images that a model was trained with.

        Raises:
            RequestError: these are others, or statistics, or the model held none out.
        """
        if split == "all":
            return self
        if self.source is None:
            raise RequestError("split", f" {split}: {self.data} holds statistics of images; give the images themselves")
        part = part_of_own(training, self.source, split)
        return replace(self, source=part, fingerprint=part.fingerprint())

    def facts(self, num_images: int) -> ReferenceFacts:
        """The reference as a report records it.

        Args:
            num_images: that could be read.
        """
        made = None if self.stored is None else self.stored.provenance
        return ReferenceFacts(
            data=made.data if made else self.source.description,
            fingerprint=self.fingerprint,
            num_images=num_images,
            image_size=self.image_size,
            resize=made.resize if made else _RULES,
        )


@dataclass(frozen=True)
class RealFeatures:
    """The features of the real images of an evaluation.

    Attributes:
        num_images: that could be read; 0: a file of statistics does not say.
        statistics: mean and covariance; None in all but the first of several processes.
        features: [M, D] float32; None where only statistics are there, and in all but the first of several processes.
        rows: [M] int64, which images of the source these are: the others cannot be read.
        labels: [M] int64, -1 where there are none.
        notes: warnings for the user.
    """

    num_images: int
    statistics: FeatureStatistics | None = None
    features: Tensor | None = None
    rows: Tensor | None = None
    labels: Tensor | None = None
    notes: tuple[str, ...] = ()


def open_real_images(
    data: str | Path,
    image_size: Size,
    pixel_format: PixelFormat | PixelChoice | None = None,
    *,
    inputs: PairedChoice | None = None,
    table: TableOptions | None = None,
) -> RealImages:
    """Open images, or a file of statistics; no image is decoded.

    Args:
        pixel_format: what images are read in, or what is said of it; None: what they are.
        inputs: the paired inputs; None: there are none.
        table: which columns of a table are used.

    Raises:
        DataError, ArtifactError: there is nothing usable, or the statistics are of images of another size.
    """
    file = Path(data)
    if file.suffix not in (_OWN_SUFFIX, *FOREIGN_SUFFIXES) or file.is_dir():
        chosen = {"pixels": pixel_format or PixelChoice(), "inputs": inputs or NO_INPUTS, "table": table}
        source = open_images(data, image_size, **chosen)
        return RealImages(str(data), source, None, source.fingerprint(), image_size)
    stored = load_reference(file)
    made = stored.provenance
    if made.image_size.area and made.image_size != image_size:
        raise DataError(
            f"{data} holds statistics of images of {made.image_size} pixels, and the images to score have "
            f"{image_size}: FID depends on the size; give the reference images instead"
        )
    notes = () if made.image_size.area else (f"{file.name} does not give its image size, which is assumed to match",)
    return RealImages(str(data), None, stored, made.fingerprint or f"sha256:{sha256_file(file)}", image_size, notes)


def reference_file(real: RealImages, extractor: FeatureExtractor, result: Path) -> Path:
    """The default place for the statistics of a reference: next to a result, named by images and features."""
    key = hashlib.sha256(json.dumps(_plan(real, extractor), sort_keys=True).encode()).hexdigest()
    return result.parent / f"reference-{key[:12]}{_OWN_SUFFIX}"


def reference_features(
    real: RealImages, extractor: FeatureExtractor, work: Work, *, file: Path | None = None
) -> RealFeatures:
    """The features of a reference; what `file` and the folder of features next to it hold already is reused.

    Args:
        work: how it is done; every process gets rows and labels.
        file: where statistics go, a .safetensors file; features go to the folder of that name with .features. None:
            nothing is kept.

    Raises:
        DataError: other features than those of a file of statistics, or no image can be read.
        ArtifactError: `file` is the reference of something else.
    """
    if real.source is None:
        warning = real.stored.require_same_features(extractor.name, extractor.hash, extractor.dim)
        found = _companion(real, extractor, work.runtime)
        notes, statistics = (*real.notes, *([warning] if warning else [])), real.stored.statistics
        return RealFeatures(statistics.n, statistics, *(found or (None, None, None)), notes=notes)
    provenance = Provenance(
        data=real.source.description,
        fingerprint=real.fingerprint,
        image_size=real.image_size,
        resize=_RULES,
        feature_name=extractor.name,
        feature_hash=extractor.hash,
    )
    kept = None
    if file is not None:
        require_writable(file, suffix=_OWN_SUFFIX)
        kept = _stored(file, provenance)
    columns = image_features(
        real.source,
        range(len(real.source)),
        extractor,
        plan=_plan(real, extractor),
        work=replace(work, folder=None if file is None else file.with_suffix(".features")),
        for_all=("rows", "labels"),
    )
    num = len(columns["rows"])
    if not num:
        raise DataError(f"{real.source.description}: no image can be read")
    features, statistics = columns.get("features"), None
    if features is not None:
        statistics = kept.statistics if kept else FeatureStatistics.of(features, extractor.device)
        if file is not None and kept is None:
            Reference(statistics, provenance).save(file)
    missing = len(real.source) - num
    notes = (f"{missing} of {len(real.source)} reference images cannot be read and are left out",) if missing else ()
    return RealFeatures(num, statistics, features, columns["rows"], columns["labels"], (*real.notes, *notes))


def image_features(
    source: ImageSource,
    rows: Sequence[int],
    extractor: FeatureExtractor,
    *,
    plan: dict[str, Any],
    work: Work,
    for_all: Collection[str] = (),
    change: Callable[[Tensor, list[int]], tuple[Tensor, Columns]] | None = None,
) -> Columns:
    """Features [M, D], `rows` [M] and labels [M] of those images of a source that can be read; see `compute_in_shards`.

    Args:
        rows: which images; every one of them is tried.
        change: applied to images [B, P, H, W], with their rows, before their features are computed; returns such
            images, and further numbers [B, ...] of each.
    """
    whose = "generated" if change else "real"

    def compute(places: range) -> Columns:
        parts = []
        for _ in range(0, len(places), work.batch_size):
            read = next(reader)
            if read.rows:
                pixels, more = change(read.pixels, read.rows) if change else (read.pixels, {})
                own = {"rows": torch.tensor(read.rows), "labels": read.labels}
                parts.append({"features": extractor(pixels), **own, **more})
            work.on_images(read.num_tried)
        if not parts:
            none = torch.zeros(0, dtype=torch.int64)
            return {"features": torch.zeros(0, extractor.dim), "rows": none, "labels": none.clone()}
        columns = join_columns(parts)
        columns["features"] = require_features(columns["features"].float().cpu(), whose)  # read once a shard
        return columns

    with ImageReader(source, rows, extractor.device, work) as reader:
        return compute_in_shards(len(rows), compute, plan=plan, work=work, for_all=for_all, on_begin=reader.begin)


def _plan(real: RealImages, extractor: FeatureExtractor) -> dict[str, Any]:
    return {
        "data": real.fingerprint,
        "num_images": real.num_images if real.source is not None else None,
        "image_size": real.image_size.written,
        "resize": _RULES,
        "features": extractor.hash,
    }


def _stored(file: Path, wanted: Provenance) -> Reference | None:
    """The statistics in `file`; None if there are none yet.

    Raises:
        ArtifactError: they are of something else.
    """
    if not file.exists():
        return None
    found = load_reference(file)
    keys = ("fingerprint", "image_size", "resize", "feature_name", "feature_hash")
    differing = [key for key in keys if getattr(found.provenance, key) != getattr(wanted, key)]
    if differing:
        raise ArtifactError(
            f"{file} is a reference for something else ({found.provenance.data}; another {', '.join(differing)}); "
            "choose another --reference-out, or delete it"
        )
    return found


def _companion(
    real: RealImages, extractor: FeatureExtractor, runtime: Runtime
) -> tuple[Tensor | None, Tensor, Tensor] | None:
    """Features (in the first process), rows and labels from the folder next to a file of statistics, if they fit it."""
    folder = Path(real.data).with_suffix(".features")
    found = _kept_features(real, extractor, folder) if runtime.is_main else {}
    shared = of_the_first(runtime, {name: found[name] for name in ("rows", "labels") if found})
    return (found.get("features"), shared["rows"], shared["labels"]) if shared else None


def _kept_features(real: RealImages, extractor: FeatureExtractor, folder: Path) -> Columns:
    if not (folder / "plan.json").is_file():
        return {}
    plan = read_json(folder / "plan.json")
    wanted = _plan(real, extractor) | {"num_images": plan.get("num_images"), "shard_size": plan.get("shard_size")}
    if plan != wanted:
        return {}

    def compute(rows: range) -> Columns:
        raise ArtifactError(f"{folder} lacks the images {rows.start} to {rows.stop - 1}")

    try:
        given = {name: value for name, value in plan.items() if name != "shard_size"}
        return compute_in_shards(plan["num_images"], compute, plan=given, work=Work(folder=folder))
    except ArtifactError:
        return {}
