"""What the page can ask a model for: a task, fields of its request, and files; checked, and ready for the queue."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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
from latentflow.sampling.edits import interpolation, prepare_image_to_image, variations
from latentflow.sampling.inpaint import prepare_inpaint
from latentflow.sampling.inversion import Inversion, invert, preset_of_inversion
from latentflow.sampling.mask_to_image import prepare_mask_to_image
from latentflow.sampling.pipeline import Given, Prepared, naming_noise
from latentflow.sampling.request import (
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
from latentflow.sampling.translate import prepare_translate
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
_ROLES = {
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
class PageTask:
    """What the queue will draw for the page.

    Attributes:
        prepared: for the queue.
        calls: expected network calls per picture.
        size: width and height of a picture in pixels; None: that of the file it is drawn from.
        inverting: of an inversion, what it finds besides pictures.
    """

    prepared: Prepared
    calls: float
    size: tuple[int, int] | None
    inverting: Inverting | None = None


def checked_request(task: str, fields: Mapping[str, Any]) -> Request:
    """The checked request of a task.

    Raises:
        ConfigError: there is no such task, or a field is refused.
    """
    if task not in _REQUESTS:
        raise ConfigError(f"there is no task {task!r:.60}; {nearest(task, _REQUESTS)}")
    given = dict(fields)
    if isinstance(size := given.get("image_size"), str):
        given["image_size"] = _typed(size)
    if given.get("guide") is not None:
        _require_local(given["guide"])
    request = _REQUESTS[task](**given)
    if getattr(request, "num", 1) > MOST_IMAGES:
        raise RequestError("num", f" {request.num:,}: the page draws at most {MOST_IMAGES:,} images at a time")
    return request


def _typed(size: str) -> Any:
    try:
        return typed_size(size)
    except ValueError as error:
        raise RequestError("image_size", f" {size!r:.60} {error}") from None


def _require_local(guide: object) -> None:
    """A page draws with what is on this machine: the name of a guide may come from somebody's picture."""
    name = str(guide.get("model") if isinstance(guide, Mapping) else guide)
    if name == NO_GUIDE or name.startswith("@") or Path(name).is_dir() or split_snapshot(name) is not None:
        return
    raise RequestError("guide", f" {name:.80}: there is no such folder on this machine; give a run or a snapshot")


def page_task(model: LatentFlow, task: str, fields: Mapping[str, Any], files: GivenFiles) -> PageTask:
    """What a job will draw; nothing is computed yet.

    Raises:
        ConfigError, DataError: a value is refused, or a file is missing or cannot be used.
    """
    request = checked_request(task, fields)
    for role in _ROLES.get(task, ()):
        if role not in files.paths:
            raise ConfigError(f"{task} needs {'an image' if role == 'image' else f'a {role}'}; give one first")
    inverting = Inverting(model, files.paths["image"], request) if isinstance(request, InvertRequest) else None
    prepared = inverting.prepared if inverting else _PREPARE[task](model, request, files)
    calls = network_calls(prepared.drawing, cost_of_guide(model, prepared.drawing)) * (2 if inverting else 1)
    if task == "inpaint":
        return PageTask(prepared, calls, None)
    height, width = prepared.drawing.image_size or model.config.image_size
    return PageTask(prepared, calls, (width, height), inverting)


def expected_calls(model: LatentFlow, task: str, fields: Mapping[str, Any]) -> float:
    """Network calls per picture of a task, before its files are there.

    Raises:
        ConfigError: a value is refused.
    """
    if task in _ROLES:
        request = checked_request(task, fields)
        preset = model.config.sampling.model_copy(update=request.preset())
        if isinstance(request, EditRequest) and request.classes is not None:
            model.config.conditioning.class_indices(request.classes)
        return network_calls(Drawing(seeds=[0], sampling=preset))
    return page_task(model, task, fields, GivenFiles()).calls


def _sample(model: LatentFlow, request: SampleRequest, files: GivenFiles) -> Prepared:
    drawing, noise = make_drawing(model, request), files.noise
    return Prepared(drawing) if noise is None else Prepared(naming_noise(drawing, noise), lambda: Given(noise=noise))


def _inpaint(model: LatentFlow, request: InpaintRequest, files: GivenFiles) -> Prepared:
    paths = files.paths
    return prepare_inpaint(model, paths["image"], paths["mask"], request, semantic_map=paths.get("map"))


_PREPARE: dict[str, Callable[[LatentFlow, Any, GivenFiles], Prepared]] = {
    "sample": _sample,
    "vary": lambda model, request, files: Prepared(variations(model, request)[1]),
    "interpolate": lambda model, request, files: Prepared(interpolation(model, request)),
    "inpaint": _inpaint,
    "mask-to-image": lambda model, request, files: prepare_mask_to_image(model, files.paths["map"], request),
    "translate": lambda model, request, files: prepare_translate(model, files.paths["image"], request),
    "image-to-image": lambda model, request, files: prepare_image_to_image(model, files.paths["image"], request),
}


class Inverting:
    """An inversion as the queue draws it: there while it computes what is given, and back as a drawing.

    Attributes:
        prepared: for the queue.
        found: the inversion, once it is there.
        numbers: what the round trip loses, by name.
    """

    def __init__(self, model: LatentFlow, image: Path, request: InvertRequest):
        asked = {name: getattr(request, name) for name in ("classes", "conditions")}
        sampling = preset_of_inversion(model, request)
        like = make_drawing(model, SampleRequest(num=1, **asked, **sampling), task="invert")
        self.prepared = Prepared(like, self._there, self._back)
        self.found: Inversion | None = None
        self.numbers: dict[str, float] = {}
        self._model, self._image, self._request = model, image, request
        self._lock = threading.Lock()

    def _there(self) -> Given:
        self.found = invert(self._model, self._image, self._request)
        return Given(noise=self.found.noise)

    def _back(self, samples: Samples) -> Samples:
        found = self.found
        samples = replace(samples, drawing=naming_noise(found.drawing, found.noise))
        with self._lock:
            if not self.numbers:
                trip = found.compared(self._model, samples)
                self.numbers = {
                    "evaluations there": found.evaluations,
                    "evaluations back": trip.evaluations,
                    "relative latent error": trip.latent_error,
                    "PSNR of the solver (dB)": trip.solver_psnr,
                    "PSNR of the autoencoder (dB)": trip.autoencoder_psnr,
                    "PSNR of both (dB)": trip.image_psnr,
                    "standard deviation of the noise": float(found.noise.std()),
                }
        return samples
