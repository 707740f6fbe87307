"""The metadata of a drawn picture, read back: where it comes from, and whether two pictures belong to one set."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from PIL import TiffImagePlugin

from latentflow.data.pictures.decode import BrokenImage, open_image, reason
from latentflow.sampling.picture_content import METADATA, TIFF

# of each picture of a set
_OWN = ("seeds", "labels", "conditions", "blends", "class_name", "to_class_name", "evaluations")
WHICH = ("seeds", "labels", "conditions", "blends", "inputs")
"""The facts that distinguish a picture from the others of its set."""
_OF_INPUT = ("inputs", "image_size")  # of each picture that is drawn from another one
_TIFF_SUFFIXES = (".tif", ".tiff")
_WIDTH, _LENGTH, _DESCRIPTION = 256, 257, 270  # tags of a TIFF
_GIVEN = ("inpaint", "mask-to-image", "translate", "image-to-image")


def read_facts(file: bytes | str, name: str | None = None) -> dict[str, Any] | None:
    """The metadata of a picture that this program drew; None: it was not drawn by this program.

    Args:
        file: its path or its content.
        name: how errors call it.

    Raises:
        BrokenImage: it is not an image.
    """
    return read_head(file, name)[1]


def read_head(
    file: bytes | str, name: str | None = None, *, decode: bool = False
) -> tuple[tuple[int, int], dict[str, Any] | None]:
    """Width and height of a picture, and its metadata as of `read_facts`.

    Args:
        decode: decode its pixels, too, which finds what is damaged.

    Raises:
        BrokenImage: it is not an image.
    """
    if isinstance(file, bytes) and file.startswith(TIFF):
        return _tiff_head(io.BytesIO(file), name or "a TIFF", decode)
    if isinstance(file, str) and file.lower().endswith(_TIFF_SUFFIXES) and Path(file).is_file():
        with Path(file).open("rb") as stream:
            return _tiff_head(stream, name or file, decode)
    with open_image(file, name) as image:
        if decode:
            image.load()
        return image.size, _facts(image.info.get(METADATA))


def _tiff_head(stream: IO[bytes], name: str, decode: bool) -> tuple[tuple[int, int], dict[str, Any] | None]:
    """The same of a TIFF, which Pillow does not open where it has several bands."""
    try:
        stream.seek(0)
        tags = TiffImagePlugin.ImageFileDirectory_v2(stream.read(8))
        stream.seek(tags.next)
        tags.load(stream)
        if decode:
            from tifffile import imread

            stream.seek(0)
            imread(stream)
        return (int(tags[_WIDTH]), int(tags[_LENGTH])), _facts(tags.get(_DESCRIPTION))
    except Exception as error:  # damaged files raise nearly anything
        raise BrokenImage(name, reason(error)) from error


def _facts(text: object) -> dict[str, Any] | None:
    try:
        facts = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return None
    return facts if isinstance(facts, dict) and isinstance(facts.get("drawn_by"), dict) else None


def whose(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What all pictures of one set have in common: the model's weights and the sampling settings, flattened.

    The names of the folders of model and guide do not count, nor do the inputs of pictures that are drawn from other
    pictures.
    """
    apart = {*_OWN, *(_OF_INPUT if facts.get("task") in _GIVEN else ())}
    common = {name: value for name, value in facts.items() if name not in apart}
    drawn_by = {name: value for name, value in common.pop("drawn_by").items() if name != "model"}
    sampling = common.pop("sampling", None) or {}
    sampling = dict(sampling) if isinstance(sampling, dict) else {}
    if isinstance(guide := sampling.get("guide"), dict):
        sampling["guide"] = guide.get("weights")
    return {**drawn_by, **common, **sampling}


def which(facts: Mapping[str, Any]) -> str:
    """What distinguishes a picture from the others of its set, as text to compare."""
    return json.dumps([facts.get(name) for name in WHICH], sort_keys=True)


def unlike(facts: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The first difference between the sets of two pictures, for people; "" if they are of the same set."""
    ours, theirs = whose(facts), whose(other)
    for name in dict.fromkeys([*ours, *theirs]):
        if ours.get(name) != theirs.get(name):
            return f"{name.replace('_', ' ')} {theirs.get(name)}, not {ours.get(name)}"
    return ""
