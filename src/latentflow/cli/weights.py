"""Verbs for models on disk and on the hub."""

from __future__ import annotations

from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from latentflow.cli.options import AsJson, Device, Model, Precision, command
from latentflow.cli.output import open_runtime, shortened, show
from latentflow.console import say

verb = partial(command, group="Models")


class ExportFormat(str, Enum):
    """What a model is exported for."""

    diffusers = "diffusers"


@verb(example="latentflow info runs/cifar10")
def info(
    model: Annotated[str, typer.Argument(help="A model folder, a run folder, a hub id, or a latent cache.")],
    as_json: AsJson = False,
) -> None:
    """Say what a model or a latent cache is; of long lists, such as class names, the first few.

    Classes are called as their folders are, or as `convert --class-names` says.
    """
    from latentflow.commands.info import describe

    facts = describe(model)
    show(facts if as_json else {name: shortened(value) for name, value in facts.items()}, as_json)


@verb(example="latentflow convert lfm model_475.pth --experiment ffhq_f8_dit --out models/ffhq")
def convert(
    family: Annotated[str, typer.Argument(help="Whose weights they are: lfm, sit, dit or edm.")],
    checkpoint: Annotated[Path, typer.Argument(help="A .pth, .pt or .safetensors file.")],
    out: Annotated[Path, typer.Option(help="The model folder, new.")],
    options: Annotated[
        list[str] | None, typer.Argument(help="key=value, arguments of the published program: name=SiT-XL/2")
    ] = None,
    experiment: Annotated[str | None, typer.Option(help="Of lfm: ffhq_f8_dit and the like.")] = None,
    autoencoder: Annotated[
        str, typer.Option(help="The autoencoder it was trained with.")
    ] = "stabilityai/sd-vae-ft-mse",
    image_size: Annotated[int | None, typer.Option(help="Side of its images in pixels; otherwise as it says.")] = None,
    class_names: Annotated[Path | None, typer.Option(help="A text file of one class name per line.")] = None,
    encoder: Annotated[
        Path | None, typer.Option(help="Of lfm: the file of the encoder of semantic maps, where it stands apart.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Probe whether it flows the right way.")] = True,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Turn published weights into a model folder. Nothing in the file is ever run."""
    from latentflow.commands.convert import convert as run

    result = run(
        family,
        checkpoint,
        out,
        experiment=experiment,
        options=options or (),
        autoencoder=autoencoder,
        image_size=image_size,
        class_names=class_names,
        encoder=encoder,
        check=check,
        runtime=open_runtime(device, Precision.fp32),
    )
    config = result.model.config
    rows = {
        "model": str(out),
        "network": config.network.title,
        "parameters": f"{result.num_parameters:,}",
        "weights of": result.part or "the file itself",
        "classes": config.conditioning.num_classes,
        "self-check": result.check.verdict if result.check else "left out",
        "seconds": round(result.seconds, 1),
    }
    show(rows, as_json)
    for note in result.notes:
        say(note)


@verb(example="latentflow export runs/streets --out streets-diffusers")
def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="A new folder.")],
    format: Annotated[ExportFormat, typer.Option(help="What it is for.")] = ExportFormat.diffusers,
    as_json: AsJson = False,
) -> None:
    """Write a model for diffusers, once diffusers has been seen to compute the same; refused where it cannot."""
    from latentflow.commands.export import export as run
    from latentflow.convert.diffusers.export import SCHEDULER

    result = run(model, out)
    folder, class_name = result.network
    rows = {
        "folder": str(result.folder),
        folder: class_name,
        "scheduler": SCHEDULER,
        "vae": result.autoencoder,
        "largest relative error": float(f"{result.error:.1e}") if as_json else f"exact to {result.error:.0e}",
    }
    show(rows, as_json)


@verb(example="latentflow push runs/streets me/streets --private")
def push(
    model: Model,
    repo_id: Annotated[str, typer.Argument(metavar="NAME", help="On the hub: owner/name, or owner/name@branch.")],
    private: Annotated[bool, typer.Option("--private", help="Create it for yourself and those you invite.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload a latentflow model",
    as_json: AsJson = False,
) -> None:
    """Put a model on the Hugging Face hub, once it has been found to load; nothing else of a run is sent."""
    from latentflow.commands.push import push as run

    url = run(model, repo_id, private=private, message=message)
    show({"model": url}, as_json)
