"""The chunks of a PNG file: what is around the pixels must never decide whether they can be read."""

from __future__ import annotations

import struct
import zlib

from PIL.ImageFile import SAFEBLOCK

PNG = b"\x89PNG\r\n\x1a\n"
_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_KEPT = (b"tRNS", b"eXIf", b"iCCP", b"cHRM", b"gAMA", b"sRGB", b"cICP", b"acTL", b"fcTL", b"fdAT")
_MOST_TEXT = 32 * SAFEBLOCK  # half of what Pillow takes of a whole file
_MOST_PROFILE = 32 * SAFEBLOCK  # the largest profiles of printers have some 4 MiB


def lean_png(content: bytes) -> tuple[bytes, dict[str, bytes]]:
    """A PNG file without chunks that do not affect its pixels, and metadata that Pillow would not report.

    Pillow refuses a file for large or damaged texts. Texts of usual size are kept, as they may hold the orientation.
    """
    kept, said, text, start, copied = [], {}, 0, len(PNG), 0
    while start + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, start)
        end = start + 12 + length
        if end > len(content):  # cut short: Pillow judges what is left
            break
        keep = kind[:1].isupper()
        if not keep:
            chunk = content[start + 8 : end - 4]
            whole = zlib.crc32(kind + chunk) == int.from_bytes(content[end - 4 : end], "big")
            keep = whole and kind in _KEPT
            if whole and kind in _TEXT:
                size = _text_size(kind, chunk)
                text += size
                keep = size <= SAFEBLOCK and text <= _MOST_TEXT
            elif whole and kind == b"iCCP":
                unpacked = _unpacked(chunk.partition(b"\0")[2][1:], _MOST_PROFILE)
                keep = len(unpacked) <= SAFEBLOCK
                if SAFEBLOCK < len(unpacked) <= _MOST_PROFILE:
                    said["icc_profile"] = unpacked
            elif whole and kind == b"cICP":
                said["cicp"] = chunk
        if not keep:
            kept.append(content[copied:start])
            copied = end
        start = end
    return (b"".join([*kept, content[copied:]]) if kept else content), said


def _text_size(kind: bytes, chunk: bytes) -> int:
    """Bytes of a PNG text once it is unpacked, counted to just above what Pillow takes."""
    rest = chunk.partition(b"\0")[2]
    if kind == b"zTXt":
        return len(_unpacked(rest[1:], SAFEBLOCK))
    if kind == b"iTXt" and rest[:1] != b"\0":
        return len(_unpacked(rest[2:].partition(b"\0")[2].partition(b"\0")[2], SAFEBLOCK))
    return len(chunk)


def _unpacked(stream: bytes, most: int) -> bytes:
    """A zlib stream, unpacked as far as one byte beyond `most`; nothing if it is damaged."""
    try:
        return zlib.decompressobj().decompress(stream, most + 1)
    except zlib.error:
        return b""
