"""Files from the web: downloaded once, into the folder of what only saves work, and read from there.

A download that was interrupted goes on where it ended. A finished file is not asked for again; delete it to do so.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import posixpath
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from latentflow.data.prefetch import in_threads
from latentflow.errors import DataError
from latentflow.ledger import cache_folder, one_at_a_time
from latentflow.progress import image_progress

_ADDRESS = re.compile(r"https?://", re.IGNORECASE)
_TRIES, _TOGETHER = 4, 4
_CHUNK = 1 << 20  # bytes
_SECONDS = 60.0  # without an answer


def is_address(text: str) -> bool:
    """Whether this is the address of a file in the web."""
    return _ADDRESS.match(text) is not None


def fetched(addresses: Sequence[str]) -> list[Path]:
    """Download files that are not here yet; returns them in order. Those of one folder there lie in one folder here.

    Raises:
        DataError: a file is not there, or the connection was lost too often; what has arrived is kept.
    """
    places = [_place(address) for address in addresses]
    places[0].parent.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(places[0].parent.parent), image_progress("downloading", len(places)) as on_files:
        pairs = list(zip(addresses, places, strict=True))
        for _ in in_threads(lambda pair: _fetch(*pair), pairs, _TOGETHER):
            on_files(1)
    return places


def _place(address: str) -> Path:
    """Where the file of an address is kept. What stands behind a question mark, such as a signature, does not count."""
    parts = urlsplit(address)
    name = posixpath.basename(unquote(parts.path))
    if not name or name.startswith("."):
        raise DataError(f"{address} names no file; give one that ends in .tar, .parquet or .zip")
    folder = f"{parts.scheme.lower()}://{parts.netloc}{posixpath.dirname(parts.path)}"
    return cache_folder() / "downloads" / hashlib.sha256(folder.encode()).hexdigest()[:16] / name


def _fetch(address: str, place: Path) -> None:
    if place.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f"{place.name}.part")
    reason = ""
    for _ in range(_TRIES):
        try:
            if _continued(address, part):
                part.replace(place)
                return
            reason = "the connection was lost"
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise DataError(f"{_shown(address)} cannot be read ({error.code} {error.reason}); check it") from None
            reason = f"{error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = str(getattr(error, "reason", error))
    raise DataError(
        f"{_shown(address)} cannot be read ({reason}); check the connection, and repeat the command to go on"
    )


def _continued(address: str, part: Path) -> bool:
    """Append what is missing of a file; whether it is complete then."""
    mark = part.with_name(f"{part.name}.etag")  # the version that the part belongs to
    have = part.stat().st_size if part.exists() and mark.exists() else 0
    request = urllib.request.Request(address, headers={"User-Agent": "latentflow"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", mark.read_text(encoding="utf-8"))
    with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
        continues = answer.status == 206
        total = int(answer.headers.get("Content-Length") or -1) + (have if continues else 0)
        if version := answer.headers.get("ETag") or answer.headers.get("Last-Modified"):
            mark.write_text(version, encoding="utf-8")
        else:
            mark.unlink(missing_ok=True)
        with part.open("ab" if continues else "wb") as file:
            with suppress(http.client.IncompleteRead):
                for chunk in iter(partial(answer.read, _CHUNK), b""):
                    file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    if total >= 0 and part.stat().st_size != total:
        return False
    mark.unlink(missing_ok=True)
    return True


def _shown(address: str) -> str:
    """An address without what stands behind a question mark, which may be a secret."""
    return address.partition("?")[0]
