"""What the server draws: for each task, the product's own request, and the images that belong to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentflow.errors import nearest
from latentflow.model.flow_model import FlowModel
from latentflow.requests import RequestError
from latentflow.sampling.drawing import make_drawing
from latentflow.sampling.inpaint import prepare_inpaint
from latentflow.sampling.mask_to_image import prepare_mask_to_image
from latentflow.sampling.pipeline import Prepared
from latentflow.sampling.request import (
    DrawRequest,
    InpaintRequest,
    MaskToImageRequest,
    SampleRequest,
    TranslateRequest,
)
from latentflow.sampling.translate import prepare_translate
from latentflow.studio.bodies import Asked
from latentflow.studio.refusals import Refused
from latentflow.studio.uploads import as_files

_NOT_SERVED = ("guide",)
"""Fields of requests that name files of this machine. The guide of the model's preset is used all the same."""
FORMATS = ("png", "json")


@dataclass(frozen=True)
class Task:
    """A kind of request.

    Attributes:
        name: as in the path.
        request: the record that it is checked by.
        title: what it does.
        images: the images that it needs.
        optional: those that it may have besides.
        prepare: called with model, request and the images as files.
    """

    name: str
    request: type[DrawRequest]
    title: str
    prepare: Callable[[FlowModel, Any, Mapping[str, Path]], Prepared]
    images: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    @property
    def fields(self) -> list[str]:
        """What a request may hold besides images."""
        return [*(name for name in self.request.model_fields if name not in _NOT_SERVED), "format"]


def _sample(model: FlowModel, request: SampleRequest, images: Mapping[str, Path]) -> Prepared:
    return Prepared(make_drawing(model, request))


def _inpaint(model: FlowModel, request: InpaintRequest, images: Mapping[str, Path]) -> Prepared:
    return prepare_inpaint(model, images["image"], images["mask"], request, semantic_map=images.get("map"))


def _mask_to_image(model: FlowModel, request: MaskToImageRequest, images: Mapping[str, Path]) -> Prepared:
    return prepare_mask_to_image(model, images["map"], request)


def _translate(model: FlowModel, request: TranslateRequest, images: Mapping[str, Path]) -> Prepared:
    return prepare_translate(model, images["image"], request)


TASKS = (
    Task("sample", SampleRequest, "Draw images from seeds and classes", _sample),
    Task("inpaint", InpaintRequest, "Fill the white part of a mask", _inpaint, ("image", "mask"), ("map",)),
    Task("mask-to-image", MaskToImageRequest, "Draw images of a semantic map", _mask_to_image, ("map",)),
    Task("translate", TranslateRequest, "Draw images from a paired image", _translate, ("image",)),
)


@dataclass(frozen=True)
class Checked:
    """A request that may be drawn.

    Attributes:
        prepared: for the queue.
        format: "png" or "json".
    """

    prepared: Prepared
    format: str


def check(model: FlowModel, task: Task, asked: Asked, *, most_images: int, most_pixels: int) -> Checked:
    """Check what was sent.

    Raises:
        LatentFlowError: in one line; Refused where it has a status of its own.
    """
    fields = dict(asked.fields)
    for name in fields:
        if name not in task.fields:
            known = [*task.images, *task.optional, *task.fields]
            raise RequestError("", f"unknown field {name!r:.60}; {nearest(name[:60], known)}")
    if isinstance(fields.get("classes"), dict):
        raise RequestError("classes", f" {fields['classes']!r:.60}: give a name, an index or a list of them")
    format_asked = fields.pop("format", None)
    request = task.request(**{"num": 1, **fields})
    if request.num > most_images:
        raise RequestError("num", f" {request.num}: this server draws at most {most_images} images for one request")
    format_asked = format_asked or ("png" if request.num == 1 else "json")
    if format_asked not in FORMATS:
        raise RequestError("format", f" {format_asked!r:.60}: give png or json")
    if format_asked == "png" and request.num > 1:
        raise RequestError("format", f" png: it holds one image, and {request.num} are asked for; give json")
    _check_images(task, asked.images)
    if not asked.images:
        return Checked(task.prepare(model, request, {}), format_asked)
    with as_files(asked.images, most_pixels, model.config.pixel_format) as files:
        return Checked(task.prepare(model, request, files), format_asked)


def _check_images(task: Task, images: Mapping[str, bytes]) -> None:
    for name in task.images:
        if name not in images:
            raise Refused(422, f"{task.name} needs the image {name!r}; send it as a file or in base64")
    for name in images:
        if name not in (*task.images, *task.optional):
            raise Refused(422, f"{task.name} takes no image {name!r}; leave it out")
