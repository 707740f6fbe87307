"""Encode images into a latent cache, resumable after a kill, shared between processes.

A shard appears complete or not at all; repeating the command encodes what is missing or damaged and nothing else.
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
from torch import Tensor

from latentflow.artifacts import (
    contents,
    make_folder,
    open_tensors,
    remove_leftovers,
    sha256_file,
    write_json,
    write_tensors,
)
from latentflow.autoencoder import Autoencoder, to_unit_range
from latentflow.console import notice
from latentflow.data.colour import PIXEL_RULES
from latentflow.data.images import BrokenImage
from latentflow.data.items import ImageItem, ImageSource, fingerprint_of
from latentflow.data.latent_cache import (
    CachedSource,
    CacheIndex,
    CachePlan,
    ChannelSums,
    ShardRecord,
    check_size,
    parse_record,
    sealed,
)
from latentflow.data.latent_size import class_counts, hide, hole_counts
from latentflow.data.masks import MaskRules, check_masks, draw_mask, masks_fingerprint
from latentflow.errors import ArtifactError, DataError
from latentflow.randomness import derive_seed

_NAMED = 5  # images or classes in a message
_PRECISIONS = {"float16": torch.float16, "float32": torch.float32}


def write_cache(
    source: ImageSource,
    autoencoder: Autoencoder,
    folder: str | Path,
    *,
    flips: bool = False,
    precision: Literal["float16", "float32"] = "float16",
    shard_size: int = 1024,
    batch_size: int = 32,
    masks: MaskRules | None = None,
    mask_variants: int = 0,
    strict: bool = False,
    process: tuple[int, int] = (0, 1),
    on_images: Callable[[int], None] = lambda num_images: None,
    on_kept: Callable[[int], None] = lambda num_images: None,
) -> CacheIndex | None:
    """Encode every image of `source` into `folder`, leaving out what is already there.

    What is there counts as long as names and contents of its images are the same. Images that were broken may be whole
    now, and then their shards are encoded anew.

    Args:
        flips: also encode the mirrored images (an encoder does not commute with mirroring).
        precision: how moments are stored; float16 rounds by at most 1 part in 2048.
        shard_size: images per shard, the unit of work that is lost by a kill.
        masks: which holes are drawn for inpainting.
        mask_variants: holes per image, each with the image encoded without it; 0: none are stored.
        strict: a broken image is an error, not an omission.
        process: (rank, number of processes); process r encodes shards r, r + n, r + 2n, ...
        on_images: told the number of images just finished, shards found complete included.
        on_kept: told the number of images of each shard found complete.

    Returns:
        The index, or None where other processes are still at work; the last one to finish writes it.

    Raises:
        ArtifactError: the folder holds something else, images have changed since, or it cannot be written.
        DataError: no image could be read, or, with `strict`, one is broken.
    """
    variants = {}
    if mask_variants:
        masks = masks or MaskRules()
        check_masks(masks, source.image_size, source.image_size)
        variants = {"masks": masks, "mask_variants": mask_variants, "masks_fingerprint": masks_fingerprint(masks)}
    plan = _plan(source, autoencoder, flips=flips, precision=precision, shard_size=shard_size, **variants)
    folder = make_folder(folder)
    remove_leftovers(folder)
    _claim(folder, plan, source)
    rank, num_processes = process
    for number in range(rank, plan.num_shards, num_processes):
        rows = _rows(plan, number)
        if _finished(folder, number, fingerprint_of(source, rows)) is None:
            _write_shard(folder, number, source, rows, autoencoder, plan, batch_size, strict, on_images)
        else:
            on_images(len(rows))
            on_kept(len(rows))
    index = _finish(folder, plan, source)
    if index is None and num_processes == 1:
        raise ArtifactError(f"records of {folder} were removed while it was being filled; repeat the command to go on")
    return index


def _plan(source: ImageSource, autoencoder: Autoencoder, **options: Any) -> CachePlan:
    side = autoencoder.latent_side(source.image_size)
    return CachePlan(
        autoencoder=autoencoder.reference,
        autoencoder_hash=autoencoder.content_hash,
        image_size=source.image_size,
        pixel_rules=PIXEL_RULES,
        source=source.description,
        source_fingerprint=source.fingerprint(),
        identity="contents",
        num_source_images=len(source),
        num_channels=autoencoder.num_channels,
        moments_shape=(autoencoder.num_moments, side, side),
        class_names=list(source.class_names),
        map_class_names=list(source.map_class_names),
        map_palette=list(source.map_palette),
        **options,
    )


def _claim(folder: Path, plan: CachePlan, source: ImageSource) -> None:
    """Write the plan into an empty folder, or make sure that the plan found there is the same.

    Only images that were broken, or are not encoded yet, may hold something else than when the cache was begun.
    """
    file, images = folder / "plan.json", folder / "source.json"
    # Listed before looking for the plan: what another process writes in between must not seem strange.
    strangers = contents(folder)
    if not file.exists():
        if strangers:
            raise ArtifactError(
                f"{folder} is not empty ({strangers[0].name}, ...) and not a latent cache; choose another --out"
            )
        write_json(file, plan.model_dump(mode="json"))
    found = parse_record(CachePlan, file)
    if found.identity != plan.identity:
        raise ArtifactError(
            f"{folder} was encoded by an earlier version, which did not keep what its images held: it can be trained "
            "on, but not gone on with; choose another --out or delete the folder"
        )
    differing = _differences(found, plan)
    if differing:
        raise ArtifactError(
            f"{folder} was begun with {'; '.join(differing)}; choose another --out or delete the folder"
        )
    same = found.source_fingerprint == plan.source_fingerprint
    if same and images.exists():
        return
    if not same:
        _require_only_broken_changed(folder, found, source)
    names = [source.name(row) for row in range(len(source))]
    record = CachedSource(names=names, contents=source.contents())
    write_json(images, record.model_dump(mode="json"))
    write_json(file, plan.model_dump(mode="json"))


def _differences(found: CachePlan, wanted: CachePlan) -> list[str]:
    """What differs between two plans, where things lie and what the images are left out."""
    apart = {"autoencoder", "source", "source_fingerprint", "num_source_images"}
    old, new = found.model_dump(exclude=apart), wanted.model_dump(exclude=apart)
    if found.masks_fingerprint and wanted.masks_fingerprint:
        old["masks"]["folder"] = new["masks"]["folder"]
    return [f"{key} {old[key]!r}, not {new[key]!r}" for key in new if old[key] != new[key]]


def _require_only_broken_changed(folder: Path, found: CachePlan, source: ImageSource) -> None:
    """Refuse to go on where images have come, gone or changed that are encoded already.

    Raises:
        ArtifactError: naming some of them.
    """
    new = dict(zip(map(source.name, range(len(source))), source.contents(), strict=True))
    file = folder / "source.json"
    record = parse_record(CachedSource, file) if file.exists() else CachedSource(names=[], contents=[])
    old = dict(zip(record.names, record.contents, strict=False))
    changed = [name for name in old.keys() & new.keys() if old[name] != new[name]]
    if changed and list(old) == list(new):
        encoded = _encoded_names(folder, found, record.names)
        changed = [name for name in changed if name in encoded]
    lists = {"changed": changed, "come": new.keys() - old.keys(), "gone": old.keys() - new.keys()}
    told = [f"{len(names)} {what} ({', '.join(sorted(names)[:_NAMED])})" for what, names in lists.items() if names]
    if told:
        raise ArtifactError(
            f"{folder} was begun with other images: since then {', '.join(told)}; restore them, choose another --out, "
            "or delete the folder"
        )


def _encoded_names(folder: Path, plan: CachePlan, names: Sequence[str]) -> set[str]:
    """The images in finished shards, without those that were broken."""
    encoded = set()
    for number in range(plan.num_shards):
        file = folder / f"{_shard_name(number)}.json"
        if file.exists():
            broken = tuple(parse_record(ShardRecord, file).broken)
            some = [names[row] for row in _rows(plan, number)]
            encoded |= {name for name in some if not any(line.startswith(f"{name}: ") for line in broken)}
    return encoded


def _rows(plan: CachePlan, number: int) -> range:
    return range(number * plan.shard_size, min((number + 1) * plan.shard_size, plan.num_source_images))


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def _write_shard(folder, number, source, rows, autoencoder, plan, batch_size, strict, on_images) -> None:
    """Encode the images of `rows` into one shard; its record is written last and makes it count."""
    sums = ChannelSums(plan.num_channels)
    parts: dict[str, list[Tensor]] = {name: [empty] for name, empty in _empty_tensors(plan).items()}
    names, broken, cuts = [], [], []
    for start, read in _read_ahead(source, rows, batch_size):
        failures = [error for error in read if isinstance(error, BrokenImage)]
        if failures and strict:
            raise failures[0]
        broken += [f"{error.name}: {error.reason}" for error in failures]
        items = [(start + n, item) for n, item in enumerate(read) if isinstance(item, ImageItem)]
        if items:
            encoded = _encode(items, autoencoder, plan)
            sums.add(encoded["moments"])
            for name, part in parts.items():
                part.append(encoded[name].to(part[0].dtype))
            names += [item.name for _, item in items]
            cuts += [item.cut for _, item in items]
        on_images(len(read))
    tensors = {name: torch.cat(part) for name, part in parts.items()}
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise DataError(
            f"moments of {names[0]} ... {names[-1]} are not finite as {plan.precision}; "
            + ("store them with --dtype float32" if plan.precision == "float16" else "the autoencoder is damaged")
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
        source_fingerprint=fingerprint_of(source, rows),
        cut_sum=sum(cuts),
        cut_most=max(cuts, default=0.0),
    )
    write_json(folder / f"{_shard_name(number)}.json", sealed(record))


def _empty_tensors(plan: CachePlan) -> dict[str, Tensor]:
    """The tensors of a shard, without images, each in the dtype it is stored in."""
    counts = torch.uint8 if plan.factor**2 <= 255 else torch.int16
    precision, moments, side = _PRECISIONS[plan.precision], plan.moments_shape, plan.moments_shape[1:]
    tensors = {"moments": torch.empty(0, *moments, dtype=precision)}
    if plan.class_names:
        tensors["labels"] = torch.empty(0, dtype=torch.int64)
    if plan.map_class_names:
        tensors["class_counts"] = torch.empty(0, len(plan.map_class_names), *side, dtype=counts)
    if plan.mask_variants:
        tensors["known_moments"] = torch.empty(0, plan.mask_variants, *moments, dtype=precision)
        tensors["hole_counts"] = torch.empty(0, plan.mask_variants, 1, *side, dtype=counts)
    if plan.flips:
        encoded = [name for name in tensors if name.endswith("moments")]
        tensors |= {f"{name}_flipped": tensors[name] for name in encoded}
    return tensors


def _encode(items: Sequence[tuple[int, ImageItem]], autoencoder: Autoencoder, plan: CachePlan) -> dict[str, Tensor]:
    """Everything a cache stores of some images, given with their rows in the source."""
    pixels = [item.pixels for _, item in items]
    encoded = _moments("moments", pixels, autoencoder, plan)
    if plan.class_names:
        encoded["labels"] = torch.tensor([item.label for _, item in items])
    if plan.map_class_names:
        num_classes = len(plan.map_class_names)
        maps = [class_counts(item.semantic_map, num_classes, plan.factor) for _, item in items]
        encoded["class_counts"] = torch.stack(maps)
    if plan.mask_variants:
        seeds = [derive_seed("mask variant", row, v) for row, _ in items for v in range(plan.mask_variants)]
        holes = [draw_mask(plan.masks, plan.image_size, plan.image_size, seed) for seed in seeds]
        told_as = plan.masks.told_as
        hidden = [hide(pixels[n // plan.mask_variants], hole, told_as) for n, hole in enumerate(holes)]
        grouped = (len(items), plan.mask_variants)
        known = _moments("known_moments", hidden, autoencoder, plan)
        encoded |= {name: moments.unflatten(0, grouped) for name, moments in known.items()}
        counts = torch.stack([hole_counts(hole, plan.factor, told_as) for hole in holes])
        encoded["hole_counts"] = counts.unflatten(0, grouped)
    return encoded


def _moments(name: str, pictures: Sequence[np.ndarray], autoencoder: Autoencoder, plan: CachePlan) -> dict[str, Tensor]:
    """Moments of uint8 pictures, and of their mirror images where the plan wants them."""
    pixels = to_unit_range(torch.from_numpy(np.stack(pictures)).to(autoencoder.device).permute(0, 3, 1, 2))
    encoded = {name: autoencoder.encode(pixels).cpu()}
    if plan.flips:
        encoded[f"{name}_flipped"] = autoencoder.encode(pixels.flip(-1)).cpu()
    return encoded


def _read_ahead(
    source: ImageSource, rows: range, batch_size: int
) -> Iterator[tuple[int, list[ImageItem | BrokenImage]]]:
    """Batches of decoded images in order, each with the row of its first.

    Threads decode the next batch while the encoder works on this one.
    """

    def read(row: int) -> ImageItem | BrokenImage:
        try:
            return source[row]
        except BrokenImage as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        batches = (pool.map(read, rows[start : start + batch_size]) for start in range(0, len(rows), batch_size))
        current = next(batches, None)
        for start in range(rows.start, rows.stop, batch_size):
            following = next(batches, None)
            yield start, list(current)
            current = following


def _finished(folder: Path, number: int, source_fingerprint: str) -> ShardRecord | None:
    """The record of a shard that is complete, undamaged and of these images, else None."""
    record = folder / f"{_shard_name(number)}.json"
    if not record.exists():
        return None
    try:
        shard = parse_record(ShardRecord, record)
        if shard.source_fingerprint != source_fingerprint:
            return None
        check_size(folder / shard.file, shard)
    except ArtifactError:
        return None
    return shard if sha256_file(folder / shard.file) == shard.sha256 else None


def _finish(folder: Path, plan: CachePlan, source: ImageSource) -> CacheIndex | None:
    """Write the index once every shard is there. Processes that get here together write the same bytes."""
    records = [folder / f"{_shard_name(number)}.json" for number in range(plan.num_shards)]
    if not all(record.exists() for record in records):
        return None
    shards = [parse_record(ShardRecord, record) for record in records]
    if any(s.source_fingerprint != fingerprint_of(source, _rows(plan, n)) for n, s in enumerate(shards)):
        return None  # another process encodes what has changed
    broken = [name for shard in shards for name in shard.broken]
    sums = ChannelSums(plan.num_channels)
    for shard in shards:
        sums.num_values += shard.num_values
        sums.sum += torch.tensor(shard.channel_sum, dtype=torch.float64)
        sums.sum_of_squares += torch.tensor(shard.channel_sum_of_squares, dtype=torch.float64)
    if not sums.num_values:
        raise DataError(f"{plan.source}: none can be read, for example {broken[0]}")
    mean, std = sums.mean_and_std()
    num_images = sum(shard.num_images for shard in shards)
    index = CacheIndex(
        plan=plan, num_images=num_images, channel_mean=mean, channel_std=std, shards=shards, broken=broken
    )
    write_json(folder / "index.json", sealed(index))
    if plan.class_names:
        files = [open_tensors(folder / shard.file) for shard in shards]
        labels = {label for file in files for label in file.get_tensor("labels").tolist()}
        if unseen := [name for label, name in enumerate(plan.class_names) if label not in labels]:
            notice(
                f"{folder} has no image that can be read of {len(unseen)} of its classes ({', '.join(unseen[:_NAMED])})"
                ", and training with labels refuses it: repair them and repeat the command"
            )
    return index
