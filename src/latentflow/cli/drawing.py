"""Verbs that draw images, and that edit them."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import Field

from latentflow.cli.options import AsJson, BatchSize, ComputesIn, Device, Model, Precision, command
from latentflow.cli.output import folder_rows, picture_rows, runtime_for, show
from latentflow.console import say
from latentflow.requests import Option, Request
from latentflow.sampling.request import (
    FitSolverRequest,
    ImageToImageRequest,
    InpaintRequest,
    InterpolateRequest,
    InvertRequest,
    MaskToImageRequest,
    SampleRequest,
    TranslateRequest,
    VaryRequest,
)

if TYPE_CHECKING:
    from latentflow.sampling.fit_solvers import SolverCheck

Picture = Annotated[
    Path, typer.Argument(help="An image; its middle, in the shape of the training images, is scaled to their size.")
]
OutFile = Annotated[Path, typer.Option(help="The PNG file; several are named after it and their seeds.")]


class InpaintFiles(Request):
    """The files that `inpaint` reads."""

    image: Annotated[Path, Option(argument=True)] = Field(description="An image of any size.")
    mask: Annotated[Path, Option(argument=True)] = Field(
        description="Of the image's size; white is filled, black is kept."
    )
    semantic_map: Annotated[Path, Option(name="--map")] | None = Field(
        default=None, description="A semantic map of the image's size, for a model that is conditioned on maps."
    )


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

    Repeat the command to continue an interrupted one. A folder that holds other pictures is refused.
    """
    from latentflow.commands.sample import sample as run

    runtime = runtime_for(device, precision)
    result = run(model, request, out, batch_size=batch_size, columns=columns, runtime=runtime)
    rows = {"folder": str(out), "images": len(result.files), "there already": result.kept, **folder_rows(result)}
    drawn_now = len(result.files) - result.kept
    show({**rows, "images per second": round(drawn_now / max(result.seconds, 1e-9), 2)}, as_json)


@verb(example="latentflow inpaint runs/streets street.jpg hole.png --num 4 --feather 8 --out filled.png")
def inpaint(
    *,
    model: Model,
    files: InpaintFiles,
    out: OutFile,
    request: InpaintRequest,
    batch_size: BatchSize = 4,
    device: Device = None,
    precision: ComputesIn = Precision.auto,
    as_json: AsJson = False,
) -> None:
    """Fill the white part of a mask; every other pixel is unchanged, bit for bit, with alpha and profile."""
    from latentflow.commands.inpaint import inpaint as run

    result = run(
        model,
        files.image,
        files.mask,
        request,
        out,
        semantic_map=files.semantic_map,
        batch_size=batch_size,
        runtime=runtime_for(device, precision),
    )
    used, (height, width) = result.drawing.inputs, result.drawing.image_size
    if used["method"] == "replacement" and request.method is None:
        say("this model was not trained for inpainting; the known region was re-imposed at every solver step")
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
    out: OutFile,
    request: MaskToImageRequest,
    batch_size: BatchSize = 16,
    device: Device = None,
    precision: ComputesIn = Precision.auto,
    as_json: AsJson = False,
) -> None:
    """Draw images of a semantic map; its classes are checked against those of the model."""
    from latentflow.commands.mask_to_image import mask_to_image as run

    runtime = runtime_for(device, precision)
    show(picture_rows(run(model, semantic_map, request, out, batch_size=batch_size, runtime=runtime)), as_json)


@verb(example="latentflow translate runs/sharp small.png --num 4 --out large.png")
def translate(
    *,
    model: Model,
    image: Annotated[
        Path, typer.Argument(help="An image as the inputs in training were: of low resolution, gray, a map, ...")
    ],
    out: OutFile,
    request: TranslateRequest,
    batch_size: BatchSize = 16,
    device: Device = None,
    precision: ComputesIn = Precision.auto,
    as_json: AsJson = False,
) -> None:
    """Draw images from an image, with a model that was trained on pairs of them."""
    from latentflow.commands.translate import translate as run

    runtime = runtime_for(device, precision)
    show(picture_rows(run(model, image, request, out, batch_size=batch_size, runtime=runtime)), as_json)


