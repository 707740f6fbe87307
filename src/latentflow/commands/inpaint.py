"""`latentflow inpaint`: a model, an image and a mask => the image with its hole filled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentflow.artifacts import require_writable
from latentflow.commands.progress import image_progress
from latentflow.latent_flow import LatentFlow
from latentflow.sampling.inpaint import inpaint as fill_hole


@dataclass(frozen=True)
class InpaintResult:
    """What `inpaint` wrote.

    Attributes:
        files: one picture per seed.
        method: "condition" where the model was trained to inpaint, else "replacement".
        frame: left, top, right, bottom of the part of the image that the model saw, in pixels.
        seen_size: height and width it saw it at.
        evaluations: mean network calls per picture.
        seconds: of solver and decoder.
    """

    files: list[Path]
    method: str
    frame: tuple[int, ...]
    seen_size: tuple[int, int]
    evaluations: float
    seconds: float


def inpaint(
    model: str | Path,
    image: str | Path,
    mask: str | Path,
    out: str | Path,
    *,
    num: int = 1,
    device: str | None = None,
    **request: Any,
) -> InpaintResult:
    """Fill the hole of an image once per seed; the request is that of `latentflow.sampling.inpaint.inpaint`.

    Args:
        out: the PNG file; several pictures are named like it, with their seeds.

    Raises:
        ArtifactError, ConfigError, DataError: before anything is written.
    """
    require_writable(out, suffix=".png")
    flow = LatentFlow.from_pretrained(model, device=device)
    with image_progress("inpainting", num) as on_images:
        samples = fill_hole(flow, image, mask, num=num, on_images=on_images, **request)
    inputs = samples.request.inputs
    return InpaintResult(
        files=samples.save_as(out),
        method=inputs["method"],
        frame=tuple(map(int, inputs["frame"].split())),
        seen_size=samples.request.image_size,
        evaluations=float(samples.evaluations.double().mean()),
        seconds=samples.seconds,
    )
