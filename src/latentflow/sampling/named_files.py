"""Pictures in files that the user names: one in `out`, several in files named after it and after their seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from latentflow.artifacts import require_writable
from latentflow.data.pictures.decode import BrokenImage
from latentflow.errors import ArtifactError, ConfigError
from latentflow.model.flow_model import FlowModel
from latentflow.pixel_format import RGB
from latentflow.progress import image_progress
from latentflow.runtime import Runtime
from latentflow.sampling.drawing import Drawing
from latentflow.sampling.picture_content import SUFFIXES, require_suffix
from latentflow.sampling.picture_file import read_facts
from latentflow.sampling.samples import Samples, files_like


@dataclass(frozen=True)
class Pictures:
    """What was written.

    Attributes:
        files: one picture per seed.
        drawing: what was drawn.
        evaluations: mean network calls per picture.
        seconds: of solver and decoder.
    """

    files: list[Path]
    drawing: Drawing
    evaluations: float
    seconds: float


def draw_to(
    out: str | Path,
    model: str | Path,
    draw: Callable[[FlowModel, Callable[[int], None]], Samples],
    *,
    inputs: tuple[str | Path | None, ...],
    num: int,
    doing: str,
    keeps_form: bool = False,
    runtime: Runtime | None,
) -> Pictures:
    """Draw pictures with a model and write them.

    Args:
        out: the file, whose suffix says what is written (see `sampling.picture_content`); several pictures get names
            like it, with their seeds.
        model: a model folder, a run folder or a hub id.
        draw: called as draw(model, on_images).
        inputs: files that must not be overwritten.
        num: how many pictures, for the progress bar.
        doing: the word before the progress bar.
        keeps_form: pictures of 8-bit RGB are written in the form of the image that they are drawn from, as PNG.

    Raises:
        ArtifactError, ConfigError, DataError: before anything is written.
    """
    files = [file for file in inputs if file is not None]
    require_picture_file(out, *files)
    flow = FlowModel.from_pretrained(model, runtime=runtime)
    suffix, pixel_format = Path(out).suffix, flow.config.pixel_format
    require_suffix(suffix, pixel_format)
    if keeps_form and pixel_format == RGB and suffix.lower() != ".png":
        raise ConfigError(f"{out} must end in .png: the picture keeps alpha, depth and profile of the image")
    with image_progress(doing, num) as on_images:
        samples = draw(flow, on_images)
    for file in files_like(out, samples.drawing, samples.class_names):
        require_picture_file(file, *files)
    return Pictures(samples.save_as(out), samples.drawing, samples.mean_evaluations, samples.seconds)


def require_picture_file(out: str | Path, *inputs: str | Path) -> None:
    """Refuse an `out` that cannot be written as a picture, is one of the input files, or is not a drawn picture.

    A picture that was drawn here before is replaced.

    Raises:
        ArtifactError: with the remedy.
    """
    out = Path(out)
    for file in inputs:
        if out.resolve() == Path(file).resolve() or (out.exists() and Path(file).exists() and out.samefile(file)):
            raise ArtifactError(f"{out} is the input itself, which would be lost; choose another --out")
    require_writable(out, suffix=kind if (kind := out.suffix.lower()) in SUFFIXES else SUFFIXES[0])
    if out.exists() and not _is_drawn(out):
        raise ArtifactError(f"{out} exists and was not drawn by this program, so it stays; choose another --out")


def _is_drawn(file: Path) -> bool:
    try:
        return read_facts(str(file)) is not None
    except BrokenImage:
        return False
