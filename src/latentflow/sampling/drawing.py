"""The drawing: what a model is to draw, resolved and checked before anything is computed; stored in every PNG.

request (what a user asks for)  +  model (its preset and conditions)  ->  drawing
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from latentflow.console import notice
from latentflow.errors import ConfigError, nearest
from latentflow.flow.guidance import check_guidance
from latentflow.flow.solvers import JUMPS, fitted_evaluations, is_adaptive
from latentflow.model.conditioning import CONDITION_NAMES, Conditioning, ConditionName
from latentflow.model.config import SamplingPreset
from latentflow.model.flow_model import FlowModel
from latentflow.model.guide_reference import NO_GUIDE
from latentflow.records import Record
from latentflow.requests import RequestError
from latentflow.runtime import Precision, Runtime
from latentflow.sampling.guides import OpenedGuide, check_guide, open_guide
from latentflow.sampling.named_conditions import NamedValue, resolve_conditions
from latentflow.sampling.request import MOST_SEED, DrawRequest, SampleRequest
from latentflow.sampling.student import check_student, require_few
from latentflow.sizes import Size

SEED_TASKS = ("sample", "interpolate", "vary")
"""Tasks that draw from seeds only. In these, a seed without a given class has one of its own, the same in all tasks."""

_WHOLE_PRESET = {name for name, field in SamplingPreset.model_fields.items() if field.default is not None}


Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]


class _Conditioned(Record):
    """A record with `conditions`, which JSON leaves out where there are none, as earlier versions wrote it."""

    @model_serializer(mode="wrap")
    def _write(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written = write(self)
        return {name: value for name, value in written.items() if name != "conditions" or value}


class Blend(_Conditioned):
    """What a picture is mixed with: the noise of another seed, and the velocity of another class."""

    seed: Seed
    weight: float = Field(ge=0, le=1, description="0: the picture's own seed and class; 1: the other ones.")
    label: int | None = Field(default=None, description="The other class; null: the picture's own.")
    conditions: dict[str, NamedValue] = Field(
        default_factory=dict, description="The other values of named conditions; the picture's own where there is none."
    )


class Drawing(_Conditioned):
    """What a model is to draw: one image per seed.

    The same record, reduced to one image, is stored in the metadata of its PNG.
    """

    task: str = Field(default="sample", description="The verb that drew it.")
    seeds: list[Seed] = Field(description="One per image; equal seeds start from equal noise.")
    labels: list[int] = Field(default_factory=list, description="One class index per image, or none.")
    conditions: dict[str, list[NamedValue]] = Field(
        default_factory=dict, description="The value of each named condition that is given, one per image."
    )
    blends: list[Blend] = Field(default_factory=list, description="One per image, or none.")
    told: list[ConditionName] = Field(default_factory=list, description="The conditions that are given.")
    inputs: dict[str, str] = Field(
        default_factory=dict, description="Files it was drawn from, with their hashes, and how they were used."
    )
    start: float = Field(default=1.0, gt=0, le=1, description="Time to start from; 1: noise.")
    image_size: Size | None = Field(default=None, description="Height and width in pixels; null: the model's.")
    sampling: SamplingPreset = SamplingPreset()
    precision: Precision = Field(default="fp32", description="What the network computes in.")

    @model_validator(mode="after")
    def _check(self) -> Drawing:
        if self.labels and "label" not in self.told:
            raise ValueError(f"{len(self.labels)} labels, but the label is not among the conditions that are given")
        for name, wanted in (("labels", "label" in self.told), ("blends", bool(self.blends))):
            number = len(getattr(self, name))
            if wanted and number != len(self.seeds):
                raise ValueError(f"{number} {name} for {len(self.seeds)} seeds; give one per image, or none")
        for name, values in self.conditions.items():
            if len(values) != len(self.seeds) or name not in self.told:
                raise ValueError(f"{len(values)} values of {name} for {len(self.seeds)} seeds; give one per image")
        towards = [blend.label for blend in self.blends if blend.label is not None]
        if towards and not self.labels:
            raise ValueError(f"a blend towards class {towards[0]} needs a class to begin with; give both")
        return self

    def at(self, rows: slice | list[int]) -> Drawing:
        """The drawing reduced to some of its images."""

        def some(every: list[Any]) -> list[Any]:
            return every[rows] if isinstance(rows, slice) else [every[row] for row in rows if every]

        lists: dict[str, list[Any]] = {"seeds": self.seeds, "labels": self.labels, "blends": self.blends}
        chosen: dict[str, Any] = {name: some(every) for name, every in lists.items()}
        conditions = {name: some(every) for name, every in self.conditions.items()}
        return self.model_copy(update={**chosen, "conditions": conditions})


def blended_towards(drawing: Drawing) -> tuple[list[int], dict[str, list[NamedValue]]]:
    """Labels and named conditions of the other side of a drawing's blends, one per image."""
    pairs = zip(drawing.labels, drawing.blends, strict=True) if drawing.labels else ()
    labels = [own if blend.label is None else blend.label for own, blend in pairs]
    conditions = {
        name: [blend.conditions.get(name, own) for own, blend in zip(values, drawing.blends, strict=True)]
        for name, values in drawing.conditions.items()
    }
    return labels, conditions


