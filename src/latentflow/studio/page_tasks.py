"""What the page can ask a model for: a task, fields of its request, and files; as parts, drawn one after another.

A part is a few pictures, so that the page fills while it draws, and others get their turn in between. Pictures do not
depend on how they are divided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from latentflow.api import LatentFlow
from latentflow.errors import ConfigError, nearest
from latentflow.model.guide_reference import NO_GUIDE
from latentflow.model.snapshots import split_snapshot
from latentflow.requests import Request, RequestError
from latentflow.sampling.cost import cost_of_guide, network_calls
from latentflow.sampling.drawing import Drawing, make_drawing
from latentflow.sampling.edits import image_to_image, interpolation, variations
from latentflow.sampling.inpaint import inpaint
from latentflow.sampling.inversion import invert
from latentflow.sampling.mask_to_image import mask_to_image
from latentflow.sampling.named_conditions import resolve_conditions
from latentflow.sampling.pipeline import draw, sample
from latentflow.sampling.request import (
    DrawRequest,
    EditRequest,
    ImageToImageRequest,
    InpaintRequest,
    InterpolateRequest,
    InvertRequest,
    MaskToImageRequest,
    SampleRequest,
    TranslateRequest,
    VaryRequest,
)
from latentflow.sampling.samples import Samples
from latentflow.sampling.translate import translate
from latentflow.sizes import typed_size

MOST_IMAGES = 1000
"""Of one job."""

_REQUESTS: dict[str, type[Request]] = {
    "sample": SampleRequest,
    "vary": VaryRequest,
    "interpolate": InterpolateRequest,
    "inpaint": InpaintRequest,
    "mask-to-image": MaskToImageRequest,
    "translate": TranslateRequest,
    "image-to-image": ImageToImageRequest,
    "invert": InvertRequest,
}
_FILES = {
    "inpaint": ("image", "mask"),
    "mask-to-image": ("map",),
    "translate": ("image",),
    "image-to-image": ("image",),
    "invert": ("image",),
}
"""The files that a task is given."""


@dataclass(frozen=True)
class GivenFiles:
    """What a task is given besides its request.

    Attributes:
        paths: of files, by their roles: image, mask, map.
        noise: [num, C, h, w] in place of that of the seeds, for "sample".
    """

    paths: Mapping[str, Path] = field(default_factory=dict)
    noise: Tensor | None = None


@dataclass(frozen=True)
class Found:
    """What a part gives.

    Attributes:
        samples: its pictures.
        numbers: what was measured, by name; of an inversion.
        noise: [1, C, h, w], of an inversion.
    """

    samples: Samples
    numbers: Mapping[str, float] = field(default_factory=dict)
    noise: Tensor | None = None


@dataclass(frozen=True)
class JobPlan:
    """A job as it will be drawn.

    Attributes:
        parts: each draws some of the pictures.
        total: pictures.
        calls: expected network calls per picture.
        size: width and height of a picture in pixels; None: that of the file it is drawn from.
    """

    parts: Sequence[Callable[[], Found]]
    total: int
    calls: float
    size: tuple[int, int] | None


def make_request(task: str, fields: Mapping[str, Any]) -> Request:
    """The checked request of a task.

    Raises:
        ConfigError: there is no such task, or a field is refused.
    """
    if task not in _REQUESTS:
        raise ConfigError(f"there is no task {task!r}; {nearest(task, _REQUESTS)}")
    given = dict(fields)
    if isinstance(size := given.get("image_size"), str):
        given["image_size"] = _typed(size)
    if given.get("guide") is not None:
        _require_local(given["guide"])
    return _REQUESTS[task](**given)


def _typed(size: str) -> Any:
    try:
        return typed_size(size)
    except ValueError as error:
        raise RequestError("image_size", f" {size!r} {error}") from None


def _require_local(guide: object) -> None:
    """A page draws with what is on this machine: the name of a guide may come from somebody's picture."""
    name = str(guide)
    if name == NO_GUIDE or name.startswith("@") or Path(name).is_dir() or split_snapshot(name) is not None:
        return
    raise RequestError("guide", f" {name:.80}: there is no such folder on this machine; give a run or a snapshot")


