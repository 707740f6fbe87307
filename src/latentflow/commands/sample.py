"""`latentflow sample`: a model and a request => PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from latentflow.artifacts import make_folder
from latentflow.commands.grid import save_grid
from latentflow.commands.processes import process_rank
from latentflow.latent_flow import LatentFlow
from latentflow.progress import image_progress
from latentflow.sampling.pipeline import draw, join_samples
from latentflow.sampling.request import make_request


@dataclass(frozen=True)
class SampleResult:
    """What `sample` wrote.

    Attributes:
        files: one PNG per image of this process.
        grid: the contact sheet of this process's images; None where it had none to draw.
        evaluations: mean network calls per image.
        seconds: of solver and decoder.
    """

    files: list[Path]
    grid: Path | None
    evaluations: float
    seconds: float


def sample(
    model: str | Path,
    out: str | Path,
    *,
    num: int = 16,
    classes: Sequence[int | str] | None = None,
    seed: int = 0,
    batch_size: int = 16,
    columns: int | None = None,
    device: str | None = None,
    **preset: object,
) -> SampleResult:
    """Draw images and write each as PNG with its request in the metadata, and a grid of them.

    Under `accelerate launch` or torchrun each process draws its share of the seeds; the pictures are the same.

    Args:
        preset: what differs from the model's sampling preset: solver, steps, guidance, guidance_interval, ...
        columns: of the grid; None: one per class asked for, or 8.

    Raises:
        ArtifactError, ConfigError: see `LatentFlow.from_pretrained` and `make_request`.
    """
    flow = LatentFlow.from_pretrained(model, device=device)
    whole = make_request(flow, num=num, classes=classes, seed=seed, **preset)
    rank, num_processes = process_rank()
    own = whole.at(slice(rank, None, num_processes))
    folder = make_folder(out)
    if not own.seeds:  # fewer images than processes
        return SampleResult([], None, 0.0, 0.0)
    parts, files = [], []
    with image_progress("sampling", len(own.seeds), enabled=rank == 0) as on_images:
        for part in draw(flow, own, batch_size=batch_size, on_images=on_images):
            files += part.save(folder)
            parts.append(part)
    samples = join_samples(parts)
    name = "grid.png" if num_processes == 1 else f"grid-{rank}-of-{num_processes}.png"
    grid = save_grid(folder / name, samples.pixels, columns or len(classes or ()) or 8)
    return SampleResult(files, grid, float(samples.evaluations.double().mean()), samples.seconds)
