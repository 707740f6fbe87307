"""What is to be drawn: one record for every verb, checked before anything is computed, kept in every PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real

from pydantic import BaseModel, ConfigDict, Field

from latentflow.console import notice
from latentflow.errors import ConfigError, nearest
from latentflow.flow.guidance import ConditionedVelocity
from latentflow.flow.solvers import is_adaptive
from latentflow.flow.times import sampling_times
from latentflow.model.conditioning import CONDITION_NAMES, ConditionName
from latentflow.model.config import SamplingPreset
from latentflow.model.flow_model import FlowModel
from latentflow.runtime import Precision, Runtime
from latentflow.sampling.request import MOST_SEED, MOST_STEPS, SampleRequest
from latentflow.shapes import Condition

SEED_TASKS = ("sample", "interpolate", "vary")
"""Tasks in which a seed alone makes a picture, so that it has a class of its own: the same in all of them."""

_RANGES = {
    "guidance": (0, 1000, "1 switches it off, 1.5 to 4 are usual"),
    "shift": (1e-4, 1e4, "1 is an even grid"),
    "rtol": (1e-9, 1, "1e-5 is usual"),
    "atol": (1e-9, 100, "1e-5 is usual"),
}


_WHOLE_PRESET = {name for name, field in SamplingPreset.model_fields.items() if field.default is not None}


class Blend(BaseModel):
    """What a picture is mixed with: the noise of another seed, and the velocity of another class."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int
    weight: float = Field(ge=0, le=1, description="0: the picture's own seed and class; 1: the other ones.")
    label: int | None = Field(None, description="The other class; null: the picture's own.")


class Drawing(BaseModel):
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
    precision: Precision = Field("fp32", description="What the network computes in.")

    def at(self, rows: slice | list[int]) -> Drawing:
        """The request reduced to some images."""
        lists = {"seeds": self.seeds, "labels": self.labels, "blends": self.blends}
        chosen = {
            name: every[rows] if isinstance(rows, slice) else [every[row] for row in rows if every]
            for name, every in lists.items()
        }
        return self.model_copy(update=chosen)


def make_drawing(
    model: FlowModel,
    request: SampleRequest,
    *,
    task: str = "sample",
    told: Sequence[ConditionName] = (),
    inputs: Mapping[str, str] | None = None,
    start: float = 1.0,
    image_size: tuple[int, int] | None = None,
) -> Drawing:
    """What a model is to draw for a request; what the request leaves out comes from the preset in the model folder.

    The preset's guidance is left out where no condition is given that it could strengthen; asked for, it is refused
    there. A value that would change nothing is refused, too, unless a whole preset is given, as a PNG holds it.

    Args:
        request: image i has seed `seed + i` and class i mod the number of classes. Where it names no class: if the
            seed is all that makes a picture (`SEED_TASKS`), the class that belongs to the seed, which of the classes
            of the training images is number seed mod their number; for the other tasks no class.
        told: conditions other than the class that are given.

    Raises:
        ConfigError: a class, solver or value that does not exist or that the model was not trained for.
    """
    num, seed = request.num, request.seed
    require_count("seed", seed, 0, MOST_SEED + 1 - num)
    conditioning = model.config.conditioning
    seeds = range(seed, seed + num)
    if request.classes is None:
        dealt = model.config.seen_classes if task in SEED_TASKS and not told else []
        labels = [dealt[own % len(dealt)] for own in seeds] if dealt else []
    else:
        dealt = conditioning.class_indices(request.classes)
        labels = [dealt[i % len(dealt)] for i in range(num)] if dealt else []
    asked = request.preset()
    given = dict(asked)
    told = [*(["label"] if labels else []), *told]
    strengthened = set(told).intersection(conditioning.can_guide, model.config.sampling.guided_by or CONDITION_NAMES)
    if not strengthened and not given.keys() & {"guidance", "guided_by"}:
        given["guidance"] = 1.0
    if model.config.sampling.guided_by:  # a preset's wish holds as far as it can
        given.setdefault("guided_by", [name for name in told if name in strengthened] or None)
    sampling = model.config.sampling.model_copy(update=given)
    drawing = Drawing(
        task=task,
        seeds=list(seeds),
        labels=labels,
        told=told,
        inputs=dict(inputs or {}),
        start=start,
        image_size=image_size,
        sampling=sampling,
        precision=precision_for(model.runtime, sampling.solver),
    )
    check_drawing(model, drawing)
    if not asked.keys() >= _WHOLE_PRESET:
        _require_effect(asked, drawing.sampling)
    _tell_what_is_kept(asked, model.config.sampling, drawing.sampling)
    _tell_of_coarse_errors(drawing)
    return drawing


def precision_for(runtime: Runtime, solver: str) -> Precision:
    """What a network is to compute in: as asked, or where nothing was, fp32 for a solver that measures its errors."""
    if not runtime.precision_is_explicit and is_adaptive(solver):
        return "fp32"
    return runtime.precision


