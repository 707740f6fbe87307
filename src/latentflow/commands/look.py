"""`latentflow encode --look`: a contact sheet of what the model will see of the images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentflow.artifacts import require_apart, require_writable
from latentflow.autoencoder import Autoencoder
from latentflow.commands.encode import at_sizes
from latentflow.data.items import ImageItem, ImageSource
from latentflow.data.painting.input_pixels import stack_inputs, unit_inputs
from latentflow.data.painting.semantic_maps import colour_map
from latentflow.data.pictures.decode import BrokenImage
from latentflow.data.pictures.shown import as_levels, as_shown
from latentflow.data.pictures.user_picture import psnr
from latentflow.data.pictures.variants import draw_variants, variants_of
from latentflow.data.request import EncodeRequest
from latentflow.data.sources.images import open_images
from latentflow.data.sources.pixel_survey import choice_for
from latentflow.errors import ConfigError, DataError
from latentflow.runtime import Runtime, open_runtime
from latentflow.sampling.contact_sheet import on_white, save_grid
from latentflow.sampling.preview import input_pictures
from latentflow.sizes import Size

_MOST_IMAGES = 64
_MOST_COLUMNS = 8


@dataclass(frozen=True)
class Look:
    """The images on a sheet.

    Attributes:
        sheet: the PNG file.
        names: the names of the images.
        cut: the share of each image that is cropped.
        psnr: the mean PSNR of the reconstructions, in dB.
    """

    sheet: Path
    names: list[str]
    cut: list[float]
    psnr: float


def look(request: EncodeRequest, out: str | Path, *, num: int, runtime: Runtime | None = None) -> Look:
    """Write OUT.png, a contact sheet next to the cache OUT; nothing is encoded.

    It shows each image as it is cropped, its semantic map and its paired input if it has them, its first augmented
    variant if it gets some, and its reconstruction with the PSNR. The images are spread evenly over the data, and so
    over the classes of a folder.

    Args:
        num: number of images, 1 to 64.
        request: as for `encode`.

    Raises:
        DataError, ArtifactError, ConfigError: as for `encode`; also if `num` is out of range.
    """
    if not 1 <= num <= _MOST_IMAGES:
        raise ConfigError(f"--look {num}: a sheet has 1 to {_MOST_IMAGES} images")
    sheet = Path(out).with_name(f"{Path(out).name.removesuffix('.png')}.png")
    require_apart(sheet, request.data)
    require_writable(sheet, suffix=".png")
    given = {"first": request.first, "table": request, "inputs": request.paired}
    given["pixels"] = choice_for(request, request.autoencoder)
    source = open_images(request.data, request.image_size, **given)
    encoder = Autoencoder.from_pretrained(request.autoencoder).to(runtime or open_runtime(precision="tf32", alone=True))
    encoder.latent_size(request.image_size)
    source = at_sizes(source, request, encoder)
    encoder.require_channels(source.pixel_format.channels, source.description)
    found = _evenly(source, num)
    by_size: dict[Size, list[int]] = {}
    for row, item in found.items():
        by_size.setdefault(Size(*item.pixels.shape[:2]), []).append(row)
    room = Size(max(size.height for size in by_size), max(size.width for size in by_size))
    parts = [_tiles(source, {row: found[row] for row in rows}, encoder, request) for rows in by_size.values()]
    tiles = [on_white(tile[None], room)[0] for part in parts for tile in part.tiles]
    columns = _MOST_COLUMNS - _MOST_COLUMNS % (len(tiles) // len(found))
    save_grid(sheet, torch.stack(tiles), columns, captions=[text for part in parts for text in part.captions])
    items = [found[row] for rows in by_size.values() for row in rows]
    quality = [decibels for part in parts for decibels in part.psnr]
    return Look(sheet, [item.name for item in items], [item.cut for item in items], sum(quality) / len(quality))


class _Part(NamedTuple):
    """Images of one size on the sheet: what is shown of them, what stands below, and the PSNR of each in dB."""

    tiles: list[Tensor]
    captions: list[str]
    psnr: list[float]


def _tiles(source: ImageSource, found: dict[int, ImageItem], encoder: Autoencoder, request: EncodeRequest) -> _Part:
    """What is shown of some images of one size, by row."""
    rows, items = list(found), list(found.values())
    variants = _first_variants(source, items, rows) if request.variants else None
    pixel_format, pixels = source.pixel_format, torch.stack([_as_tensor(item.pixels) for item in items])
    reconstructed = encoder.reconstruct(pixels, pixel_format)
    quality = psnr(*(as_levels(one, pixel_format) for one in (pixels, reconstructed))).tolist()
    pixels, reconstructed = (as_shown(one, pixel_format) for one in (pixels, reconstructed))
    tiles, captions = [], []
    for place, (item, decibels) in enumerate(zip(items, quality, strict=True)):
        tiles.append(pixels[place])
        captions.append(item.name.rpartition("/")[2] if item.label is None else source.class_names[item.label])
        if item.semantic_map is not None:
            tiles.append(_as_tensor(colour_map(item.semantic_map, source.map_palette)))
            captions.append("map")
        if item.input is not None:
            inputs = unit_inputs(stack_inputs([item.input], source.input_format), source.input_format)
            tiles.append(input_pictures(inputs, Size(*pixels.shape[2:]))[0])
            captions.append("input")
        if variants is not None:
            tiles.append(variants[place])
            captions.append("variant")
        tiles.append(reconstructed[place])
        captions.append(f"{decibels:.1f} dB")
    return _Part(tiles, captions, quality)


def _evenly(source: ImageSource, num: int) -> dict[int, ImageItem]:
    """`num` images spread evenly over the source, by row; a broken one is replaced by the next that can be read."""
    items: dict[int, ImageItem] = {}
    for start in np.linspace(0, len(source), min(num, len(source)), endpoint=False).astype(int).tolist():
        for row in range(start, len(source)):
            try:
                items.setdefault(row, source[row])
                break
            except BrokenImage:
                continue
    if not items:
        raise DataError(f"{source.description}: none can be read")
    return {row: items[row] for row in sorted(items)}


def _first_variants(source: ImageSource, items: list[ImageItem], rows: list[int]) -> Tensor:
    """As they are shown: [n, 3, H, W] uint8."""
    pixels = source.pixel_format.to_unit(torch.stack([_as_tensor(item.pixels) for item in items]))
    varied = variants_of(pixels, draw_variants(rows, 1, pixels.shape[3] / pixels.shape[2])[:, 0])
    return as_shown(source.pixel_format.from_unit(varied), source.pixel_format)


def _as_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
