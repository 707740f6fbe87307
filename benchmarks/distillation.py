"""A student of 1, 2, 4 and 8 evaluations against its teacher, and against solvers that were fitted to the teacher.

    python benchmarks/distillation.py --teacher demo/run --cache demo/cache --data synthetic:1000:20240612
    python benchmarks/distillation.py --teacher runs/cifar10 --student runs/cifar10_student --data cifar10/held_out \
        --features judges/cifar10

Of each way to draw: the distance by a judge's features (or others), precision, recall, class accuracy, network calls,
and the seconds that 1,000 images take. A model of the demo's shapes is also measured by recognising class and colour,
and by the IoU of maps. The ways are the student at each number of evaluations and guidance scale, the teacher's preset,
and the teacher by fitted solvers and by ab2 with as many network calls, where a guided call counts twice.

Without --student one is trained from --cache, into --work; what is there is continued. Solvers are fitted to a copy of
the teacher.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import measuring
import torch

from latentflow.commands.distill import distill
from latentflow.commands.evaluate import evaluate
from latentflow.commands.fit_solver import fit_solver
from latentflow.data.painting.latent_size import class_counts, shares
from latentflow.data.sources.synthetic import CLASS_NAMES, SyntheticShapes
from latentflow.demo.judging import judge, mean_iou
from latentflow.demo.workshop import HELD_OUT_SEED
from latentflow.evaluation.request import EvaluationRequest
from latentflow.flow.solvers import expected_evaluations
from latentflow.metrics.names import CLASS_ACCURACY, is_judge
from latentflow.model.flow_model import FlowModel, find_model
from latentflow.requests import numbers_like
from latentflow.runtime import Runtime, open_runtime
from latentflow.sampling.drawing import make_drawing
from latentflow.sampling.pipeline import Given, draw_all
from latentflow.sampling.request import FitSolverRequest, SampleRequest
from latentflow.training.student_recipe import load_student_recipe

_PLACES = ("teacher", "student", "cache", "data", "features", "work", "results")
_TRAINED = ("jumps", "optimizer", "training", "times")  # sections of the recipe without places

Way = dict[str, Any]
"""Fields of a request that draws."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train where there is no student, fit, draw, measure, print and write; returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="a model folder or a run folder")
    parser.add_argument("--student", help="a run of `latentflow distill`; otherwise it is trained")
    parser.add_argument("--cache", help="latents to train the student on")
    parser.add_argument("--data", required=True, help="real images that neither was trained on")
    parser.add_argument("--features", default="random", help="the folder of a judge, or other features")
    parser.add_argument("--evaluations", default="1,2,4,8")
    parser.add_argument("--guidance", default="1,2", help="scales of all ways but the preset")
    parser.add_argument("--num", type=int, default=1000, help="images of each way")
    parser.add_argument("--maps", type=int, default=96, help="of a model of the demo's shapes")
    parser.add_argument("--fit", type=int, default=128, help="images that solvers are fitted to")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--work", help="keep student and solvers in this folder; a repeated call continues")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's choice")
    parser.add_argument("--results", default=measuring.RESULTS, help="folder of the JSON file")
    parser.add_argument("--name", default="distillation", help="of the JSON file, before the device")
    parser.add_argument("changes", nargs="*", help="of the student's recipe, such as training.steps=400")
    options = parser.parse_args(arguments)
    measuring.setup(options.device, options.threads)
    runtime, read = open_runtime(options.device), numbers_like("1,2", float)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(options.work or temporary)
        student, trained = options.student, {}
        if student is None:
            student, trained = train(options, work, runtime)
        calls, scales = [int(number) for number in read(options.evaluations)], read(options.guidance)
        teacher = with_solvers(options, work, calls, scales, runtime)
        ways = {name: (student, way) for name, way in ways_of_student(calls, scales).items()}
        ways |= {name: (teacher, way) for name, way in ways_of_teacher(teacher, calls, scales).items()}
        measured = {name: measure(*way, options, runtime) for name, way in ways.items()}
    report(measured)
    settings = {name: value for name, value in vars(options).items() if name not in _PLACES}
    how = {name: part for name, part in trained.items() if name in _TRAINED}
    written = {"settings": settings, "training": how, "ways": measured}
    measuring.write_results(options.name, runtime.device, written, options.results)
    return written


def train(options: argparse.Namespace, work: Path, runtime: Runtime) -> tuple[str, dict[str, Any]]:
    """The run folder of a student that is trained here, and how."""
    if options.cache is None:
        raise SystemExit("give --student, or --cache to train one")
    given = {"teacher": options.teacher, "data.path": options.cache, "out": work / "student"}
    recipe, decided = load_student_recipe("student", measuring.overrides(given, options.changes)), []
    result = distill(recipe, on_prepared=decided.append, runtime=runtime)
    if not result.outcome.finished:
        raise SystemExit(f"stopped; with --work {work} the same command goes on")
    return str(result.run), decided[0].recipe.model_dump(mode="json")


