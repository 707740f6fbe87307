"""Drawn pictures in memory, and how they are written to files."""

from __future__ import annotations

import io
import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from latentflow.artifacts import atomic_file, sync
from latentflow.console import printable
from latentflow.data.pictures.shown import as_shown
from latentflow.pixel_format import RGB, PixelFormat
from latentflow.sampling.call_cost import call_count
from latentflow.sampling.drawing import Drawing
from latentflow.sampling.naming import picture_caption, picture_facts, picture_name, seed_caption
from latentflow.sampling.notebook_grid import grid_html, grid_png
from latentflow.sampling.picture_content import METADATA, encode_picture, require_suffix, usual_suffix
from latentflow.sampling.png import PILLOW_OPTIONS

_THREADS = 8  # more than there are cores: they spend much of their time waiting for the disk
_WAITING = 2


@dataclass(frozen=True)
class Samples:
    """Drawn pictures. In a notebook they show themselves as a grid with captions.

    Attributes:
        pixels: [B, P, H, W], stored values in `pixel_format`.
        latents: [B, C, h, w] float32, normalised, at t = 0.
        evaluations: [B] int64, network calls of each image; a guided call counts twice. [B] float64 where a guide is a
            network of another size; see `latentflow.sampling.call_cost`.
        drawing: what was drawn.
        class_names: of the model.
        drawn_by: returns the origin of the pictures, see `latentflow.sampling.pipeline.drawn_by`.
        seconds: wall time of solver and decoder.
        pixel_format: what the values of the pixels are; the default is 8-bit RGB.
        finish: turns the pixels of a picture, [H, W, 3], into the image that is written; None: they are written.
    """

    pixels: Tensor
    latents: Tensor
    evaluations: Tensor
    drawing: Drawing
    class_names: Sequence[str] = field(default=())
    drawn_by: Callable[[], Mapping[str, Any]] = field(default=dict)
    seconds: float = 0.0
    pixel_format: PixelFormat = RGB
    finish: Callable[[np.ndarray], Image.Image] | None = None

    @property
    def images(self) -> list[Image.Image]:
        """The pictures as RGB images of Pillow, of other formats as they are shown (see `data.pictures.shown`)."""
        return [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in self.shown]

    @property
    def arrays(self) -> list[np.ndarray]:
        """The pictures as arrays of stored values, [H, W, P] each."""
        return [self._array(row) for row in range(len(self.pixels))]

    @property
    def shown(self) -> Tensor:
        """The pictures as they are shown: [B, 3, H, W] uint8."""
        return as_shown(self.pixels, self.pixel_format)

    @property
    def mean_evaluations(self) -> float:
        """Network calls per image."""
        return float(self.evaluations.double().mean())

    def save(self, folder: str | Path) -> list[Path]:
        """Write one file per image, named after class and seed, with its drawing in the metadata.

        PNG, or TIFF where PNG does not hold the format: several bands or floating-point numbers.

        Raises:
            ConfigError: it takes a library that is not installed.
        """
        require_suffix(usual_suffix(self.pixel_format), self.pixel_format)
        return self._write_all([Path(folder) / self.name(row) for row in range(len(self.pixels))])

    def save_as(self, file: str | Path) -> list[Path]:
        """Write one image to `file`; several images to files named after it and after class and seed.

        Args:
            file: its suffix says what is written: see `sampling.picture_content`.

        Raises:
            ConfigError: such a file does not hold the format, or takes a library that is not installed.
        """
        require_suffix(Path(file).suffix, self.pixel_format)
        return self._write_all(files_like(file, self.drawing, self.class_names))

    def name(self, row: int) -> str:
        """The file name of one image: "cat_seed-00000017.png"."""
        own = self.drawing.at(slice(row, row + 1))
        return picture_name(own, self.class_names, usual_suffix(self.pixel_format))

    def png(self, row: int) -> bytes:
        """The PNG file of one image, with its drawing in the metadata."""
        return self.content(row, ".png")

    def content(self, row: int, suffix: str) -> bytes:
        """The file of one image, with its drawing in the metadata where such a file has some.

        Args:
            suffix: ".png" or another of `sampling.picture_content`.
        """
        text = self.facts(row)
        if self.finish is None:
            return encode_picture(self._array(row), self.pixel_format, text, suffix)
        written, metadata = io.BytesIO(), PngImagePlugin.PngInfo()
        metadata.add_text(METADATA, text)
        self.finish(self._array(row)).save(written, format="PNG", pnginfo=metadata, **PILLOW_OPTIONS)
        return written.getvalue()

    def facts(self, row: int) -> str:
        """The metadata of one image: its drawing, as JSON."""
        own = self.drawing.at(slice(row, row + 1))
        facts = picture_facts(own, self.class_names, dict(self.drawn_by()))
        return json.dumps(facts | {"evaluations": call_count(self.evaluations[row])})

    @property
    def captions(self) -> list[str]:
        """What each picture shows, "cat, age 63" or "cat to dog at 0.25"; "" where no condition is given."""
        return [picture_caption(own, self.class_names) for own in self._singles]

    def __len__(self) -> int:
        return len(self.pixels)

    def __repr__(self) -> str:
        """One line: "Samples(16 images of 64 x 64 pixels: cat, dog; seeds 0 to 15)"."""
        if not len(self):
            return "Samples(0 images)"
        height, width = self.pixels.shape[2:]
        names = ", ".join(dict.fromkeys(filter(None, self.captions)))
        shows = f": {shorten(printable(names), 60, placeholder=' ...')}" if names else ""
        seeds = self.drawing.seeds
        last = f" to {seeds[-1]}" if seeds[-1] != seeds[0] else ""
        images = "1 image" if len(self) == 1 else f"{len(self):,} images"
        return f"Samples({images} of {width} x {height} pixels{shows}; seed{'s' if last else ''} {seeds[0]}{last})"

    def _repr_png_(self) -> bytes | None:
        if not len(self):
            return None
        captions = self.captions
        return grid_png(self.shown, captions if any(captions) else [seed_caption(own) for own in self._singles])

    def _repr_html_(self) -> str | None:
        if not len(self):
            return None
        return grid_html(self.shown, self.captions, [seed_caption(own) for own in self._singles])

    @property
    def _singles(self) -> list[Drawing]:
        return [self.drawing.at(slice(row, row + 1)) for row in range(len(self))]

    def _write_all(self, files: list[Path]) -> list[Path]:
        with PictureWriter() as writer:
            writer.write(self, files)
        return files

    def _array(self, row: int) -> np.ndarray:
        return self.pixels[row].permute(1, 2, 0).numpy()


