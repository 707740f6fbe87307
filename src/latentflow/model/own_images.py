"""The images that a model was trained on, and those that were held out from it."""

from __future__ import annotations

from latentflow.data.batches import image_names
from latentflow.data.buckets import BucketedImages
from latentflow.data.cache.reader import LatentCache
from latentflow.data.items import ImageSource
from latentflow.data.sources.part import PartOfSource
from latentflow.model.config import TrainingRecord
from latentflow.requests import RequestError, Split
from latentflow.sizes import Size


def is_own(training: TrainingRecord, source: LatentCache | ImageSource) -> bool:
    """Whether a source or a latent cache holds the very images of a run, those that were held out included."""
    cached = isinstance(source, LatentCache)
    found = source.plan.source_fingerprint if cached else source.fingerprint()
    return bool(training.data_fingerprint) and found == training.data_fingerprint


def is_trained_on(training: TrainingRecord, source: ImageSource) -> bool:
    """Whether a run was trained on images of a source, and saw all of them but those that it held out."""
    if isinstance(source, PartOfSource):
        return source.split != "held-out" and is_own(training, source.source)
    return is_own(training, source)


def rows_of_split(training: TrainingRecord, source: LatentCache | ImageSource, split: Split) -> list[int]:
    """The images of a split of a model's own data.

    Raises:
        RequestError: the model was trained on all of its images, or the source holds others.
    """
    every = range(len(source))
    if split == "all":
        return list(every)
    if training.held_out is None:
        raise RequestError(
            "split",
            f" {split}: the model held no images out when it was trained; remove it, and give images it never saw",
        )
    if not is_own(training, source):
        own = training.data or "not known"
        raise RequestError(
            "split", f" {split}: these are not the images that the model was trained with ({own}); give those"
        )
    held_out = training.held_out.rows(image_names(source, every))
    return held_out if split == "held-out" else sorted(set(every) - set(held_out))


def part_of_own(training: TrainingRecord, source: ImageSource, split: Split, size: Size | None = None) -> ImageSource:
    """The images of a split as a source; see `rows_of_split`.

    Args:
        size: of images in buckets those of this size; None: all of them, or of a source of one size.

    Raises:
        DataError: none is of this size.
    """
    of_size = size if isinstance(source, BucketedImages) else None
    if split == "all" and of_size is None:
        return source
    rows = rows_of_split(training, source, split)
    if of_size is not None:
        rows = source.of_size(of_size, rows)
    return PartOfSource(source, rows, split, of_size)