def make_drawing(
    model: FlowModel,
    request: DrawRequest,
    *,
    task: str = "sample",
    conditions: Sequence[ConditionName] = (),
    inputs: Mapping[str, str] | None = None,
    start: float = 1.0,
    image_size: Size | None = None,
) -> Drawing:
    """Resolve a request for a model: what the request leaves out comes from the preset in the model folder.

    The preset's guidance is switched off if no given condition supports it and it has no guide; requested guidance is
    then refused. A value that has no effect is refused as well, unless a whole preset is given, as in the metadata of a
    PNG.

    Args:
        request: image i has seed `seed + i` and class i mod the number of classes. Without classes, an image has the
            class of its seed, seed mod the number of classes with training images, in the tasks that draw from seeds
            only (`SEED_TASKS`), and no label in the others.
        conditions: those that are given, besides the label.
        image_size: None: that of the request, or else the model's.

    Raises:
        ConfigError: a class, size, solver or value that does not exist, or that the model was not trained for.
    """
    last = MOST_SEED + 1 - request.num
    if request.seed > last:
        reason = f" {request.seed}: give a whole number from 0 to {last:,} for {request.num:,} images"
        raise RequestError("seed", reason)
    seeds = range(request.seed, request.seed + request.num)
    labels = _labels(model, request, seeds, task in SEED_TASKS and not conditions)
    named = resolve_conditions(model.config.conditioning, request.conditions, request.num)
    given: list[ConditionName] = [*(("label",) if labels else ()), *conditions, *named]
    asked = request.preset()
    require_few(model.config, request.evaluations, task)
    if isinstance(request, SampleRequest) and request.image_size is not None:
        size = trained_size(model, request.image_size)
        image_size = None if size == model.config.image_size else size
    drawing = Drawing(
        task=task,
        seeds=list(seeds),
        labels=labels,
        conditions=named,
        told=given,
        inputs=dict(inputs or {}),
        start=start,
        image_size=image_size,
        sampling=_resolve_preset(model, asked, given),
        precision=precision_for(model.runtime, str(asked.get("solver", model.config.sampling.solver))),
    )
    check_drawing(model, drawing)
    if not asked.keys() >= _WHOLE_PRESET:
        _require_effect(asked, drawing.sampling)
        _require_learned(model, asked, given)
    _notice_what_is_kept(asked, model.config.sampling, drawing.sampling)
    _notice_coarse_errors(drawing)
    return drawing


def trained_size(model: FlowModel, size: Size) -> Size:
    """A size, which the model must have been trained on.

    Raises:
        RequestError: it was not; the sizes are named, nearest first.
    """
    sizes = model.config.sizes
    if size not in sizes:
        nearest = sorted(sizes, key=lambda one: abs(one.height - size.height) + abs(one.width - size.width))
        known = ", ".join(map(str, nearest))
        raise RequestError("image_size", f" {size}: the model was not trained on it; give one of its sizes: {known}")
    return size


