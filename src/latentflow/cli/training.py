"""Verbs that train, and verbs that say what training will take and what it achieved."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from latentflow.cli.options import AsJson, Device, Model, Precision, command
from latentflow.cli.output import runtime_for, show, teller
from latentflow.console import printable, say
from latentflow.planning.request import PlanRequest
from latentflow.training.request import EmaRequest, FinetuneRequest, LossRequest, TrainFeaturesRequest

RecipeName = Annotated[str, typer.Argument(help="A name from `latentflow recipes`, or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes of the recipe: key=value, for example training.steps=1000")
]
AllowChange = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY", help="Continue although this key of the recipe has changed since the run began; may be repeated."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything without training or writing.")]
PrintRecipe = Annotated[
    bool,
    typer.Option("--print", help="Print the resolved recipe instead of the summary."),
]

verb = partial(command, group="Training")


@verb(example="latentflow train cifar10_64 data.path=caches/cifar10 out=runs/cifar10")
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    device: Device = None,
    allow_change: AllowChange = None,
    dry_run: DryRun = False,
    print_recipe: PrintRecipe = False,
) -> None:
    """Train a model. Repeat the command to resume exactly where it was stopped."""
    from latentflow.training.config import load_recipe

    _train(_resolved(load_recipe, recipe, overrides), device, allow_change, dry_run, print_recipe)


def _train(given: Any, device: str | None, allow_change: list[str] | None, dry_run: bool, print_recipe: bool) -> None:
    """Check or train a recipe of a velocity network, and say how it ended."""
    from latentflow.commands.train import prepare
    from latentflow.commands.train import train as run

    runtime, on_prepared, changes = runtime_for(device), teller(print_recipe), allow_change or ()
    if dry_run:
        _checked(on_prepared, prepare(given, runtime, allow_change=changes))
        return
    result = run(given, allow_change=changes, on_prepared=on_prepared, runtime=runtime)
    _report_end(result)
    if runtime.is_main:
        say(f"{result.outcome.step} steps done; the model is {result.run / 'model'}")
        if result.best and result.best.step < result.outcome.step:
            lowest = f"the held-out loss was lowest after step {result.best.step}, {result.best.loss:.4f}"
            say(f"{lowest}; {result.run}@best is the model of that step")


@verb(example="latentflow finetune models/dit --data caches/dogs --class-from corgi=Pembroke out=runs/dogs")
def finetune(
    request: FinetuneRequest,
    overrides: Overrides = None,
    device: Device = None,
    allow_change: AllowChange = None,
    dry_run: DryRun = False,
    print_recipe: PrintRecipe = False,
) -> None:
    """Finetune a model to your own images and classes. Repeat the command to resume exactly where it was stopped."""
    from latentflow.commands.finetune import RECIPE, finetune_recipe

    given = _resolved(lambda name, changes: finetune_recipe(request, changes), RECIPE, overrides)
    _train(given, device, allow_change, dry_run, print_recipe)


@verb(example="latentflow distill runs/photos --data caches/photos out=runs/photos_student")
def distill(
    model: Model,
    overrides: Overrides = None,
    data: Annotated[
        str | None, typer.Option(help="A latent cache, or images: those of MODEL, or others of its classes.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="A name from `latentflow recipes`, or a YAML file.")] = "student",
    device: Device = None,
    allow_change: AllowChange = None,
    dry_run: DryRun = False,
    print_recipe: PrintRecipe = False,
) -> None:
    """Train a student that draws in 2 to 4 network calls. Repeat the command to resume exactly."""
    from latentflow.commands.distill import distill as run
    from latentflow.commands.distill import prepare_distillation
    from latentflow.training.student_recipe import load_student_recipe

    places = [f"teacher={model}", *([f"data.path={data}"] if data is not None else [])]
    given, runtime = load_student_recipe(recipe, [*places, *(overrides or ())]), runtime_for(device)
    given = given.model_copy(update={"out": given.out or f"runs/{_name_of(model)}_student"})
    on_prepared, changes = teller(print_recipe), allow_change or ()
    if dry_run:
        _checked(on_prepared, prepare_distillation(given, runtime, allow_change=changes))
        return
    result = run(given, allow_change=changes, on_prepared=on_prepared, runtime=runtime)
    _report_end(result)
    if runtime.is_main:
        say(f"{result.outcome.step} steps done; the student is {result.run / 'model'}")


def _name_of(model: str) -> str:
    """The last part of the name of a model or of its adapter, without a snapshot or a revision."""
    from latentflow.model.adapter_name import split_adapted

    named = split_adapted(model)
    return Path(named.adapter if named else model).name.partition("@")[0] or "model"


@verb(example="latentflow train-autoencoder own_images data.path=photos out=runs/photos_autoencoder")
def train_autoencoder(
    recipe: RecipeName,
    overrides: Overrides = None,
    device: Device = None,
    allow_change: AllowChange = None,
    dry_run: DryRun = False,
    print_recipe: PrintRecipe = False,
) -> None:
    """Train an autoencoder on one device. Repeat the command to resume exactly where it was stopped."""
    from latentflow.commands.train_autoencoder import prepare_autoencoder
    from latentflow.commands.train_autoencoder import train_autoencoder as run
    from latentflow.training.first_stage import load_autoencoder_recipe

    given, runtime = _resolved(load_autoencoder_recipe, recipe, overrides, "_autoencoder"), runtime_for(device)
    on_prepared, changes = teller(print_recipe), allow_change or ()
    if dry_run:
        _checked(on_prepared, prepare_autoencoder(given, runtime, allow_change=changes))
        return
    result = run(given, allow_change=changes, on_prepared=on_prepared, runtime=runtime)
    _report_end(result)
    found = result.report
    rows = {
        "autoencoder": str(result.run / "autoencoder"),
        "reconstruction": f"{found.psnr:.2f} dB PSNR on {found.num_held_out} held-out images",
        "by channel": " ".join(f"{value:.2f}" for value in found.channel_psnr) + " dB",
        "latents": f"{found.num_channels} channels, factor {found.factor}, posterior std {found.posterior_std:.3f}",
        "parameters": f"{found.num_parameters:,} in {found.num_bytes / 1e6:.2f} MB",
        "pictures": str(result.run / "reconstructions.png"),
    }
    show(rows, as_json=False)


@verb(example="latentflow train-features photos --image-size 64 --out judges/photos")
def train_features(request: TrainFeaturesRequest, device: Device = None, as_json: AsJson = False) -> None:
    """Train a judge on your images, for `evaluate --features`. Repeat the command to resume exactly."""
    from latentflow.commands.train_features import train_features as run

    on_prepared = (lambda prepared: None) if as_json else teller(False)
    result = run(request, on_prepared=on_prepared, runtime=runtime_for(device))
    _report_end(result)
    found = result.record
    if found is None:
        say("this process is done; the first one makes the judge")
        return
    if as_json:
        show(found.model_dump(mode="json"), as_json)
        return
    rows = {
        "judge": str(result.folder),
        "learned from": "its classes" if found.method == "labels" else "two views of each image",
        "accuracy": found.judged,
        "class accuracy": f"{100 * found.ceiling:.1f} % at most" if found.class_names else "not measured: no classes",
        "hash": found.hash[:12],
    }
    show(rows, as_json)


def _resolved(load: Callable[..., Any], recipe: str, overrides: list[str] | None, suffix: str = "") -> Any:
    """The recipe with its overrides; the run folder is named after it unless it is set."""
    given = load(recipe, overrides or ())
    return given.model_copy(update={"out": given.out or f"runs/{Path(recipe).stem}{suffix}"})


def _checked(on_prepared: Callable[[Any], None], prepared: Any) -> None:
    on_prepared(prepared)
    say("all is well; nothing was written")


def _report_end(result: Any) -> None:
    """Name the images that were left out; exit as a shell does if a signal ended the run."""
    for name in result.broken:
        say(f"left out: {name}")
    if not result.outcome.finished:
        say(f"stopped by a signal at step {result.outcome.step}, saved; repeat the command to go on")
        raise typer.Exit(128 + (result.outcome.signal or 0))


@verb(example="latentflow plan imnet_f8_ditb2 training.batch_size=256 --device-memory 80")
def plan(
    recipe: RecipeName,
    request: PlanRequest,
    overrides: Overrides = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Estimate what a run takes before it begins: memory by part, time, disk space, and what would make it fit."""
    from latentflow.commands.plan import plan as run
    from latentflow.commands.plan import recipe_to_plan
    from latentflow.planning.advice import advice
    from latentflow.planning.report import numbers, tables

    given = _resolved(recipe_to_plan, recipe, overrides)
    found = run(given, Path(recipe).stem, request, runtime_for(device))
    if as_json:
        show(numbers(found), as_json)
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_column(style="dim")
    for title, rows in tables(found).items():
        if title:
            table.add_row()
            table.add_row(f"[bold]{escape(title)}")
        for name, value, known in rows:
            table.add_row(f"[bold]{name}" if not title else f"  {name}", escape(printable(value)), known)
    Console().print(table)
    for line in advice(found):
        say(line)