@verb(example="latentflow image-to-image runs/pets cat.png --strength 0.6 --classes cat --out new.png")
def image_to_image(
    *,
    model: Model,
    image: Picture,
    out: OutFile,
    request: ImageToImageRequest,
    batch_size: BatchSize = 16,
    device: Device = None,
    precision: ComputesIn = Precision.auto,
    as_json: AsJson = False,
) -> None:
    """Redraw an image: add noise to it, and remove it again; without a label unless one is given."""
    from latentflow.commands.image_to_image import image_to_image as run

    runtime = runtime_for(device, precision)
    show(picture_rows(run(model, image, request, out, batch_size=batch_size, runtime=runtime)), as_json)


@verb(example="latentflow interpolate runs/cifar10 --seeds 3,8 --classes cat,dog --num 9 --out frames")
def interpolate(
    model: Model,
    request: InterpolateRequest,
    out: Annotated[Path, typer.Option(help="Folder for the frames and grid.png, which shows them in a row.")],
    batch_size: BatchSize = 16,
    device: Device = None,
    precision: ComputesIn = Precision.auto,
    as_json: AsJson = False,
) -> None:
    """Draw the frames between two seeds, and between two classes."""
    from latentflow.commands.interpolate import interpolate as run

    result = run(model, request, out, batch_size=batch_size, runtime=runtime_for(device, precision))
    show({"folder": str(out), "frames": len(result.files), **folder_rows(result)}, as_json)


@verb(example="latentflow vary runs/cifar10 --seed 5 --classes cat --amount 0.3 --num 8 --out near")
def vary(
    model: Model,
    request: VaryRequest,
    out: Annotated[Path, typer.Option(help="Folder for the pictures and grid.png, which starts with the original.")],
    batch_size: BatchSize = 16,
    device: Device = None,
    precision: ComputesIn = Precision.auto,
    as_json: AsJson = False,
) -> None:
    """Draw the picture of one seed, and variations of it."""
    from latentflow.commands.vary import vary as run

    result = run(model, request, out, batch_size=batch_size, runtime=runtime_for(device, precision))
    rows = {"folder": str(out), "original": str(result.files[0]), "variations": len(result.files) - 1}
    show({**rows, **folder_rows(result)}, as_json)


@verb(example="latentflow invert runs/cifar10 cat.png --classes cat --table --out inverted")
def invert(
    model: Model,
    image: Picture,
    request: InvertRequest,
    out: Annotated[
        Path, typer.Option(help="Folder for input.png, autoencoder.png, round_trip.png and noise.safetensors.")
    ],
    table: Annotated[bool, typer.Option("--table", help="Also compare solvers, steps and tolerances.")] = False,
    device: Device = None,
    precision: ComputesIn = Precision.fp32,
    as_json: AsJson = False,
) -> None:
    """Find the noise that an image would be drawn from, and draw it again. Guidance is 1 unless it is given."""
    from latentflow.commands.invert import invert as run

    result = run(model, image, request, out, table=table, runtime=runtime_for(device, precision))
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


@verb(example="latentflow fit-solver runs/cifar10 --evaluations 6,8,10")
def fit_solver(
    request: FitSolverRequest,
    batch_size: BatchSize = 16,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Fit solvers of few evaluations to a model, for `--solver fitted-8`.

    Each is compared with the usual solvers on held-out seeds, and stored in the model folder only if it is better.
    Repeat the command to continue an interrupted one.
    """
    from latentflow.commands.fit_solver import fit_solver as run

    checks = run(request, batch_size=batch_size, runtime=runtime_for(device, Precision.fp32))
    if as_json:
        show({check.name: asdict(check) for check in checks}, as_json)
        return
    show({check.name: _check_line(check) for check in checks}, as_json)


def _check_line(check: SolverCheck) -> str:
    other = check.best_other
    compared = f"held-out distance {check.error:.3g}, {other} with as many evaluations {check.others[other]:.3g}"
    if not check.is_kept:
        return f"{compared}: not stored, since {other} is no worse"
    return compared + (": there already" if check.rounds == 0 else f": stored, fitted in {check.seconds:.0f} s")
