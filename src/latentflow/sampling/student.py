"""What a student can be asked to draw, and what only a student can."""

from __future__ import annotations

from typing import TYPE_CHECKING

from latentflow.flow.solvers import JUMPS
from latentflow.model.config import ModelConfig
from latentflow.model.student_record import MOST_JUMPS
from latentflow.requests import RequestError
from latentflow.shapes import MOST_GUIDANCE

if TYPE_CHECKING:
    from latentflow.sampling.drawing import Drawing


def require_few(config: ModelConfig, evaluations: int | None, task: str) -> None:
    """Refuse a number of evaluations of a model that is no student, and where a student cannot jump.

    Raises:
        RequestError: with the remedy.
    """
    if evaluations is None:
        return
    if config.student is None:
        reason = f" {evaluations}: the model is no student, and takes the steps of a solver; give --solver ab2 --steps"
        steps = max(evaluations - 1, 4)
        raise RequestError("evaluations", f"{reason} {steps}, or make a student by latentflow distill")
    if task == "invert":
        reason = f" {evaluations}: a student jumps from noise to data, not back; give --solver heun --steps 25"
        raise RequestError("evaluations", reason)


def check_student(config: ModelConfig, drawing: Drawing) -> None:
    """Refuse the jumps of a model that is no student, and guidance that a student has not learned.

    Raises:
        RequestError: with the value and the remedy.
    """
    sampling = drawing.sampling
    if config.student is None:
        if sampling.solver == JUMPS:
            reason = f" {JUMPS}: those of a student, and the model is none; use heun, or make one by latentflow distill"
            raise RequestError("solver", reason)
        return
    if sampling.solver == JUMPS and sampling.steps > MOST_JUMPS:
        reason = f" {sampling.steps}: a student jumps at most {MOST_JUMPS} times, as more gain nothing; give 4, or"
        raise RequestError("steps", f"{reason} --solver heun")
    if sampling.guide is not None and sampling.guidance != 1:
        reason = f" {sampling.guide.model}: a student takes the guidance scale as an input, and no guide; leave it out"
        raise RequestError("guide", reason)
    if sampling.guidance != 1 and not config.student.guided:
        reason = f" {sampling.guidance:g}: this student learned without guidance, as its teacher has none; use 1"
        raise RequestError("guidance", reason)
    if not 1 <= sampling.guidance <= MOST_GUIDANCE:
        reason = f" {sampling.guidance:g}: a student knows scales from 1 to {MOST_GUIDANCE:g}; give one of them"
        raise RequestError("guidance", f"{reason}, 2 is usual")