def with_solvers(
    options: argparse.Namespace, work: Path, calls: Sequence[int], scales: Sequence[float], runtime: Runtime
) -> str:
    """A copy of the teacher with solvers that were fitted without guidance, for each number of steps that is needed."""
    copied = work / "teacher"
    if not copied.exists():
        shutil.copytree(find_model(options.teacher), copied)
    steps = sorted({steps_for(number, scale) for number in calls for scale in scales} - {0, 1})
    if steps and options.fit:
        request = FitSolverRequest(
            model=str(copied), evaluations=steps, num=options.fit, held_out=max(options.fit // 2, 8), guidance=1.0
        )
        fit_solver(request, batch_size=options.batch_size, runtime=runtime)
    return str(copied)


def steps_for(calls: int, scale: float) -> int:
    """Evaluations of the velocity for so many network calls."""
    return calls if scale == 1 else calls // 2


def ways_of_student(calls: Sequence[int], scales: Sequence[float]) -> dict[str, Way]:
    """The student at each number of evaluations and each scale."""
    return {f"student {n}, guidance {g:g}": {"evaluations": n, "guidance": g} for g in scales for n in calls}


def ways_of_teacher(teacher: str, calls: Sequence[int], scales: Sequence[float]) -> dict[str, Way]:
    """The preset of the teacher, its fitted solvers, and ab2, with as many network calls as the student."""
    fitted, ways = FlowModel.from_pretrained(teacher, device="cpu").fitted_solvers.solvers, {"preset": {}}
    for scale in scales:
        for number in calls:
            steps, what = steps_for(number, scale), f"guidance {scale:g}"
            if (solver := f"fitted-{steps}") in fitted:
                ways[f"{solver}, {what}"] = {"solver": solver, "guidance": scale}
            if steps > 1 and expected_evaluations("ab2", steps - 1, 1.0) == steps:
                ways[f"ab2 in {steps}, {what}"] = {"solver": "ab2", "steps": steps - 1, "guidance": scale}
    return ways


def measure(model: str, way: Way, options: argparse.Namespace, runtime: Runtime) -> dict[str, float]:
    """The figures of one way to draw."""
    metrics = ["fid", "precision", "recall", *([CLASS_ACCURACY] if is_judge(options.features) else [])]
    request = EvaluationRequest(
        model=model,
        data=options.data,
        features=options.features,
        metrics=metrics,
        num=options.num,
        batch_size=options.batch_size,
        **way,
    )
    found = evaluate(request, runtime=runtime).report
    scores = {name.replace("fid", "fd"): score.value for name, score in found.scores.items()}
    distance = found.scores["fid" if "fid" in found.scores else "fd"]
    flow = FlowModel.from_pretrained(model, runtime=runtime)
    figures = {**scores, "fd_error": distance.standard_error, "evaluations": found.protocol.evaluations.mean}
    samples = draw_all(flow, make_drawing(flow, SampleRequest(num=options.num, **way)), batch_size=options.batch_size)
    figures["seconds_per_1000"] = 1000 * samples.seconds / options.num
    if flow.config.conditioning.class_names == list(CLASS_NAMES):
        figures["recognised"] = float(judge(samples.pixels, samples.drawing.labels).both)
        if flow.config.conditioning.num_map_classes:
            figures["iou"] = painted(flow, way, options)
    return figures


def painted(flow: FlowModel, way: Mapping[str, Any], options: argparse.Namespace) -> float:
    """The mean IoU of held-out maps with those that are recovered from what is drawn of them."""
    maps = [item.semantic_map for item in SyntheticShapes(options.maps, flow.config.image_size, HELD_OUT_SEED)]
    factor, number = flow.config.autoencoder.factor, flow.config.conditioning.num_map_classes
    given = Given(class_fractions=shares(torch.stack([class_counts(one, number, factor) for one in maps]), factor))
    request = SampleRequest(num=len(maps), classes=[], **way)
    drawing = make_drawing(flow, request, conditions=["semantic_map"])
    return mean_iou(maps, draw_all(flow, drawing, given, batch_size=options.batch_size).pixels)


def report(ways: Mapping[str, Mapping[str, float]]) -> None:
    """A table of the ways."""
    columns = list(dict.fromkeys(name for figures in ways.values() for name in figures))
    print(f"{'':<24}" + "".join(f"{name:>18}" for name in columns))
    for name, figures in ways.items():
        cells = (figures.get(column, math.nan) for column in columns)
        print(f"{name:<24}" + "".join(f"{'':>18}" if cell != cell else f"{cell:>18.4g}" for cell in cells))


if __name__ == "__main__":
    main()
