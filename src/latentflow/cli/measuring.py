"""Verbs that measure."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from latentflow.cli.options import AsJson, BatchSize, ComputesIn, Device, Model, Precision, command
from latentflow.cli.output import open_runtime, show
from latentflow.cli.text import names, numbers, pair
from latentflow.console import say
from latentflow.sampling.request import SamplingRequest

if TYPE_CHECKING:
    from latentflow.model.config import SamplingPreset

Seed = Annotated[int, typer.Option(help="Seed of the first image; image i has seed SEED + i.")]

verb = partial(command, group="Measuring")


@verb(example="latentflow benchmark runs/cifar10 --batch-sizes 1,8,32 --solver euler --steps 20")
def benchmark(
    *,
    model: Model,
    num: Annotated[int, typer.Option(help="Images of each repeat, rounded up to whole batches.")] = 8,
    batch_sizes: Annotated[str, typer.Option(help="Numbers of images computed together.")] = "1,8",
    repeats: Annotated[int, typer.Option(help="Timed repeats, after one that warms up.")] = 3,
    sampling: SamplingRequest,
    seed: Seed = 0,
    device: Device = None,
    precision: ComputesIn = Precision.auto,
    as_json: AsJson = False,
) -> None:
    """Say what drawing an image costs: network calls, milliseconds and memory."""
    from latentflow.commands.benchmark import benchmark as run

    sizes = numbers(batch_sizes, "--batch-sizes", int)
    result = run(
        model,
        num=num,
        batch_sizes=sizes,
        repeats=repeats,
        seed=seed,
        runtime=open_runtime(device, precision),
        **sampling.preset(),
    )
    if as_json:
        batches = [{**asdict(batch), "images_per_second": batch.images_per_second} for batch in result.batches]
        show({**asdict(result), "sampling": result.sampling.model_dump(mode="json"), "batches": batches}, as_json)
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
    show(rows, as_json)


@verb(example="latentflow sweep runs/cifar10 --data caches/cifar10.safetensors --budget 600 --write")
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
        "solvers": names(solvers),
        "steps": numbers(steps, "--steps", int),
        "tolerances": numbers(tolerances, "--tolerances"),
        "guidances": numbers(guidance, "--guidance"),
        "intervals": [pair(text, "--intervals", ":") for text in names(intervals)],
        "shifts": numbers(shifts, "--shifts"),
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
        runtime=open_runtime(device, precision),
    )
    if as_json:
        show(summary(result), as_json)
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
    show({**presets, "page": str(out / "page.html"), "seconds": round(result.seconds, 1)}, as_json)
    for note in [*result.notes, *(f"{name} could not be measured: {why}" for name, why in result.failed.items())]:
        say(note)


@verb(example="latentflow evaluate runs/pets --data pets --num 10000 --guidance 1.5 --out pets.json")
def evaluate(
    *,
    model: Annotated[
        str,
        typer.Argument(help="A model; a folder or zip of PNG samples; with --reconstruction, also an autoencoder."),
    ],
    data: Annotated[
        str, typer.Option(help="Real images as for `encode`, or statistics of them: .safetensors or .npz.")
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
    sampling: SamplingRequest,
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
        metrics=names(metrics),
        num=num,
        features=features,
        weights=weights,
        features_precision=features_precision,
        labels=labels,
        masks=masks,
        segmenter=segmenter,
        lpips=lpips,
        image_size=image_size,
        **sampling.preset(),
        seed=seed,
        batch_size=batch_size,
        num_workers=num_workers,
        resamples=resamples,
        neighbours=neighbours,
        reference_out=reference_out,
        out=out,
        against=against,
        anyway=anyway,
        runtime=open_runtime(device, precision),
    )
    if result is None:
        say("this process is done; the first one computes the scores")
        return
    report, comparison = result.report, result.comparison
    if as_json:
        compared = {"comparison": asdict(comparison)} if comparison else {}
        show({**report.model_dump(mode="json"), **compared}, as_json)
        return
    show(evaluation_rows(result), as_json)
    for note in [*(comparison.differing if comparison else []), *report.warnings]:
        say(note)


@verb(example="latentflow bound runs/pets --data pets --out bound")
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
        runtime=open_runtime(device, Precision.fp32),
    )
    if as_json:
        show(bound_record(measured), as_json)
        return
    rows = {}
    for name, value, spread, _, kind in term_rows(measured):
        rows[name] = f"{value}{f' ± {spread}' if spread else ''}  ({kind})"
    for variant, error, factor, flow, total, *_ in total_rows(measured):
        rows[f"bound: {variant}, {error}"] = f"{total}  (flow {flow} in latents, errors grow {factor} times)"
    if out is not None:
        rows["page"] = str(out / "page.html")
    show(rows, as_json)
    say(verdict(measured))
    say(looseness(measured))


@verb(example="latentflow diagnose runs/pets --data pets/val --train pets/train --out diagnosis")
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
        runtime=open_runtime(device, Precision.fp32),
    )
    page = str(out / "page.html")
    if as_json:
        found = {one.topic: one.model_dump() for one in verdicts(diagnosis)}
        show({"page": page, "seconds": diagnosis.seconds, "verdicts": found}, as_json)
        return
    rows = {one.topic: f"{WORDS[one.mark]}. {one.text}" for one in verdicts(diagnosis)}
    show({**rows, "page": page}, as_json)


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
