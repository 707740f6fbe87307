"""Verbs that prepare data."""

from __future__ import annotations

from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from latentflow.cli.options import AsJson, Device, Precision, command
from latentflow.cli.output import open_runtime, show
from latentflow.console import say

_MUCH_CUT = 0.2  # of a picture, by its square; 4:3 has 0.25

verb = partial(command, group="Data")


class Dtype(str, Enum):
    """How a latent cache stores its moments."""

    float16 = "float16"
    float32 = "float32"


class MaskPolicy(str, Enum):
    """Which holes are drawn for inpainting."""

    mixed = "mixed"
    strokes = "strokes"
    boxes = "boxes"
    halves = "halves"
    borders = "borders"


@verb(example="latentflow encode photos --autoencoder stabilityai/sd-vae-ft-mse --out caches/photos")
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
        runtime=open_runtime(device),
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
    show(rows, as_json)
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
        runtime=open_runtime(device, Precision.tf32),
    )
    cut = f"the square leaves out {sum(seen.cut) / len(seen.cut):.0%} on average, {max(seen.cut):.0%} at most"
    given_back = f"{seen.psnr:.1f} dB PSNR by the autoencoder"
    show({"sheet": str(seen.sheet), "images": len(seen.names), "cut away": cut, "given back": given_back}, as_json)


@verb(example="latentflow prepare camvid camvid.zip --out data/camvid")
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
    show({**splits, "map classes": result.num_map_classes, "seconds": round(result.seconds, 1)}, as_json)
