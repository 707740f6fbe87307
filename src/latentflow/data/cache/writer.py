"""Encode images into a latent cache: resumable after a kill, and shared between processes.

A shard appears complete or not at all; repeating the command encodes only what is missing or damaged.

Three things overlap: images are read in the background, the device encodes, the previous shard is written. The result
depends on none of this, only on the images and on which of them are encoded together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from latentflow.artifacts import make_folder, open_tensors, remove_leftovers, sha256_file, write_json
from latentflow.autoencoder import Autoencoder
from latentflow.console import notice
from latentflow.data.buckets import Bucket, BucketedImages
from latentflow.data.cache.encoder_input import EncoderInputs
from latentflow.data.cache.schema import (
    INDEX_FILE,
    SOURCE_FILE,
    CachedSource,
    CacheIndex,
    CachePlan,
    ShardRecord,
    check_size,
    finished_shards,
    read_cache_record,
    record_file,
    sealed,
)
from latentflow.data.cache.shard import ShardWriter
from latentflow.data.items import ImageSource, fingerprint_of
from latentflow.data.latent_statistics import ChannelSums
from latentflow.data.painting.input_rules import InputRules
from latentflow.data.painting.mask_rules import MaskRules
from latentflow.data.painting.masks import check_masks, masks_fingerprint
from latentflow.data.pictures.colour import PIXEL_RULES
from latentflow.data.pictures.variants import VARIANT_RULES
from latentflow.data.prefetch import BYTES_READ_TOGETHER, Reading, images_read_together, prefetch
from latentflow.data.request import CacheOptions
from latentflow.errors import ArtifactError, DataError
from latentflow.plans import PLAN_FILE, claim_folder, require_same_plan
from latentflow.runtime import Runtime

_NAMED = 5  # images or classes in a message
_BATCH_SIZE = 32
_WHAT = "a latent cache"  # for messages
_FREE = {"autoencoder", "source", "source_fingerprint", "num_source_images"}  # where things are, and which images


def write_cache(
    source: ImageSource,
    autoencoder: Autoencoder,
    folder: str | Path,
    options: CacheOptions | None = None,
    *,
    masks: MaskRules | None = None,
    runtime: Runtime | None = None,
    on_images: Callable[[int], None] = lambda num_images: None,
    on_kept: Callable[[int], None] = lambda num_images: None,
) -> CacheIndex | None:
    """Encode every image of `source` into `folder`, except those that are already there.

    A shard is kept while names and contents of its images are the same. An image that was broken may have been
    repaired; then its shard is encoded again.

    Args:
        masks: how the holes of `options.mask_variants` are drawn; None: the default rules.
        runtime: processes that share the work: of n, process r encodes shards r, r + n, r + 2n, ...; None: only this
            one.
        on_images: called with the number of images just finished, kept shards included.
        on_kept: called with the number of images of each shard that is kept.

    Returns:
        The index; None where other processes are still at work, the last of which writes it.

    Raises:
        ArtifactError: the folder holds something else, images have changed since, or it cannot be written.
        DataError: no image can be read, or, with `options.strict`, one is broken.
    """
    options = options or CacheOptions()
    plan = _plan(source, autoencoder, options, masks or MaskRules())
    folder = make_folder(folder)
    remove_leftovers(folder)
    _claim(folder, plan, source)
    runtime, missing = runtime or Runtime(autoencoder.device), []
    for number in runtime.share(range(plan.num_shards)):
        rows = plan.rows(number)
        if _is_finished(folder, number, fingerprint_of(source, rows)):
            on_images(len(rows))
            on_kept(len(rows))
        else:
            missing.append(number)
    if missing:
        device, inputs = autoencoder.device.type, EncoderInputs(source, plan)
        batch_size = options.batch_size or max(autoencoder.slice_of(plan.image_size.area), _BATCH_SIZE)
        writer = ShardWriter(folder, plan, source, autoencoder, batch_size, strict=options.strict, on_images=on_images)
        parts = _parts(inputs, [plan.rows(number) for number in missing], batch_size)
        how = Reading(options.num_workers, BYTES_READ_TOGETHER, device == "cuda", device == "cpu", runtime.local_world)
        with prefetch(inputs, parts, how) as read:
            writer.write(missing, read)
    index = _finish(folder, plan, source)
    if index is None and runtime.world == 1:
        raise ArtifactError(f"records of {folder} were removed while it was being filled; repeat the command")
    return index


def _plan(source: ImageSource, autoencoder: Autoencoder, options: CacheOptions, masks: MaskRules) -> CachePlan:
    latent = autoencoder.latent_size(source.image_size)
    buckets = list(source.buckets) if isinstance(source, BucketedImages) else []
    holes = {}
    inputs = None
    if source.input_format is not None:
        formats = (source.input_format, source.pixel_format)
        inputs = InputRules(origin=source.input_origin, form=options.input_form).resolved(*formats)
        inputs.network_channels(*formats, autoencoder.factor, autoencoder.num_channels)
    if options.mask_variants:
        for bucket in buckets or [Bucket(size=source.image_size, num_images=len(source))]:
            check_masks(masks, *bucket.size)
        holes = {"masks": masks, "masks_fingerprint": masks_fingerprint(masks)}
    return CachePlan(
        autoencoder=autoencoder.reference,
        autoencoder_hash=autoencoder.content_hash,
        image_size=source.image_size,
        pixel_format=source.pixel_format,
        pixel_rules=PIXEL_RULES,
        flips=options.flips,
        precision=options.dtype,
        source=source.description,
        source_fingerprint=source.fingerprint(),
        identity="contents",
        num_source_images=len(source),
        shard_size=options.shard_size,
        num_channels=autoencoder.num_channels,
        moments_shape=(autoencoder.num_moments, *latent),
        class_names=list(source.class_names),
        map_class_names=list(source.map_class_names),
        map_palette=list(source.map_palette),
        mask_variants=options.mask_variants,
        variants=options.variants,
        variant_rules=VARIANT_RULES if options.variants else "",
        columns=list(source.columns),
        inputs=inputs,
        input_format=source.input_format,
        buckets=buckets,
        **holes,
    )


def _claim(folder: Path, plan: CachePlan, source: ImageSource) -> None:
    """Write the plan into an empty folder, or make sure that the plan there is the same.

    Only images that are not encoded yet, or were broken, may have changed since the cache was created.
    """
    claim_folder(folder, plan.model_dump(mode="json"), _WHAT)
    found = read_cache_record(CachePlan, folder / PLAN_FILE)
    if found.identity != plan.identity:
        raise ArtifactError(
            f"{folder} was encoded by an earlier version, which did not record what its images held: it can be trained "
            "on, but not extended; choose another --out or delete the folder"
        )
    free = _FREE | ({"masks.folder"} if found.masks_fingerprint and plan.masks_fingerprint else set())
    old, new = (record.model_dump(mode="json") for record in (found, plan))
    require_same_plan(folder, old, new, _WHAT, free=free)
    same = found.source_fingerprint == plan.source_fingerprint
    if same and (folder / SOURCE_FILE).exists():
        return
    if not same:
        _require_only_broken_changed(folder, found, source)
    names = [source.name(row) for row in range(len(source))]
    record = CachedSource(names=names, contents=list(source.contents()))
    write_json(folder / SOURCE_FILE, record.model_dump(mode="json"))
    write_json(folder / PLAN_FILE, plan.model_dump(mode="json"))


def _require_only_broken_changed(folder: Path, found: CachePlan, source: ImageSource) -> None:
    """Refuse to continue if encoded images were added, removed or changed.

    Raises:
        ArtifactError: naming some of them.
    """
    new = dict(zip(map(source.name, range(len(source))), source.contents(), strict=True))
    file = folder / SOURCE_FILE
    record = read_cache_record(CachedSource, file) if file.exists() else CachedSource(names=[], contents=[])
    old = dict(zip(record.names, record.contents, strict=False))
    changed = [name for name in old.keys() & new.keys() if old[name] != new[name]]
    if changed and list(old) == list(new):
        encoded = _encoded_names(folder, found, record.names)
        changed = [name for name in changed if name in encoded]
    lists = {"changed": changed, "added": new.keys() - old.keys(), "removed": old.keys() - new.keys()}
    listed = [f"{len(names)} {what} ({', '.join(sorted(names)[:_NAMED])})" for what, names in lists.items() if names]
    if listed:
        raise ArtifactError(
            f"{folder} was created with other images: since then {', '.join(listed)}; restore them, choose another "
            "--out, or delete the folder"
        )


def _encoded_names(folder: Path, plan: CachePlan, names: Sequence[str]) -> set[str]:
    """The images in finished shards, without those that were broken."""
    return {
        names[row]
        for number, shard in finished_shards(folder, plan)
        for row in plan.rows(number)
        if not shard.is_broken(names[row])
    }


def _parts(inputs: EncoderInputs, shards: Sequence[range], batch_size: int) -> list[range]:
    """The batches of some shards, in parts that are small enough for a worker process to return."""
    size = images_read_together(inputs.bytes_per_image)
    return [part for rows in shards for batch in _split(rows, batch_size) for part in _split(batch, size)]


def _split(rows: range, size: int) -> Iterator[range]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _is_finished(folder: Path, number: int, source_fingerprint: str) -> bool:
    """Whether a shard is complete, undamaged and of these images."""
    if not record_file(folder, number).exists():
        return False
    try:
        shard = read_cache_record(ShardRecord, record_file(folder, number))
        check_size(folder / shard.file, shard)
    except ArtifactError:
        return False
    return shard.source_fingerprint == source_fingerprint and sha256_file(folder / shard.file) == shard.sha256


def _finish(folder: Path, plan: CachePlan, source: ImageSource) -> CacheIndex | None:
    """Write the index once every shard is there. Processes that get here together write the same bytes."""
    shards = [shard for _, shard in finished_shards(folder, plan)]
    if len(shards) < plan.num_shards:
        return None
    if any(s.source_fingerprint != fingerprint_of(source, plan.rows(n)) for n, s in enumerate(shards)):
        return None  # another process encodes what has changed
    broken = [name for shard in shards for name in shard.broken]
    sums = ChannelSums(plan.num_channels)
    for shard in shards:
        sums.add_sums(shard.num_values, shard.channel_sum, shard.channel_sum_of_squares)
    if not sums.num_values:
        raise DataError(f"{plan.source}: no image can be read, for example {broken[0]}")
    mean, std = sums.mean_and_std()
    num_images = sum(shard.num_images for shard in shards)
    index = CacheIndex(
        plan=plan, num_images=num_images, channel_mean=mean, channel_std=std, shards=shards, broken=broken
    )
    write_json(folder / INDEX_FILE, sealed(index))
    _notice_empty_classes(folder, plan, shards)
    return index


def _notice_empty_classes(folder: Path, plan: CachePlan, shards: Sequence[ShardRecord]) -> None:
    if not plan.class_names:
        return
    files = [open_tensors(folder / shard.file) for shard in shards]
    labels = {label for file in files for label in file.get_tensor("labels").tolist()}
    if empty := [name for label, name in enumerate(plan.class_names) if label not in labels]:
        notice(
            f"{folder} has no readable image of {len(empty)} of its classes ({', '.join(empty[:_NAMED])}), so training "
            "with labels will refuse it; repair the images and repeat the command"
        )
