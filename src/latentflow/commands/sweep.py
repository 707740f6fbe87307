"""`latentflow sweep`: which sampling preset gives the best images for its cost, measured and not guessed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from pydantic import ValidationError

from latentflow.artifacts import (
    require_apart,
    require_writable,
    sha256_file,
    write_json,
    write_text,
)
from latentflow.data.cache.reader import is_cache
from latentflow.errors import ArtifactError, ConfigError, DataError, NonFiniteError
from latentflow.evaluation.drawn_set import draw_set
from latentflow.evaluation.real_images import RealFeatures, RealImages, open_reference, reference_features
from latentflow.evaluation.sweep_rounds import Candidates, Round, SweepPlan, measure_rounds
from latentflow.evaluation.sweep_rules import (
    Ceiling,
    cheapest_as_good,
    combinations,
    images_needed,
    marks,
    round_sizes,
    with_more,
)
from latentflow.hub import CARD_FILE
from latentflow.locks import writes
from latentflow.metrics.class_judge import ClassJudge
from latentflow.metrics.features.extractors import open_features
from latentflow.metrics.scores import require_enough
from latentflow.model.card import model_card
from latentflow.model.config import SamplingPreset
from latentflow.model.flow_model import CONFIG_FILE, WEIGHTS_FILE, FlowModel, find_model, read_config
from latentflow.pages.sweep import SweepResult, summary, sweep_page, sweep_picture
from latentflow.plans import PLAN_FILE, claim_folder, require_same_plan
from latentflow.progress import image_progress
from latentflow.runtime import Runtime
from latentflow.sampling.drawing import make_drawing
from latentflow.sampling.request import SampleRequest

SOLVERS = ("euler", "heun", "ab2", "dopri5")
STEPS = (4, 8, 16, 32)
TOLERANCES = (1e-2, 1e-3)
GUIDANCES = (1.0, 1.5, 2.0, 3.0)
"""What is compared unless the user says otherwise; of the guidance scales 1 alone where a model cannot be guided."""

MARGIN = 0.1
"""A difference of distances that does not matter, as a share of the other's."""

_NAMED = 5  # of the presets that were not measured
_REFERENCE_FILE, _CANDIDATES = "reference.safetensors", "candidates"
_WHAT = "a sweep"  # in `out`, for messages