def make_plan(model: LatentFlow, task: str, fields: Mapping[str, Any], files: GivenFiles, batch_size: int) -> JobPlan:
    """What a job will draw; nothing is computed yet.

    Args:
        batch_size: pictures of one part.

    Raises:
        ConfigError: a value is refused, or a file is missing.
    """
    request = make_request(task, fields)
    num = getattr(request, "num", 1)
    if num > MOST_IMAGES:
        raise RequestError("num", f" {num:,}: the page draws at most {MOST_IMAGES:,} images at a time")
    for role in _FILES.get(task, ()):
        if role not in files.paths:
            raise ConfigError(f"{task} needs {'an image' if role == 'image' else f'a {role}'}; give one first")
    if isinstance(request, InvertRequest):
        return _inversion(model, request, files)
    if isinstance(request, EditRequest):
        return _from_files(model, task, request, files, batch_size)
    if files.noise is not None:
        return _from_noise(model, request, files.noise)
    drawing = _drawing_of(model, request)
    rows = [slice(start, start + batch_size) for start in range(0, num, batch_size)]
    parts = [_Seeded(model, drawing.at(some), batch_size) for some in rows]
    return JobPlan(parts, num, _calls(model, drawing), _size(model, drawing))


def _drawing_of(model: LatentFlow, request: Request) -> Drawing:
    if isinstance(request, VaryRequest):
        return variations(model, request)[1]
    if isinstance(request, InterpolateRequest):
        return interpolation(model, request)
    return make_drawing(model, request)


@dataclass(frozen=True)
class _Seeded:
    """A part of a drawing from seeds."""

    model: LatentFlow
    drawing: Drawing
    batch_size: int

    def __call__(self) -> Found:
        (samples,) = draw(self.model, self.drawing, batch_size=self.batch_size)
        return Found(samples)


def _from_noise(model: LatentFlow, request: Request, noise: Tensor) -> JobPlan:
    drawing = make_drawing(model, request)
    return JobPlan(
        [lambda: Found(sample(model, request, noise=noise))], 1, _calls(model, drawing), _size(model, drawing)
    )


def _inversion(model: LatentFlow, request: InvertRequest, files: GivenFiles) -> JobPlan:
    asked = {name: getattr(request, name) for name in ("classes", "conditions")}
    drawing = make_drawing(model, SampleRequest(num=1, **asked, **{"guidance": 1.0, **request.preset()}))

    def run() -> Found:
        found = invert(model, files.paths["image"], request)
        trip = found.round_trip(model)
        numbers = {
            "evaluations there": found.evaluations,
            "evaluations back": trip.evaluations,
            "relative latent error": trip.latent_error,
            "PSNR of the solver (dB)": trip.solver_psnr,
            "PSNR of the autoencoder (dB)": trip.autoencoder_psnr,
            "PSNR of both (dB)": trip.image_psnr,
            "standard deviation of the noise": float(found.noise.std()),
        }
        return Found(trip.samples, numbers, found.noise)

    return JobPlan([run], 1, 2 * _calls(model, drawing), _size(model, drawing))


def _from_files(model: LatentFlow, task: str, request: EditRequest, files: GivenFiles, batch_size: int) -> JobPlan:
    """Parts by seed: classes and values that are cycled over the images are given to each part by image."""
    expected = _like_sample(model, request)
    conditioning = model.config.conditioning
    labels = [] if request.classes is None else conditioning.class_indices(request.classes)
    named = resolve_conditions(conditioning, request.conditions, request.num)
    parts = []
    for start in range(0, request.num, batch_size):
        places = range(start, min(start + batch_size, request.num))
        own = {
            "num": len(places),
            "seed": request.seed + start,
            "classes": [labels[place % len(labels)] for place in places] if labels else request.classes,
            "conditions": {name: [values[place] for place in places] for name, values in named.items()} or None,
        }
        parts.append(_FromFiles(model, task, request.model_copy(update=own), files, batch_size))
    size = None if task == "inpaint" else _size(model, None)
    return JobPlan(parts, request.num, expected, size)


@dataclass(frozen=True)
class _FromFiles:
    """A part that is drawn from files."""

    model: LatentFlow
    task: str
    request: Any
    files: GivenFiles
    batch_size: int

    def __call__(self) -> Found:
        paths, options = self.files.paths, {"batch_size": self.batch_size}
        if self.task == "inpaint":
            more = {"semantic_map": paths.get("map")}
            return Found(inpaint(self.model, paths["image"], paths["mask"], self.request, **more, **options))
        if self.task == "mask-to-image":
            return Found(mask_to_image(self.model, paths["map"], self.request, **options))
        run = translate if self.task == "translate" else image_to_image
        return Found(run(self.model, paths["image"], self.request, **options))


def _like_sample(model: LatentFlow, request: DrawRequest) -> float:
    """About how many network calls a picture takes; the files, which are not read here, do not matter to it."""
    preset = model.config.sampling.model_copy(update=request.preset())
    return network_calls(Drawing(seeds=[0], sampling=preset))


def _calls(model: LatentFlow, drawing: Drawing) -> float:
    return network_calls(drawing, cost_of_guide(model, drawing))


def _size(model: LatentFlow, drawing: Drawing | None) -> tuple[int, int]:
    height, width = (drawing and drawing.image_size) or model.config.image_size
    return width, height
