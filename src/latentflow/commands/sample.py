"""`latentflow sample`: a model and a request => PNG files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from latentflow.locks import writes
from latentflow.model.conditioning import ClassList
from latentflow.model.flow_model import FlowModel
from latentflow.progress import image_progress
from latentflow.runtime import Runtime
from latentflow.sampling.contact_sheet import save_grid
from latentflow.sampling.picture_folder import PictureFolder, read_pixels
from latentflow.sampling.request import make_request

GRID_IMAGES = 64
"""The most pictures that a grid shows."""


@dataclass(frozen=True)
class SampleResult:
    """What `sample` wrote.

    Attributes:
        files: one PNG per image of this process.
        kept: how many of them were there already.
        grid: the contact sheet of this process's first images; None where it had none to draw.
        evaluations: mean network calls per image.
        seconds: of solver and decoder, for those that were not there.
    """

    files: list[Path]
    kept: int
    grid: Path | None
    evaluations: float
    seconds: float


@writes("out", launch=True)
def sample(
    model: str | Path,
    out: str | Path,
    *,
    num: int = 16,
    classes: ClassList | None = None,
    seed: int = 0,
    batch_size: int = 16,
    columns: int | None = None,
    runtime: Runtime | None = None,
    **preset: object,
) -> SampleResult:
    """Draw images and write each as PNG with its request in the metadata, and a grid of the first `GRID_IMAGES`.

    Repeating the call goes on where it was: what is in the folder already stays. Under `accelerate launch` or torchrun
    each process draws its share of the seeds; the pictures are the same.

    Args:
        out: a folder for these pictures alone.
        preset: what differs from the model's sampling preset: solver, steps, guidance, guidance_interval, ...
        columns: of the grid; None: one per class, where they fit, or 8.

    Raises:
        ArtifactError: no such model, or the folder holds other pictures.
        ConfigError: see `make_request`.
    """
    assert runtime is not None  # opened by `writes`
    flow = FlowModel.from_pretrained(model, runtime=runtime)
    whole = make_request(flow, num=num, classes=classes, seed=seed, **preset)
    own = whole.at(slice(runtime.rank, None, runtime.world))
    folder = PictureFolder(flow, out, whole)
    if not own.seeds:  # fewer images than processes
        return SampleResult([], 0, None, 0.0, 0.0)
    with image_progress("sampling", len(own.seeds)) as on_images:
        drawn = folder.draw(own, batch_size=batch_size, on_images=on_images)
    name = "grid.png" if runtime.world == 1 else f"grid-{runtime.rank}-of-{runtime.world}.png"
    shown = own.at(slice(0, GRID_IMAGES))
    captions = [flow.config.conditioning.class_names[label] for label in shown.labels]
    grid = save_grid(
        folder.path / name,
        read_pixels(drawn.files[:GRID_IMAGES]),
        columns or _columns(shown.labels),
        captions=captions,
    )
    return SampleResult(drawn.files, drawn.kept, grid, drawn.evaluations, drawn.seconds)


def _columns(labels: list[int], most: int = 12) -> int:
    """One column per class where the labels repeat in turn and the columns are few, else 8."""
    turn = len(dict.fromkeys(labels))
    in_turn = turn and all(label == labels[place % turn] for place, label in enumerate(labels))
    return turn if in_turn and 1 < turn <= most else 8
