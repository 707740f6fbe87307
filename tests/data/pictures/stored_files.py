"""Files of every format and mode with known numbers, for round trips."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE = 12


def ramp(channels: int, dtype: str, most: float | None = None) -> np.ndarray:
    """Numbers [S, S, C] that use the range of a dtype up to `most`; each channel has its own."""
    random = np.random.default_rng(channels)
    if dtype == "float32":
        return random.uniform(-1000, most or 3000, (SIDE, SIDE, channels)).astype(dtype)
    info = np.iinfo(dtype)
    values = random.integers(info.min, int(most or info.max) + 1, (SIDE, SIDE, channels), dtype)
    values[0, 0], values[0, 1] = info.min, int(most or info.max)
    return values


def png16(values: np.ndarray) -> bytes:
    """A PNG of 16 bits of any colour type, with another filter for each row."""
    height, width, channels = values.shape
    rows = values.astype(">u2").view(np.uint8).reshape(height, -1).astype(int)
    step, lines = 2 * channels, []
    for y, row in enumerate(rows):
        kind = y % 5
        left = np.concatenate([np.zeros(step, int), row[:-step]])
        above = rows[y - 1] if y else np.zeros_like(row)
        corner = np.concatenate([np.zeros(step, int), above[:-step]])
        paeth = left + above - corner
        near = [abs(paeth - one) for one in (left, above, corner)]
        best = np.where((near[0] <= near[1]) & (near[0] <= near[2]), left, np.where(near[1] <= near[2], above, corner))
        guess = (0, left, above, (left + above) // 2, best)[kind]
        lines.append(bytes([kind]) + ((row - guess) % 256).astype(np.uint8).tobytes())
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(b"".join(lines))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def by_pillow(values: np.ndarray, kind: str, mode: str | None = None, **options) -> bytes:
    """A file that Pillow writes of numbers [S, S, C]."""
    image = Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)
    buffer = io.BytesIO()
    (image if mode is None else image.convert(mode)).save(buffer, kind, **options)
    return buffer.getvalue()


def by_numpy(values: np.ndarray, archive: bool = False) -> bytes:
    buffer = io.BytesIO()
    if archive:
        np.savez_compressed(buffer, values)
    else:
        np.save(buffer, values)
    return buffer.getvalue()


def by_tifffile(values: np.ndarray, **options) -> bytes:
    """A TIFF of several bands or of floating-point numbers."""
    import tifffile

    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def dicom(values: np.ndarray, *, bits: int = 12, kind: str = "MONOCHROME2", **elements) -> bytes:
    """A DICOM file of one frame of gray."""
    import pydicom

    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    data = pydicom.dataset.FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    data.Rows, data.Columns = values.shape[:2]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, kind
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, bits, bits - 1
    data.PixelRepresentation = int(values.dtype.kind == "i")
    data.PixelData = np.ascontiguousarray(values[..., 0]).tobytes()
    for name, value in elements.items():
        setattr(data, name, value)
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@dataclass(frozen=True)
class Stored:
    """A file and what must come out of it.

    Attributes:
        name: with the suffix of its format.
        content: of the file.
        values: [S, S, C].
        mode: of `PixelFormat`.
        off: levels that a lossy format may be off by.
    """

    name: str
    content: bytes
    values: np.ndarray
    mode: str
    off: int = 0


def every_kind() -> dict[str, Stored]:
    """A file of every format and mode that is read, by a name for people."""
    gray, rgb, rgba = (ramp(channels, "uint8") for channels in (1, 3, 4))
    gray_alpha = ramp(2, "uint8")
    deep = {channels: ramp(channels, "uint16") for channels in (1, 2, 3, 4)}
    bands, floats = ramp(5, "uint16", 10000), ramp(4, "float32")
    signed = ramp(1, "int16", 3000)
    photograph = np.asarray(Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB")).copy()
    shades = photograph[..., :1]
    palette = Image.fromarray(rgb).quantize(64)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    of_palette = np.asarray(palette.convert("RGB"))
    contiguous = {"photometric": "minisblack", "planarconfig": "contig"}
    unspecified = {"photometric": "rgb", "extrasamples": ["unspecified"]}
    return {
        "PNG, 8-bit gray": Stored("a.png", by_pillow(gray, "PNG"), gray, "gray"),
        "PNG, 8-bit gray and alpha": Stored("a.png", by_pillow(gray_alpha, "PNG"), gray_alpha, "gray-alpha"),
        "PNG, 8-bit colours": Stored("a.png", by_pillow(rgb, "PNG"), rgb, "rgb"),
        "PNG, 8-bit colours and alpha": Stored("a.png", by_pillow(rgba, "PNG"), rgba, "rgba"),
        "PNG, palette": Stored("a.png", buffer.getvalue(), of_palette, "rgb"),
        "PNG, 1 bit": Stored("a.png", by_pillow(gray // 128 * 255, "PNG", "1"), gray // 128 * 255, "gray"),
        "PNG, 16-bit gray": Stored("a.png", png16(deep[1]), deep[1], "gray"),
        "PNG, 16-bit gray and alpha": Stored("a.png", png16(deep[2]), deep[2], "gray-alpha"),
        "PNG, 16-bit colours": Stored("a.png", png16(deep[3]), deep[3], "rgb"),
        "PNG, 16-bit colours and alpha": Stored("a.png", png16(deep[4]), deep[4], "rgba"),
        "JPEG": Stored("a.jpg", by_pillow(photograph, "JPEG", quality=98), photograph, "rgb", 4),
        "JPEG, gray": Stored("a.jpg", by_pillow(shades, "JPEG", quality=98), shades, "gray", 4),
        "WebP, lossless": Stored("a.webp", by_pillow(rgb, "WEBP", lossless=True), rgb, "rgb"),
        "AVIF": Stored("a.avif", by_pillow(photograph, "AVIF", quality=98), photograph, "rgb", 8),
        "BMP": Stored("a.bmp", by_pillow(rgb, "BMP"), rgb, "rgb"),
        "PGM, 16 bits": Stored("a.pgm", b"P5 12 12 65535 " + deep[1].astype(">u2").tobytes(), deep[1], "gray"),
        "TIFF, 8-bit gray": Stored("a.tif", by_pillow(gray, "TIFF"), gray, "gray"),
        "TIFF, 8-bit colours": Stored("a.tif", by_pillow(rgb, "TIFF"), rgb, "rgb"),
        "TIFF, 8-bit colours and alpha": Stored("a.tif", by_pillow(rgba, "TIFF"), rgba, "rgba"),
        "TIFF, 8-bit, 4 bands": Stored("a.tif", by_tifffile(rgba, **unspecified), rgba, "bands"),
        "TIFF, 16-bit gray": Stored("a.tif", by_pillow(deep[1], "TIFF"), deep[1], "gray"),
        "TIFF, 16-bit gray, zero is white": Stored(
            "a.tif", by_tifffile(deep[1][..., 0], photometric="miniswhite"), 65535 - deep[1], "gray"
        ),
        "TIFF, 16-bit colours": Stored("a.tif", by_tifffile(deep[3], photometric="rgb"), deep[3], "rgb"),
        "TIFF, 16-bit, 4 bands": Stored("a.tif", by_tifffile(deep[4], **unspecified), deep[4], "bands"),
        "TIFF, 16-bit, fourth band marked as alpha": Stored(
            "a.tif", by_tifffile(deep[4], photometric="rgb", extrasamples=["unassalpha"]), deep[4], "bands"
        ),
        "TIFF, 16-bit, 5 bands, one after the other": Stored(
            "a.tif",
            by_tifffile(np.moveaxis(bands, 2, 0).copy(), photometric="minisblack", planarconfig="separate"),
            bands,
            "bands",
        ),
        "TIFF, 16-bit, LZW": Stored(
            "a.tif",
            by_tifffile(bands, **contiguous, compression="lzw"),
            bands,
            "bands",
        ),
        "TIFF, floating-point gray": Stored("a.tif", by_tifffile(floats[..., 0]), floats[..., :1], "gray"),
        "TIFF, floating-point, 4 bands": Stored("a.tif", by_tifffile(floats, **contiguous), floats, "bands"),
        "TIFF, 16 bits with sign": Stored("a.tif", by_tifffile(signed[..., 0]), signed.astype(np.float32), "gray"),
        "NPY, 8 bits": Stored("a.npy", by_numpy(rgb), rgb, "rgb"),
        "NPY, 16-bit gray [H, W]": Stored("a.npy", by_numpy(deep[1][..., 0]), deep[1], "gray"),
        "NPY, floating-point [C, H, W]": Stored("a.npy", by_numpy(np.moveaxis(floats, 2, 0)), floats, "bands"),
        "NPZ, 16 bits": Stored("a.npz", by_numpy(bands, archive=True), bands, "bands"),
        "DICOM, 12 bits": Stored("a.dcm", dicom(ramp(1, "uint16", 4095)), ramp(1, "uint16", 4095), "gray"),
        "DICOM, MONOCHROME1": Stored(
            "a.dcm", dicom(ramp(1, "uint16", 4095), kind="MONOCHROME1"), 4095 - ramp(1, "uint16", 4095), "gray"
        ),
        "DICOM, Hounsfield units": Stored(
            "a.dcm",
            dicom(ramp(1, "uint16", 4095), RescaleSlope=1, RescaleIntercept=-1024),
            ramp(1, "uint16", 4095).astype(np.float32) - 1024,
            "gray",
        ),
    }