def _labels(model: FlowModel, request: DrawRequest, seeds: Sequence[int], by_seed: bool) -> list[int]:
    """The label of each image; empty: no label."""
    if request.classes is not None:
        chosen = model.config.conditioning.class_indices(request.classes)
        return [chosen[place % len(chosen)] for place in range(len(seeds))] if chosen else []
    seen = model.config.seen_classes
    return [seen[seed % len(seen)] for seed in seeds] if by_seed and seen else []


def _resolve_preset(model: FlowModel, asked: Mapping[str, Any], conditions: Sequence[ConditionName]) -> SamplingPreset:
    """The model's preset, changed by what is asked for; a whole preset leaves out what is null in it."""
    preset = SamplingPreset() if asked.keys() >= _WHOLE_PRESET else model.config.sampling
    changed = dict(asked)
    guide = asked.get("guide", preset.guide)
    guide = None if guide is None or guide.model == NO_GUIDE else guide
    preset = preset.guided_from(guide)
    able = conditions if guide is not None else model.config.conditioning.can_guide  # a guide needs no null of ours
    supported = [name for name in conditions if name in able and name in (preset.guided_by or able)]
    if preset.solver == JUMPS and asked.get("solver", JUMPS) != JUMPS:  # whose steps are far larger
        changed.setdefault("steps", SamplingPreset().steps)
    if not supported and guide is None and not asked.keys() & {"guidance", "guided_by"}:
        changed["guidance"] = 1.0
    if preset.guided_by:  # of the preset's conditions, those that are given
        changed.setdefault("guided_by", supported or None)
    if guide is not None and changed.get("guidance", preset.guidance) != 1:
        guide = open_guide(model, guide).reference
    else:
        guide = None
    resolved = preset.model_copy(update={**changed, "guide": guide})
    if fitted_evaluations(resolved.solver) is None:
        return resolved
    name, method = model.fitted_solver(resolved.solver)
    return resolved.model_copy(update={"solver": name, "steps": len(method.weights), "shift": 1.0})


def precision_for(runtime: Runtime, solver: str) -> Precision:
    """The precision of the network: as asked for; by default, fp32 for solvers that estimate their error."""
    if not runtime.precision_is_explicit and is_adaptive(solver):
        return "fp32"
    return runtime.precision