@writes("out")
def sweep(
    model: str | Path,
    data: str | Path,
    out: str | Path = "sweep",
    *,
    features: str = "random",
    weights: str | Path | None = None,
    solvers: Sequence[str] = SOLVERS,
    steps: Sequence[int] = STEPS,
    tolerances: Sequence[float] = TOLERANCES,
    guidances: Sequence[float] | None = None,
    intervals: Sequence[tuple[float, float]] = ((0.0, 1.0),),
    shifts: Sequence[float] = (1.0,),
    num: int = 1000,
    budget: float | None = None,
    margin: float = MARGIN,
    batch_size: int = 32,
    seed: int = 0,
    write: bool = False,
    runtime: Runtime | None = None,
) -> SweepResult:
    """Measure quality against cost for every combination of settings, and name the best preset if the numbers show it.

    All candidates draw the same seeds and classes. The best is the cheapest that is shown to be as good as any other
    of the last complete round; see `sweep_rules.images_needed`. Where none is, the result is undecided.

    With a budget the rounds are those of successive halving: all candidates with few images, those that tell most with
    twice as many, and so on; distances are compared within a round only. Repeat the call to go on: what was measured
    is kept in `out`, and costs nothing of a budget.

    Args:
        data: images as for `encode`, or a file of reference statistics.
        features: what images are compared by, a name of `metrics.features.NAMES`.
        weights: of the features; see `open_features`.
        tolerances: of adaptive solvers, in place of steps and shifts.
        guidances: None: `GUIDANCES`, or 1 alone where the model cannot be guided by its classes.
        intervals: times between which guidance acts.
        num: images per candidate, in the last round. A sweep in `out` of fewer goes on to as many.
        budget: seconds after which nothing more is begun, the reference not counted; None: every candidate is measured
            with `num` images.
        margin: a difference of distances that does not matter, as a share of the other's.
        write: make the best preset that of the model; not done where none is named.

    Raises:
        ArtifactError, ConfigError, DataError: something does not exist, does not fit, or cannot be written.
    """
    if write and not Path(model).exists():
        raise ArtifactError(f"{model} is no folder here; a preset is written into a model folder: leave --write out")
    folder, out = find_model(model), Path(out)
    config = read_config(folder)
    if guidances is None:
        guidances = GUIDANCES if "label" in config.conditioning.can_guide else (1.0,)
    candidates = combinations(
        solvers=solvers, steps=steps, tolerances=tolerances, guidances=guidances, intervals=intervals, shifts=shifts
    )
    _require_numbers(num, budget, margin, batch_size)
    if write:
        require_writable(folder / CONFIG_FILE, suffix=".json")
    require_writable(out)
    require_apart(out, data)
    flow = FlowModel.from_pretrained(model, runtime=runtime)
    for candidate in candidates.values():
        make_drawing(flow, SampleRequest(num=1, **candidate))
    extractor = open_features(
        features,
        weights=weights,
        autoencoder=flow.autoencoder,
        image_size=config.image_size,
        device=flow.device,
    )
    if is_cache(data):
        raise DataError(f"{data} is a latent cache; give the images it was made of, or their statistics")
    real = open_reference(data, config.image_size)
    if real.stored:
        real.stored.require_same_features(extractor.name, extractor.hash, extractor.dim)
    plan = SweepPlan(
        weights=sha256_file(folder / WEIGHTS_FILE),
        model=config.model_dump(mode="json", exclude={"sampling", "training"}),
        guided=config.sampling.model_dump(mode="json", include={"guided_by", "guided_channels"}),
        data=real.fingerprint,
        features=extractor.name,
        feature_hash=extractor.hash,
        device=flow.device.type,
        precision=flow.runtime.precision,
        batch_size=batch_size,
        seed=seed,
        sizes=[num] if budget is None else round_sizes(num, len(candidates)),
        candidates=candidates,
    )
    plan = _claim(out, plan)
    with image_progress("reference", real.num_images, enabled=real.stored is None) as on_images:
        reference = reference_features(
            real, extractor, file=out / _REFERENCE_FILE, batch_size=batch_size, on_images=on_images
        )
    statistics = reference.statistics.to(flow.device) if flow.device.type == "cuda" else reference.statistics
    # dealt out in turn, few images would show the first of many classes alone
    labels = "balanced" if plan.sizes[0] >= 4 * config.conditioning.num_classes else "uniform"
    draw = partial(draw_set, flow, extractor, labels=labels, batch_size=batch_size)
    judge, unjudged = _class_judge(flow, real, reference)
    measured = Candidates(out / _CANDIDATES, plan, draw, statistics, judge)
    began = time.perf_counter()
    rounds = measure_rounds(measured, budget)
    failed = {name: record.failed for name, record in measured.kept.items() if record.failed}
    if not rounds and failed:
        raise NonFiniteError(f"no candidate could be measured; {min(failed)}: {failed[min(failed)]}")
    if not rounds:
        raise ConfigError(f"the budget of {budget:g} s was spent before a candidate was measured; give more")
    final = ([one for one in rounds if not one.missing] or rounds)[-1]
    ceiling = Ceiling(judge.accuracy, judge.num_held_out) if judge else None
    needed = images_needed(final.points, final.num, margin, ceiling)
    best = None if final.missing else cheapest_as_good(final.points, final.num, needed)
    result = SweepResult(
        out=out,
        model=str(model),
        label=extractor.label,
        rounds=rounds,
        final=final,
        marks=marks(final.points),
        needed=needed,
        margin=margin,
        ceiling=ceiling,
        last_size=plan.sizes[-1],
        budget=budget,
        seconds_per_image=sum(measured.kept[name].seconds_per_image for name in final.measured),
        best=best,
        old=config.sampling,
        new=None if best is None else config.sampling.model_copy(update=candidates[best]),
        asked_to_write=write,
        presets=candidates,
        failed=failed,
        notes=[*reference.notes, *unjudged, *_notes(rounds, final, plan, extractor.dim, budget)],
        seconds=time.perf_counter() - began,
    )
    if result.written:
        write_preset(folder, result.new)
    write_json(out / "sweep.json", summary(result))
    write_text(out / "sweep.svg", sweep_picture(result))
    write_text(out / "page.html", sweep_page(result))
    return result


