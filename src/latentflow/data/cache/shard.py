"""One shard of a latent cache in the making: encode its images, collect the tensors, write them.

Tensors cross from the device without waiting. While one shard is written the next one is being encoded.

Legend: n images, H and W image height and width; other shapes as in `reader`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from latentflow.artifacts import sha256_file, write_json, write_tensors
from latentflow.autoencoder import Autoencoder
from latentflow.data.cache.encoder_input import EncoderInput, counts_dtype, joined
from latentflow.data.cache.schema import CachePlan, ShardRecord, column_tensor, record_file, sealed, shard_file
from latentflow.data.column_tensors import stored_values
from latentflow.data.items import ImageSource, fingerprint_of
from latentflow.data.latent_statistics import ChannelSums
from latentflow.data.painting.input_pixels import at_image_size, derived_inputs, unit_inputs
from latentflow.data.painting.latent_size import hole_shade
from latentflow.data.pictures.decode import BrokenImage
from latentflow.data.pictures.variants import VARIANT_NUMBERS, variants_of
from latentflow.errors import DataError
from latentflow.shapes import moved_about
from latentflow.sizes import Size

_PRECISIONS = {"float16": torch.float16, "float32": torch.float32}
_AS_READ = ("labels", "class_counts", "hole_counts", "variant_numbers", "variant_class_counts")  # and not encoded


class ShardWriter:
    """Encodes the images of a cache and writes them, shard by shard.

    Args:
        folder: the cache.
        batch_size: images encoded together.
        strict: a broken image is an error.
        on_images: called with the number of images just encoded.
    """

    def __init__(
        self,
        folder: Path,
        plan: CachePlan,
        source: ImageSource,
        autoencoder: Autoencoder,
        batch_size: int,
        *,
        strict: bool = False,
        on_images: Callable[[int], None] = lambda num_images: None,
    ):
        self.folder, self.plan, self.source, self.autoencoder = folder, plan, source, autoencoder
        self.batch_size, self.strict, self.on_images = batch_size, strict, on_images

    def write(self, numbers: Sequence[int], read: Iterator[EncoderInput]) -> None:
        """Encode the images of shards `numbers`, which `read` gives in order, and write each shard.

        Raises:
            BrokenImage: an image cannot be read, with `strict`.
            DataError: moments are not finite.
            ArtifactError: a shard cannot be written.
        """
        written: Future[None] | None = None
        with ThreadPoolExecutor(1) as background:
            for number in numbers:
                shard = self._encoded(number, read)
                if written:
                    written.result()
                shard.close()
                fingerprint = fingerprint_of(self.source, self.plan.rows(number))
                written = background.submit(shard.write, self.folder, number, fingerprint)
            if written:
                written.result()

    def _encoded(self, number: int, read: Iterator[EncoderInput]) -> Shard:
        rows = self.plan.rows(number)
        shard = Shard(self.plan, number, self.autoencoder.device)
        for start in range(0, len(rows), self.batch_size):
            parts, wanted = [], min(self.batch_size, len(rows) - start)
            while (got := sum(part.num_rows for part in parts)) < wanted:
                parts.append(next(read))
            batch = joined(parts, self.autoencoder.device)
            if batch.broken and self.strict:
                raise BrokenImage(*batch.broken[0])
            shard.add(batch, encode_batch(batch, self.autoencoder, self.plan) if batch.names else {})
            self.on_images(got)
        return shard


class Shard:
    """The tensors of one shard, on their way from the device, and the facts about its images.

    Args:
        number: of the shard. Broken images are left out.
    """

    def __init__(self, plan: CachePlan, number: int, device: torch.device):
        self.plan = plan
        self.on_gpu = device.type == "cuda"
        self.sums = ChannelSums(plan.num_channels)
        self.names: list[str] = []
        self.broken: list[str] = []
        self.cuts: list[float] = []
        self.clips: list[float] = []
        self.tensors = {
            name: torch.empty(len(plan.rows(number)), *like.shape[1:], dtype=like.dtype, pin_memory=self.on_gpu)
            for name, like in _empty_tensors(plan, plan.shape_of(number)).items()
        }
        self.arrived: torch.cuda.Event | None = None

    def add(self, batch: EncoderInput, encoded: dict[str, Tensor]) -> None:
        """Append a batch; nothing waits for the device."""
        first = len(self.names)
        for name, values in encoded.items():
            place = self.tensors[name][first : first + len(batch.names)]
            place.copy_(values.to(place.dtype), non_blocking=self.on_gpu)
        if encoded:
            self.sums.add(encoded["moments"])
        self.names += batch.names
        self.cuts += batch.cuts
        self.clips += batch.clips
        self.broken += [f"{name}: {reason}" for name, reason in batch.broken]

    def close(self) -> None:
        """Mark the end: all batches have been added."""
        if self.on_gpu:
            self.sums.send_home()
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def write(self, folder: Path, number: int, source_fingerprint: str) -> None:
        """Wait for the device and write the tensors, then the record, which makes the shard count.

        Raises:
            DataError: moments are not finite.
            ArtifactError: a file cannot be written.
        """
        if self.arrived:
            self.arrived.synchronize()
        plan, names, sums = self.plan, self.names, self.sums
        tensors = {name: tensor[: len(names)] for name, tensor in self.tensors.items()}
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise DataError(
                f"moments of {names[0]} ... {names[-1]} are not finite as {plan.precision}; "
                + ("store them with --dtype float32" if plan.precision == "float16" else "the autoencoder is damaged")
            )
        file = shard_file(folder, number)
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
            clip_sum=sum(self.clips),
        )
        write_json(record_file(folder, number), sealed(record))


def encode_batch(batch: EncoderInput, autoencoder: Autoencoder, plan: CachePlan) -> dict[str, Tensor]:
    """Everything that a cache stores of some images; see the legend of `reader`."""
    pixels = _in_unit_range(batch.pixels, plan)
    encoded = _moments("moments", pixels, autoencoder, plan)
    if batch.holes is not None:
        hole = batch.holes[..., None] > 0
        shade = torch.from_numpy(hole_shade(plan.masks.told_as, plan.pixel_format)).to(hole.device)
        hidden = moved_about(lambda fill, x: torch.where(hole, fill, x[:, None]), shade, batch.pixels)
        known = _moments("known_moments", _in_unit_range(hidden.flatten(0, 1), plan), autoencoder, plan)
        encoded |= {name: moments.unflatten(0, hole.shape[:2]) for name, moments in known.items()}
    if batch.variant_numbers is not None:
        variants = [_encoded_variant(*one, batch, autoencoder, plan) for one in _windows(pixels, batch.variant_numbers)]
        encoded |= {name: torch.stack([one[name] for one in variants], dim=1) for name in variants[0]}
    if batch.inputs is not None:
        encoded |= _encoded_inputs(plan.input_tensor, batch.inputs, autoencoder, plan)
    counted = {name: getattr(batch, name) for name in _AS_READ}
    columns = {column_tensor(number): values for number, values in enumerate(batch.columns)}
    return encoded | columns | {name: values for name, values in counted.items() if values is not None}


def _windows(pixels: Tensor, numbers: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The variants of pictures one after the other, since together they may not fit in the device's memory, and the
    numbers of each."""
    return ((variants_of(pixels, one), one) for one in numbers.unbind(1))


