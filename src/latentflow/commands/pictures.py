"""What verbs that write single pictures have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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


def write_pictures(samples: Samples, out: str | Path) -> Pictures:
    """Write one picture to the PNG file `out`, several to files named like it and by their seeds."""
    evaluations = float(samples.evaluations.double().mean())
    return Pictures(samples.save_as(out), samples.request, evaluations, samples.seconds)
