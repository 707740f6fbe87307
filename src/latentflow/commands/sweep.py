"""`latentflow sweep`: which sampling preset gives the best images for its cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from latentflow.artifacts import require_apart, require_writable, write_json, write_text
from latentflow.commands.ema import write_average
from latentflow.errors import ArtifactError
from latentflow.evaluation.request import SweepRequest
from latentflow.evaluation.sweep import SweepResult, measure_sweep, open_sweep
from latentflow.evaluation.sweep_rounds import SweepPlan
from latentflow.evaluation.sweep_rules import with_more
from latentflow.hub import CARD_FILE
from latentflow.locks import writes
from latentflow.model.adapter import ADAPTER_FOLDER
from latentflow.model.card import model_card
from latentflow.model.config import SamplingPreset
from latentflow.model.flow_model import CONFIG_FILE, find_model, read_config
from latentflow.model.snapshots import run_of
from latentflow.pages.sweep import summary, sweep_page, sweep_picture
from latentflow.plans import PLAN_FILE, claim_folder, require_same_plan
from latentflow.runtime import Runtime
from latentflow.training.request import EmaRequest

_WHAT = "a sweep"


def _written_model(request: SweepRequest) -> Path | None:
    """The folder that the best preset is written into, if it is."""
    if not request.write or not Path(request.model).exists():
        return None
    if (run := run_of(request.model)).resolve() == Path(request.out).resolve():
        raise ArtifactError(f"--out {request.out} is the folder of the model; choose another one")
    return run


@writes(lambda given: _written_model(given["request"]))
@writes(lambda given: given["request"].out)
def sweep(request: SweepRequest, runtime: Runtime | None = None) -> SweepResult:
    """Measure quality against cost for every combination of settings, and name the best preset if the numbers show it.

    All candidates draw the same seeds and classes. The best is the cheapest that is shown to be as good as any other
    of the last complete round; see `sweep_rules.images_needed`. If there is none, the result is undecided.

    With a budget the rounds are those of successive halving: all candidates with few images, the most informative ones
    with twice as many, and so on; distances are compared within a round only. Repeat the call to go on: what was
    measured is kept in `out` and costs no budget. A sweep in `out` of fewer images goes on to as many. Where the best
    preset is to be written, nothing else may write the model meanwhile.

    Raises:
        ArtifactError, ConfigError, DataError: something does not exist, does not fit, or cannot be written.
    """
    if request.write and not Path(request.model).exists():
        raise ArtifactError(
            f"{request.model} is not a folder here; a preset is written into a model folder: remove --write"
        )
    folder = find_model(request.model) if request.write else None
    if folder is not None:
        require_writable(folder / CONFIG_FILE, suffix=".json")
    require_writable(request.out)
    require_apart(request.out, request.data)
    opened = open_sweep(request, runtime)
    result = measure_sweep(replace(opened, plan=_claim(request.out, opened.plan)))
    if result.written and result.lengths:
        write_average(EmaRequest(run=request.model, length=result.lengths[result.best], write=True))
    if result.written and folder is not None:
        write_preset(folder, result.new)
    write_json(request.out / "sweep.json", summary(result))
    write_text(request.out / "sweep.svg", sweep_picture(result))
    write_text(request.out / "page.html", sweep_page(result))
    return result


def write_preset(folder: str | Path, preset: SamplingPreset) -> None:
    """Make `preset` the preset of a model folder, in its config, its card and its adapter; all else in it stays.

    Raises:
        ArtifactError: a config cannot be read or written.
    """
    config = read_config(folder).model_copy(update={"sampling": preset})
    for place in (Path(folder), Path(folder) / ADAPTER_FOLDER):
        if (place / CONFIG_FILE).is_file():
            write_json(place / CONFIG_FILE, config.model_dump(mode="json"))
    write_text(Path(folder) / CARD_FILE, model_card(config))


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
