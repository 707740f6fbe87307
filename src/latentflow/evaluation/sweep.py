"""Sampling presets of a model, compared: the candidates, their rounds, and which preset the numbers name."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from latentflow.artifacts import sha256_file
from latentflow.data.cache.reader import is_cache
from latentflow.data.table_options import TableOptions
from latentflow.errors import ConfigError, DataError, NonFiniteError
from latentflow.evaluation.class_accuracy import class_judge
from latentflow.evaluation.drawn_set import plan_set
from latentflow.evaluation.encoded_images import with_columns_of
from latentflow.evaluation.model_features import open_features_for
from latentflow.evaluation.painted import require_same_classes
from latentflow.evaluation.real_images import RealFeatures, RealImages, open_real_images, reference_features
from latentflow.evaluation.request import SweepRequest
from latentflow.evaluation.shards import Columns, OnImages, Work
from latentflow.evaluation.sweep_rounds import Candidates, Round, SweepPlan, measure_rounds
from latentflow.evaluation.sweep_rules import (
    Candidate,
    Ceiling,
    cheapest_as_good,
    combinations,
    images_needed,
    marks,
    round_sizes,
)
from latentflow.evaluation.swept_averages import SweptAverages, with_lengths
from latentflow.flow.solvers import JUMPS, fitted_evaluations
from latentflow.metrics.class_judge import ClassJudge
from latentflow.metrics.features.extractors import FeatureExtractor
from latentflow.metrics.scores import require_enough
from latentflow.model.adapter_name import split_adapted
from latentflow.model.conditioning import ConditionName
from latentflow.model.config import ModelConfig, SamplingPreset
from latentflow.model.flow_model import WEIGHTS_FILE, FlowModel, find_model
from latentflow.model.guide_reference import NO_GUIDE, GuideReference
from latentflow.progress import image_progress
from latentflow.requests import RequestError
from latentflow.runtime import Runtime
from latentflow.sampling.row_conditions import known_columns, row_conditions

GUIDANCES = (1.0, 1.5, 2.0, 3.0)
"""The guidance scales that are compared by default, if the model can be guided by its classes."""

_NAMED = 5  # of the presets that were not measured
_REFERENCE_FILE, _CANDIDATES = "reference.safetensors", "candidates"


_OF_STUDENTS = {"solvers": [JUMPS], "steps": [1, 2, 4, 8]}
"""What is compared of a student, where nothing else is asked for."""


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep.

    Attributes:
        request: as it was given.
        label: what the distance is called.
        rounds: in order of their number of images.
        final: the last complete round, which everything below is about; the first one if none is complete.
        marks: by name: "front", "undecided" or "beaten"; see `sweep_rules.marks`.
        needed: by name, how many images would show that a candidate is as good as any other.
        ceiling: the class judge's accuracy on real images; None if classes are not judged.
        last_size: images per candidate in the last round that was planned.
        seconds_per_image: of all candidates of the final round together, for one more image of each.
        best: name of the cheapest candidate that is shown to be as good as any other; None: undecided.
        old, new: the model's preset, and that of `best`.
        presets: by name, what every candidate changes in the model's preset.
        lengths: by name, of the weights' average it is drawn with; empty: all are drawn with the model's own weights.
        failed: by name, why a candidate could not be measured.
        notes: remarks on the figures.
        seconds: of this call, without the reference.
    """

    request: SweepRequest
    label: str
    rounds: list[Round]
    final: Round
    marks: dict[str, str]
    needed: dict[str, float]
    ceiling: Ceiling | None
    last_size: int
    seconds_per_image: float
    best: str | None
    old: SamplingPreset
    new: SamplingPreset | None
    presets: dict[str, Candidate]
    lengths: dict[str, float]
    failed: dict[str, str]
    notes: list[str]
    seconds: float

    @property
    def written(self) -> bool:
        """Whether the model has the new preset now."""
        return self.request.write and self.best is not None


@dataclass(frozen=True)
class Sweep:
    """Candidates, model and reference, checked before anything is drawn.

    Attributes:
        plan: everything that two sweeps must share for one to continue the other.
        averages: of the weights; None: the model's own.
    """

    request: SweepRequest
    flow: FlowModel
    extractor: FeatureExtractor
    real: RealImages
    plan: SweepPlan
    averages: SweptAverages | None = None


def candidates_of(
    request: SweepRequest, config: ModelConfig, named: Sequence[ConditionName] = ()
) -> dict[str, Candidate]:
    """The candidates of a request, by name.

    Args:
        named: the named conditions that are given.

    Raises:
        ConfigError: an unknown solver, a value out of range, or no candidate at all.
    """
    guidances, guides = request.guidance, list(dict.fromkeys(request.guides or ()))
    if guidances is None:
        has_guide = config.sampling.guide is not None if not guides else guides != [NO_GUIDE]
        can_guide = {"label", *named} & {*config.conditioning.can_guide}
        guidances = GUIDANCES if has_guide or can_guide else (1.0,)
    pace = {"solvers": request.solvers, "steps": request.steps}
    if config.student is not None:  # the command line gives every field, those at their default as well
        usual = {name: SweepRequest.model_fields[name].default for name in pace}
        pace = {name: _OF_STUDENTS[name] if pace[name] == usual[name] else pace[name] for name in pace}
    return combinations(
        **pace,
        tolerances=request.tolerances,
        guidances=guidances,
        intervals=[(0.0, 1.0)] if request.intervals is None else request.intervals,
        shifts=request.shifts,
        guides=guides,
    )