def require_count(what: str, value: int, low: int, high: int, remedy: str = "") -> None:
    """Refuse anything but a whole number from `low` to `high`.

    Raises:
        ConfigError: naming the range.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= value <= high:
        large = isinstance(value, Integral) and abs(value) >= 10**40
        shown = "of more than 40 digits" if large else value
        raise ConfigError(f"{what} {shown}: give a whole number from {low} to {high:,}" + (remedy and f"; {remedy}"))


def _require_learned(model: FlowModel, asked: Mapping[str, Any], conditions: Sequence[ConditionName]) -> None:
    """Refuse guidance of a student by other conditions, times or channels than those that it has learned.

    Raises:
        RequestError: naming the field.
    """
    if model.config.student is None:
        return
    names = ("guidance_interval", "guided_by", "guided_channels")
    own = _resolve_preset(model, {name: value for name, value in asked.items() if name not in names}, conditions)
    for name in names:
        if name in asked and asked[name] != getattr(own, name):
            value = asked[name] if isinstance(asked[name], int) else ",".join(map(str, asked[name]))
            raise RequestError(name, f" {value}: a student is guided as its teacher was when it learned; leave it out")


def _require_effect(asked: Mapping[str, Any], sampling: SamplingPreset) -> None:
    """Refuse a value that has no effect; a value that switches something off is always accepted."""
    if fitted_evaluations(sampling.solver) is not None:
        for name, none in (("steps", sampling.steps), ("shift", 1), ("rtol", None), ("atol", None)):
            if asked.get(name, none) != none:
                reason = f" {asked[name]} has no effect with {sampling.solver}: its times are fitted; leave it out"
                raise RequestError(name, reason)
        return
    adaptive = is_adaptive(sampling.solver)
    whose = "" if "solver" in asked else ", the solver of the model's preset"
    for name in ("steps", "shift") if adaptive else ("rtol", "atol"):
        if name in asked and (name, asked[name]) != ("shift", 1):
            raise RequestError(
                name,
                f" {asked[name]} has no effect with {sampling.solver}{whose}: "
                + (
                    "it chooses its own steps by rtol and atol; leave it out, or use a fixed-step solver such as heun"
                    if adaptive
                    else "it takes a fixed number of steps; leave it out, or choose dopri5 or bosh3"
                ),
            )
    if sampling.guidance == 1:
        off = {"guidance_interval": (0.0, 1.0)}
        if (guide := asked.get("guide")) is not None and guide.model != NO_GUIDE:
            reason = f" {guide.model} has no effect: guidance is 1, which is off; give guidance above 1, such as 1.5"
            raise RequestError("guide", reason)
        for name in ("guidance_interval", "guided_by", "guided_channels"):
            if name in asked and (name not in off or tuple(asked[name]) != off[name]):
                value = asked[name] if isinstance(asked[name], int | str) else ",".join(map(str, asked[name]))
                reason = f" {value} has no effect: guidance is 1, which is off; leave it out, or give guidance above 1"
                raise RequestError(name, reason)


def _notice_what_is_kept(asked: Mapping[str, Any], preset: SamplingPreset, sampling: SamplingPreset) -> None:
    """Announce which values another solver keeps from the model's preset, which were chosen for its own solver."""
    is_fitted = fitted_evaluations(sampling.solver) is not None
    if is_fitted or is_adaptive(sampling.solver) == is_adaptive(preset.solver):
        return
    kept = [name for name in _pace(sampling.solver) if name not in asked]
    if kept:
        values = " and ".join(f"{name} {getattr(sampling, name):g}" for name in kept)
        notice(f"{sampling.solver} takes {values} from the model's preset, which draws with {preset.solver}")


def _notice_coarse_errors(drawing: Drawing) -> None:
    """Announce that the velocity of an adaptive solver is rounded more coarsely than the solver's tolerance."""
    sampling = drawing.sampling
    if is_adaptive(sampling.solver) and drawing.precision != "fp32":
        notice(
            f"{sampling.solver} has the tolerance {sampling.rtol:g}, and {drawing.precision} rounds more coarsely: "
            "it takes more steps, which may differ in another batch; use --precision fp32 or auto, or a fixed-step "
            "solver such as heun"
        )


def _pace(solver: str) -> tuple[str, ...]:
    return ("rtol", "atol") if is_adaptive(solver) else ("steps",)


def check_drawing(model: FlowModel, drawing: Drawing) -> None:
    """Refuse what this model cannot draw, before anything is computed.

    Raises:
        ConfigError: with the value and the remedy.
    """
    sampling, conditioning = drawing.sampling, model.config.conditioning
    seen = set(model.config.seen_classes)
    for label in dict.fromkeys([*drawing.labels, *(b.label for b in drawing.blends if b.label is not None)]):
        if conditioning.class_index(label) not in seen:
            raise ConfigError(
                f"no training image was of the class {conditioning.class_names[label]!r}; the model was trained on "
                f"{len(seen)} of its {conditioning.num_classes} classes"
            )
    for name in drawing.told:
        conditioning.require(name)
    conditioning.require_all(drawing.told)
    for name in set(conditioning.required) & drawing.conditions.keys():
        if None in drawing.conditions[name]:
            conditioning.require_all([one for one in drawing.told if one != name])
    _check_solver(model, drawing)
    check_student(model.config, drawing)
    check_guidance(sampling.guidance, sampling.guidance_interval, sampling.guided_channels)
    if sampling.guided_channels is not None:
        asked, channels = sampling.guided_channels, model.config.autoencoder.num_channels
        if asked > channels:
            reason = f" {asked}: give a whole number from 1 to {channels}; the latents have {channels} channels"
            raise RequestError("guided_channels", reason)
    if sampling.guidance != 1 and (guide := guide_of(model, drawing)) is None:
        guided_by(model, drawing)
    elif sampling.guidance != 1:
        named = _known_conditions(sampling.guided_by or [], conditioning, drawing)
        check_guide(model, guide, drawing.told, named, drawing.image_size)


