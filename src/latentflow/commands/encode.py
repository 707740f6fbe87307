"""`latentflow encode`: images => latent cache."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from latentflow.artifacts import require_apart
from latentflow.autoencoder import Autoencoder
from latentflow.data.cache.reader import CacheIndex
from latentflow.data.cache.writer import write_cache
from latentflow.data.items import ImageSource
from latentflow.data.painting.mask_rules import MaskRules
from latentflow.data.sources.images import BrokenImage, open_images
from latentflow.errors import DataError
from latentflow.locks import writes
from latentflow.progress import image_progress
from latentflow.runtime import PrecisionWord, Runtime


@dataclass(frozen=True)
class EncodeResult:
    """What `encode` did.

    Attributes:
        index: of the finished cache; None where other processes are still encoding.
        is_new: whether any image was encoded.
        seconds: wall time.
    """

    index: CacheIndex | None
    is_new: bool
    seconds: float


@writes("out", launch=True)
def encode(
    data: str | Path,
    out: str | Path,
    *,
    autoencoder: str | Path,
    image_size: int,
    first: int | None = None,
    flips: bool = False,
    dtype: Literal["float16", "float32"] = "float16",
    batch_size: int | None = None,
    shard_size: int = 1024,
    masks: MaskRules | None = None,
    mask_variants: int = 0,
    strict: bool = False,
    num_workers: int | None = None,
    precision: PrecisionWord = "tf32",
    runtime: Runtime | None = None,
) -> EncodeResult:
    """Encode images into a latent cache; repeating the call goes on where a kill ended it.

    Args:
        data: a folder, a zip, an LMDB environment, or 'synthetic:COUNT'.
        first: encode the first so many images, of class folders evenly; None: all of them. See `open_images`.
        flips: also encode the mirrored images, so that training can mirror.
        masks: which holes are drawn; None: those of the usual policy.
        dtype: how moments are stored.
        mask_variants: images with holes that are encoded of each image, for inpainting; 0: none.
        batch_size: images encoded together; None: 32, and on a GPU as many as make a megapixel.
        num_workers: processes that read and resize images; 0: threads; None: as many as pay.
        strict: a broken image is an error; otherwise it is left out and listed in the index.
        precision: what the autoencoder computes in; half precision only where it is asked for.
        runtime: where; None: see `open_runtime`.

    Raises:
        DataError, ArtifactError, ConfigError: see `open_images`, `Autoencoder.from_pretrained` and `write_cache`.
    """
    began = time.perf_counter()
    require_apart(out, data, masks.folder if masks else None)
    source = open_images(data, image_size, first=first, strict=strict)
    _require_one_readable(source)
    assert runtime is not None  # opened by `writes`
    encoder = Autoencoder.from_pretrained(autoencoder).to(runtime.with_precision(precision))
    num_images, finished, kept = len(source) // runtime.world, [], []
    with image_progress("encoding", num_images) as on_images:

        def count(number: int) -> None:
            finished.append(number)
            on_images(number)

        index = write_cache(
            source,
            encoder,
            out,
            flips=flips,
            precision=dtype,
            batch_size=batch_size,
            shard_size=shard_size,
            masks=masks,
            mask_variants=mask_variants,
            strict=strict,
            runtime=runtime,
            num_workers=num_workers,
            on_images=count,
            on_kept=kept.append,
        )
    return EncodeResult(index, sum(finished) > sum(kept), time.perf_counter() - began)


def _require_one_readable(source: ImageSource) -> None:
    """Refuse images none of which can be read, before anything is written; usually the first one can."""
    errors = []
    for row in range(len(source)):
        try:
            source[row]
            return
        except BrokenImage as error:
            errors.append(error)
    raise DataError(f"{source.description}: none can be read, for example {errors[0].name}: {errors[0].reason}")