def write_preset(folder: str | Path, preset: SamplingPreset) -> None:
    """Make `preset` the one that a model folder samples with, and its card say so; all else in the folder stays.

    Raises:
        ArtifactError: the config cannot be read or written.
    """
    config = read_config(folder).model_copy(update={"sampling": preset})
    write_json(Path(folder) / CONFIG_FILE, config.model_dump(mode="json"))
    write_text(Path(folder) / CARD_FILE, model_card(config))


def _notes(result_of: Sequence[Round], final: Round, plan: SweepPlan, dim: int, budget: float | None) -> list[str]:
    """What one should know about the figures."""
    notes = [
        require_enough("fid", final.num, dim=dim)
        or f"distances of {final.num} images are too large, for all candidates alike: compare them with each other only"
    ]
    for one in result_of:
        if one.missing:
            more = ", ..." if len(one.missing) > _NAMED else ""
            notes.append(
                f"the budget of {budget:g} s is spent: with {one.num} images {len(one.missing)} of "
                f"{len(one.missing) + len(one.measured)} were not measured ({', '.join(one.missing[:_NAMED])}{more}); "
                "repeat the command to go on"
            )
    if later := [str(size) for size in plan.sizes if size > result_of[-1].num]:
        notes.append(f"there was no time for rounds of {', '.join(later)} images; repeat the command to go on")
    return notes


def _class_judge(flow: FlowModel, real: RealImages, reference: RealFeatures) -> tuple[ClassJudge | None, list[str]]:
    """What judges the classes of images, or none and why there is none."""
    known = flow.config.conditioning.class_names
    if not known:
        return None, []
    alone = "no class accuracy is measured, and the distance alone decides"
    if real.source is None or not real.source.class_names:
        return None, [f"{real.data} holds no labelled images: {alone}"]
    if sorted(real.source.class_names) != sorted(known):
        return None, [f"{real.data} has other classes than the model: {alone}"]
    place = torch.tensor([known.index(name) for name in real.source.class_names])
    try:
        return ClassJudge(reference.features, place[reference.labels], len(known)), []
    except DataError as error:
        return None, [f"{error}; {alone}"]


def _claim(out: Path, plan: SweepPlan) -> SweepPlan:
    """The plan of the sweep in `out`: `plan`, or the one found there, extended to the images that `plan` asks for.

    Raises:
        ArtifactError: it holds another sweep, or something else.
    """
    wanted = plan.model_dump(mode="json")
    try:
        other = SweepPlan.model_validate(claim_folder(out, wanted, _WHAT))
    except ValidationError as error:
        raise ArtifactError(f"{out / PLAN_FILE} is damaged or of another version; choose another --out") from error
    if goes_on := plan.sizes[-1] >= other.sizes[-1]:
        plan = plan.model_copy(update={"sizes": with_more(other.sizes, plan.sizes[-1])})
    free = ["sizes"] if goes_on else []
    require_same_plan(out, other.model_dump(mode="json"), plan.model_dump(mode="json"), _WHAT, free=free)
    if plan != other:
        write_json(out / PLAN_FILE, plan.model_dump(mode="json"))
    return plan


def _require_numbers(num: int, budget: float | None, margin: float, batch_size: int) -> None:
    require_enough("fid", num)
    if budget is not None and not budget > 0:
        raise ConfigError(f"budget {budget:g} s: it must be above 0; leave it out to measure everything")
    if not 0 <= margin < 1:
        raise ConfigError(f"margin {margin:g}: a share from 0 to below 1 is needed, such as {MARGIN:g}")
    if batch_size < 1:
        raise ConfigError(f"batch size {batch_size}: at least 1 is needed")
