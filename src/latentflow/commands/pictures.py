"""What verbs that write single pictures have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from latentflow.artifacts import require_writable
from latentflow.data.pictures.decode import BrokenImage
from latentflow.errors import ArtifactError
from latentflow.sampling.picture_file import read_facts
from latentflow.sampling.request import SampleRequest
from latentflow.sampling.samples import Samples, files_like


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
    """Refuse an `out` that could not be written as PNG, or that is one of the input files or anybody else's.

    A picture that was drawn here before is replaced.

    Raises:
        ArtifactError: with the remedy.
    """
    out = Path(out)
    for file in inputs:
        if out.resolve() == Path(file).resolve() or (out.exists() and Path(file).exists() and out.samefile(file)):
            raise ArtifactError(f"{out} is the input itself, which would be lost; choose another --out")
    require_writable(out, suffix=".png")
    if out.exists() and not _is_drawn(out):
        raise ArtifactError(f"{out} is there and was not drawn by this program, so it stays; choose another --out")


def write_pictures(samples: Samples, out: str | Path, *inputs: str | Path) -> Pictures:
    """Write one picture to the PNG file `out`, several to files named like it and by their seeds.

    Raises:
        ArtifactError: see `require_picture_file`; nothing was written.
    """
    for file in files_like(out, samples.request, samples.class_names):
        require_picture_file(file, *inputs)
    return Pictures(samples.save_as(out), samples.request, samples.mean_evaluations, samples.seconds)


def _is_drawn(file: Path) -> bool:
    try:
        return read_facts(str(file)) is not None
    except BrokenImage:
        return False
