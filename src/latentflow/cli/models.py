"""Verbs for models on disk and on the hub."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from latentflow.cli.options import AsJson, Device, Model, Precision, command
from latentflow.cli.output import runtime_for, shortened, show
from latentflow.console import say
from latentflow.convert.request import ConvertRequest, ExportRequest

verb = partial(command, group="Models")

_TITLES = {"told": "conditions", "columns": "named conditions", "holes": "mask policy"}
"""Titles in the table of `info`, where they are not the keys of the JSON."""


@verb(example="latentflow info runs/cifar10")
def info(
    model: Annotated[str, typer.Argument(help="A model folder, a run folder, a hub id, an adapter or a latent cache.")],
    as_json: AsJson = False,
) -> None:
    """Show the facts of a model, an adapter or a latent cache, and of long lists, such as class names, the first few.

    Classes have the names of their folders, or those of `convert --class-names`.
    """
    from latentflow.commands.info import describe

    facts = describe(model)
    show(facts if as_json else {_TITLES.get(name, name): shortened(value) for name, value in facts.items()}, as_json)


@verb(example="latentflow convert lfm model_475.pth --experiment ffhq_f8_dit --out models/ffhq")
def convert(
    request: ConvertRequest,
    out: Annotated[Path, typer.Option(help="Folder of the model; must be new.")],
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Turn published weights into a model folder. No code in the file is run."""
    from latentflow.commands.convert import convert as run

    result = run(request, out, runtime=runtime_for(device, Precision.fp32))
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


@verb(example="latentflow merge models/dit --adapter runs/birds --out models/birds")
def merge(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder of the new model; must be new.")],
    as_json: AsJson = False,
) -> None:
    """Write a model with its adapter as one model folder, which needs neither of them."""
    from latentflow.commands.merge import merge as run

    flow = run(model, out)
    conditioning = flow.config.conditioning
    show({"model": str(out), "merged": flow.reference, "classes": conditioning.num_classes}, as_json)


@verb(example="latentflow export runs/streets --out streets-diffusers")
def export(
    model: Model,
    request: ExportRequest,
    out: Annotated[Path, typer.Option(help="Folder to write; must be new.")],
    as_json: AsJson = False,
) -> None:
    """Write a model for other programs, after checking that they compute the same; refused where they cannot.

    Formats: diffusers, its own classes; pipeline, a folder with its own code that diffusers loads; onnx, files for
    onnxruntime and others, with the extra `onnx`.
    """
    from latentflow.commands.export import export as run

    result = run(model, out, request)
    error = float(f"{result.error:.1e}") if as_json else f"exact to {result.error:.0e}"
    show({"folder": str(result.folder), **result.parts, "largest relative error": error}, as_json)


@verb(example="latentflow push runs/streets me/streets --private")
def push(
    model: Annotated[str, typer.Argument(help="A model folder, a run folder, a hub id or the folder of an adapter.")],
    repo_id: Annotated[str, typer.Argument(metavar="NAME", help="On the hub: owner/name, or owner/name@branch.")],
    private: Annotated[
        bool, typer.Option("--private", help="Create a private repository, for you and those you invite.")
    ] = False,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload a latentflow model",
    as_json: AsJson = False,
) -> None:
    """Upload a model or an adapter to the Hugging Face hub, if it can be loaded; nothing else of a run is sent."""
    from latentflow.commands.push import push as run

    show({"model": run(model, repo_id, private=private, message=message)}, as_json)
