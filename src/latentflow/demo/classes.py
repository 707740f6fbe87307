"""The demo's stages of class-conditional sampling: every class, guidance scales, and solvers."""

from __future__ import annotations

from typing import Any

from latentflow.data.sources.synthetic import CLASS_NAMES
from latentflow.demo.judging import judge
from latentflow.demo.workshop import Workshop
from latentflow.flow.solvers import SOLVERS, RungeKutta, is_adaptive


def draw_classes(work: Workshop) -> dict[str, Any]:
    """Draw samples of every class, as the recipe's preset says."""
    samples = work.draw(work.figures.scale.num_judged)
    samples.save(work.out / "samples" / "images")
    by_class = [samples.pixels[label :: len(CLASS_NAMES)] for label in range(len(CLASS_NAMES))]
    work.save_sheet("classes", [pixels[: work.figures.scale.num_shown] for pixels in by_class])
    return {
        "drawing_seconds": samples.seconds,
        "evaluations": samples.mean_evaluations,
        "recognised": judge(samples.pixels, samples.drawing.labels),
    }


def sweep_guidance(work: Workshop) -> dict[str, Any]:
    """Draw the same seeds at several guidance scales."""
    runs, rows = [], []
    for scale in work.figures.scale.guidance_scales:
        samples = work.draw(work.figures.scale.num_per_scale, guidance=scale)
        recognised = judge(samples.pixels, samples.drawing.labels)
        runs.append({"scale": scale, "evaluations": samples.mean_evaluations, "recognised": recognised})
        rows.append(samples.pixels[: len(CLASS_NAMES)])
    work.save_sheet("guidance", rows)
    return {"runs": runs}


def compare_solvers(work: Workshop) -> dict[str, Any]:
    """Draw the same seeds with every solver at several costs, and compare the latents with a fine reference."""
    scale, runs = work.figures.scale, []
    reference = work.draw(scale.num_solved, solver="rk4", steps=scale.reference_steps)
    for solver in SOLVERS:
        if is_adaptive(solver):
            settings = [{"tolerance": tolerance} for tolerance in scale.tolerances]
        else:
            settings = [{"steps": steps_within(solver, budget)} for budget in scale.budgets]
        for setting in settings:
            tolerance = setting.get("tolerance")
            samples = work.draw(
                scale.num_solved, solver=solver, steps=setting.get("steps"), rtol=tolerance, atol=tolerance
            )
            error = (samples.latents - reference.latents).square().mean().sqrt()
            distance = (error / reference.latents.square().mean().sqrt()).item()
            runs.append({"solver": solver, **setting, "evaluations": samples.mean_evaluations, "distance": distance})
    return {"reference_evaluations": reference.mean_evaluations, "runs": runs}


def steps_within(solver: str, budget: int) -> int:
    """The most steps, at least 1, that a fixed-step solver takes within `budget` evaluations of the velocity."""
    method = SOLVERS[solver]
    if isinstance(method, RungeKutta):
        return max(budget // len(method.nodes), 1)
    return max(budget - method.extra, 1)
