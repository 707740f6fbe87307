"""Pictures, folders and archives that the tests of sources are about."""

import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from latentflow.data.items import UNLABELLED, ImageSource
from latentflow.data.painting.semantic_maps import MapClasses
from latentflow.data.sources.images import open_images

RED, WHITE = (255, 0, 0), (255, 255, 255)

TOWN = MapClasses(("sky", "road", "tree"), ((128, 128, 128), (128, 64, 128), (128, 128, 0)))


def save(path: Path, image: Image.Image | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (10, 8), RED)).save(path, **options)
    return path


def picture(seed: int, width: int = 20, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def pack(folder: Path, archive: Path, wrapper: str = "") -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*"), reverse=True):
            file.write(path, wrapper + path.relative_to(folder).as_posix())
    return archive


def names(source: ImageSource) -> list[str]:
    return [item.name for item in source]


def one(tmp_path: Path, image: Image.Image, suffix: str = ".png", size: int = 8, **options) -> np.ndarray:
    """The pixels of an image after a trip through a file."""
    save(tmp_path / "one" / f"image{suffix}", image, **options)
    return open_images(tmp_path / "one", size)[0].pixels


def semantic_map(seed: int, width: int = 20, height: int = 16) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, len(TOWN), (height, width), np.uint8)
    values[3:6, 8:12] = UNLABELLED
    return values
