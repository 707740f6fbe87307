"""`latentflow encode --look`: what a model will see of some images, as a sheet for the eye."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latentflow.artifacts import require_apart, require_writable
from latentflow.autoencoder import Autoencoder, latent_mean, to_uint8, to_unit_range
from latentflow.data.items import ImageItem, ImageSource
from latentflow.data.painting.semantic_maps import colour_map
from latentflow.data.pictures.decode import BrokenImage
from latentflow.data.pictures.user_picture import psnr
from latentflow.data.request import EncodeRequest
from latentflow.data.sources.images import open_images
from latentflow.errors import ConfigError, DataError
from latentflow.runtime import Runtime, open_runtime
from latentflow.sampling.contact_sheet import save_grid

_MOST_IMAGES, _TILES = 64, 8
"""The most images of a sheet, and its pictures side by side."""


@dataclass(frozen=True)
class Look:
    """What was looked at.

    Attributes:
        sheet: the PNG file.
        names: of the images on it.
        cut: per image, the share that its square leaves out.
        psnr: mean over the images of what the autoencoder gives back, in dB.
    """

    sheet: Path
    names: list[str]
    cut: list[float]
    psnr: float


def look(request: EncodeRequest, out: str | Path, *, num: int, runtime: Runtime | None = None) -> Look:
    """Write OUT.png beside the cache OUT: each image's square, its map if it has one, and what its latents keep.

    Under the last stands its PSNR. The images lie evenly over all there are, and so over the classes of a folder.
    Nothing is encoded.

    Args:
        num: images, 1 to 64.
        request: as for `encode`.

    Raises:
        DataError, ArtifactError, ConfigError: as `encode` raises them; or `num` is out of range.
    """
    if not 1 <= num <= _MOST_IMAGES:
        raise ConfigError(f"--look {num}: a sheet has 1 to {_MOST_IMAGES} images")
    sheet = Path(out).with_name(f"{Path(out).name.removesuffix('.png')}.png")
    require_apart(sheet, request.data)
    require_writable(sheet, suffix=".png")
    source = open_images(request.data, request.image_size, first=request.first)
    encoder = Autoencoder.from_pretrained(request.autoencoder).to(runtime or open_runtime(precision="tf32", alone=True))
    encoder.latent_side(request.image_size)
    items = _evenly(source, num)
    pixels = torch.stack([_as_tensor(item.pixels) for item in items])
    given_back = to_uint8(
        encoder.decode(latent_mean(encoder.encode(to_unit_range(pixels)), encoder.num_channels))
    ).cpu()
    quality = psnr(pixels, given_back)
    tiles, captions = [], []
    for number, item in enumerate(items):
        tiles.append(pixels[number])
        captions.append(item.name.rpartition("/")[2] if item.label is None else source.class_names[item.label])
        if item.semantic_map is not None:
            tiles.append(_as_tensor(colour_map(item.semantic_map, source.map_palette)))
            captions.append("map")
        tiles.append(given_back[number])
        captions.append(f"{quality[number]:.1f} dB")
    columns = _TILES - _TILES % (len(tiles) // len(items))
    save_grid(sheet, torch.stack(tiles), columns, captions=captions)
    return Look(sheet, [item.name for item in items], [item.cut for item in items], quality.mean().item())


def _evenly(source: ImageSource, num: int) -> list[ImageItem]:
    """`num` images that lie evenly over the source; for one that cannot be read stands the next that can."""
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
    return [items[row] for row in sorted(items)]


def _as_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