def _encoded_variant(
    pictures: Tensor, numbers: Tensor, batch: EncoderInput, autoencoder: Autoencoder, plan: CachePlan
) -> dict[str, Tensor]:
    """What is stored of one variant of each picture, [n, 3, S, S] in [-1, 1], and of its input."""
    encoded = _moments("variant_moments", pictures, autoencoder, plan)
    if batch.inputs is None:
        return encoded
    if plan.inputs.is_derived:
        inputs = derived_inputs(plan.pixel_format.from_unit(pictures), plan.inputs)
    else:
        inputs = plan.input_format.from_unit(variants_of(unit_inputs(batch.inputs, plan.input_format), numbers))
    if inputs.dtype != torch.uint8:
        inputs = plan.input_format.to_unit(inputs)
    return encoded | _encoded_inputs(f"variant_{plan.input_tensor}", inputs, autoencoder, plan)


def _encoded_inputs(name: str, inputs: Tensor, autoencoder: Autoencoder, plan: CachePlan) -> dict[str, Tensor]:
    """Inputs [n, c, S / N, S / N] of `stack_inputs` as they are stored: their pixels, or their moments."""
    if plan.inputs.form == "pixels":
        return {name: inputs}
    pixels = at_image_size(unit_inputs(inputs, plan.input_format), plan.inputs.shrinking, plan.pixel_format.channels)
    return _moments(name, pixels, autoencoder, plan)