def _hash_of_weights(model: str, flow: FlowModel) -> str:
    """The hash of a model's weights file, which earlier sweeps have in their plans; of merged weights their own."""
    return flow.weights_hash if split_adapted(model) else sha256_file(find_model(model) / WEIGHTS_FILE)


def open_sweep(request: SweepRequest, runtime: Runtime | None) -> Sweep:
    """Open model, features and reference.

    Raises:
        ArtifactError, ConfigError, DataError: something does not exist or does not fit.
    """
    flow = FlowModel.from_pretrained(request.model, runtime=runtime)
    extractor = open_features_for(flow, request.features, weights=request.weights)
    if is_cache(request.data):
        raise DataError(f"{request.data} is a latent cache; give the images it was made from, or their statistics")
    real = _open_reference(flow, request.data)
    named = () if real.source is None else known_columns(flow.config.conditioning, real.source)
    candidates = candidates_of(request, flow.config, named)
    candidates = {name: _with_weights(flow, candidate, named) for name, candidate in candidates.items()}
    if real.stored:
        real.stored.require_same_features(extractor.name, extractor.hash, extractor.dim)
    averages, lengths = None, {}
    if request.ema is not None:
        _refuse_fitted(candidates)
        averages = SweptAverages(request.model, request.ema, flow.config)
        candidates, lengths = with_lengths(candidates, request.ema)
    inherited = {"guided_by", "guided_channels"} if request.guides else {"guided_by", "guided_channels", "guide"}
    plan = SweepPlan(
        weights=averages.hash if averages else _hash_of_weights(request.model, flow),
        model=flow.config.model_dump(mode="json", exclude={"sampling", "training"}),
        guided=flow.config.sampling.model_dump(mode="json", include=inherited),
        data=real.fingerprint,
        features=extractor.name,
        feature_hash=extractor.hash,
        device=flow.device.type,
        precision=flow.runtime.precision,
        batch_size=request.batch_size,
        seed=request.seed,
        sizes=[request.num] if request.budget is None else round_sizes(request.num, len(candidates)),
        candidates=candidates,
        lengths=lengths,
        named=list(named),
    )
    return Sweep(request, flow, extractor, real, plan, averages)


def _refuse_fitted(candidates: dict[str, Candidate]) -> None:
    """Refuse solvers that were fitted to the model's own weights, where others are compared."""
    for one in candidates.values():
        if fitted_evaluations(solver := one["solver"]) is not None:
            reason = f" {solver}: it was fitted to the model's own weights, not to averages of other lengths (--ema)"
            raise RequestError("solvers", f"{reason}; leave it out, or write the best average first and fit it again")


def _open_reference(flow: FlowModel, data: str) -> RealImages:
    """The real images, with the columns of the model that they have."""
    config, conditioning = flow.config, flow.config.conditioning

    def opened(table: TableOptions) -> RealImages:
        real = open_real_images(data, config.image_size, config.pixel_format, table=table).of_shape(config, "all")
        if real.source is None and table.columns:
            raise ConfigError(f"{data} holds statistics, which have no named conditions; give the images")
        if real.source is not None and real.source.columns and conditioning.columns and conditioning.num_classes:
            require_same_classes(flow, real.source)
        return real

    return with_columns_of(conditioning, data, opened, lambda real: real.source)


def _with_weights(flow: FlowModel, candidate: Candidate, named: Sequence[ConditionName]) -> Candidate:
    """A candidate that the model can draw, with the weights of its guide and the hash of a fitted solver."""
    labels = "rows" if named else "balanced"
    sampling = plan_set(flow, labels=labels, preset=candidate, named=named).drawing.sampling
    candidate, guide = {**candidate, "solver": sampling.solver}, sampling.guide
    return candidate if guide is None or "guide" not in candidate else {**candidate, "guide": guide.model_dump()}


def _as_preset(old: SamplingPreset, candidate: Candidate) -> SamplingPreset:
    """The preset of a model, changed by a candidate."""
    if (guide := candidate.get("guide")) is not None:
        candidate = {name: value for name, value in candidate.items() if name != "guide"}
        old = old.guided_from(None if guide["model"] == NO_GUIDE else GuideReference.model_validate(guide))
    return SamplingPreset.model_validate({**old.model_dump(), **candidate})