def require_count(what: str, value: int, low: int, high: int, remedy: str = "") -> None:
    """Refuse what is no whole number from `low` to `high`.

    Raises:
        ConfigError: naming the range.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= value <= high:
        large = isinstance(value, Integral) and abs(value) >= 10**40
        shown = "of more than 40 digits" if large else value
        raise ConfigError(f"{what} {shown}: give a whole number from {low} to {high:,}" + (remedy and f"; {remedy}"))


def _require_effect(asked: Mapping[str, object], sampling: SamplingPreset) -> None:
    """Refuse what was asked for and would change nothing; a value that switches something off is always fine."""
    adaptive = is_adaptive(sampling.solver)
    whose = "" if "solver" in asked else ", the solver of the model's preset"
    for name in ("steps", "shift") if adaptive else ("rtol", "atol"):
        if name in asked and (name, asked[name]) != ("shift", 1):
            raise ConfigError(
                f"{name} {asked[name]} has no effect with {sampling.solver}{whose}: "
                + (
                    "it chooses its own steps by rtol and atol; leave it out, or choose a solver of fixed steps "
                    "such as heun"
                    if adaptive
                    else "it takes a fixed number of steps; leave it out, or choose dopri5 or bosh3"
                )
            )
    if sampling.guidance == 1:
        off = {"guidance_interval": (0.0, 1.0)}
        for name in ("guidance_interval", "guided_by", "guided_channels"):
            if name in asked and (name not in off or tuple(asked[name]) != off[name]):
                value = asked[name] if isinstance(asked[name], int | str) else ",".join(map(str, asked[name]))
                raise ConfigError(
                    f"{name} {value} has no effect: guidance is 1, which is off; leave it out, or give guidance above 1"
                )


def _tell_what_is_kept(asked: Mapping[str, object], preset: SamplingPreset, sampling: SamplingPreset) -> None:
    """Say what another solver takes over from the model's preset, which was made for its own."""
    if is_adaptive(sampling.solver) == is_adaptive(preset.solver):
        return
    kept = [name for name in _pace(sampling.solver) if name not in asked]
    if kept:
        values = " and ".join(f"{name} {getattr(sampling, name):g}" for name in kept)
        notice(f"{sampling.solver} takes {values} from the model's preset, which draws with {preset.solver}")


def _tell_of_coarse_errors(request: Drawing) -> None:
    """Say what an adaptive solver makes of velocities that are rounded more than it is told to err."""
    sampling = request.sampling
    if is_adaptive(sampling.solver) and request.precision != "fp32":
        notice(
            f"{sampling.solver} measures errors of {sampling.rtol:g}, and {request.precision} rounds more than that: "
            "it takes more steps, which may be others in another batch; --precision fp32 or auto is made for it, or a "
            "solver of fixed steps such as heun"
        )


def _pace(solver: str) -> tuple[str, ...]:
    return ("rtol", "atol") if is_adaptive(solver) else ("steps",)


def check_drawing(model: FlowModel, request: Drawing) -> None:
    """Refuse what cannot be drawn, before anything is computed.

    Raises:
        ConfigError: with the value and the remedy.
    """
    sampling, conditioning = request.sampling, model.config.conditioning
    for seed in (*request.seeds, *(blend.seed for blend in request.blends)):
        require_count("seed", seed, 0, MOST_SEED)
    if len(request.labels) != (len(request.seeds) if "label" in request.told else 0):
        raise ConfigError(f"{len(request.labels)} labels for {len(request.seeds)} seeds; give one per image, or none")
    if request.blends and len(request.blends) != len(request.seeds):
        raise ConfigError(f"{len(request.blends)} blends for {len(request.seeds)} seeds; give one per image, or none")
    others = [blend.label for blend in request.blends if blend.label is not None]
    if others and not request.labels:
        raise ConfigError(f"a blend towards class {others[0]} needs a class to begin with; give both")
    seen = set(model.config.seen_classes)
    for label in dict.fromkeys([*request.labels, *others]):
        if conditioning.class_index(label) not in seen:
            raise ConfigError(
                f"the class {conditioning.class_names[label]!r} was in no training image, so the model never learned "
                f"it; it learned {len(seen)} of its {conditioning.num_classes} classes"
            )
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
    is_adaptive(sampling.solver)
    for name, (low, high, usual) in _RANGES.items():
        value = getattr(sampling, name)
        if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high:
            shown = f"{value:g}" if isinstance(value, float) else str(value)[:40]
            raise ConfigError(f"{name} {shown}: give a number from {low:g} to {high:g}; {usual}")
    require_count("steps", sampling.steps, 1, MOST_STEPS, "25 are usual")
    if sampling.guided_channels is not None:
        channels = model.config.autoencoder.num_channels
        require_count("guided_channels", sampling.guided_channels, 1, channels, f"the latents have {channels} channels")
    if sampling.guidance != 1:
        guided_by(model, request)
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


def guided_by(model: FlowModel, request: Drawing) -> list[ConditionName]:
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
