"""Verbs that prepare data."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from latentflow.cli.options import AsJson, Device, Precision, command
from latentflow.cli.output import runtime_for, show
from latentflow.console import say
from latentflow.data.request import EncodeRequest, PrepareRequest

_MUCH_CUT = 0.2  # of a picture, by its square crop; 4:3 has 0.25

verb = partial(command, group="Data")


@verb(example="latentflow encode photos --autoencoder stabilityai/sd-vae-ft-mse --out caches/photos")
def encode(
    request: EncodeRequest,
    out: Annotated[Path, typer.Option(help="The latent cache, a folder.")],
    look: Annotated[
        int | None,
        typer.Option(help="Encode nothing; write OUT.png, which shows this many images as a model will see them."),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Encode images once into a latent cache. Repeat the command to continue after a kill."""
    if look is not None:
        _look(request, out, look, device, as_json)
        return
    from latentflow.commands.encode import encode as run

    result = run(request, out, runtime=runtime_for(device))
    if result.index is None:
        say("this process is done; another one will finish the cache")
        return
    index = result.index
    rows = {
        "cache": str(out),
        "images": index.num_images,
        "classes": len(index.plan.class_names),
        "pixels": index.plan.pixel_format.title,
        "moments": " x ".join(map(str, index.plan.moments_shape)),
        "map classes": len(index.plan.map_class_names),
        "mask variants": index.plan.mask_variants,
        "variants": index.plan.variants,
        "flips": index.plan.flips,
        "shards": len(index.shards),
        "broken": len(index.broken),
        "cut away": "the square leaves out {:.0%} of a picture on average, {:.0%} at most".format(*index.cut),
        **({"clipped": f"{index.clipped:.2%} of the values lie outside the range"} if index.clipped else {}),
        "seconds": round(result.seconds, 1),
    }
    show(rows, as_json)
    if index.cut[0] > _MUCH_CUT:
        say(
            f"note: {index.cut[0]:.0%} of the pictures lies outside the square crops and is never learned; if that "
            "matters, cut them into squares yourself"
        )
    for name in index.broken:
        say(f"left out: {name}")
    if not result.is_new:
        say("all images were encoded already; nothing was done")


def _look(request: EncodeRequest, out: Path, num: int, device: str | None, as_json: bool) -> None:
    from latentflow.commands.look import look as run

    seen = run(request, out, num=num, runtime=runtime_for(device, Precision.tf32))
    cut = f"the square leaves out {sum(seen.cut) / len(seen.cut):.0%} on average, {max(seen.cut):.0%} at most"
    given_back = f"{seen.psnr:.1f} dB PSNR by the autoencoder"
    show({"sheet": str(seen.sheet), "images": len(seen.names), "cut away": cut, "given back": given_back}, as_json)


@verb(example="latentflow prepare camvid camvid.zip --out data/camvid")
def prepare(
    request: PrepareRequest,
    out: Annotated[Path, typer.Option(help="A new folder; it gets one folder per split.")],
    as_json: AsJson = False,
) -> None:
    """Convert a published data set of images and semantic maps to the layout that latentflow reads."""
    from latentflow.commands.prepare import prepare as run

    result = run(request, out)
    splits = {str(out / split): f"{number} images with maps" for split, number in result.num_images.items()}
    show({**splits, "map classes": result.num_map_classes, "seconds": round(result.seconds, 1)}, as_json)
