"""Encode images into a latent cache, resumable after a kill, shared between processes.

A shard appears complete or not at all; repeating the command encodes what is missing or damaged and nothing else.

Three things go on at once: pictures are read ahead, by threads or processes; the device encodes; the shard before is
written. What is written depends on none of this, only on the images and on which of them are encoded together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from latentflow.artifacts import (
    make_folder,
    open_tensors,
    remove_leftovers,
    sha256_file,
    write_json,
    write_tensors,
)
from latentflow.autoencoder import Autoencoder, to_unit_range
from latentflow.console import notice
from latentflow.data.ahead import lost_workers, read_ahead, read_in_threads, reading_processes
from latentflow.data.cache.encoder_input import EncoderInput, EncoderInputs, counts_dtype, joined
from latentflow.data.cache.reader import (
    CachedSource,
    CacheIndex,
    CachePlan,
    ChannelSums,
    ShardRecord,
    check_size,
    parse_record,
    sealed,
)
from latentflow.data.items import ImageSource, fingerprint_of
from latentflow.data.painting.latent_size import hole_shade
from latentflow.data.painting.mask_rules import MaskRules
from latentflow.data.painting.masks import check_masks, masks_fingerprint
from latentflow.data.pictures.colour import PIXEL_RULES
from latentflow.data.sources.images import BrokenImage
from latentflow.errors import ArtifactError, DataError
from latentflow.plans import PLAN_FILE, claim_folder, require_same_plan
from latentflow.runtime import Runtime

_NAMED = 5  # images or classes in a message
_MOST_READ_TOGETHER, _BYTES_READ_TOGETHER = 32, 4 << 20  # images and bytes of one piece of a batch
_BATCH_SIZE = 32
_OPTION = "--num-workers"
_WHAT = "a latent cache"  # for messages
_FREE = {"autoencoder", "source", "source_fingerprint", "num_source_images"}  # where things lie, and which images
_PRECISIONS = {"float16": torch.float16, "float32": torch.float32}


def write_cache(
    source: ImageSource,
    autoencoder: Autoencoder,
    folder: str | Path,
    *,
    flips: bool = False,
    precision: Literal["float16", "float32"] = "float16",
    shard_size: int = 1024,
    batch_size: int | None = None,
    masks: MaskRules | None = None,
    mask_variants: int = 0,
    strict: bool = False,
    runtime: Runtime | None = None,
    num_workers: int | None = None,
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
        batch_size: images encoded together, on which the results depend by rounding; None: 32, and on a GPU as many
            as make a megapixel.
        runtime: of processes that share the work: of n, process r encodes shards r, r + n, r + 2n, ...; None: this one
            does it alone.
        num_workers: processes that read and resize images; 0: threads of this process; None: as many as pay.
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
    runtime, missing = runtime or Runtime(autoencoder.device), []
    for number in runtime.share(range(plan.num_shards)):
        rows = _rows(plan, number)
        if _finished(folder, number, fingerprint_of(source, rows)) is None:
            missing.append(number)
        else:
            on_images(len(rows))
            on_kept(len(rows))
    if missing:
        if num_workers is None:
            room = {"device": autoencoder.device, "num_bytes": _BYTES_READ_TOGETHER, "sharing": runtime.local_world}
            num_workers = reading_processes(source.__getitem__, [_rows(plan, n) for n in missing], **room)
        batch_size = batch_size or _batch_size(autoencoder, plan.image_size)
        inputs, on_gpu = EncoderInputs(source, plan), autoencoder.device.type == "cuda"
        pieces = [piece for number in missing for piece in _pieces(inputs, _rows(plan, number), batch_size)]
        if num_workers:
            room = {"num_workers": num_workers, "num_bytes": _BYTES_READ_TOGETHER, "option": _OPTION}
            read = read_ahead(inputs, pieces, pin_memory=on_gpu, sharing=runtime.local_world, **room)
        else:
            read = read_in_threads(inputs, pieces, pin_memory=on_gpu, sharing=runtime.local_world)
        with closing(read), lost_workers(num_workers, _OPTION):
            _write_shards(folder, missing, source, read, autoencoder, plan, batch_size, strict, on_images)
    index = _finish(folder, plan, source)
    if index is None and runtime.world == 1:
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
    file, images = folder / PLAN_FILE, folder / "source.json"
    claim_folder(folder, plan.model_dump(mode="json"), _WHAT)
    found = parse_record(CachePlan, file)
    if found.identity != plan.identity:
        raise ArtifactError(
            f"{folder} was encoded by an earlier version, which did not keep what its images held: it can be trained "
            "on, but not gone on with; choose another --out or delete the folder"
        )
    free = _FREE | ({"masks.folder"} if found.masks_fingerprint and plan.masks_fingerprint else set())
    old, new = (record.model_dump(mode="json") for record in (found, plan))
    require_same_plan(folder, old, new, _WHAT, free=free)
    same = found.source_fingerprint == plan.source_fingerprint
    if same and images.exists():
        return
    if not same:
        _require_only_broken_changed(folder, found, source)
    names = [source.name(row) for row in range(len(source))]
    record = CachedSource(names=names, contents=list(source.contents()))
    write_json(images, record.model_dump(mode="json"))
    write_json(file, plan.model_dump(mode="json"))


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


def _pieces(inputs: EncoderInputs, rows: range, batch_size: int) -> Iterator[range]:
    """The batches of a shard, in parts that are small enough to be handed on."""
    size = min(max(_BYTES_READ_TOGETHER // inputs.bytes_per_image, 1), _MOST_READ_TOGETHER)
    for start in range(rows.start, rows.stop, batch_size):
        batch = range(start, min(start + batch_size, rows.stop))
        yield from (batch[part : part + size] for part in range(0, len(batch), size))


def _batch_size(autoencoder: Autoencoder, image_size: int) -> int:
    return max(autoencoder.slice_of(image_size), _BATCH_SIZE)


def _write_shards(
    folder: Path,
    numbers: Sequence[int],
    source: ImageSource,
    read: Iterator[EncoderInput],
    autoencoder: Autoencoder,
    plan: CachePlan,
    batch_size: int,
    strict: bool,
    on_images: Callable[[int], None],
) -> None:
    """Encode what is read, the pieces of shards `numbers`; each shard is written while the next one is encoded."""
    written: Future[None] | None = None
    with ThreadPoolExecutor(1) as background:
        for number in numbers:
            rows = _rows(plan, number)
            shard = _Shard(plan, len(rows), autoencoder.device)
            for start in range(0, len(rows), batch_size):
                parts, wanted = [], min(batch_size, len(rows) - start)
                while (got := sum(part.num_rows for part in parts)) < wanted:
                    parts.append(next(read))
                batch = joined(parts, autoencoder.device)
                if batch.broken and strict:
                    raise BrokenImage(*batch.broken[0])
                shard.add(batch, _encode(batch, autoencoder, plan) if batch.names else {})
                on_images(got)
            if written:
                written.result()
            shard.close()
            written = background.submit(shard.write, folder, number, fingerprint_of(source, rows))
        if written:
            written.result()


class _Shard:
    """One shard in the making: what is encoded of it, on its way from the device, and what is known of its images.

    Args:
        num_rows: the most images it can have.
    """

    def __init__(self, plan: CachePlan, num_rows: int, device: torch.device):
        self.plan = plan
        self.on_gpu = device.type == "cuda"
        self.sums = ChannelSums(plan.num_channels)
        self.names: list[str] = []
        self.broken: list[str] = []
        self.cuts: list[float] = []
        self.tensors = {
            name: torch.empty(num_rows, *like.shape[1:], dtype=like.dtype, pin_memory=self.on_gpu)
            for name, like in _empty_tensors(plan).items()
        }
        self.arrived: torch.cuda.Event | None = None

    def add(self, batch: EncoderInput, encoded: dict[str, Tensor]) -> None:
        """Take in a batch; nothing waits for the device."""
        first = len(self.names)
        for name, values in encoded.items():
            place = self.tensors[name][first : first + len(batch.names)]
            place.copy_(values.to(place.dtype), non_blocking=self.on_gpu)
        if encoded:
            self.sums.add(encoded["moments"])
        self.names += batch.names
        self.cuts += batch.cuts
        self.broken += [f"{name}: {reason}" for name, reason in batch.broken]

    def close(self) -> None:
        """All batches are there, or on their way."""
        if self.on_gpu:
            self.sums.send_home()
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def write(self, folder: Path, number: int, source_fingerprint: str) -> None:
        """Write what has arrived; the record is written last and makes it count."""
        if self.arrived:
            self.arrived.synchronize()
        plan, names, sums = self.plan, self.names, self.sums
        tensors = {name: tensor[: len(names)] for name, tensor in self.tensors.items()}
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
            broken=self.broken,
            source_fingerprint=source_fingerprint,
            cut_sum=sum(self.cuts),
            cut_most=max(self.cuts, default=0.0),
        )
        write_json(folder / f"{_shard_name(number)}.json", sealed(record))


def _empty_tensors(plan: CachePlan) -> dict[str, Tensor]:
    """The tensors of a shard, without images, each in the dtype it is stored in."""
    counts = counts_dtype(plan)
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


def _encode(batch: EncoderInput, autoencoder: Autoencoder, plan: CachePlan) -> dict[str, Tensor]:
    """Everything a cache stores of some images, given and encoded on the autoencoder's device."""
    encoded = _moments("moments", batch.pixels, autoencoder, plan)
    if batch.holes is not None:
        hole = batch.holes[..., None] > 0
        hidden = torch.where(hole, hole_shade(plan.masks.told_as), batch.pixels[:, None])
        known = _moments("known_moments", hidden.flatten(0, 1), autoencoder, plan)
        encoded |= {name: moments.unflatten(0, hole.shape[:2]) for name, moments in known.items()}
    counted = {name: getattr(batch, name) for name in ("labels", "class_counts", "hole_counts")}
    return encoded | {name: values for name, values in counted.items() if values is not None}


def _moments(name: str, pictures: Tensor, autoencoder: Autoencoder, plan: CachePlan) -> dict[str, Tensor]:
    """Moments of pictures [B, S, S, 3] uint8, and of their mirror images where the plan wants them."""
    pixels = to_unit_range(pictures.permute(0, 3, 1, 2))
    encoded = {name: autoencoder.encode(pixels)}
    if plan.flips:
        encoded[f"{name}_flipped"] = autoencoder.encode(pixels.flip(-1))
    return encoded


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
