"""What verbs that write single pictures have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from latentflow.artifacts import require_writable
from latentflow.errors import ArtifactError
from latentflow.sampling.pipeline import Samples
from latentflow.sampling.request import SampleRequest


@dataclass(frozen=True)
class Pictures:
    """What was written.

    Attributes:
        files: one picture per seed.
        request: what was drawn.
        evaluations: mean network calls per picture.
        seconds: of solver and decoder.
    """

    files: list[Path]
    request: SampleRequest
    evaluations: float
    seconds: float


def require_picture_file(out: str | Path, *inputs: str | Path) -> None:
    """Refuse an `out` that could not be written as PNG, or that is one of the input files.

    Raises:
        ArtifactError: with the remedy.
    """
    for file in inputs:
        if Path(out).resolve() == Path(file).resolve():
            raise ArtifactError(f"{out} is the input itself, which would be lost; choose another --out")
    require_writable(out, suffix=".png")


def write_pictures(samples: Samples, out: str | Path) -> Pictures:
    """Write one picture to the PNG file `out`, several to files named like it and by their seeds."""
    evaluations = float(samples.evaluations.double().mean())
    return Pictures(samples.save_as(out), samples.request, evaluations, samples.seconds)
