"""Verbs that draw images, and that edit them."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from latentflow.cli.options import AsJson, BatchSize, ComputesIn, Device, Model, Precision, command
from latentflow.cli.output import open_runtime, picture_rows, show
from latentflow.cli.text import class_list, two_seeds
from latentflow.console import say
from latentflow.sampling.request import SampleRequest, SamplingRequest

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

verb = partial(command, group="Drawing")


@verb(example="latentflow sample runs/cifar10 --num 16 --classes cat,dog --guidance 1.5 --out samples")
def sample(
    model: Model,
    request: SampleRequest,
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.")],
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

    runtime = open_runtime(device, precision)
    result = run(model, request, out, batch_size=batch_size, columns=columns, runtime=runtime)
    rows = {
        "folder": str(out),
        "images": len(result.files),
        "there already": result.kept,
        "grid": str(result.grid),
        "evaluations per image": round(result.evaluations, 2),
        "seconds": round(result.seconds, 2),
        "images per second": round((len(result.files) - result.kept) / max(result.seconds, 1e-9), 2),
    }
    show(rows, as_json)


@verb(example="latentflow inpaint runs/streets street.jpg hole.png --num 4 --feather 8 --out filled.png")
def inpaint(
    *,
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
    sampling: SamplingRequest,
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
        classes=class_list(classes),
        **sampling.preset(),
        seed=seed,
        batch_size=batch_size,
        runtime=open_runtime(device, precision),
    )
    used, (height, width) = result.request.inputs, result.request.image_size
    if used["method"] == "replacement" and method is None:
        say("the model was not trained for inpainting: what is known was put in its place along the path")
    left, top, right, bottom = map(int, used["frame"].split())
    rows = {
        "method": used["method"],
        "seen": f"{right - left} x {bottom - top} pixels from ({left}, {top}), at {width} x {height}",
    }
    show({**rows, **picture_rows(result)}, as_json)


@verb(example="latentflow mask-to-image runs/streets map.png --num 4 --out street.png")
def mask_to_image(
    *,
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
    sampling: SamplingRequest,
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
        classes=class_list(classes),
        **sampling.preset(),
        seed=seed,
        batch_size=batch_size,
        runtime=open_runtime(device, precision),
    )
    show(picture_rows(result), as_json)


@verb(example="latentflow image-to-image runs/pets cat.png --strength 0.6 --classes cat --out new.png")
def image_to_image(
    *,
    model: Model,
    image: Picture,
    out: Annotated[Path, typer.Option(help="The PNG file; several are named like it, with their seeds.")],
    strength: Annotated[
        float, typer.Option(help="The time at which drawing starts: near 0 little changes; 1: nothing is left of it.")
    ] = 0.6,
    num: Annotated[int, typer.Option(help="Number of seeds, for variety.")] = 1,
    classes: Classes = None,
    sampling: SamplingRequest,
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
        classes=class_list(classes),
        **sampling.preset(),
        seed=seed,
        batch_size=batch_size,
        runtime=open_runtime(device, precision),
    )
    show(picture_rows(result), as_json)


@verb(example="latentflow interpolate runs/cifar10 --seeds 3,8 --classes cat,dog --num 9 --out frames")
def interpolate(
    *,
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
    sampling: SamplingRequest,
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
        seeds=two_seeds(seeds),
        num=num,
        classes=class_list(classes),
        **sampling.preset(),
        batch_size=batch_size,
        runtime=open_runtime(device, precision),
    )
    rows = {
        "folder": str(out),
        "frames": len(result.files),
        "grid": str(result.grid),
        "evaluations per image": round(result.evaluations, 2),
        "seconds": round(result.seconds, 2),
    }
    show(rows, as_json)


@verb(example="latentflow vary runs/cifar10 --seed 5 --classes cat --amount 0.3 --num 8 --out near")
def vary(
    *,
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
    sampling: SamplingRequest,
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
        classes=class_list(classes),
        **sampling.preset(),
        batch_size=batch_size,
        runtime=open_runtime(device, precision),
    )
    rows = {
        "folder": str(out),
        "original": str(result.files[0]),
        "variations": len(result.files) - 1,
        "grid": str(result.grid),
        "evaluations per image": round(result.evaluations, 2),
        "seconds": round(result.seconds, 2),
    }
    show(rows, as_json)


@verb(example="latentflow invert runs/cifar10 cat.png --classes cat --table --out inverted")
def invert(
    *,
    model: Model,
    image: Picture,
    out: Annotated[
        Path, typer.Option(help="Folder for input.png, autoencoder.png, round_trip.png and noise.safetensors.")
    ],
    classes: Annotated[
        str | None, typer.Option(help="At most one, by name, or by index like '#3'; otherwise told no class.")
    ] = None,
    sampling: SamplingRequest,
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
        classes=class_list(classes),
        **sampling.preset(),
        table=table,
        runtime=open_runtime(device, precision),
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
        show({**rows, "table": [asdict(row) for row in result.table]}, as_json)
        return
    for row in result.table:
        setting = f"{row.steps} steps" if row.tolerance is None else f"tolerance {row.tolerance:g}"
        rows[f"{row.solver}, {setting}"] = (
            f"{row.evaluations_there:g} + {row.evaluations_back:g} evaluations, relative error of the noise "
            f"{row.noise_error:.2g}, of the round trip {row.latent_error:.2g}, {row.solver_psnr:.2f} dB"
        )
    show(rows, as_json)