def measure_sweep(sweep: Sweep) -> SweepResult:
    """Measure all candidates in rounds, and find the best preset if the numbers show it.

    Raises:
        ConfigError: the budget was spent before a candidate was measured.
        NonFiniteError: no candidate can be measured.
    """
    request, plan, dim = sweep.request, sweep.plan, sweep.extractor.dim
    with image_progress("reference", sweep.real.num_images, enabled=sweep.real.stored is None) as on_images:
        work = Work(batch_size=request.batch_size, on_images=on_images)
        reference = reference_features(sweep.real, sweep.extractor, work, file=request.out / _REFERENCE_FILE)
    device = sweep.flow.device
    statistics = reference.statistics.to(device) if device.type == "cuda" else reference.statistics
    judge, unjudged = _class_judge(sweep, reference)
    draw = _drawing_of(sweep, reference)
    candidates = Candidates(request.out / _CANDIDATES, plan, draw, statistics, judge, _weights_of(sweep))
    began = time.perf_counter()
    rounds = measure_rounds(candidates, request.budget)
    failed = {name: record.failed for name, record in candidates.kept.items() if record.failed}
    _require_some(rounds, failed, request.budget)
    final = ([one for one in rounds if not one.missing] or rounds)[-1]
    ceiling = _ceiling(sweep, judge) if judge else None
    needed = images_needed(final.points, final.num, request.margin, ceiling)
    best = None if final.missing else cheapest_as_good(final.points, final.num, needed)
    old = sweep.flow.config.sampling
    return SweepResult(
        request=request,
        label=sweep.extractor.label,
        rounds=rounds,
        final=final,
        marks=marks(final.points),
        needed=needed,
        ceiling=ceiling,
        last_size=plan.sizes[-1],
        seconds_per_image=sum(candidates.kept[name].seconds_per_image for name in final.measured),
        best=best,
        old=old,
        new=None if best is None else _as_preset(old, plan.candidates[best]),
        presets=plan.candidates,
        lengths=plan.lengths,
        failed=failed,
        notes=[*reference.notes, *unjudged, *_notes(rounds, final, plan, dim, request.budget)],
        seconds=time.perf_counter() - began,
    )


def _drawing_of(sweep: Sweep, reference: RealFeatures) -> Callable[..., Columns]:
    """Draws images of a candidate; all candidates draw the same seeds and conditions."""
    flow, plan, conditioning = sweep.flow, sweep.plan, sweep.flow.config.conditioning
    # balanced labels cycle over the classes, of which few images would show only the first
    labels = "balanced" if plan.sizes[0] >= 4 * conditioning.num_classes else "uniform"
    rows = None
    if plan.named:
        of_each = reference.labels if conditioning.num_classes else None
        labels = "rows"
        rows = row_conditions(conditioning, sweep.real.source, reference.rows.tolist(), of_each, plan.seed)

    def draw(*, num: int, seed: int, preset: Candidate, on_images: OnImages = lambda num_images: None) -> Columns:
        work = Work(batch_size=sweep.request.batch_size, on_images=on_images)
        images = plan_set(flow, seed=seed, labels=labels, preset=preset, named=plan.named)
        if rows is not None:
            images = images.with_rows(replace(rows, first=seed - plan.seed))
        return images.draw(sweep.extractor, num, work)

    return draw


def _weights_of(sweep: Sweep) -> Callable[[str], None]:
    """Gives the network the weights of a candidate, by name."""
    if sweep.averages is None:
        return lambda name: None
    return sweep.averages.put_into(sweep.flow.network, sweep.plan.lengths)


def _require_some(rounds: Sequence[Round], failed: dict[str, str], budget: float | None) -> None:
    if rounds:
        return
    if failed:
        raise NonFiniteError(f"no candidate could be measured; {min(failed)}: {failed[min(failed)]}")
    raise ConfigError(f"the budget of {budget:g} s was spent before a candidate was measured; give more")


def _notes(rounds: Sequence[Round], final: Round, plan: SweepPlan, dim: int, budget: float | None) -> list[str]:
    """Remarks on the figures."""
    notes = [
        require_enough("fid", final.num, dim=dim)
        or f"distances of {final.num} images are biased upward, for all candidates alike: compare them only here"
    ]
    for one in rounds:
        if one.missing:
            more = ", ..." if len(one.missing) > _NAMED else ""
            notes.append(
                f"the budget of {budget:g} s is spent: with {one.num} images {len(one.missing)} of "
                f"{len(one.missing) + len(one.measured)} were not measured ({', '.join(one.missing[:_NAMED])}{more}); "
                "repeat the command to go on"
            )
    if later := [str(size) for size in plan.sizes if size > rounds[-1].num]:
        notes.append(f"there was no time for rounds of {', '.join(later)} images; repeat the command to go on")
    return notes


def _ceiling(sweep: Sweep, judge: ClassJudge) -> Ceiling:
    """The accuracy of the judge on real images of the classes that are drawn, each as often."""
    if sweep.plan.named:  # images have the labels of real ones
        return Ceiling(judge.accuracy, judge.num_held_out)
    return Ceiling(judge.ceiling(torch.tensor(sweep.flow.config.seen_classes)), judge.num_held_out)


def _class_judge(sweep: Sweep, reference: RealFeatures) -> tuple[ClassJudge | None, list[str]]:
    """A judge of the classes of images, or None and the reason."""
    known = sweep.flow.config.conditioning.class_names
    if not known:
        return None, []
    try:
        return class_judge(sweep.extractor, known, sweep.real, reference), []
    except DataError as error:
        return None, [f"{error}: class accuracy is not measured, and only the distance decides"]
