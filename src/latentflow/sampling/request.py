"""What is to be drawn: one record for every verb, checked before anything is computed, kept in every PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field

from latentflow.conditioning import CONDITION_NAMES, ConditionName
from latentflow.errors import ConfigError, nearest
from latentflow.flow.guidance import ConditionedVelocity
from latentflow.flow.solvers import is_adaptive
from latentflow.flow.times import sampling_times
from latentflow.latent_flow import LatentFlow
from latentflow.model_config import SamplingPreset
from latentflow.shapes import Condition


class Blend(BaseModel):
    """What a picture is mixed with: the noise of another seed, and the velocity of another class."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int
    weight: float = Field(ge=0, le=1, description="0: the picture's own seed and class; 1: the other ones.")
    label: int | None = Field(None, description="The other class; null: the picture's own.")


class SampleRequest(BaseModel):
    """What is to be drawn: one image per seed, each with its class.

    The same record is stored in every PNG, reduced to that image.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str = Field("sample", description="The verb that drew it.")
    seeds: list[int] = Field(description="One per image; equal seeds start from equal noise.")
    labels: list[int] = Field(default_factory=list, description="One class index per image; empty: no class is told.")
    blends: list[Blend] = Field(default_factory=list, description="One per image, or none.")
    told: list[ConditionName] = Field(default_factory=list, description="Conditions that are not null.")
    inputs: dict[str, str] = Field(
        default_factory=dict, description="Files it was drawn from, with their hashes, and how they were used."
    )
    start: float = Field(1.0, gt=0, le=1, description="Time at which drawing starts; 1: from noise alone.")
    image_size: tuple[int, int] | None = Field(None, description="Height and width drawn at; null: the model's.")
    sampling: SamplingPreset = SamplingPreset()

    def at(self, rows: slice) -> SampleRequest:
        """The request reduced to some images."""
        lists = {"seeds": self.seeds[rows], "labels": self.labels[rows], "blends": self.blends[rows]}
        return self.model_copy(update=lists)


def make_request(
    model: LatentFlow,
    *,
    num: int = 1,
    classes: Sequence[int | str] | None = None,
    seed: int = 0,
    task: str = "sample",
    told: Sequence[ConditionName] = (),
    inputs: Mapping[str, str] | None = None,
    start: float = 1.0,
    image_size: tuple[int, int] | None = None,
    **preset: object,
) -> SampleRequest:
    """One checked request; what is left out or None comes from the preset in the model folder.

    The preset's guidance is left out where nothing is told that it could strengthen; asked for, it is refused there.

    Args:
        num: number of images; image i has seed `seed + i`.
        classes: by index or name, dealt out in turn (image i gets class i mod their number); an empty list or
            "none": no class is told; None: all classes in turn where that is all the model is told, else no class.
        told: conditions besides the class that are given.
        preset: fields of `SamplingPreset`: solver, steps, guidance, guidance_interval, guided_by,
            guided_channels, shift, rtol, atol.

    Raises:
        ConfigError: a class, solver or value that does not exist or that the model was not trained for.
    """
    if num < 1:
        raise ConfigError(f"number of images {num}: at least 1 is needed")
    if seed < 0:
        raise ConfigError(f"seed {seed} is below zero; give 0 or more")
    conditioning = model.config.conditioning
    if classes is None:
        chosen = list(range(conditioning.num_classes)) if task == "sample" and not told else []
    elif list(classes) == ["none"] and "none" not in conditioning.class_names:
        chosen = []
    else:
        chosen = [conditioning.class_index(c) for c in classes]
    given = {key: value for key, value in preset.items() if value is not None}
    unknown = given.keys() - SamplingPreset.model_fields.keys()
    if unknown:
        raise TypeError(f"unknown argument {min(unknown)!r}; {nearest(min(unknown), SamplingPreset.model_fields)}")
    told = [*(["label"] if chosen else []), *told]
    strengthened = set(told).intersection(conditioning.can_guide, model.config.sampling.guided_by or CONDITION_NAMES)
    if not strengthened and not given.keys() & {"guidance", "guided_by"}:
        given["guidance"] = 1.0
    if model.config.sampling.guided_by:  # a preset's wish holds as far as it can
        given.setdefault("guided_by", [name for name in told if name in strengthened] or None)
    request = SampleRequest(
        task=task,
        seeds=list(range(seed, seed + num)),
        labels=[chosen[i % len(chosen)] for i in range(num)] if chosen else [],
        told=told,
        inputs=dict(inputs or {}),
        start=start,
        image_size=image_size,
        sampling=model.config.sampling.model_copy(update=given),
    )
    check_request(model, request)
    return request


def check_request(model: LatentFlow, request: SampleRequest) -> None:
    """Refuse what cannot be drawn, before anything is computed.

    Raises:
        ConfigError: with the value and the remedy.
    """
    sampling, conditioning = request.sampling, model.config.conditioning
    if len(request.labels) != (len(request.seeds) if "label" in request.told else 0):
        raise ConfigError(f"{len(request.labels)} labels for {len(request.seeds)} seeds; give one per image, or none")
    if request.blends and len(request.blends) != len(request.seeds):
        raise ConfigError(f"{len(request.blends)} blends for {len(request.seeds)} seeds; give one per image, or none")
    others = [blend.label for blend in request.blends if blend.label is not None]
    if others and not request.labels:
        raise ConfigError(f"a blend towards class {others[0]} needs a class to begin with; give both")
    for label in [*request.labels, *others]:
        conditioning.class_index(label)
    for name in request.told:
        conditioning.require(name)
    for name, share in conditioning.dropout.items():
        if share == 0 and name not in request.told:
            remedy = {
                "label": "give --classes",
                "inpainting": "it can only fill holes: `latentflow inpaint` with the method 'condition'",
                "semantic_map": "give a map: `latentflow inpaint --map`"
                if "inpainting" in request.told
                else "it can only paint maps: `latentflow mask-to-image`",
            }
            if name == "inpainting" and "semantic_map" in request.told:
                remedy[name] += " and --map"
            raise ConfigError(f"the model never learned to do without the condition {name}; {remedy[name]}")
    if sampling.guidance < 0:
        raise ConfigError(f"guidance {sampling.guidance} is below zero; 1 switches it off, 1.5 to 4 are usual")
    if sampling.guidance != 1:
        guided_by(model, request)
    if is_adaptive(sampling.solver) and not (sampling.rtol > 0 and sampling.atol > 0):
        raise ConfigError(f"rtol {sampling.rtol} and atol {sampling.atol} must both be above 0; 1e-5 is usual")
    if not 0 < request.start <= 1:
        raise ConfigError(f"start {request.start}: drawing starts at a time above 0 (the image) and at most 1 (noise)")
    sampling_times(sampling.steps, sampling.shift, start=request.start)
    ConditionedVelocity(
        model.velocity,
        Condition(),
        Condition(),
        sampling.guidance,
        sampling.guidance_interval,
        sampling.guided_channels,
    )


def guided_by(model: LatentFlow, request: SampleRequest) -> list[ConditionName]:
    """The conditions that guidance strengthens: those that its null twin is not told.

    Raises:
        ConfigError: there are none, or one is not given or has an untrained null.
    """
    conditioning, scale = model.config.conditioning, request.sampling.guidance
    if not request.sampling.guided_by:
        names = [name for name in request.told if name in conditioning.can_guide]
        if not names:
            if not conditioning.dropout:
                why = "the model is unconditional"
            elif not request.told:
                why = "the images are told nothing that it could strengthen"
            else:
                keys = {"label": "label_dropout", "inpainting": "inpainting_dropout", "semantic_map": "map_dropout"}
                why = f"the model was trained with conditioning.{keys[request.told[0]]} = 0"
            raise ConfigError(f"guidance {scale}: {why}, so its null condition means nothing; use guidance 1")
        return names
    for name in request.sampling.guided_by:
        if name not in CONDITION_NAMES:
            raise ConfigError(f"guided by {name!r}: no such condition; {nearest(name, CONDITION_NAMES)}")
        if name not in conditioning.can_guide:
            able = ", ".join(conditioning.can_guide) or "nothing"
            raise ConfigError(f"guided by {name}: its null was never trained in this model, which can guide by {able}")
        if name not in request.told:
            told = ", ".join(request.told) or "nothing"
            raise ConfigError(f"guided by {name}, which the images are not told (they are told {told}); give it, too")
    return list(request.sampling.guided_by)
