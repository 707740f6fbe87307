"""Verbs that prepare data."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentflow.cli.options import AsJson, Device, Precision, command
from latentflow.cli.output import runtime_for, show
from latentflow.console import say
from latentflow.data.request import EncodeRequest, PrepareRequest
from latentflow.errors import ConfigError

if TYPE_CHECKING:
    from latentflow.data.inventory import ColumnCounts

_MUCH_CUT = 0.2  # of a picture, by its crop; 4:3 as a square has 0.25
_CUT_AWAY = "the crop leaves out {:.0%} of a picture on average, {:.0%} at most"

verb = partial(command, group="Data")


@verb(example="latentflow encode photos --autoencoder stabilityai/sd-vae-ft-mse --out caches/photos")
def encode(
    request: EncodeRequest,
    out: Annotated[Path, typer.Option(help="The latent cache, a folder.")],
    look: Annotated[
        int | None,
        typer.Option(help="Encode nothing; write OUT.png, which shows this many images as a model will see them."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Encode and write nothing; read every image, and print what is there."),
    ] = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Encode images once into a latent cache. Repeat the command to continue after a kill."""
    if dry_run and look is not None:
        raise ConfigError(f"--look {look} writes a sheet, and --dry-run nothing; leave one of them out")
    if dry_run:
        _dry_run(request, out, as_json)
        return
    if look is not None:
        _look(request, out, look, device, as_json)
        return
    from latentflow.commands.encode import encode as run
    from latentflow.data.buckets import named_sizes

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
        **named_sizes(index.plan.buckets),
        "map classes": len(index.plan.map_class_names),
        "inputs": index.plan.inputs.title if index.plan.inputs else "none",
        "mask variants": index.plan.mask_variants,
        "variants": index.plan.variants,
        "flips": index.plan.flips,
        "shards": len(index.shards),
        "broken": len(index.broken),
        "cut away": _CUT_AWAY.format(*index.cut),
        **({"clipped": f"{index.clipped:.2%} of the values lie outside the range"} if index.clipped else {}),
        "seconds": round(result.seconds, 1),
    }
    show(rows, as_json)
    if index.cut[0] > _MUCH_CUT:
        say(
            f"note: {index.cut[0]:.0%} of the pictures lies outside the crops and is never learned; if that matters, "
            "choose a shape nearer to theirs, such as --image-size 192x128, or cut them yourself"
        )
    for name in index.broken:
        say(f"left out: {name}")
    if not result.is_new:
        say("all images were encoded already; nothing was done")


def _dry_run(request: EncodeRequest, out: Path, as_json: bool) -> None:
    from latentflow.commands.encode import what_would_be_read

    found = what_would_be_read(request, out)
    if as_json:
        show(found.model_dump(mode="json"), as_json)
        return
    rows = {"source": found.source, "images": found.num_images, "pixels": found.pixels}
    if found.classes:
        rows["classes"] = _counts(found.classes)
    for name, column in found.columns.items():
        rows[name] = f"{column.kind}: {_column_line(column)}"
    rows |= {"files": _counts(found.formats), "sizes": _counts(found.sizes)}
    rows["duplicates"] = _groups(found.duplicates, found.num_duplicates, "images repeat another")
    if found.contradictory:
        rows["in two classes"] = _groups(found.contradictory, len(found.contradictory), "images")
    rows["broken"] = len(found.broken)
    for size, bucket in found.buckets.items():
        cut = _CUT_AWAY.format(bucket.cut_mean, bucket.cut_most)
        rows[f"bucket {size}"] = f"{bucket.num_images:,} images; {cut}"
    rows["cut away"] = _CUT_AWAY.format(found.cut_mean, found.cut_most)
    show(rows, as_json)
    for line in found.broken:
        say(f"would be left out: {line}")
    if empty := [name for name, number in found.classes.items() if not number]:
        say(f"note: {len(empty)} classes have no image that can be read: {', '.join(empty[:5])}")


def _counts(counts: dict[str, int], most: int = 8) -> str:
    """For example "apple: 5; berry: 6"; of many the first."""
    some = "; ".join(f"{name}: {number:,}" for name, number in list(counts.items())[:most])
    return f"{some}; ... {len(counts):,} in all (see --json)" if len(counts) > most else some


def _column_line(column: ColumnCounts) -> str:
    parts = []
    if column.kind != "number":
        parts.append(_counts(column.classes))
    elif column.mean is not None:
        parts.append(f"{column.least:g} to {column.greatest:g}, {column.mean:.4g} on average")
    if column.without_class:
        parts.append(f"none of them {column.without_class:,}")
    if column.unknown:
        parts.append(f"not known {column.unknown:,}")
    return "; ".join(parts)


def _groups(groups: list[list[str]], number: int, what: str) -> str:
    """For example "2 images repeat another: a.png = b.png; c.png = d.png"."""
    some = "; ".join(" = ".join(group[:3]) for group in groups[:3])
    return f"{number:,} {what}: {some}{'; ...' if len(groups) > 3 else ''}" if groups else "none"


def _look(request: EncodeRequest, out: Path, num: int, device: str | None, as_json: bool) -> None:
    from latentflow.commands.look import look as run

    seen = run(request, out, num=num, runtime=runtime_for(device, Precision.tf32))
    cut = f"the crop leaves out {sum(seen.cut) / len(seen.cut):.0%} on average, {max(seen.cut):.0%} at most"
    kept = f"{seen.psnr:.1f} dB PSNR by the autoencoder"
    show({"sheet": str(seen.sheet), "images": len(seen.names), "cut away": cut, "reconstruction": kept}, as_json)


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