@verb(example="latentflow loss runs/streets --data streets/val")
def loss(
    model: Model,
    request: LossRequest,
    batch_size: Annotated[int, typer.Option(min=1, help="Images computed together.")] = 64,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure the loss on a set of images: unconditional, with each condition by itself, and with all conditions."""
    from latentflow.commands.loss import loss as run

    results = run(model, request, batch_size=batch_size, runtime=runtime_for(device, Precision.fp32))
    rows = {" + ".join(r.told) or "nothing": f"{r.loss:.4f} +- {r.standard_error:.4f}" for r in results}
    if as_json:
        rows = {name: asdict(result) for name, result in zip(rows, results, strict=True)}
    show(rows, as_json)


@verb(example="latentflow ema runs/photos --length 0.1 --out models/photos")
def ema(request: EmaRequest, as_json: AsJson = False) -> None:
    """Choose the length of the weights' average after training, from what the run has kept."""
    from latentflow.commands.ema import ema as run

    result = run(request)
    made = result.combination
    rows = {
        "model": str(result.model),
        "length": made.target.length,
        "step": made.target.step,
        "made of": len(made.shares),
        "error of the profile": float(f"{made.error:.1e}"),
        "possible lengths": list(result.spanned) if as_json else "{:g} to {:g}".format(*result.spanned),
    }
    show(rows, as_json)


@verb(example="latentflow recipes")
def recipes(as_json: AsJson = False) -> None:
    """List the recipes that come with the package."""
    from latentflow.training.config import load_recipe, recipe_names
    from latentflow.training.first_stage import AUTOENCODER_RECIPES, load_autoencoder_recipe
    from latentflow.training.student_recipe import STUDENT_RECIPES, load_student_recipe

    rows = {name: load_recipe(name).description for name in recipe_names()}
    for name in recipe_names(AUTOENCODER_RECIPES):
        rows[f"train-autoencoder {name}"] = load_autoencoder_recipe(name).description
    for name in recipe_names(STUDENT_RECIPES):
        rows[f"distill {name}"] = load_student_recipe(name).description
    show(rows, as_json)


@verb(example="latentflow demo --out demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo writes.")] = Path("demo"),
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Do everything once, offline, and end in OUT/report.html. Repeat the command to go on after a kill.

    `latentflow studio OUT/run` opens the model in a page.
    """
    from latentflow.demo.building import Interrupted
    from latentflow.demo.page import key_figures
    from latentflow.demo.stages import demo as run

    try:
        figures = run(out, say=say, runtime=runtime_for(device))
    except Interrupted as stop:
        say(str(stop))
        raise typer.Exit(128 + stop.signal) from None
    show({**key_figures(figures), "report": str(out / "report.html")}, as_json)
    say(f"look at it: latentflow studio {shlex.quote(str(out / 'run'))}")
