"""Generated images in files: one set of one model, which are scored at their own size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from latentflow.data.items import ImageSource
from latentflow.data.pictures.decode import reason
from latentflow.data.sources.listed import list_files
from latentflow.data.sources.stored import ImageFiles
from latentflow.data.stores.files import FolderStore, Listing, ZipStore, is_image, open_store
from latentflow.errors import DataError
from latentflow.model.flow_model import CONFIG_FILE
from latentflow.pixel_format import PixelFormat
from latentflow.progress import image_progress
from latentflow.sampling.picture_file import read_head, unlike, which, whose
from latentflow.sampling.picture_folder import GRID
from latentflow.sizes import Size

_READERS = 8
_LOSSLESS = (".png", ".tif", ".tiff")

Store = FolderStore | ZipStore


def open_samples(place: str) -> tuple[ImageSource, list[int]] | None:
    """Generated images in a folder or a zip, and which of them are samples. Of each file only the beginning is read.

    Returns:
        None if the place is no set of images: it is a model, if anything.

    Raises:
        DataError: the images are not PNG, not square, of several sizes, of several sets, or drawn twice.
    """
    found = _images_in(place)
    if found is None:
        return None
    samples = _checked(place, *found)
    return samples, [row for row in range(len(samples)) if not GRID.search(samples.name(row))]


def _images_in(place: str) -> tuple[Store, Listing] | None:
    """The listing of a zip, or of a folder with images and without a model.

    Raises:
        DataError: it cannot be listed.
    """
    path = Path(place)
    if path.suffix.lower() == ".zip":
        store = open_store(path)
        return store, store.listing()
    marks = (path / CONFIG_FILE, path / "model" / CONFIG_FILE, path / "recipe.yaml")
    if not path.is_dir() or any(mark.exists() for mark in marks):
        return None
    store = open_store(path)
    listing = store.listing()
    return (store, listing) if any(map(is_image, listing.files)) else None


def _checked(place: str, store: Store, listing: Listing) -> ImageSource:
    files = {name: file for name, file in sorted(listing.files.items()) if is_image(name) and not GRID.search(name)}
    size, facts = None, {}
    if lossy := [name for name in files if not name.lower().endswith(_LOSSLESS)]:
        raise DataError(
            f"{place}: {lossy[0]} is neither PNG nor TIFF: lossy compression such as JPEG changes every score; save "
            "samples as PNG"
        )
    with ThreadPoolExecutor(_READERS) as pool, image_progress("looking at", len(files)) as on_images:
        heads = pool.map(lambda name: _head(store, files[name].path, name), files)
        for name, found in zip(files, heads, strict=True):
            if isinstance(found, Exception):
                raise DataError(f"{place}: cannot read {name}: {reason(found)}; draw it again") from found
            (width, height), facts[name] = found
            size = size or Size(height, width)
            if (height, width) != size:
                raise DataError(
                    f"{place}: {name} has {width} x {height} pixels; samples must be of one size, here {size.words}"
                )
            on_images(1)
    _require_one_set(place, facts)
    images = ImageFiles(list_files(store, listing), size or Size(1, 1))
    drawn_by = next((known["drawn_by"] for known in facts.values() if known), {})
    return images.with_format(PixelFormat.model_validate(drawn_by.get("pixel_format", {})))


def _head(store: Store, path: str, name: str) -> tuple[tuple[int, int], dict[str, Any] | None] | Exception:
    """Width and height of a PNG and its metadata; or what is wrong with it."""
    wrong: Exception = DataError(name)
    for read in (store.mark, store.read):  # metadata is longer than the first bytes only if somebody made it so
        try:
            content = read(path)
            if read == store.mark and b"IDAT" not in content:
                continue
            return read_head(content, name)
        except Exception as error:  # damaged archives raise nearly anything
            wrong = error
    return wrong


def _require_one_set(place: str, facts: Mapping[str, dict[str, Any] | None]) -> None:
    """Refuse pictures that are not of one model and request, by their metadata.

    Raises:
        DataError: they are of several sets, some have no metadata, or one is there twice.
    """
    sets: dict[str, list[str]] = {}
    for name, known in facts.items():
        sets.setdefault(json.dumps(whose(known), sort_keys=True) if known else "", []).append(name)
    if len(sets) > 1:
        most, other, *_ = sorted(sets.values(), key=len, reverse=True)
        one, two = facts[most[0]], facts[other[0]]
        how = (
            unlike(one, two)
            if one and two
            else "it has no metadata of a model"
            if one
            else f"only {other[0]} has metadata of a model"
        )
        raise DataError(
            f"{place} mixes {len(sets)} sets of images, and a joint score would describe neither: {len(most)} such as "
            f"{most[0]}, {len(other)} such as {other[0]} ({how}); put each set into a separate folder"
        )
    seen: dict[str, str] = {}
    for name, known in facts.items():
        if known and (first := seen.setdefault(which(known), name)) != name:
            raise DataError(f"{place} holds one image twice, as {first} and as {name}: remove one of them")
