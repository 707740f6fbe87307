"""The body of a request, as bytes, and as the fields and images that are in it.

It is read no further than allowed, and nothing in it is a path of this machine. What becomes a file is in `uploads`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from latentflow.studio.refusals import Refused

IMAGES = ("image", "mask", "map")
"""Names of the parts that are images."""
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


async def read_body(request: Request, most_bytes: int) -> bytes:
    """The body of a request, which is not read further than allowed.

    Raises:
        Refused: it has more bytes (413), or ended early (400).
    """
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


async def read_asked(request: Request, most_bytes: int) -> Asked:
    """Read fields and images.

    Raises:
        Refused: it is too large (413), of another type (415), or cannot be read (422).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", "multipart/form-data"):
        raise Refused(415, f"the content type is {kind!r:.60}; send application/json or multipart/form-data")
    body = await read_body(request, most_bytes)
    if kind == "application/json":
        if len(body) < _QUICK:
            return _from_json(body)
        return await asyncio.to_thread(_from_json, body)
    return await _from_form(request.headers, body, most_bytes)


def _from_json(body: bytes) -> Asked:
    return _from_fields(_object(body), {})


def _object(text: bytes | str) -> dict[str, Any]:
    try:
        found = json.loads(text, parse_constant=_no_constant) if text else {}
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else f"{error}"
        raise Refused(422, f"the request is not JSON: {reason:.100}") from None
    if not isinstance(found, dict):
        raise Refused(422, 'the request is not a JSON object like {"seed": 0}')
    if _depth(found) > _MOST_DEPTH:
        raise Refused(422, f"the request is nested too deeply; at most {_MOST_DEPTH} levels are read")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


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
