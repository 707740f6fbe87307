"""`latentflow encode`: images => latent cache."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from latentflow.artifacts import require_apart
from latentflow.autoencoder import Autoencoder
from latentflow.console import notice
from latentflow.data.buckets import BucketedImages, bucket_sizes, usual_step
from latentflow.data.cache.schema import CacheIndex, plan_of_cache
from latentflow.data.cache.writer import write_cache
from latentflow.data.inventory import Inventory, duplicates_in, take_inventory
from latentflow.data.items import ImageSource
from latentflow.data.pictures.decode import BrokenImage
from latentflow.data.request import EncodeRequest
from latentflow.data.sources.images import open_images
from latentflow.data.sources.pixel_survey import alike, choice_for
from latentflow.errors import DataError
from latentflow.locks import writes
from latentflow.progress import image_progress
from latentflow.requests import RequestError
from latentflow.runtime import Runtime


@dataclass(frozen=True)
class EncodeResult:
    """What `encode` did.

    Attributes:
        index: of the finished cache; None while other processes are still encoding.
        is_new: whether any image was encoded.
        seconds: wall time.
    """

    index: CacheIndex | None
    is_new: bool
    seconds: float


def what_would_be_read(request: EncodeRequest, out: str | Path) -> Inventory:
    """Read every image as `encode` would, and count what is there; nothing is written.

    Args:
        out: the cache that it would be, whose range of values is kept if it is there already.

    Raises:
        DataError, ArtifactError: see `open_images`; also if no image can be read.
    """
    require_apart(out, request.data, request.mask_folder)
    source = _opened(request, out)
    if request.buckets or request.bucket_step is not None:  # whose sizes depend on the autoencoder
        source = at_sizes(source, request, Autoencoder.from_pretrained(request.autoencoder))
    found = take_inventory(source, request.num_workers)
    if not found.num_images:
        raise DataError(f"{found.source}: no image can be read, for example {found.broken[0]}")
    return found


@writes("out", launch=True)
def encode(request: EncodeRequest, out: str | Path, *, runtime: Runtime | None = None) -> EncodeResult:
    """Encode images into a latent cache; repeating the call continues after a kill.

    Args:
        out: the cache, a folder.
        runtime: where to compute; None: see `open_runtime`.

    Raises:
        DataError, ArtifactError, ConfigError: see `open_images`, `Autoencoder.from_pretrained` and `write_cache`.
    """
    began = time.perf_counter()
    require_apart(out, request.data, request.mask_folder)
    source = _opened(request, out)
    _require_one_readable(source)
    _notice_duplicates(source)
    assert runtime is not None  # opened by `writes`
    encoder = Autoencoder.from_pretrained(request.autoencoder).to(runtime.with_precision(request.precision))
    encoder.require_channels(source.pixel_format.channels, request.data)
    source = at_sizes(source, request, encoder)
    finished: list[int] = []
    kept: list[int] = []
    with image_progress("encoding", len(source) // runtime.world) as on_images:

        def count(number: int) -> None:
            finished.append(number)
            on_images(number)

        callbacks = {"on_images": count, "on_kept": kept.append}
        index = write_cache(source, encoder, out, request, masks=request.masks, runtime=runtime, **callbacks)
    return EncodeResult(index, sum(finished) > sum(kept), time.perf_counter() - began)


def _opened(request: EncodeRequest, out: str | Path) -> ImageSource:
    pixels = choice_for(request, request.autoencoder)
    options = {"first": request.first, "strict": request.strict, "table": request, "pixels": pixels}
    inputs = request.paired
    if (plan := plan_of_cache(out)) is not None:
        options["known"], inputs = plan.pixel_format, replace(inputs, known=plan.input_format)
    source = open_images(request.data, request.image_size, inputs=inputs, **options)
    if request.input_form != "auto" and not source.input_origin:
        reason = f" {request.input_form}: {request.data} has no paired inputs; give --inputs, or leave it out"
        raise RequestError("input_form", reason)
    if (trained_on := pixels.trained_on) is not None and not alike(source.pixel_format, trained_on):
        notice(
            f"{request.autoencoder} was trained on {trained_on.title}, and these images are read as "
            f"{source.pixel_format.title}: what it gives back may differ from them; `encode --look 16` shows it"
        )
    return source


def _notice_duplicates(source: ImageSource) -> None:
    """Print how many images repeat another, which a model would see more often."""
    if groups := duplicates_in(source):
        first = ", ".join(source.name(row) for row in groups[0][:3])
        notice(
            f"{source.description}: {sum(len(group) - 1 for group in groups)} images repeat another, byte for byte "
            f"(such as {first}); `encode --dry-run --json` lists them"
        )


def at_sizes(source: ImageSource, request: EncodeRequest, autoencoder: Autoencoder) -> ImageSource:
    """The images at the sizes of their buckets, if that is asked for.

    Raises:
        ConfigError: the step of the buckets is no multiple of the autoencoder's factor, or without effect.
        DataError: the images cannot be cropped to several sizes.
    """
    if not request.buckets:
        if request.bucket_step is not None:
            raise RequestError("bucket_step", f" {request.bucket_step} has no effect without --buckets; remove it")
        return source
    step = request.bucket_step or usual_step(request.image_size, autoencoder.factor)
    if step % autoencoder.factor:
        raise RequestError("bucket_step", f" {step}: give a multiple of {autoencoder.factor}, the autoencoder's factor")
    with image_progress("measuring", len(source)) as on_images:
        return BucketedImages.of(source, bucket_sizes(request.image_size, step), on_images)


def _require_one_readable(source: ImageSource) -> None:
    """Refuse a source without a readable image, before anything is written; usually the first one is readable."""
    errors = []
    for row in range(len(source)):
        try:
            source[row]
            return
        except BrokenImage as error:
            errors.append(error)
    raise DataError(f"{source.description}: no image can be read, for example {errors[0].name}: {errors[0].reason}")
