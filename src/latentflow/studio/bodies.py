"""What a client sends: fields and images, bounded before they are read, and never a path of this machine."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from latentflow.data.pictures.decode import BrokenImage, open_image
from latentflow.pixel_format import RGB, PixelFormat
from latentflow.studio.refusals import Refused

IMAGES = ("image", "mask", "map")
"""Names of the parts that are images."""
_PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"P4", b"P5", b"P6")
_MOST_DEPTH = 32
_QUICK = 1 << 16  # bytes of JSON that are read in no time


@dataclass(frozen=True)
class Asked:
    """A request as it was sent.

    Attributes:
        fields: of the request, unchecked.
        images: the content of its images, by name.
    """

    fields: dict[str, Any]
    images: dict[str, bytes]


async def read_asked(request: Request, most_bytes: int) -> Asked:
    """Read a request's body.

    Raises:
        Refused: it is too large (413), of another type (415), or cannot be read (422).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", "multipart/form-data"):
        raise Refused(415, f"the content type is {kind!r:.60}; send application/json or multipart/form-data")
    body = await _body(request, most_bytes)
    if kind == "application/json":
        if len(body) < _QUICK:
            return _from_json(body)
        return await asyncio.to_thread(_from_json, body)
    return await _from_form(request.headers, body, most_bytes)


def _from_json(body: bytes) -> Asked:
    return _from_fields(_object(body), {})


async def _body(request: Request, most_bytes: int) -> bytes:
    too_large = Refused(413, f"the request has more than {most_bytes:,} bytes; send smaller images")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > most_bytes:
        raise too_large
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > most_bytes:
                raise too_large
            parts.append(part)
    except ClientDisconnect:
        raise Refused(400, "the request ended early") from None
    return b"".join(parts)


def _object(text: bytes | str) -> dict[str, Any]:
    try:
        found = json.loads(text, parse_constant=_no_constant) if text else {}
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else f"{error}"
        raise Refused(422, f"the request is not JSON: {reason:.100}") from None
    if not isinstance(found, dict):
        raise Refused(422, 'the request is not a JSON object like {"seed": 0}')
    if _depth(found) > _MOST_DEPTH:
        raise Refused(422, "the request is nested too deeply")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _depth(value: Any) -> int:
    """How deeply a value is nested, without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            x for one in level if isinstance(one, dict | list) for x in (one.values() if isinstance(one, dict) else one)
        ]
    return depth


def _from_fields(fields: dict[str, Any], images: dict[str, bytes]) -> Asked:
    """Take the images out of the fields, where they stand in base64."""
    for name in IMAGES:
        if (text := fields.pop(name, None)) is None:
            continue
        if not isinstance(text, str):
            raise Refused(422, f"{name}: give the content of an image file in base64")
        content = text.partition(",")[2] if text.startswith("data:") else text
        try:
            images[name] = base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError):
            raise Refused(
                422, f"{name} is not base64: give the content of an image file; paths are not taken"
            ) from None
    return Asked(fields, images)


async def _from_form(headers: Headers, body: bytes, most_bytes: int) -> Asked:
    """A form: images as files, and the other fields as JSON in the field `request`."""

    async def stream() -> AsyncIterator[bytes]:
        yield body

    try:
        parser = MultiPartParser(headers, stream(), max_files=4, max_fields=16, max_part_size=min(most_bytes, 1 << 20))
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise Refused(422, f"the form cannot be read: {getattr(error, 'message', error)!s:.100}") from None
    images: dict[str, bytes] = {}
    fields: dict[str, Any] = {}
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile) and name in IMAGES and name not in images:
                images[name] = await value.read()
            elif not isinstance(value, UploadFile) and name == "request" and not fields:
                fields = _object(value)
            else:
                known = ", ".join((*IMAGES, "request"))
                raise Refused(422, f"the form has an unexpected part {name!r:.60}; the parts are {known}, each once")
    finally:
        await form.close()
    if twice := [name for name in images if name in fields]:
        raise Refused(422, f"{twice[0]} is given twice; give it once")
    return _from_fields(fields, images)


@contextmanager
def as_files(
    images: Mapping[str, bytes], most_pixels: int, pixel_format: PixelFormat = RGB
) -> Iterator[dict[str, Path]]:
    """The images as files of names of our own, for as long as the context lasts.

    Raises:
        Refused: one is no image (415), or has too many pixels (413).
    """
    for name, content in images.items():
        if name != "image" or pixel_format == RGB:  # others may be arrays, whose bytes are counted
            _check_picture(name, content, most_pixels)
    with tempfile.TemporaryDirectory(prefix="latentflow-") as folder:
        files = {name: Path(folder) / name for name in images}
        for name, content in images.items():
            files[name].write_bytes(content)
        yield files


def _check_picture(name: str, content: bytes, most_pixels: int) -> None:
    """Look at the header of an image."""
    try:
        with open_image(content, name) as image:
            width, height = image.size
    except BrokenImage as error:
        status = 422 if content.startswith(_PICTURES) else 415
        if "pixels" in error.reason:
            status = 413
        raise Refused(status, str(error)) from None
    if width * height > most_pixels:
        raise Refused(413, f"{name} has {width} x {height} pixels; at most {most_pixels:,} are taken")
