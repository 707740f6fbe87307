"""Verbs that train, and those that say what training takes and has brought."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from latentflow.cli.options import AsJson, Device, Model, Precision, command
from latentflow.cli.output import open_runtime, show, teller
from latentflow.console import printable, say
from latentflow.planning.request import PlanRequest

RecipeName = Annotated[str, typer.Argument(help="A name from `latentflow recipes`, or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes of the recipe: key=value, for example training.steps=1000")
]
AllowChange = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY", help="Go on although this key of the recipe has changed since the run began; may be repeated."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check all of it, without a step and without writing.")]
PrintRecipe = Annotated[
    bool,
    typer.Option("--print", help="Print the whole recipe, everything decided, in place of the summary."),
]

verb = partial(command, group="Training")


@verb(example="latentflow train cifar10_64 data.path=caches/cifar10 autoencoder=taesd out=runs/cifar10")
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

    given = load_recipe(recipe, overrides or ())
    given = given.model_copy(update={"out": given.out or f"runs/{Path(recipe).stem}"})
    from latentflow.commands.train import prepare
    from latentflow.commands.train import train as run

    told = teller(print_recipe)
    if dry_run:
        told(prepare(given, open_runtime(device), allow_change=allow_change or ()))
        say("all is well; nothing was written")
        return
    runtime = open_runtime(device)
    result = run(given, allow_change=allow_change or (), on_prepared=told, runtime=runtime)
    for name in result.broken:
        say(f"left out: {name}")
    if not result.outcome.finished:
        say(f"stopped by a signal at step {result.outcome.step}, saved; repeat the command to go on")
        raise typer.Exit(128 + (result.outcome.signal or 0))
    if runtime.is_main:
        say(f"{result.outcome.step} steps done; the model is {result.run / 'model'}")


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
    from latentflow.planning.advice import advice
    from latentflow.planning.report import numbers, tables
    from latentflow.training.config import load_recipe

    given = load_recipe(recipe, overrides or ())
    given = given.model_copy(update={"out": given.out or f"runs/{Path(recipe).stem}"})
    found = run(given, Path(recipe).stem, request, open_runtime(device))
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


@verb(example="latentflow train-autoencoder own_images data.path=photos out=runs/photos_autoencoder")
def train_autoencoder(
    recipe: RecipeName,
    overrides: Overrides = None,
    device: Device = None,
    allow_change: AllowChange = None,
    dry_run: DryRun = False,
    print_recipe: PrintRecipe = False,
) -> None:
    """Train a first stage on one device. Repeat the command to resume exactly where it was stopped."""
    from latentflow.training.first_stage import load_autoencoder_recipe

    given = load_autoencoder_recipe(recipe, overrides or ())
    given = given.model_copy(update={"out": given.out or f"runs/{Path(recipe).stem}_autoencoder"})
    from latentflow.commands.train_autoencoder import train_first_stage
    from latentflow.training.first_stage_run import prepare_first_stage

    told = teller(print_recipe)
    if dry_run:
        told(prepare_first_stage(given, open_runtime(device), allow_change=allow_change or ()))
        say("all is well; nothing was written")
        return
    result = train_first_stage(given, allow_change=allow_change or (), on_prepared=told, runtime=open_runtime(device))
    for name in result.broken:
        say(f"left out: {name}")
    if result.report is None:
        say(f"stopped by a signal at step {result.outcome.step}, saved; repeat the command to go on")
        raise typer.Exit(128 + (result.outcome.signal or 0))
    report = result.report
    rows = {
        "autoencoder": str(result.run / "autoencoder"),
        "reconstruction": f"{report.psnr:.2f} dB PSNR on {report.num_held_out} held-out images",
        "latents": f"{report.num_channels} channels, factor {report.factor}, posterior std {report.posterior_std:.3f}",
        "parameters": f"{report.num_parameters:,} in {report.num_bytes / 1e6:.2f} MB",
        "pictures": str(result.run / "reconstructions.png"),
    }
    show(rows, as_json=False)


@verb(example="latentflow loss runs/streets --data streets/val")
def loss(
    model: Model,
    data: Annotated[str, typer.Option(help="Images as for `encode`, or a latent cache.")],
    num: Annotated[int, typer.Option(help="Draws of image, time and noise.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Images computed together.")] = 64,
    seed: Annotated[int, typer.Option(help="Of images, times, noises and holes.")] = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure the loss on images, held out or not: told nothing, each condition alone, and everything."""
    from latentflow.commands.loss import loss as run

    results = run(model, data, num=num, batch_size=batch_size, seed=seed, runtime=open_runtime(device, Precision.fp32))
    rows = {" + ".join(r.told) or "nothing": f"{r.loss:.4f} +- {r.standard_error:.4f}" for r in results}
    if as_json:
        rows = {name: asdict(result) for name, result in zip(rows, results, strict=True)}
    show(rows, as_json)


@verb(example="latentflow recipes")
def recipes(as_json: AsJson = False) -> None:
    """List the recipes that come with the package."""
    from latentflow.training.config import load_recipe, recipe_names
    from latentflow.training.first_stage import AUTOENCODER_RECIPES, load_autoencoder_recipe

    rows = {name: load_recipe(name).description for name in recipe_names()}
    for name in recipe_names(AUTOENCODER_RECIPES):
        rows[f"train-autoencoder {name}"] = load_autoencoder_recipe(name).description
    show(rows, as_json)


@verb(example="latentflow demo --out demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo writes.")] = Path("demo"),
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Do everything once, offline, and end in OUT/report.html. Repeat the command to go on after a kill."""
    from latentflow.demo.page import key_figures
    from latentflow.demo.stages import Interrupted
    from latentflow.demo.stages import demo as run

    try:
        figures = run(out, say=say, runtime=open_runtime(device))
    except Interrupted as stop:
        say(str(stop))
        raise typer.Exit(128 + stop.signal) from None
    show({**key_figures(figures), "report": str(out / "report.html")}, as_json)
