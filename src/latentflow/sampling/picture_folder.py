"""A folder of drawn pictures belongs to one request: it is completed, never mixed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from latentflow.artifacts import require_writable
from latentflow.data.items import stack_pixels
from latentflow.data.pictures.decode import BrokenImage
from latentflow.data.pictures.shown import as_shown
from latentflow.data.stores.files import is_image
from latentflow.errors import ArtifactError
from latentflow.model.flow_model import FlowModel
from latentflow.pixel_format import PixelFormat
from latentflow.progress import image_progress
from latentflow.runtime import Runtime
from latentflow.sampling.call_cost import call_count
from latentflow.sampling.contact_sheet import save_grid, sheet_columns
from latentflow.sampling.cost import announce_cost, compile_where_it_pays
from latentflow.sampling.drawing import Drawing
from latentflow.sampling.naming import picture_caption, picture_facts, picture_name
from latentflow.sampling.picture_content import decode_picture, require_suffix, usual_suffix
from latentflow.sampling.picture_file import WHICH, read_facts, read_head, unlike
from latentflow.sampling.pipeline import Given, draw_batches, drawn_by
from latentflow.sampling.samples import PictureWriter

GRID = re.compile(r"(^|/)grid(-\d+-of-\d+)?\.png$")
"""Contact sheets, which lie next to the pictures that they show and do not count as such."""
GRID_IMAGES = 64
"""The most pictures on a contact sheet."""


@dataclass(frozen=True)
class DrawnFolder:
    """What is in a folder after drawing.

    Attributes:
        files: one per requested picture, in order.
        kept: how many of them an earlier run had drawn.
        evaluations: mean network calls per picture.
        seconds: of solver and decoder, for the others.
        grid: a contact sheet of the first of them, if there is one.
    """

    files: list[Path]
    kept: int
    evaluations: float
    seconds: float
    grid: Path | None = None


def draw_folder(
    out: str | Path,
    model: str | Path,
    plan: Callable[[FlowModel], Sequence[Drawing]],
    *,
    doing: str,
    batch_size: int = 16,
    columns: int | None = None,
    captions: bool = False,
    runtime: Runtime | None = None,
) -> DrawnFolder:
    """Draw into a folder: one file per picture, PNG or TIFF, and a contact sheet of the first `GRID_IMAGES`.

    Repeating the call continues where it stopped. Each process of `runtime` draws its share of the pictures.

    Args:
        out: a folder for these pictures only.
        model: a model folder, a run folder or a hub id.
        plan: called with the model, returns what is to be drawn.
        doing: the word before the progress bar.
        columns: of the contact sheet; None: one per class or condition, if they fit, else 8.
        captions: whether the contact sheet names classes and conditions.

    Raises:
        ArtifactError: no such model, or the folder cannot be written or holds other pictures.
        ConfigError: as `plan` does, or pictures of the model's pixel format take a library that is not installed.
    """
    require_writable(out)
    flow = FlowModel.from_pretrained(model, runtime=runtime)
    require_suffix(usual_suffix(flow.config.pixel_format), flow.config.pixel_format)
    rank, world = flow.runtime.rank, flow.runtime.world
    drawings = plan(flow)
    folder = PictureFolder(flow, out, *drawings)
    shares = [drawing.at(slice(rank, None, world)) for drawing in drawings]
    num_images = sum(len(share.seeds) for share in shares)
    if not num_images:  # fewer images than processes
        return DrawnFolder([], 0, 0.0, 0.0)
    with image_progress(doing, num_images) as on_images:
        parts = [folder.draw(share, batch_size=batch_size, on_images=on_images) for share in shares]
    files = [file for part in parts for file in part.files]
    singles = [share.at(slice(row, row + 1)) for share in shares for row in range(len(share.seeds))][:GRID_IMAGES]
    shown = [picture_caption(single, flow.config.conditioning.class_names) for single in singles]
    grid = save_grid(
        folder.path / ("grid.png" if world == 1 else f"grid-{rank}-of-{world}.png"),
        read_shown(files[:GRID_IMAGES], flow.config.pixel_format),
        columns or sheet_columns(shown),
        captions=shown if captions and any(shown) else [],
    )
    return DrawnFolder(
        files,
        kept=sum(part.kept for part in parts),
        evaluations=sum(part.evaluations * len(part.files) for part in parts) / len(files),
        seconds=sum(part.seconds for part in parts),
        grid=grid,
    )


class PictureFolder:
    """The folder of the pictures of some drawings, and of no others.

    Pictures that an earlier run of the same drawings left there are kept. Files that are not images are ignored, and so
    are pictures of this program in subfolders; other pictures in subfolders mean that this is a folder of data.

    Args:
        drawings: everything that belongs in the folder, of all processes.

    Raises:
        ArtifactError: it cannot be written, or holds other pictures.
    """

    def __init__(self, flow: FlowModel, folder: str | Path, *drawings: Drawing):
        self.path = require_writable(folder)
        _refuse_data(self.path)
        self._flow = flow
        self._evaluations: dict[str, float] = {}
        expected = {name: (own, row) for own in drawings for row, name in enumerate(self._names(own))}
        refuse_others(self.path, lambda file: self._look_at(file, expected.get(file.name), drawings[0]))

    def draw(
        self,
        drawing: Drawing,
        *,
        batch_size: int,
        on_images: Callable[[int], None] = lambda num_images: None,
    ) -> DrawnFolder:
        """Draw what is missing of a drawing, in the batches of a run that starts from nothing: the bytes are the same.

        Pictures are written while the next batch is drawn.
        """
        names = self._names(drawing)
        kept, seconds = sum(name in self._evaluations for name in names), 0.0
        if kept < len(names):
            announce_cost(self._flow, drawing, batch_size)
        batches = [slice(start, start + batch_size) for start in range(0, len(names), batch_size)]
        missing = [rows for rows in batches if any(name not in self._evaluations for name in names[rows])]
        on_images(sum(len(names[rows]) for rows in batches) - sum(len(names[rows]) for rows in missing))
        compile_where_it_pays(self._flow, drawing, batch_size=batch_size, num_batches=len(missing))
        drawn = draw_batches(self._flow, ((drawing.at(rows), Given()) for rows in missing), batch_size)
        with PictureWriter() as writer:
            for rows, samples in zip(missing, drawn, strict=True):
                own = {place: name for place, name in enumerate(names[rows]) if name not in self._evaluations}
                writer.write(samples, [self.path / name for name in own.values()], own)
                self._evaluations |= {name: call_count(samples.evaluations[place]) for place, name in own.items()}
                seconds += samples.seconds
                on_images(len(samples.pixels))
        calls = sum(self._evaluations[name] for name in names) / max(len(names), 1)
        return DrawnFolder([self.path / name for name in names], kept, calls, seconds)

    def _names(self, drawing: Drawing) -> list[str]:
        config = self._flow.config
        class_names, suffix = tuple(config.conditioning.class_names), usual_suffix(config.pixel_format)
        return [picture_name(drawing.at(slice(row, row + 1)), class_names, suffix) for row in range(len(drawing.seeds))]

    def _look_at(self, file: Path, place: tuple[Drawing, int] | None, drawing: Drawing) -> str:
        """Why a file is not of this drawing; "" where it is, or where it is a damaged one of it, to be drawn again."""
        try:
            _, facts = read_head(str(file), decode=True)  # its pixels are checked as they are read
        except BrokenImage:
            return "" if place is not None else "no readable image"
        if facts is None:
            return "not drawn by this program, or edited since"
        asked, row = place or (drawing, 0)
        asked = asked.at(slice(row, row + 1))
        own = picture_facts(asked, self._flow.config.conditioning.class_names, drawn_by(self._flow))
        if why := unlike(own, facts):
            return why
        if place is None:
            return "another seed or class"
        if any(facts.get(name) != own.get(name) for name in WHICH):
            return "another seed, class, condition or input"
        self._evaluations[file.name] = facts.get("evaluations", 0)
        return ""


def refuse_others(folder: Path, why: Callable[[Path], str]) -> None:
    """Refuse a folder with pictures that do not belong there; contact sheets and hidden files do not count.

    Args:
        why: says why a picture does not belong, or "" where it does.

    Raises:
        ArtifactError: naming one of them.
    """
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    pictures = [file for file in found if is_image(file.name) and not file.name.startswith(".") and file.is_file()]
    others = [f"{file.name} ({said})" for file in pictures if not GRID.search(file.name) and (said := why(file))]
    if others:
        many = f"{len(others)} pictures that are not" if len(others) > 1 else "a picture that is not"
        raise ArtifactError(
            f"{folder} holds {many} of this request: {others[0]}; give another --out, so that they do not mix"
        )


def _refuse_data(folder: Path) -> None:
    """Refuse a folder with class folders of somebody's own pictures: what is drawn would become part of them."""
    for below in sorted(folder.glob("[!.]*/")):
        first = next((file for file in sorted(below.glob("[!.]*")) if is_image(file.name) and file.is_file()), None)
        if first is not None and not _drawn_here(first):
            raise ArtifactError(
                f"{folder} holds folders of other pictures ({below.name}/{first.name}); "
                "give another --out, so that they do not mix"
            )


def _drawn_here(file: Path) -> bool:
    try:
        return GRID.search(file.name) is not None or read_facts(str(file)) is not None
    except BrokenImage:
        return True


def read_shown(files: Sequence[Path], pixel_format: PixelFormat) -> Tensor:
    """Drawn pictures of one size as they are shown: [B, 3, H, W] uint8.

    Raises:
        BrokenImage: one of them is gone or damaged.
    """
    return as_shown(stack_pixels([decode_picture(file.read_bytes(), str(file)) for file in files]), pixel_format)
