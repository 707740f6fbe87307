"""Verbs that measure."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from latentflow.cli.options import AsJson, ComputesIn, Device, Precision, command
from latentflow.cli.output import runtime_for, show
from latentflow.console import say
from latentflow.evaluation.request import (
    BenchmarkRequest,
    BoundRequest,
    DiagnoseRequest,
    EvaluationRequest,
    SweepRequest,
)

if TYPE_CHECKING:
    from latentflow.evaluation.drawing_cost import BenchmarkResult

verb = partial(command, group="Measuring")


@verb(example="latentflow benchmark runs/cifar10 --batch-sizes 1,8,32 --solver euler --steps 20")
def benchmark(
    request: BenchmarkRequest,
    device: Device = None,
    precision: ComputesIn = Precision.auto,
    as_json: AsJson = False,
) -> None:
    """Measure what drawing an image costs: network calls, milliseconds and memory."""
    from latentflow.commands.benchmark import benchmark as run

    result = run(request, runtime_for(device, precision))
    if as_json:
        batches = [{**asdict(batch), "images_per_second": batch.images_per_second} for batch in result.batches]
        records = {name: getattr(result, name).model_dump(mode="json") for name in ("request", "sampling")}
        show({**asdict(result), **records, "batches": batches}, as_json)
        return
    show(_cost_rows(result), as_json)


def _cost_rows(result: BenchmarkResult) -> dict[str, str]:
    spread = f"{result.fewest:g} to {result.most:g}"
    rows = {
        "drawn": f"{result.num} images, {result.sampling.in_words}",
        "conditions": ", ".join(result.told) or "none",
        "evaluations per image": f"{result.evaluations:g}" + (f", {spread}" if len(result.histogram) > 1 else ""),
    }
    if len(result.histogram) > 1:
        rows["images by evaluations"] = ", ".join(f"{calls:g}: {n}" for calls, n in result.histogram.items())
    for batch in result.batches:
        memory = "" if batch.peak_bytes is None else f", {batch.peak_bytes / 2**20:,.0f} MiB"
        rows[f"batch of {batch.batch_size}"] = (
            f"{batch.network_milliseconds:.2f} ms network + {batch.decoder_milliseconds:.2f} ms decoder per image, "
            f"{batch.images_per_second:.2f} images/s{memory}"
        )
    calls = "not countable" if result.multiply_adds is None else f"{result.multiply_adds / 1e9:.4g} G multiply-adds"
    return rows | {
        "network": f"{result.parameters:,} parameters, {calls} per evaluation",
        "decoder": f"{result.decoder_parameters:,} parameters",
        "device": f"{result.device}; torch has {result.threads} CPU thread" + ("s" if result.threads > 1 else ""),
        "precision": result.precision,
        "memory": result.memory,
    }


@verb(example="latentflow sweep runs/cifar10 --data caches/cifar10.safetensors --budget 600 --write")
def sweep(
    request: SweepRequest,
    device: Device = None,
    precision: ComputesIn = Precision.auto,
    as_json: AsJson = False,
) -> None:
    """Measure quality against cost, and name the best sampling preset if the numbers show one. Repeat it to go on."""
    from latentflow.commands.sweep import sweep as run
    from latentflow.pages.sweep import HEADER, rows, summary, verdict

    result = run(request, runtime_for(device, precision))
    if as_json:
        show(summary(result), as_json)
        return
    table = Table(*HEADER, box=None, pad_edge=False)
    for row in rows(result):
        table.add_row(*map(escape, row), style="bold" if row[0] == result.best else None)
    Console().print(table)
    name = "new preset" if result.written else "best preset"
    presets = {
        "old preset": result.old.in_words,
        name: "undecided" if result.new is None else result.new.in_words,
        "verdict": " ".join(verdict(result)),
    }
    show({**presets, "page": str(request.out / "page.html"), "seconds": round(result.seconds, 1)}, as_json)
    for note in [*result.notes, *(f"{name} could not be measured: {why}" for name, why in result.failed.items())]:
        say(note)


@verb(example="latentflow evaluate runs/pets --data pets --num 10000 --guidance 1.5 --out pets.json")
def evaluate(
    request: EvaluationRequest,
    device: Device = None,
    precision: ComputesIn = Precision.auto,
    as_json: AsJson = False,
) -> None:
    """Evaluate a model, or images in files, against real images; the report records the full protocol."""
    from latentflow.commands.evaluate import evaluate as run
    from latentflow.commands.evaluate import evaluation_rows

    result = run(request, runtime_for(device, precision))
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
def bound(request: BoundRequest, device: Device = None, as_json: AsJson = False) -> None:
    """Measure the paper's bound on how far the model's images can be from the data, term by term."""
    from latentflow.commands.bound import bound as run
    from latentflow.pages.bound import bound_record, dominant_term, looseness, term_rows, total_rows

    measured = run(request, runtime_for(device, Precision.fp32))
    if as_json:
        show(bound_record(measured), as_json)
        return
    rows = {}
    for name, value, spread, _, kind in term_rows(measured):
        rows[name] = f"{value}{f' ± {spread}' if spread else ''}  ({kind})"
    for variant, error, factor, flow, total, *_ in total_rows(measured):
        rows[f"bound: {variant}, {error}"] = f"{total}  (flow {flow} in latents, errors grow {factor} times)"
    if request.out is not None:
        rows["page"] = str(request.out / "page.html")
    show(rows, as_json)
    say(dominant_term(measured))
    say(looseness(measured))


@verb(example="latentflow diagnose runs/pets --data pets/val --train pets/train --out diagnosis")
def diagnose(request: DiagnoseRequest, device: Device = None, as_json: AsJson = False) -> None:
    """Find what is right and wrong with a model: loss, trajectories, latents, copies, and the autoencoder's share."""
    from latentflow.analysis.verdicts import WORDS, verdicts
    from latentflow.commands.diagnose import diagnose as run

    diagnosis = run(request, runtime_for(device, Precision.fp32))
    page = str(request.out / "page.html")
    if as_json:
        found = {one.topic: one.model_dump() for one in verdicts(diagnosis)}
        show({"page": page, "seconds": diagnosis.seconds, "verdicts": found}, as_json)
        return
    rows = {one.topic: f"{WORDS[one.mark]}. {one.text}" for one in verdicts(diagnosis)}
    show({**rows, "page": page}, as_json)
