"""`latentflow demo`: everything once, offline, on the built-in dataset: encode, train, draw, measure, report.

The demo is a row of stages. Each leaves its figures in report.json and its files beside it; a stage whose figures and
files are there is not repeated. The page is made from these alone: no figure in it is written by hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from latentflow.artifacts import make_folder, read_json, write_json, write_text
from latentflow.autoencoder import Autoencoder
from latentflow.commands.encode import encode
from latentflow.commands.info import describe
from latentflow.commands.train import train
from latentflow.data.pictures.user_picture import psnr
from latentflow.data.request import EncodeRequest
from latentflow.data.sources.synthetic import CLASS_NAMES, SyntheticShapes
from latentflow.demo.figures import DemoFigures, DemoScale, judge
from latentflow.demo.page import demo_page
from latentflow.demo.painting import HELD_OUT_SEED, compare_losses, fill_holes, paint_maps
from latentflow.errors import ArtifactError, ConfigError
from latentflow.flow.solvers import SOLVERS, AdamsBashforth, is_adaptive
from latentflow.locks import writes
from latentflow.model.flow_model import FlowModel
from latentflow.plans import changed_values, spelled_out
from latentflow.progress import image_progress
from latentflow.runtime import Runtime, open_runtime
from latentflow.sampling.contact_sheet import save_grid
from latentflow.sampling.drawing import make_drawing
from latentflow.sampling.pipeline import draw
from latentflow.sampling.request import SampleRequest
from latentflow.sampling.samples import Samples, join_samples
from latentflow.training.config import load_recipe
from latentflow.training.log import read_metrics
from latentflow.training.settings import is_within

_BATCH = 64
_MASK_VARIANTS = 1  # a hole for each image: encoding them anew in each step would cost more than the step


class Interrupted(Exception):
    """A signal stopped the training, which is saved; repeating the call goes on.

    Attributes:
        signal: its number.
    """

    def __init__(self, step: int, signal: int):
        super().__init__(f"stopped by a signal at step {step}, saved; repeat the command to go on")
        self.signal = signal


@writes("out")
def demo(
    out: str | Path,
    *,
    scale: DemoScale | None = None,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
    runtime: Runtime | None = None,
) -> DemoFigures:
    """Run the demo into `out`, or what is missing there, and write report.json and report.html.

    Args:
        out: gets cache/, run/, samples/, report.json and report.html.
        scale: how much is drawn and measured; None: the full demo.
        overrides: `key=value` for the recipe "demo", whose data.path says what is encoded.
        say: told what is being done.
        runtime: where; None: see `open_runtime`.

    Raises:
        ConfigError: `out` holds a demo with other settings.
        ArtifactError: `out` holds something else, or cannot be written.
        Interrupted: training was stopped by a signal.
    """
    out, runtime = make_folder(out), runtime or open_runtime(alone=True)
    plan = DemoFigures(scale=scale or DemoScale(), recipe=load_recipe("demo", overrides))
    figures, done = _earlier_figures(out, plan), True
    for number, stage in enumerate(STAGES, start=1):
        done = done and getattr(figures, stage.name) is not None and all((out / f).is_file() for f in stage.files)
        say(f"{number}/{len(STAGES)} {stage.title}" + (": done before" if done else ""))
        if not done:  # nor are the stages that build on it
            began = time.perf_counter()
            result = stage.run(figures, out, runtime)
            result = {"seconds": time.perf_counter() - began, **result}
            figures = DemoFigures.model_validate({**dict(figures), stage.name: result})
            write_json(out / "report.json", figures.model_dump(mode="json"))
    write_text(out / "report.html", demo_page(figures, out))
    return figures


def _earlier_figures(out: Path, plan: DemoFigures) -> DemoFigures:
    """What an earlier call has left in `out`, else the plan, without figures."""
    file = out / "report.json"
    if not file.exists():
        return plan
    try:
        found = DemoFigures.model_validate(read_json(file))
    except (ValidationError, ConfigError) as error:
        raise ArtifactError(f"{file} is not the record of a demo of this version; choose another --out") from error
    done = [stage.name for stage in STAGES]
    before, now = found.model_dump(mode="json"), plan.model_dump(mode="json")
    changed = {key: values for key, values in changed_values(before, now).items() if not is_within(key, done)}
    if changed:
        raise ConfigError(f"{out} holds a demo with other settings ({spelled_out(changed)}); choose another --out")
    return found


def _encode(figures: DemoFigures, out: Path, runtime: Runtime) -> dict[str, Any]:
    data, folder = figures.recipe.data, out / "cache"
    before = sum(read_json(record)["num_images"] for record in folder.glob("shard-*.json"))
    request = EncodeRequest(
        data=data.path,
        autoencoder=figures.recipe.autoencoder,
        image_size=data.image_size,
        flips=data.flip,
        mask_policy=data.masks.policy,
        mask_variants=_MASK_VARIANTS,
        batch_size=_BATCH,
    )
    result = encode(request, folder, runtime=runtime)
    plan, num_images = result.index.plan, result.index.num_images
    return {
        "num_images": num_images,
        "image_size": plan.image_size,
        "latent_shape": (plan.num_channels, *plan.moments_shape[1:]),
        "images_per_second": (num_images - before) / result.seconds,
    }


def _reconstruct(figures: DemoFigures, out: Path, runtime: Runtime) -> dict[str, Any]:
    autoencoder = Autoencoder.from_pretrained(figures.recipe.autoencoder).to(runtime.for_autoencoder())
    source = SyntheticShapes(figures.scale.num_judged, figures.recipe.data.image_size, HELD_OUT_SEED)
    labels = [source.label(index) for index in range(len(source))]
    real = torch.from_numpy(np.stack([item.pixels for item in source])).permute(0, 3, 1, 2)
    decoded = autoencoder.reconstruct(real)
    decibels = psnr(real, decoded)
    shown = np.argsort(labels[: len(CLASS_NAMES)])  # the first of each class, in the order of the classes
    save_grid(out / "samples" / "reconstructions.png", torch.cat([real[shown], decoded[shown]]), len(shown))
    return {
        "psnr": decibels.mean().item(),
        "worst_psnr": decibels.min().item(),
        "shown_psnr": decibels[shown].tolist(),
        "real": judge(real, labels),
        "reconstructed": judge(decoded, labels),
    }


def _train(figures: DemoFigures, out: Path, runtime: Runtime) -> dict[str, Any]:
    recipe = figures.recipe
    data = recipe.data.model_copy(update={"path": str(out / "cache")})
    result = train(recipe.model_copy(update={"data": data, "out": str(out / "run")}), runtime=runtime)
    if not result.outcome.finished:
        raise Interrupted(result.outcome.step, result.outcome.signal or 0)
    curve, environment = read_metrics(result.run), read_json(result.run / "environment.json")
    seen = [0, *(line["images_seen"] for line in curve)]
    return {
        "seconds": sum((seen[n + 1] - seen[n]) / line["images_per_second"] for n, line in enumerate(curve)),
        "images_seen": seen[-1],
        "num_parameters": describe(result.run)["parameters"],
        "device": environment["device"],
        "num_threads": environment["num_threads"],
        "curve": curve,
    }


def _draw(model: FlowModel, num: int, **preset: Any) -> Samples:
    request = make_drawing(model, SampleRequest(num=num, **preset))
    with image_progress("sampling", num) as on_images:
        return join_samples(list(draw(model, request, batch_size=_BATCH, on_images=on_images)))


def _sample(figures: DemoFigures, out: Path, runtime: Runtime) -> dict[str, Any]:
    samples = _draw(FlowModel.from_pretrained(out / "run", runtime=runtime), figures.scale.num_judged)
    samples.save(out / "samples" / "images")
    columns = figures.scale.num_shown
    by_class = [samples.pixels[label :: len(CLASS_NAMES)][:columns] for label in range(len(CLASS_NAMES))]
    save_grid(out / "samples" / "classes.png", torch.cat(by_class), columns)
    return {
        "drawing_seconds": samples.seconds,
        "evaluations": samples.mean_evaluations,
        "recognised": judge(samples.pixels, samples.request.labels),
    }


def _sweep_guidance(figures: DemoFigures, out: Path, runtime: Runtime) -> dict[str, Any]:
    model, runs, rows = FlowModel.from_pretrained(out / "run", runtime=runtime), [], []
    for scale in figures.scale.guidance_scales:
        samples = _draw(model, figures.scale.num_per_scale, guidance=scale)
        recognised = judge(samples.pixels, samples.request.labels)
        evaluations = samples.mean_evaluations
        runs.append({"scale": scale, "evaluations": evaluations, "recognised": recognised})
        rows.append(samples.pixels[: len(CLASS_NAMES)])
    save_grid(out / "samples" / "guidance.png", torch.cat(rows), len(CLASS_NAMES))
    return {"runs": runs}


def _compare_solvers(figures: DemoFigures, out: Path, runtime: Runtime) -> dict[str, Any]:
    model, scale, runs = FlowModel.from_pretrained(out / "run", runtime=runtime), figures.scale, []
    reference = _draw(model, scale.num_solved, solver="rk4", steps=scale.reference_steps)
    for solver in SOLVERS:
        if is_adaptive(solver):
            settings = [{"tolerance": tolerance} for tolerance in scale.tolerances]
        else:
            settings = [{"steps": steps_within(solver, budget)} for budget in scale.budgets]
        for setting in settings:
            tolerance = setting.get("tolerance")
            samples = _draw(
                model, scale.num_solved, solver=solver, steps=setting.get("steps"), rtol=tolerance, atol=tolerance
            )
            error = (samples.latents - reference.latents).square().mean().sqrt()
            distance = error / reference.latents.square().mean().sqrt()
            evaluations = samples.mean_evaluations
            runs.append({"solver": solver, **setting, "evaluations": evaluations, "distance": distance.item()})
    return {"reference_evaluations": reference.mean_evaluations, "runs": runs}


def steps_within(solver: str, budget: int) -> int:
    """The most steps, at least 1, that a fixed-step solver takes with `budget` calls of the velocity."""
    method = SOLVERS[solver]
    if isinstance(method, AdamsBashforth):  # its first order - 1 steps are Heun's and cost one call more
        return max(budget - (method.order - 1), 1)
    return max(budget // len(method.nodes), 1)


@dataclass(frozen=True)
class Stage:
    """One step of the demo.

    Attributes:
        name: of its record in `DemoFigures`.
        title: for people.
        run: (figures so far, folder) => its figures; the seconds it took are added where it does not tell them.
        files: what must lie in the folder for the stage to count as done.
    """

    name: str
    title: str
    run: Callable[[DemoFigures, Path, Runtime], dict[str, Any]]
    files: tuple[str, ...] = ()


STAGES = (
    Stage("encoding", "encode the built-in dataset", _encode, ("cache/index.json",)),
    Stage("first_stage", "look at the autoencoder", _reconstruct, ("samples/reconstructions.png",)),
    Stage(
        "training", "train the velocity network", _train, ("run/model/config.json", "run/model/velocity.safetensors")
    ),
    Stage("sampling", "draw samples of every class", _sample, ("samples/classes.png",)),
    Stage("guidance", "draw the same seeds at several guidance scales", _sweep_guidance, ("samples/guidance.png",)),
    Stage("maps", "paint semantic maps", paint_maps, ("samples/maps.png",)),
    Stage("holes", "fill holes", fill_holes, ("samples/holes.png",)),
    Stage("losses", "measure what each condition is worth", compare_losses),
    Stage("solvers", "compare the solvers", _compare_solvers),
)