def _moments(name: str, pixels: Tensor, autoencoder: Autoencoder, plan: CachePlan) -> dict[str, Tensor]:
    """Moments of pictures [n, C, H, W] in [-1, 1], and of their mirror images where the plan has them."""
    encoded = {name: autoencoder.encode(pixels)}
    if plan.flips:
        encoded[f"{name}_flipped"] = autoencoder.encode(pixels.flip(-1))
    return encoded


def _in_unit_range(pictures: Tensor, plan: CachePlan) -> Tensor:
    """Stored values [n, H, W, C] => [n, C, H, W] in [-1, 1]."""
    return plan.pixel_format.to_unit(pictures.permute(0, 3, 1, 2))


def _empty_tensors(plan: CachePlan, moments: tuple[int, int, int]) -> dict[str, Tensor]:
    """The tensors of a shard of no images, each in the dtype it is stored in."""
    counts = counts_dtype(plan)
    precision, size = _PRECISIONS[plan.precision], moments[1:]
    tensors = {"moments": torch.empty(0, *moments, dtype=precision)}
    if plan.class_names:
        tensors["labels"] = torch.empty(0, dtype=torch.int64)
    if plan.map_class_names:
        tensors["class_counts"] = torch.empty(0, len(plan.map_class_names), *size, dtype=counts)
    if plan.mask_variants:
        tensors["known_moments"] = torch.empty(0, plan.mask_variants, *moments, dtype=precision)
        tensors["hole_counts"] = torch.empty(0, plan.mask_variants, 1, *size, dtype=counts)
    if plan.variants:
        tensors["variant_moments"] = torch.empty(0, plan.variants, *moments, dtype=precision)
        tensors["variant_numbers"] = torch.empty(0, plan.variants, len(VARIANT_NUMBERS))
        if plan.map_class_names:
            shape = (0, plan.variants, len(plan.map_class_names), *size)
            tensors["variant_class_counts"] = torch.empty(shape, dtype=counts)
    for number, column in enumerate(plan.columns):
        tensors[column_tensor(number)] = stored_values(column, [])
    if plan.inputs is not None:
        small = plan.inputs.size(Size(*size).times(plan.factor))
        kind = torch.uint8 if plan.input_format.dtype == "uint8" else precision
        pixels = torch.empty(0, plan.input_format.channels, *small, dtype=kind)
        latents = torch.empty(0, *moments, dtype=precision)
        stored = pixels if plan.inputs.form == "pixels" else latents
        tensors[plan.input_tensor] = stored
        if plan.variants:
            tensors[f"variant_{plan.input_tensor}"] = stored[:, None].expand(0, plan.variants, *stored.shape[1:])
    if plan.flips:
        encoded = [name for name in tensors if name.endswith("moments")]
        tensors |= {f"{name}_flipped": tensors[name] for name in encoded}
    return tensors
