"""The command line: parses and prints. Everything else is imported inside the subcommands, so that help is quick."""

from __future__ import annotations

import csv
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from latentflow.console import open_streams, printable, say
from latentflow.door import guarded, hush_libraries
from latentflow.errors import ConfigError, nearest

if TYPE_CHECKING:
    from latentflow.model.config import SamplingPreset
    from latentflow.runtime import Runtime
    from latentflow.sampling.named_files import Pictures

app = typer.Typer(
    name="latentflow",
    help="Train, sample and measure image generators by flow matching in the latent space of a pretrained autoencoder.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

_MUCH_CUT = 0.2  # of a picture, by its square; 4:3 has 0.25


class Dtype(str, Enum):
    """How a latent cache stores its moments."""

    float16 = "float16"
    float32 = "float32"


class Precision(str, Enum):
    """What networks compute in."""

    auto = "auto"
    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"
    fp16 = "fp16"


class MaskPolicy(str, Enum):
    """Which holes are drawn for inpainting."""

    mixed = "mixed"
    strokes = "strokes"
    boxes = "boxes"
    halves = "halves"
    borders = "borders"


class ExportFormat(str, Enum):
    """What a model is exported for."""

    diffusers = "diffusers"


AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or mps; otherwise a GPU if there is one. Of several processes each gets its own."),
]
ComputesIn = Annotated[
    Precision, typer.Option(help="What the network computes in; auto: bf16 on a GPU that has it, else fp32.")
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

Model = Annotated[str, typer.Argument(help="A model folder, a run folder or a hub id.")]
Picture = Annotated[
    Path, typer.Argument(help="An image; its square middle is scaled to the size of the training images.")
]
Classes = Annotated[
    str | None,
    typer.Option(
        help="Names, dealt out in turn: cat,dog or 'cat,\"Doe, Jane\"' where a name has a comma; or indices, "
        "'#3,#7' in quotes. 'none' ('#none' where a class is called none): told no class."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the first image; image i has seed SEED + i.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images computed together; does not change them.")]


Preset = dict[str, Any] | None
"""Stands in a verb's signature for the options of `_preset`."""


def _preset(
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1: off.")] = None,
    guidance_interval: Annotated[
        str | None, typer.Option(help="Times between which guidance acts, for example 0.1,0.8")
    ] = None,
    guided_by: Annotated[
        str | None,
        typer.Option(help="What guidance strengthens: label, inpainting, semantic_map; else all that is told."),
    ] = None,
    guided_channels: Annotated[
        int | None, typer.Option(min=1, help="Guidance acts on the first latent channels alone; otherwise on all.")
    ] = None,
    solver: Annotated[str | None, typer.Option(help="euler, midpoint, heun, rk4, ab2, ab3, bosh3 or dopri5.")] = None,
    steps: Annotated[int | None, typer.Option(help="Intervals of a fixed-step solver.")] = None,
    shift: Annotated[float | None, typer.Option(help="Time shift of the grid; 1: even.")] = None,
    rtol: Annotated[float | None, typer.Option(help="Relative tolerance of bosh3 and dopri5.")] = None,
    atol: Annotated[float | None, typer.Option(help="Absolute tolerance of bosh3 and dopri5.")] = None,
) -> dict[str, Any]:
    """What every verb that draws understands; what is left out comes from the model's preset."""
    return {
        "guidance": guidance,
        "guidance_interval": _pair(guidance_interval, "--guidance-interval"),
        "guided_by": _names(guided_by),
        "guided_channels": guided_channels,
        "solver": solver,
        "steps": steps,
        "shift": shift,
        "rtol": rtol,
        "atol": atol,
    }


def _draws(verb: Callable[..., None]) -> Callable[..., None]:
    """Put the options of `_preset` in the place of a verb's parameter `preset`, which receives what they say."""
    shared = inspect.signature(_preset, eval_str=True).parameters
    parameters = []
    for name, parameter in inspect.signature(verb, eval_str=True).parameters.items():
        parameters += shared.values() if name == "preset" else [parameter]

    def command(**options: Any) -> None:
        preset = _preset(**{name: options.pop(name) for name in shared})
        verb(**options, preset=preset)

    command.__name__, command.__doc__ = verb.__name__, verb.__doc__
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__signature__ = inspect.Signature(parameters)
    return command


@app.callback()
def shared(
    no_verify: Annotated[
        bool,
        typer.Option("--no-verify", help="Do not compare what is read with its checksums; also after the command."),
    ] = False,
) -> None:
    """What every command understands."""
    if no_verify:
        from latentflow.artifacts import verify_checksums

        verify_checksums(False)


@app.command(epilog="Example: latentflow encode photos --autoencoder stabilityai/sd-vae-ft-mse --out caches/photos")
def encode(
    data: Annotated[str, typer.Argument(help="A folder or zip of images, an LMDB, or synthetic:COUNT.")],
    autoencoder: Annotated[str, typer.Option(help="A diffusers autoencoder: folder, hub id, or 'shapes'.")],
    out: Annotated[Path, typer.Option(help="The latent cache, a folder.")],
    image_size: Annotated[int, typer.Option(help="Side of the square images in pixels.")] = 256,
    first: Annotated[
        int | None, typer.Option(help="Encode so many images: the first of each class, then the second, and so on.")
    ] = None,
    flips: Annotated[bool, typer.Option("--flips", help="Also encode the mirrored images.")] = False,
    dtype: Annotated[Dtype, typer.Option(help="How moments are stored.")] = Dtype.float16,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images encoded together; not given: 32, and on a GPU more small ones.")
    ] = None,
    shard_size: Annotated[
        int, typer.Option(min=1, help="Images per shard; a kill loses the one at hand and the one being written.")
    ] = 1024,
    num_workers: Annotated[
        int | None,
        typer.Option(min=0, max=256, help="Processes that read images; 0: threads; not given: as many as pay."),
    ] = None,
    mask_variants: Annotated[
        int, typer.Option(min=0, help="Images with holes encoded of each image, for inpainting; 0: none.")
    ] = 0,
    mask_policy: Annotated[MaskPolicy, typer.Option(help="How their holes are drawn.")] = MaskPolicy.mixed,
    mask_folder: Annotated[
        Path | None, typer.Option(help="Mask files to choose from instead; white is painted anew.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at a broken image instead of leaving it out.")] = False,
    look: Annotated[
        int | None,
        typer.Option(help="Encode nothing; write OUT.png, which shows so many images as a model will see them."),
    ] = None,
    device: Device = None,
    precision: Annotated[
        Precision, typer.Option(help="What the autoencoder computes in; tf32 is float32 where there is no TF32.")
    ] = Precision.tf32,
    as_json: AsJson = False,
) -> None:
    """Encode images once into a latent cache. Repeat the command to go on after a kill."""
    if look is not None:
        _look(data, out, look, autoencoder, image_size, first, device, as_json)
        return
    from latentflow.commands.encode import encode as run
    from latentflow.data.painting.mask_rules import MaskRules

    result = run(
        data,
        out,
        autoencoder=autoencoder,
        image_size=image_size,
        first=first,
        flips=flips,
        dtype=dtype.value,
        batch_size=batch_size,
        shard_size=shard_size,
        masks=MaskRules(policy=mask_policy.value, folder=str(mask_folder or "")),
        mask_variants=mask_variants,
        strict=strict,
        num_workers=num_workers,
        precision=precision.value,
        runtime=_runtime(device),
    )
    if result.index is None:
        say("this process is done; another one will finish the cache")
        return
    index = result.index
    rows = {
        "cache": str(out),
        "images": index.num_images,
        "classes": len(index.plan.class_names),
        "moments": " x ".join(map(str, index.plan.moments_shape)),
        "map classes": len(index.plan.map_class_names),
        "mask variants": index.plan.mask_variants,
        "flips": index.plan.flips,
        "shards": len(index.shards),
        "broken": len(index.broken),
        "cut away": "the square leaves out {:.0%} of a picture on average, {:.0%} at most".format(*index.cut),
        "seconds": round(result.seconds, 1),
    }
    _report(rows, as_json)
    if index.cut[0] > _MUCH_CUT:
        say(
            f"note: {index.cut[0]:.0%} of the pictures lies outside of their squares, and is never learned; where that "
            "matters, cut them into squares yourself"
        )
    for name in index.broken:
        say(f"left out: {name}")
    if not result.is_new:
        say("everything was encoded already, from the same images; nothing was done")


def _look(
    data: str,
    out: Path,
    num: int,
    autoencoder: str,
    image_size: int,
    first: int | None,
    device: str | None,
    as_json: bool,
) -> None:
    from latentflow.commands.look import look as run

    seen = run(
        data,
        out,
        num=num,
        autoencoder=autoencoder,
        image_size=image_size,
        first=first,
        runtime=_runtime(device, Precision.tf32),
    )
    cut = f"the square leaves out {sum(seen.cut) / len(seen.cut):.0%} on average, {max(seen.cut):.0%} at most"
    given_back = f"{seen.psnr:.1f} dB PSNR by the autoencoder"
    _report({"sheet": str(seen.sheet), "images": len(seen.names), "cut away": cut, "given back": given_back}, as_json)


@app.command(epilog="Example: latentflow prepare camvid camvid.zip --out data/camvid")
def prepare(
    kind: Annotated[str, typer.Argument(help="camvid, celebamask-hq, ade20k or coco-stuff.")],
    source: Annotated[Path, typer.Argument(help="The data set as published: a folder or a zip.")],
    out: Annotated[Path, typer.Option(help="A new folder; it gets one folder per split.")],
    link: Annotated[
        bool, typer.Option("--link", help="Hard links instead of copies: editing one then edits the original as well.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Bring a published data set of images and semantic maps into the layout that is read here."""
    from latentflow.commands.prepare import prepare as run

    result = run(kind, source, out, link=link)
    splits = {str(out / split): f"{number} images with maps" for split, number in result.num_images.items()}
    _report({**splits, "map classes": result.num_map_classes, "seconds": round(result.seconds, 1)}, as_json)


@app.command(epilog="Example: latentflow train cifar10_64 data.path=caches/cifar10 autoencoder=taesd out=runs/cifar10")
def train(
    recipe: Annotated[str, typer.Argument(help="A name from `latentflow recipes`, or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example training.steps=1000")] = None,
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

    told = _teller(print_recipe)
    if dry_run:
        told(prepare(given, _runtime(device), allow_change=allow_change or ()))
        say("all is well; nothing was written")
        return
    runtime = _runtime(device)
    result = run(given, allow_change=allow_change or (), on_prepared=told, runtime=runtime)
    for name in result.broken:
        say(f"left out: {name}")
    if not result.outcome.finished:
        say(f"stopped by a signal at step {result.outcome.step}, saved; repeat the command to go on")
        raise typer.Exit(128 + (result.outcome.signal or 0))
    if runtime.is_main:
        say(f"{result.outcome.step} steps done; the model is {result.run / 'model'}")


@app.command(epilog="Example: latentflow plan imnet_f8_ditb2 training.batch_size=256 --device-memory 80")
def plan(
    recipe: Annotated[str, typer.Argument(help="A name from `latentflow recipes`, or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example training.batch_size=64")] = None,
    device_memory: Annotated[
        float | None, typer.Option(min=0.001, help="Plan for a GPU with so many GiB, in place of this machine.")
    ] = None,
    device_tflops: Annotated[
        float | None, typer.Option(min=0.001, help="Its speed as its maker states it, in place of steps probed here.")
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="That share a batch, each with a device.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Of the data, where they are not here.")] = None,
    classes: Annotated[int | None, typer.Option(min=0, help="Of the data, where they are not here.")] = None,
    latents: Annotated[
        str | None, typer.Option(help="Of an image, as 4x32x32, where the autoencoder is not here.")
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run will take before it is begun: memory by part, time, disk, and what would make it fit."""
    from latentflow.commands.plan import plan as run
    from latentflow.training.config import load_recipe

    given = load_recipe(recipe, overrides or ())
    given = given.model_copy(update={"out": given.out or f"runs/{Path(recipe).stem}"})
    found = run(
        given,
        Path(recipe).stem,
        _runtime(device),
        device_memory=device_memory,
        device_tflops=device_tflops,
        num_processes=processes,
        num_images=images,
        num_classes=classes,
        latents=_latent_shape(latents),
    )
    if as_json:
        _report(found.record(), as_json)
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_column(style="dim")
    for title, rows in found.sections().items():
        if title:
            table.add_row()
            table.add_row(f"[bold]{escape(title)}")
        for name, value, known in rows:
            table.add_row(f"[bold]{name}" if not title else f"  {name}", escape(printable(value)), known)
    Console().print(table)
    for line in found.advice:
        say(line)


@app.command(epilog="Example: latentflow train-autoencoder own_images data.path=photos out=runs/photos_autoencoder")
def train_autoencoder(
    recipe: Annotated[str, typer.Argument(help="A name from `latentflow recipes`, or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example training.steps=1000")] = None,
    device: Device = None,
    allow_change: AllowChange = None,
    dry_run: DryRun = False,
    print_recipe: PrintRecipe = False,
) -> None:
    """Train a first stage on one device. Repeat the command to resume exactly where it was stopped."""
    from latentflow.training.first_stage import load_autoencoder_recipe

    given = load_autoencoder_recipe(recipe, overrides or ())
    given = given.model_copy(update={"out": given.out or f"runs/{Path(recipe).stem}_autoencoder"})
    from latentflow.commands.train_autoencoder import prepare, train_first_stage

    told = _teller(print_recipe)
    if dry_run:
        told(prepare(given, _runtime(device), allow_change=allow_change or ()))
        say("all is well; nothing was written")
        return
    result = train_first_stage(given, allow_change=allow_change or (), on_prepared=told, runtime=_runtime(device))
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
    _report(rows, as_json=False)


@app.command(epilog="Example: latentflow sample runs/cifar10 --num 16 --classes cat,dog --guidance 1.5 --out samples")
@_draws
def sample(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.")],
    num: Annotated[int, typer.Option(help="Number of images.")] = 16,
    classes: Classes = None,
    preset: Preset = None,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    columns: Annotated[int | None, typer.Option(min=1, help="Columns of grid.png.")] = None,
    device: Device = None,
    precision: ComputesIn = Precision.auto,
    as_json: AsJson = False,
) -> None:
    """Draw images: one PNG per seed with its request in the metadata, and a grid of the first 64.

    Repeat the command to go on after a kill. A folder that holds other pictures is refused.
    """
    from latentflow.commands.sample import sample as run

    result = run(
        model,
        out,
        num=num,
        classes=_classes(classes),
        **preset,
        seed=seed,
        batch_size=batch_size,
        columns=columns,
        runtime=_runtime(device, precision),
    )
    rows = {
        "folder": str(out),
        "images": len(result.files),
        "there already": result.kept,
        "grid": str(result.grid),
        "evaluations per image": round(result.evaluations, 2),
        "seconds": round(result.seconds, 2),
        "images per second": round((len(result.files) - result.kept) / max(result.seconds, 1e-9), 2),
    }
    _report(rows, as_json)


@app.command(epilog="Example: latentflow inpaint runs/streets street.jpg hole.png --num 4 --feather 8 --out filled.png")
@_draws
def inpaint(
    model: Model,
    image: Annotated[Path, typer.Argument(help="An image of any size.")],
    mask: Annotated[Path, typer.Argument(help="Of the image's size; white is painted anew, black is kept.")],
    out: Annotated[Path, typer.Option(help="The PNG file; several are named like it, with their seeds.")],
    num: Annotated[int, typer.Option(help="Number of seeds, for variety.")] = 1,
    semantic_map: Annotated[
        Path | None, typer.Option("--map", help="A semantic map of the image's size, for a model that is told maps.")
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            help="What the model sees: 'window', a square around the hole scaled to the training size (the default "
            "where there is one); 'whole', the whole image, its shorter side scaled to that size; 'native', as it is."
        ),
    ] = None,
    feather: Annotated[int, typer.Option(help="Pixels inside the hole over which colours meet the border's.")] = 0,
    method: Annotated[
        str | None,
        typer.Option(help="'condition' (a model trained for it) or 'replacement' (any model); else the best there is."),
    ] = None,
    classes: Classes = None,
    preset: Preset = None,
    seed: Seed = 0,
    batch_size: BatchSize = 4,
    device: Device = None,
    precision: ComputesIn = Precision.auto,
    as_json: AsJson = False,
) -> None:
    """Paint the white part of a mask anew; every other pixel stays as it is, to the bit, with alpha and profile."""
    from latentflow.commands.inpaint import inpaint as run

    result = run(
        model,
        image,
        mask,
        out,
        num=num,
        semantic_map=semantic_map,
        fit=fit,
        feather=feather,
        method=method,
        classes=_classes(classes),
        **preset,
        seed=seed,
        batch_size=batch_size,
        runtime=_runtime(device, precision),
    )
    used, (height, width) = result.request.inputs, result.request.image_size
    if used["method"] == "replacement" and method is None:
        say("the model was not trained for inpainting: what is known was put in its place along the path")
    left, top, right, bottom = map(int, used["frame"].split())
    rows = {
        "method": used["method"],
        "seen": f"{right - left} x {bottom - top} pixels from ({left}, {top}), at {width} x {height}",
    }
    _report({**rows, **_picture_rows(result)}, as_json)


@app.command(epilog="Example: latentflow mask-to-image runs/streets map.png --num 4 --out street.png")
@_draws
def mask_to_image(
    model: Model,
    semantic_map: Annotated[
        Path, typer.Argument(metavar="MAP", help="A PNG of class indices, or of the colours of the model's palette.")
    ],
    out: Annotated[Path, typer.Option(help="The PNG file; several are named like it, with their seeds.")],
    num: Annotated[int, typer.Option(help="Number of seeds, for variety.")] = 1,
    native: Annotated[
        bool,
        typer.Option(
            "--native", help="Paint the map at its own size; otherwise its square middle, scaled as in training."
        ),
    ] = False,
    classes: Classes = None,
    preset: Preset = None,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    device: Device = None,
    precision: ComputesIn = Precision.auto,
    as_json: AsJson = False,
) -> None:
    """Paint a semantic map; its classes are checked against those of the model."""
    from latentflow.commands.mask_to_image import mask_to_image as run

    result = run(
        model,
        semantic_map,
        out,
        num=num,
        native=native,
        classes=_classes(classes),
        **preset,
        seed=seed,
        batch_size=batch_size,
        runtime=_runtime(device, precision),
    )
    _report(_picture_rows(result), as_json)


@app.command(epilog="Example: latentflow loss runs/streets --data streets/val")
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

    results = run(model, data, num=num, batch_size=batch_size, seed=seed, runtime=_runtime(device, Precision.fp32))
    rows = {" + ".join(r.told) or "nothing": f"{r.loss:.4f} +- {r.standard_error:.4f}" for r in results}
    if as_json:
        rows = {name: asdict(result) for name, result in zip(rows, results, strict=True)}
    _report(rows, as_json)


@app.command(epilog="Example: latentflow benchmark runs/cifar10 --batch-sizes 1,8,32 --solver euler --steps 20")
@_draws
def benchmark(
    model: Model,
    num: Annotated[int, typer.Option(help="Images of each repeat, rounded up to whole batches.")] = 8,
    batch_sizes: Annotated[str, typer.Option(help="Numbers of images computed together.")] = "1,8",
    repeats: Annotated[int, typer.Option(help="Timed repeats, after one that warms up.")] = 3,
    preset: Preset = None,
    seed: Seed = 0,
    device: Device = None,
    precision: ComputesIn = Precision.auto,
    as_json: AsJson = False,
) -> None:
    """Say what drawing an image costs: network calls, milliseconds and memory."""
    from latentflow.commands.benchmark import benchmark as run

    sizes = _numbers(batch_sizes, "--batch-sizes", int)
    result = run(
        model, num=num, batch_sizes=sizes, repeats=repeats, seed=seed, runtime=_runtime(device, precision), **preset
    )
    if as_json:
        batches = [{**asdict(batch), "images_per_second": batch.images_per_second} for batch in result.batches]
        _report({**asdict(result), "sampling": result.sampling.model_dump(mode="json"), "batches": batches}, as_json)
        return
    sampling, spread = result.sampling, f"{result.fewest} to {result.most}"
    rows = {
        "drawn": f"{result.num} images, {sampling.solver}, guidance {sampling.guidance:g}",
        "told": ", ".join(result.told) or "nothing",
        "evaluations per image": f"{result.evaluations:g}" + (f", {spread}" if len(result.histogram) > 1 else ""),
    }
    if len(result.histogram) > 1:
        rows["images by evaluations"] = ", ".join(f"{calls}: {n}" for calls, n in result.histogram.items())
    for batch in result.batches:
        memory = "" if batch.peak_bytes is None else f", {batch.peak_bytes / 2**20:,.0f} MiB"
        rows[f"batch of {batch.batch_size}"] = (
            f"{batch.network_milliseconds:.2f} ms network + {batch.decoder_milliseconds:.2f} ms decoder per image, "
            f"{batch.images_per_second:.2f} images/s{memory}"
        )
    calls = "not countable" if result.multiply_adds is None else f"{result.multiply_adds / 1e9:.4g} G multiply-adds"
    rows |= {
        "network": f"{result.parameters:,} parameters, {calls} per evaluation",
        "decoder": f"{result.decoder_parameters:,} parameters",
        "device": f"{result.device}; torch has {result.threads} CPU thread" + ("s" if result.threads > 1 else ""),
        "precision": result.precision,
        "memory": result.memory,
    }
    _report(rows, as_json)


@app.command(epilog="Example: latentflow sweep runs/cifar10 --data caches/cifar10.safetensors --budget 600 --write")
def sweep(
    model: Model,
    data: Annotated[str, typer.Option(help="Images as for `encode`, or a file of reference statistics.")],
    out: Annotated[Path, typer.Option(help="Folder for page.html, sweep.json, sweep.svg and the candidates.")] = Path(
        "sweep"
    ),
    features: Annotated[str, typer.Option(help="What images are compared by: random, latents, inception, dinov2.")] = (
        "random"
    ),
    weights: Annotated[
        str | None, typer.Option(help="Of inception, a file; of dinov2, a folder or hub id; otherwise the usual ones.")
    ] = None,
    solvers: Annotated[str | None, typer.Option(help="Otherwise euler,heun,ab2,dopri5")] = None,
    steps: Annotated[str | None, typer.Option(help="Of fixed-step solvers; otherwise 4,8,16,32")] = None,
    tolerances: Annotated[str | None, typer.Option(help="Of bosh3 and dopri5; otherwise 1e-2,1e-3")] = None,
    guidance: Annotated[
        str | None, typer.Option(help="Scales; otherwise 1,1.5,2,3, or 1 alone where the model cannot be guided.")
    ] = None,
    intervals: Annotated[str, typer.Option(help="Times between which guidance acts: 0:1,0.1:0.8")] = "0:1",
    shifts: Annotated[str, typer.Option(help="Time shifts of the grid; 1: even.")] = "1",
    num: Annotated[int, typer.Option(help="Images per candidate, in the last round.")] = 1000,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which nothing more is begun. All candidates then draw few images, the promising half "
            "twice as many, and so on; without a budget all of them draw --num."
        ),
    ] = None,
    margin: Annotated[
        float, typer.Option(help="A difference of distances that does not matter, as a share of the other's.")
    ] = 0.1,
    write: Annotated[
        bool, typer.Option("--write", help="Make the best preset that of the model; nothing where it is undecided.")
    ] = False,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    device: Device = None,
    precision: ComputesIn = Precision.auto,
    as_json: AsJson = False,
) -> None:
    """Measure quality against cost, and name the best sampling preset if the numbers show one. Repeat it to go on."""
    from latentflow.commands.sweep import sweep as run
    from latentflow.pages.sweep import HEADER, rows, summary, verdict

    given = {
        "solvers": _names(solvers),
        "steps": _numbers(steps, "--steps", int),
        "tolerances": _numbers(tolerances, "--tolerances"),
        "guidances": _numbers(guidance, "--guidance"),
        "intervals": [_pair(text, "--intervals", ":") for text in _names(intervals)],
        "shifts": _numbers(shifts, "--shifts"),
    }
    result = run(
        model,
        data,
        out,
        features=features,
        weights=weights,
        **{name: value for name, value in given.items() if value is not None},
        num=num,
        budget=budget,
        margin=margin,
        batch_size=batch_size,
        seed=seed,
        write=write,
        runtime=_runtime(device, precision),
    )
    if as_json:
        _report(summary(result), as_json)
        return
    table = Table(*HEADER, box=None, pad_edge=False)
    for row in rows(result):
        table.add_row(*map(escape, row), style="bold" if row[0] == result.best else None)
    Console().print(table)
    name = "new preset" if result.written else "best preset"
    presets = {
        "old preset": _preset_line(result.old),
        name: "undecided" if result.new is None else _preset_line(result.new),
        "verdict": " ".join(verdict(result)),
    }
    _report({**presets, "page": str(out / "page.html"), "seconds": round(result.seconds, 1)}, as_json)
    for note in [*result.notes, *(f"{name} could not be measured: {why}" for name, why in result.failed.items())]:
        say(note)


@app.command(epilog="Example: latentflow evaluate runs/pets --data pets --num 10000 --guidance 1.5 --out pets.json")
@_draws
def evaluate(
    model: Annotated[
        str,
        typer.Argument(help="A model; a folder or zip of PNG samples; with --reconstruction, also an autoencoder."),
    ],
    data: Annotated[
        str, typer.Option(help="Real images as for `encode`, or statistics of them: .safetensors, .npz or .npy.")
    ],
    metrics: Annotated[
        str | None,
        typer.Option(
            help="fid, kid, is, precision, recall, density, coverage; psnr, ssim, lpips of pairs; psnr-hole, "
            "ssim-hole, p-ids, u-ids of holes; miou of maps. Otherwise the usual ones of the task."
        ),
    ] = None,
    num: Annotated[
        int | None, typer.Option(help="Number of images; otherwise 50,000 drawn ones, or all there are.")
    ] = None,
    task: Annotated[
        str, typer.Option(help="sample; inpaint, which fills holes in DATA; mask-to-image, which paints its maps.")
    ] = "sample",
    reconstruction: Annotated[
        bool, typer.Option("--reconstruction", help="Score what the autoencoder gives back of DATA: the floor.")
    ] = False,
    features: Annotated[
        str, typer.Option(help="inception (FID); dinov2; latents or random, which need no download.")
    ] = "inception",
    weights: Annotated[str | None, typer.Option(help="Of the features: a file; otherwise downloaded once.")] = None,
    features_precision: Annotated[
        str, typer.Option(help="Of the features: fp32, as published; tf32 or bf16 are faster, and other features.")
    ] = "fp32",
    labels: Annotated[
        str | None,
        typer.Option(help="Class of image i: balanced (the default), uniform, data (as often as in DATA) or none."),
    ] = None,
    preset: Preset = None,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    num_workers: Annotated[
        int | None,
        typer.Option(min=0, max=256, help="Processes that read images; 0: threads; not given: as many as pay."),
    ] = None,
    masks: Annotated[
        str | None,
        typer.Option(help="Holes: a folder of masks, or mixed, strokes, boxes, halves, borders; else as trained."),
    ] = None,
    segmenter: Annotated[
        str | None, typer.Option(help="For miou: package.module:function, uint8 [B, 3, H, W] to classes [B, H, W].")
    ] = None,
    lpips: Annotated[
        Path | None,
        typer.Option(help="For lpips: a folder with alexnet-owt-7be5be79.pth and alex.pth, or one file of both."),
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Of an autoencoder on its own.")] = None,
    resamples: Annotated[
        int | None,
        typer.Option(help="Find intervals by so many resamples; 0: none; otherwise by the spread over images."),
    ] = None,
    neighbours: Annotated[
        int,
        typer.Option(help="The most images of each kind that precision, recall, density and coverage look at; 0: all."),
    ] = 10_000,
    reference_out: Annotated[
        Path | None, typer.Option(help="File for the statistics of DATA, .safetensors; otherwise next to OUT.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder, or a .json file; repeat the command to go on after a kill.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Another report, to compare with: its folder or its .json file; refused where it was not found alike."
        ),
    ] = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="Compare all the same.")] = False,
    device: Device = None,
    precision: ComputesIn = Precision.auto,
    as_json: AsJson = False,
) -> None:
    """Score the images of a model, or images in files, against real ones; the result says what it depends on."""
    from latentflow.commands.evaluate import evaluate as run
    from latentflow.commands.evaluate import evaluation_rows

    result = run(
        model,
        data,
        task=task,
        reconstruction=reconstruction,
        metrics=_names(metrics),
        num=num,
        features=features,
        weights=weights,
        features_precision=features_precision,
        labels=labels,
        masks=masks,
        segmenter=segmenter,
        lpips=lpips,
        image_size=image_size,
        **preset,
        seed=seed,
        batch_size=batch_size,
        num_workers=num_workers,
        resamples=resamples,
        neighbours=neighbours,
        reference_out=reference_out,
        out=out,
        against=against,
        anyway=anyway,
        runtime=_runtime(device, precision),
    )
    if result is None:
        say("this process is done; the first one computes the scores")
        return
    report, comparison = result.report, result.comparison
    if as_json:
        compared = {"comparison": asdict(comparison)} if comparison else {}
        _report({**report.model_dump(mode="json"), **compared}, as_json)
        return
    _report(evaluation_rows(result), as_json)
    for note in [*(comparison.differing if comparison else []), *report.warnings]:
        say(note)


@app.command(epilog="Example: latentflow bound runs/pets --data pets --out bound")
def bound(
    model: Model,
    data: Annotated[str, typer.Option(help="Images as for `encode`; best those that the model was not trained on.")],
    out: Annotated[Path | None, typer.Option(help="Folder for page.html, bound.json and the charts.")] = None,
    num: Annotated[int, typer.Option(help="Images to reconstruct, and draws for the loss in each bin of time.")] = 256,
    num_data: Annotated[
        int, typer.Option(min=1, help="Images whose latents stand for the data, if there are as many.")
    ] = 4096,
    points: Annotated[int, typer.Option(help="States of each kind at which derivatives are taken.")] = 64,
    bins: Annotated[int, typer.Option(help="Bins of time.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Images computed together; less needs less memory.")] = 8,
    seed: Annotated[int, typer.Option(help="Of images, times and noises.")] = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure the paper's bound on how far the model's images can be from the data, term by term."""
    from latentflow.commands.bound import bound as run
    from latentflow.pages.bound import bound_record, looseness, term_rows, total_rows, verdict

    measured = run(
        model,
        data,
        out,
        num=num,
        num_data=num_data,
        points=points,
        bins=bins,
        batch_size=batch_size,
        seed=seed,
        runtime=_runtime(device, Precision.fp32),
    )
    if as_json:
        _report(bound_record(measured), as_json)
        return
    rows = {}
    for name, value, spread, _, kind in term_rows(measured):
        rows[name] = f"{value}{f' ± {spread}' if spread else ''}  ({kind})"
    for variant, error, factor, flow, total, *_ in total_rows(measured):
        rows[f"bound: {variant}, {error}"] = f"{total}  (flow {flow} in latents, errors grow {factor} times)"
    if out is not None:
        rows["page"] = str(out / "page.html")
    _report(rows, as_json)
    say(verdict(measured))
    say(looseness(measured))


@app.command(epilog="Example: latentflow diagnose runs/pets --data pets/val --train pets/train --out diagnosis")
def diagnose(
    model: Model,
    data: Annotated[str, typer.Option(help="Images as for `encode`; best those that the model was not trained on.")],
    out: Annotated[Path, typer.Option(help="Folder for page.html, diagnose.json and pictures.")] = Path("diagnosis"),
    train: Annotated[
        str | None, typer.Option(help="Images it was trained on, to look for copies; otherwise half of DATA.")
    ] = None,
    num: Annotated[int, typer.Option(help="Images of DATA; half as many are drawn.")] = 512,
    num_train: Annotated[int, typer.Option(help="Images of --train, if there are as many.")] = 4096,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; otherwise the model's preset.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images computed together.")] = 16,
    seed: Seed = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Say what is right and wrong with a model: loss, trajectories, latents, copies, and the autoencoder's share."""
    from latentflow.analysis.verdicts import WORDS, verdicts
    from latentflow.commands.diagnose import diagnose as run

    diagnosis = run(
        model,
        data,
        out,
        train=train,
        num=num,
        num_train=num_train,
        guidance=guidance,
        batch_size=batch_size,
        seed=seed,
        runtime=_runtime(device, Precision.fp32),
    )
    page = str(out / "page.html")
    if as_json:
        found = {one.topic: one.model_dump() for one in verdicts(diagnosis)}
        _report({"page": page, "seconds": diagnosis.seconds, "verdicts": found}, as_json)
        return
    rows = {one.topic: f"{WORDS[one.mark]}. {one.text}" for one in verdicts(diagnosis)}
    _report({**rows, "page": page}, as_json)


@app.command(epilog="Example: latentflow image-to-image runs/pets cat.png --strength 0.6 --classes cat --out new.png")
@_draws
def image_to_image(
    model: Model,
    image: Picture,
    out: Annotated[Path, typer.Option(help="The PNG file; several are named like it, with their seeds.")],
    strength: Annotated[
        float, typer.Option(help="The time at which drawing starts: near 0 little changes; 1: nothing is left of it.")
    ] = 0.6,
    num: Annotated[int, typer.Option(help="Number of seeds, for variety.")] = 1,
    classes: Classes = None,
    preset: Preset = None,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    device: Device = None,
    precision: ComputesIn = Precision.auto,
    as_json: AsJson = False,
) -> None:
    """Redraw an image: mix noise into it, and take it out again. No class is told unless one is given."""
    from latentflow.commands.image_to_image import image_to_image as run

    result = run(
        model,
        image,
        out,
        strength=strength,
        num=num,
        classes=_classes(classes),
        **preset,
        seed=seed,
        batch_size=batch_size,
        runtime=_runtime(device, precision),
    )
    _report(_picture_rows(result), as_json)


@app.command(epilog="Example: latentflow interpolate runs/cifar10 --seeds 3,8 --classes cat,dog --num 9 --out frames")
@_draws
def interpolate(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the frames and grid.png, which shows them in a row.")],
    seeds: Annotated[str, typer.Option(help="From, to; twice the same to change the class alone.")] = "0,1",
    num: Annotated[int, typer.Option(help="Number of frames, the two ends included.")] = 9,
    classes: Annotated[
        str | None,
        typer.Option(
            help="One for all frames, or two: from, to; by name, or by index like '#3'; 'none': told no class. "
            "Otherwise those of the two seeds, as in `sample`."
        ),
    ] = None,
    preset: Preset = None,
    batch_size: BatchSize = 16,
    device: Device = None,
    precision: ComputesIn = Precision.auto,
    as_json: AsJson = False,
) -> None:
    """Draw the frames between two seeds, and between two classes."""
    from latentflow.commands.interpolate import interpolate as run

    result = run(
        model,
        out,
        seeds=_two_seeds(seeds),
        num=num,
        classes=_classes(classes),
        **preset,
        batch_size=batch_size,
        runtime=_runtime(device, precision),
    )
    rows = {
        "folder": str(out),
        "frames": len(result.files),
        "grid": str(result.grid),
        "evaluations per image": round(result.evaluations, 2),
        "seconds": round(result.seconds, 2),
    }
    _report(rows, as_json)


@app.command(epilog="Example: latentflow vary runs/cifar10 --seed 5 --classes cat --amount 0.3 --num 8 --out near")
@_draws
def vary(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the pictures and grid.png, which begins with the original.")],
    seed: Annotated[int, typer.Option(help="Seed of the original.")] = 0,
    amount: Annotated[
        float, typer.Option(help="How far to go: 0: the original itself; 1: pictures that have nothing to do with it.")
    ] = 0.3,
    num: Annotated[int, typer.Option(help="Number of variations.")] = 8,
    classes: Annotated[
        str | None,
        typer.Option(
            help="At most one, by name or by index like '#3'; 'none': told no class. Otherwise the seed's own, as in "
            "`sample`."
        ),
    ] = None,
    preset: Preset = None,
    batch_size: BatchSize = 16,
    device: Device = None,
    precision: ComputesIn = Precision.auto,
    as_json: AsJson = False,
) -> None:
    """Draw the picture of one seed, and others near it."""
    from latentflow.commands.vary import vary as run

    result = run(
        model,
        out,
        seed=seed,
        num=num,
        amount=amount,
        classes=_classes(classes),
        **preset,
        batch_size=batch_size,
        runtime=_runtime(device, precision),
    )
    rows = {
        "folder": str(out),
        "original": str(result.files[0]),
        "variations": len(result.files) - 1,
        "grid": str(result.grid),
        "evaluations per image": round(result.evaluations, 2),
        "seconds": round(result.seconds, 2),
    }
    _report(rows, as_json)


@app.command(epilog="Example: latentflow invert runs/cifar10 cat.png --classes cat --table --out inverted")
@_draws
def invert(
    model: Model,
    image: Picture,
    out: Annotated[
        Path, typer.Option(help="Folder for input.png, autoencoder.png, round_trip.png and noise.safetensors.")
    ],
    classes: Annotated[
        str | None, typer.Option(help="At most one, by name, or by index like '#3'; otherwise told no class.")
    ] = None,
    preset: Preset = None,
    table: Annotated[bool, typer.Option("--table", help="Also compare solvers, steps and tolerances.")] = False,
    device: Device = None,
    precision: ComputesIn = Precision.fp32,
    as_json: AsJson = False,
) -> None:
    """Find the noise an image would have been drawn from, and draw it again. Guidance is 1 unless it is given."""
    from latentflow.commands.invert import invert as run

    result = run(
        model,
        image,
        out,
        classes=_classes(classes),
        **preset,
        table=table,
        runtime=_runtime(device, precision),
    )
    trip = result.round_trip
    rows = {
        "folder": str(out),
        "evaluations there": result.inversion.evaluations,
        "evaluations back": trip.evaluations,
        "relative latent error": float(f"{trip.latent_error:.3g}"),
        "PSNR of the solver": round(trip.solver_psnr, 2),
        "PSNR of the autoencoder": round(trip.autoencoder_psnr, 2),
        "PSNR of both": round(trip.image_psnr, 2),
        "standard deviation of the noise": round(float(result.inversion.noise.std()), 3),
    }
    if as_json:
        _report({**rows, "table": [asdict(row) for row in result.table]}, as_json)
        return
    for row in result.table:
        setting = f"{row.steps} steps" if row.tolerance is None else f"tolerance {row.tolerance:g}"
        rows[f"{row.solver}, {setting}"] = (
            f"{row.evaluations_there:g} + {row.evaluations_back:g} evaluations, relative error of the noise "
            f"{row.noise_error:.2g}, of the round trip {row.latent_error:.2g}, {row.solver_psnr:.2f} dB"
        )
    _report(rows, as_json)


@app.command(epilog="Example: latentflow demo --out demo")
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
        figures = run(out, say=say, runtime=_runtime(device))
    except Interrupted as stop:
        say(str(stop))
        raise typer.Exit(128 + stop.signal) from None
    _report({**key_figures(figures), "report": str(out / "report.html")}, as_json)


@app.command(epilog="Example: latentflow convert lfm model_475.pth --experiment ffhq_f8_dit --out models/ffhq")
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
        runtime=_runtime(device, Precision.fp32),
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
    _report(rows, as_json)
    for note in result.notes:
        say(note)


@app.command(epilog="Example: latentflow push runs/streets me/streets --private")
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
    _report({"model": url}, as_json)


@app.command(epilog="Example: latentflow export runs/streets --out streets-diffusers")
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
    _report(rows, as_json)


@app.command(epilog="Example: latentflow recipes")
def recipes(as_json: AsJson = False) -> None:
    """List the recipes that come with the package."""
    from latentflow.training.config import load_recipe, recipe_names
    from latentflow.training.first_stage import AUTOENCODER_RECIPES, load_autoencoder_recipe

    rows = {name: load_recipe(name).description for name in recipe_names()}
    for name in recipe_names(AUTOENCODER_RECIPES):
        rows[f"train-autoencoder {name}"] = load_autoencoder_recipe(name).description
    _report(rows, as_json)


@app.command(epilog="Example: latentflow info runs/cifar10")
def info(
    model: Annotated[str, typer.Argument(help="A model folder, a run folder, a hub id, or a latent cache.")],
    as_json: AsJson = False,
) -> None:
    """Say what a model or a latent cache is; of long lists, such as class names, the first few.

    Classes are called as their folders are, or as `convert --class-names` says.
    """
    from latentflow.commands.info import describe

    facts = describe(model)
    _report(facts if as_json else {name: _shortened(value) for name, value in facts.items()}, as_json)


def _shortened(value: Any, most: int = 12) -> Any:
    """A list of texts as a line of the first few; other values as they are."""
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        return value
    if len(value) <= most:
        return ", ".join(value) or "none"
    return f"{len(value):,}: {', '.join(value[:5])}, ... (all of them with --json)"


def _runtime(device: str | None, precision: Precision = Precision.auto) -> Runtime:
    from latentflow.runtime import open_runtime

    return open_runtime(device, precision.value)


def _teller(print_recipe: bool) -> Callable[[Any], None]:
    """Prints what a prepared run is in about ten lines, or its whole recipe, once."""

    def tell(prepared: Any) -> None:
        from latentflow.training.settings import to_yaml

        lines = [f"{key:<10} {printable(value)}" for key, value in prepared.describe().items()]
        if prepared.runtime.is_main:
            typer.echo(to_yaml(prepared.recipe) if print_recipe else "\n".join(lines))

    return tell


def _picture_rows(result: Pictures) -> dict[str, Any]:
    return {
        "files": ", ".join(map(str, result.files)),
        "evaluations per image": round(result.evaluations, 2),
        "seconds": round(result.seconds, 2),
    }


def _latent_shape(text: str | None) -> tuple[int, int, int] | None:
    """Channels, height and width of latents written as 4x32x32."""
    if text is None:
        return None
    if not re.fullmatch("[1-9][0-9]{0,4}(x[1-9][0-9]{0,4}){2}", text):
        raise ConfigError(f"--latents {text!r} is not three numbers like 4x32x32: channels, height and width")
    channels, height, width = map(int, text.split("x"))
    if height != width:
        raise ConfigError(f"--latents {text}: training images are square, and so are their latents")
    return channels, height, width


def _names(text: str | None) -> list[str] | None:
    """What a list with commas names; None where it was left out."""
    return None if text is None else [name.strip() for name in text.split(",")]


def _classes(text: str | None) -> list[str] | None:
    """The classes of a list in CSV, where a name with a comma stands in quotes; None where it was left out."""
    if text is None:
        return None
    try:
        rows = list(csv.reader([text], skipinitialspace=True, strict=True))
    except csv.Error as error:
        from latentflow.errors import ConfigError

        raise ConfigError(
            f"--classes {text!r} is not a list like cat,dog ({error}); a name with a comma stands in double quotes"
        ) from None
    return rows[0] if rows and rows[0] else [""]


def _numbers(text: str | None, option: str, kind: type = float) -> list[Any] | None:
    """The numbers of a list with commas; None where it was left out."""
    try:
        return None if text is None else [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        example = "4,8,16" if kind is int else "1,1.5,2"
        raise ConfigError(f"{option} {text!r} is not a list of numbers like {example}") from None


def _preset_line(preset: SamplingPreset) -> str:
    """What a preset does, in a line."""
    from latentflow.flow.solvers import is_adaptive

    adaptive = is_adaptive(preset.solver)
    parts = [f"{preset.solver}, " + (f"tolerance {preset.rtol:g}" if adaptive else f"{preset.steps} steps")]
    parts.append(f"guidance {preset.guidance:g}")
    if preset.guidance != 1 and preset.guidance_interval != (0.0, 1.0):
        parts.append("between {:g} and {:g}".format(*preset.guidance_interval))
    if preset.shift != 1 and not adaptive:
        parts.append(f"shift {preset.shift:g}")
    return ", ".join(parts)


def _two_seeds(text: str) -> tuple[int, int]:
    try:
        first, second = (int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--seeds {text!r} is not two whole numbers like 3,8") from None
    return first, second


def _pair(text: str | None, option: str, separator: str = ",") -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(separator))
    except ValueError:
        raise ConfigError(f"{option} {text!r} is not two numbers like 0.1{separator}0.8") from None
    return low, high


def _report(rows: dict[str, Any], as_json: bool) -> None:
    """A short two-column table, or JSON for a script."""
    if as_json:
        from latentflow.artifacts import json_line

        typer.echo(json_line(rows))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")  # a path that is cut short is of no use
    for key, value in rows.items():
        table.add_row(f"[bold]{escape(printable(key))}", escape(printable(value)))
    Console().print(table)


def main() -> None:
    """Run the command line; whatever goes wrong is one line on stderr and an exit code: see `latentflow.door`."""
    open_streams()
    hush_libraries()
    sys.exit(guarded(_run))


def _run() -> int:
    command = typer.main.get_command(app)
    try:
        # what every command understands may stand anywhere, and is looked for in front
        args = sorted(sys.argv[1:], key=lambda arg: arg != "--no-verify")
        with command.make_context("latentflow", args or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as ended:
        return ended.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
    except _USAGE_ERROR as error:
        raise ConfigError(_usage_line(error)) from error
    if (runtime := sys.modules.get("latentflow.runtime")) is not None:  # which most help does without
        runtime.leave()
    return 0


_USAGE_ERROR = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""What the parser raises; typer brings its own copy of click, or uses the one that is installed."""


def _usage_line(error: Any) -> str:
    """What is wrong with a command line, and the nearest that would be right."""
    message = error.format_message().rstrip(".").replace("Value error, ", "")
    command = error.ctx.command if error.ctx else None
    path = error.ctx.command_path if error.ctx else "latentflow"
    if unknown := re.match(r"No such command '(.*?)'", message):
        return f"there is no {path} {unknown[1]!r}; {nearest(unknown[1], command.list_commands(error.ctx))}"
    if hasattr(error, "possibilities"):
        options = [name for parameter in command.params for name in parameter.opts if name.startswith("--")]
        return f"{path} has no option {error.option_name}; {nearest(error.option_name, [*options, '--help'])}"
    parameter = getattr(error, "param", None)
    if message.startswith("Missing ") and parameter is not None:
        named = [name for name in parameter.opts if name.startswith("--")]
        message = f"{path} needs {named[0] if named else (parameter.metavar or parameter.name).upper()}"
    elif message.startswith("Invalid value for ") and parameter is not None:
        value = _typed_behind(parameter.opts)
        message = f"{parameter.opts[0]}{'' if value is None else f' {value!r}'}: {message.partition(': ')[2]}"
    return f"{message}; see `{path} --help`"


def _typed_behind(options: list[str]) -> str | None:
    """The value that was given for an option; None for what is no option."""
    for word, following in zip(sys.argv, [*sys.argv[1:], None], strict=True):
        name, equals, value = word.partition("=")
        if name in options:
            return value if equals else following
    return None