def files_like(file: str | Path, drawing: Drawing, class_names: Sequence[str]) -> list[Path]:
    """The files of a drawing's pictures: `file` for one, for several `file` with class and seed added to its name."""
    file = Path(file)
    if len(drawing.seeds) == 1:
        return [file]
    rows = (drawing.at(slice(row, row + 1)) for row in range(len(drawing.seeds)))
    return [file.with_name(f"{file.stem}_{picture_name(row, class_names, file.suffix)}") for row in rows]


def join_samples(parts: Sequence[Samples]) -> Samples:
    """One record of several batches, in their order."""
    drawings = [part.drawing for part in parts]
    of_each = ("seeds", "labels", "blends")
    lists: dict[str, Any] = {name: [x for r in drawings for x in getattr(r, name)] for name in of_each}
    lists["conditions"] = {name: [x for r in drawings for x in r.conditions[name]] for name in drawings[0].conditions}
    return Samples(
        pixels=torch.cat([part.pixels for part in parts]),
        latents=torch.cat([part.latents for part in parts]),
        evaluations=torch.cat([part.evaluations for part in parts]),
        drawing=drawings[0].model_copy(update=lists),
        class_names=parts[0].class_names,
        drawn_by=parts[0].drawn_by,
        seconds=sum(part.seconds for part in parts),
        pixel_format=parts[0].pixel_format,
    )


class PictureWriter:
    """Writes pictures in threads while the next ones are drawn; each file appears complete or not at all.

    At most `_WAITING` batches are kept; `write` waits for the oldest of more. An error in a thread is raised by the
    next call, or at the end of the `with` block.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="pictures")
        self._batches: deque[tuple[list[Future[None]], set[Path]]] = deque()

    def __enter__(self) -> PictureWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            while kind is None and self._batches:
                self._settle()
        finally:
            self._threads.shutdown(cancel_futures=True)

    def write(self, samples: Samples, files: Iterable[Path], rows: Iterable[int] | None = None) -> None:
        """Start to write images of `samples` to `files`.

        Args:
            rows: the images, one per file; None: all.

        Raises:
            ArtifactError: an earlier one could not be written.
        """
        rows = range(len(samples.pixels)) if rows is None else rows
        pairs = list(zip(files, rows, strict=True))
        futures = [self._threads.submit(_write, samples, file, row) for file, row in pairs]
        self._batches.append((futures, {file.parent for file, _ in pairs}))
        while len(self._batches) > _WAITING:
            self._settle()

    def _settle(self) -> None:
        futures, folders = self._batches.popleft()
        for future in futures:
            future.result()
        for folder in folders:
            sync(folder)


def _write(samples: Samples, file: Path, row: int) -> None:
    content = samples.content(row, file.suffix)
    with atomic_file(file, sync_folder=False) as temporary:
        temporary.write_bytes(content)
