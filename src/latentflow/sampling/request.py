"""Requests of the verbs that draw: what a user asks for, whatever the model.

They import no torch, since they are the options of the command line. `latentflow.sampling.drawing` resolves them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from latentflow.model.guide_reference import GuideReference
from latentflow.model.student_record import MOST_JUMPS
from latentflow.requests import (
    Classes,
    Conditions,
    FromText,
    Names,
    Number,
    Option,
    PathText,
    Request,
    RequestError,
    Times,
    Whole,
    numbers_like,
    pair_like,
    two_of,
)
from latentflow.sizes import ImageSize, typed_size

JUMPS = "jumps"
"""The solver of students. `latentflow.flow.solvers` has the same name; nothing here may import torch."""
MOST_IMAGES, MOST_FRAMES, MOST_SEED, MOST_STEPS = 1_000_000, 10_000, 2**63 - 1, 10_000

Fit = Literal["window", "whole", "native"]
"""What the model sees of an image with a hole; see `InpaintRequest`."""
Method = Literal["condition", "replacement"]
"""How the known part of an image guides what fills its hole; see `InpaintRequest`."""


def _seed(value: int) -> int:
    if not 0 <= value <= MOST_SEED:
        raise ValueError(f"give whole numbers from 0 to {MOST_SEED:,}")
    return value


_Seed = Annotated[Whole, AfterValidator(_seed)]

_CLASSES = (
    "Names, cycled over the images: cat,dog or 'cat,\"Doe, Jane\"' where a name has a comma; or indices, '#3,#7' in "
    "quotes; 'none' ('#none' where a class is called none): unconditional."
)


_CONDITIONS = (
    "A named condition of the model: age=63, view=lateral, findings=edema,nodule; repeatable. Several are cycled over "
    "the images: age=20,40,60, of sets with ';'. 'none': not given, as is the default."
)
_ONE_CONDITION = "A named condition of the model, like age=63 or view=lateral; repeatable. Default: not given."


def require_interval(times: tuple[float, float]) -> tuple[float, float]:
    """Two times, the earlier one first.

    Raises:
        ValueError: they are not.
    """
    if not 0 <= times[0] <= times[1] <= 1:
        raise ValueError("give two times from 0 to 1, the smaller one first, like 0.1,0.8")
    return times


def _strength(value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError("give a number above 0 (the image itself) and at most 1 (nothing is left of it); 0.6 is usual")
    return value


GuideName = Annotated[GuideReference, FromText(str), Option(metavar="MODEL")]
GUIDE_DESCRIPTION = (
    "Guide away from this model, not from the null condition: an earlier snapshot (RUN@1/8, RUN@1000, or @1/8 of "
    "MODEL's own run), or the model before fine-tuning; 'none': the null condition."
)


class SamplingRequest(Request):
    """How to draw. What is None comes from the preset in the model folder."""

    guidance: Annotated[Number, Option(remedy="1 switches it off, 1.5 to 4 are usual")] | None = Field(
        default=None, ge=0, le=1000, description="Guidance scale; 1: off."
    )
    guidance_interval: Annotated[Times, AfterValidator(require_interval)] | None = Field(
        default=None, description="Times between which guidance acts, for example 0.1,0.8."
    )
    guided_by: Names | None = Field(
        default=None,
        description="Conditions to guide on: label, inpainting, semantic_map, input or named columns. Default: all "
        "that are given.",
    )
    guided_channels: Whole | None = Field(
        default=None, ge=1, le=65_536, description="Number of leading latent channels to guide."
    )
    guide: GuideName | None = Field(default=None, description=GUIDE_DESCRIPTION)
    solver: str | None = Field(
        default=None,
        description="euler, midpoint, heun, rk4, ab2, ab3, ab4, dpmpp2m, dpmpp3m, unipc2, unipc3, bosh3 or dopri5; "
        "fitted-N after `latentflow fit-solver`; jumps of a student.",
    )
    evaluations: Annotated[Whole, Option(remedy="2 to 4 are usual")] | None = Field(
        default=None,
        ge=1,
        le=MOST_JUMPS,
        description="Of a student, by `latentflow distill`: network calls per image, 1, 2, 4 or 8; with any guidance.",
    )
    steps: Annotated[Whole, Option(remedy="25 are usual")] | None = Field(
        default=None, ge=1, le=MOST_STEPS, description="Intervals of a fixed-step solver."
    )
    shift: Annotated[Number, Option(remedy="1 is an even grid")] | None = Field(
        default=None,
        ge=1e-4,
        le=1e4,
        description="Time shift of the grid; 1: even, above 1: more steps near the noise.",
    )
    rtol: Annotated[Number, Option(remedy="1e-5 is usual")] | None = Field(
        default=None, ge=1e-9, le=1, description="Relative tolerance of bosh3 and dopri5."
    )
    atol: Annotated[Number, Option(remedy="1e-5 is usual")] | None = Field(
        default=None, ge=1e-9, le=100, description="Absolute tolerance of bosh3 and dopri5."
    )

    def preset(self) -> dict[str, Any]:
        """The fields of a sampling preset that are given."""
        own = {name: getattr(self, name) for name in SamplingRequest.model_fields if name != "evaluations"}
        given = {name: value for name, value in own.items() if value is not None}
        return given if self.evaluations is None else {**given, "solver": JUMPS, "steps": self.evaluations}

    @model_validator(mode="after")
    def _evaluations_are_jumps(self) -> SamplingRequest:
        for name, other in (("steps", self.steps), ("solver", None if self.solver == JUMPS else self.solver)):
            if self.evaluations is not None and other is not None:
                raise RequestError(
                    "evaluations", f" {self.evaluations}: the jumps of a student, which take no {name}; leave one out"
                )
        return self


class DrawRequest(SamplingRequest):
    """Images from seeds and classes, of the size that the task has."""

    num: Annotated[Whole, Option(called="number of images", remedy="draw more with another seed")] = Field(
        default=16, ge=1, le=MOST_IMAGES, description="Number of images."
    )
    classes: Classes | None = Field(
        default=None,
        description=f"{_CLASSES} Default: image i has the class of its seed, all classes in turn.",
    )
    conditions: Conditions | None = Field(default=None, description=_CONDITIONS)
    seed: Whole = Field(
        default=0, ge=0, le=MOST_SEED, description="Seed of the first image; image i has seed SEED + i."
    )


class SampleRequest(DrawRequest):
    """Images from seeds and classes."""

    image_size: Annotated[ImageSize, FromText(typed_size)] | None = Field(
        default=None,
        description="Size in pixels, 256 or WIDTHxHEIGHT: one that the model was trained on. Default: that of most of "
        "its training images.",
    )


class EditRequest(DrawRequest):
    """Variants of one image, one per seed."""

    num: Annotated[Whole, Option(called="number of images", remedy="draw more with another seed")] = Field(
        default=1, ge=1, le=MOST_IMAGES, description="Number of images, each from its own seed."
    )
    classes: Classes | None = Field(default=None, description=f"{_CLASSES} Default: unconditional.")


class InpaintRequest(EditRequest):
    """An image with its hole filled."""

    fit: Fit | None = Field(
        default=None,
        description="What the model sees. window: a part around the hole, of the shape of the training images, scaled "
        "to their size; whole: the image, scaled until it covers that size; native: the image at its own size. "
        "Default: window if the hole leaves room for one, else whole.",
    )
    feather: Annotated[Whole, Option(remedy="0 switches it off, 8 pixels are usual")] = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="Pixels inside the hole over which colours blend into the surroundings.",
    )
    method: Method | None = Field(
        default=None,
        description="condition: the model is conditioned on the known part, which takes a model trained for it; "
        "replacement: the known part replaces the state at every step, with any model. Default: condition if possible.",
    )


class MaskToImageRequest(EditRequest):
    """Images of a semantic map."""

    native: bool = Field(
        default=False,
        description="Draw at the map's own size. Default: the middle of the map, of the shape of the training images, "
        "scaled to their size.",
    )


class TranslateRequest(EditRequest):
    """Images of a paired image: its high resolution, its colours, whatever the model has learned."""

    native: bool = Field(
        default=False,
        description="Draw at the size that belongs to the image's own. Default: the square middle of the image, at the "
        "size of the training images.",
    )


class ImageToImageRequest(EditRequest):
    """An image drawn again from a noisy version of itself."""

    strength: Annotated[Number, AfterValidator(_strength)] = Field(
        default=0.6,
        description="Time to start from, in (0, 1]: near 0 little changes; 1: nothing is left of the image.",
    )


class InterpolateRequest(SamplingRequest):
    """Frames between two seeds, and between two classes."""

    seeds: Annotated[
        tuple[_Seed, _Seed], BeforeValidator(two_of("seeds, from and to")), FromText(pair_like("3,8", int))
    ] = Field(default=(0, 1), description="From, to; the same seed twice to change only the class.")
    num: Annotated[Whole, Option(called="number of frames", remedy="the two ends are two of them")] = Field(
        default=9, ge=2, le=MOST_FRAMES, description="Number of frames, including both ends."
    )
    classes: Classes | None = Field(
        default=None,
        description="One class for all frames, or two: from, to; by name or by index like '#3'; 'none': unconditional. "
        "Default: those of the seeds, as in `sample`.",
    )
    conditions: Conditions | None = Field(
        default=None,
        description="A named condition for all frames, or from and to: age=20,60. Numbers change from frame to frame, "
        "of labels the velocities are blended. Repeatable.",
    )


class VaryRequest(SamplingRequest):
    """Variations of the picture of one seed."""

    seed: Whole = Field(default=0, ge=0, le=MOST_SEED, description="Seed of the original picture.")
    amount: Annotated[Number, Option(remedy="0 is the picture itself, 1 gives unrelated pictures")] = Field(
        default=0.3, ge=0, le=1, description="How far to go: 0: the original picture; 1: unrelated pictures."
    )
    num: Annotated[Whole, Option(called="number of variations")] = Field(
        default=8, ge=1, le=MOST_FRAMES, description="Number of variations."
    )
    classes: Classes | None = Field(
        default=None,
        description="At most one, by name or by index like '#3'; 'none': unconditional. Default: that of the seed, as "
        "in `sample`.",
    )
    conditions: Conditions | None = Field(default=None, description=_ONE_CONDITION)


def _distinct(numbers: list[int]) -> list[int]:
    if not numbers:
        raise ValueError("give at least one number, like 6,8,10")
    return sorted(set(numbers))


class FitSolverRequest(Request):
    """Solvers to be fitted to a model, and on what."""

    model: Annotated[PathText, Option(argument=True)] = Field(description="A model folder or a run folder.")
    evaluations: Annotated[
        list[Annotated[Whole, Field(ge=2, le=100)]],
        FromText(numbers_like("6,8,10", int)),
        AfterValidator(_distinct),
    ] = Field(default=[6, 8, 10], description="Network calls of each solver, without guidance; one solver for each.")
    num: Annotated[Whole, Option(called="number of images")] = Field(
        default=128, ge=8, le=100_000, description="Images that the solvers are fitted to."
    )
    held_out: Annotated[Whole, Option(called="number of held-out images")] = Field(
        default=128, ge=8, le=100_000, description="Other images, on which they are checked."
    )
    data: PathText | None = Field(
        default=None,
        description="Images whose conditions are drawn: their classes and, of a model that knows any, named columns. "
        "Needed if the model requires a named column; otherwise classes alone are given.",
    )
    seed: Whole = Field(
        default=1_000_000_000, ge=0, le=MOST_SEED, description="Seed of the first image; far from those of `sample`."
    )
    guidance: Annotated[Number, Option(remedy="1 switches it off, 1.5 to 4 are usual")] | None = Field(
        default=None, ge=0, le=1000, description="Guidance scale; default: that of the preset in the model folder."
    )
    guide: GuideName | None = Field(default=None, description=GUIDE_DESCRIPTION)
    reference_steps: Whole = Field(
        default=100, ge=4, le=MOST_STEPS, description="Steps of the solution to compare with, by ab4."
    )

    @model_validator(mode="after")
    def _fewer_than_the_reference(self) -> FitSolverRequest:
        if (most := self.evaluations[-1]) > self.reference_steps:
            raise ValueError(
                f"{most} evaluations are more than the {self.reference_steps} steps of the reference: give fewer, or "
                "more reference steps"
            )
        return self


class InvertRequest(SamplingRequest):
    """The noise of an image. Guidance is 1 unless it is given."""

    classes: Classes | None = Field(
        default=None, description="At most one, by name or by index like '#3'. Default: unconditional."
    )
    conditions: Conditions | None = Field(default=None, description=_ONE_CONDITION)