def guide_of(model: FlowModel, drawing: Drawing) -> OpenedGuide | None:
    """The guide of a drawing; None: guidance, if any, is by the null condition.

    Raises:
        ConfigError, ArtifactError: see `open_guide`.
    """
    sampling = drawing.sampling
    return None if sampling.guide is None or sampling.guidance == 1 else open_guide(model, sampling.guide)


def _check_solver(model: FlowModel, drawing: Drawing) -> None:
    """Refuse a solver that does not exist, or that was not fitted for what it is to do."""
    solver = drawing.sampling.solver
    is_adaptive(solver)
    if solver == JUMPS and drawing.task == "invert":
        raise RequestError("solver", f" {solver}: a student jumps from noise to data, not back; use heun")
    if fitted_evaluations(solver) is None:
        return
    model.fitted_solver(solver)
    if drawing.start != 1 or drawing.task == "invert":
        where = "goes from data to noise" if drawing.task == "invert" else f"starts at t = {drawing.start:g}"
        reason = f" {solver}: it was fitted to go from noise to data, and {drawing.task} {where}; use heun or ab2"
        raise RequestError("solver", reason)


def guided_by(model: FlowModel, drawing: Drawing) -> list[ConditionName]:
    """The conditions that guidance strengthens: those that the null condition lacks.

    Raises:
        ConfigError: there are none, or one is not given or was never dropped in training.
    """
    conditioning, chosen = model.config.conditioning, drawing.sampling.guided_by
    if not chosen:
        return _guided_by_default(conditioning, drawing)
    for name in chosen:
        if name in known_conditions(conditioning) and name not in conditioning.can_guide:
            able = f"guidance on {', '.join(conditioning.can_guide)}" if conditioning.can_guide else "no guidance"
            raise ConfigError(f"guided by {name}: its unconditional branch was not trained; this model supports {able}")
        _known_conditions([name], conditioning, drawing)
    return list(chosen)


def known_conditions(conditioning: Conditioning) -> list[ConditionName]:
    """The names of all conditions that there are, and of the columns of the model."""
    return [*CONDITION_NAMES, *(name for name in conditioning.kinds if name not in CONDITION_NAMES)]


def _known_conditions(chosen: Sequence[str], conditioning: Conditioning, drawing: Drawing) -> list[ConditionName]:
    """Conditions by their names, all of which are given.

    Raises:
        ConfigError: there is no such condition, or it is not given.
    """
    for name in chosen:
        if name not in (known := known_conditions(conditioning)):
            raise ConfigError(f"guided by {name!r}: no such condition; {nearest(name, known)}")
        if name not in drawing.told:
            given = ", ".join(drawing.told) or "none"
            raise ConfigError(f"guided by {name}, which is not given (conditions given: {given}); give it as well")
    return list(chosen)


def _guided_by_default(conditioning: Conditioning, drawing: Drawing) -> list[ConditionName]:
    """All conditions that are given and were dropped in training.

    Raises:
        ConfigError: there are none.
    """
    names = [name for name in drawing.told if name in conditioning.can_guide]
    if names:
        return names
    if not conditioning.kinds:
        why = "the model is unconditional"
    elif not drawing.told:
        why = "no condition is given"
    else:
        why = f"the model was trained with conditioning.{conditioning.kinds[drawing.told[0]].dropout_key} = 0"
    raise ConfigError(f"guidance {drawing.sampling.guidance}: {why}, so guidance has nothing to act on; use guidance 1")
