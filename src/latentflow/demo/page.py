"""The demo's figures as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentflow.data.sources.synthetic import CLASS_NAMES
from latentflow.demo.figures import DemoFigures, HoleRun, Recognised, SolverRun
from latentflow.demo.painting import NUM_COLUMNS
from latentflow.flow.solvers import is_adaptive
from latentflow.pages.charts import TIME, Chart, Series
from latentflow.pages.numbers import number, percent, whole
from latentflow.pages.page import Sheet, Table, render

_RECOGNISED = ("both right", "95 % interval", "shape", "colour", "nothing found")
_CALLS = "calls per image"


def demo_page(figures: DemoFigures, out: Path) -> str:
    """The report of a complete demo in `out`, as one HTML document."""
    training = figures.training
    quarter = max(len(training.curve) // 4, 1)
    return render(
        "demo.html",
        figures=figures,
        run=out / "run",
        total_seconds=_total_seconds(figures),
        drawn_per_second=_drawn_per_second(figures),
        num_tokens=_num_tokens(figures),
        device=_device(figures),
        best_iou=_best_iou(figures),
        reconstructions=_reconstructions(figures, out),
        course=Chart([Series("training loss", _course(training.curve), markers=False)], "images seen", "loss"),
        loss_by_time=Chart(
            [
                Series("first quarter of training", _mean_by_time(training.curve[:quarter])),
                Series("last quarter", _mean_by_time(training.curve[-quarter:])),
            ],
            TIME,
            "loss",
        ),
        samples=_samples(figures, out),
        guidance_sheet=_guidance_sheet(figures, out),
        guidance_table=_guidance_table(figures),
        maps_sheet=_maps_sheet(figures, out),
        maps_table=_maps_table(figures),
        holes_sheet=_holes_sheet(figures, out),
        holes_table=_holes_table(figures),
        losses_table=_losses_table(figures),
        solvers_chart=_solvers_chart(figures.solvers.runs),
        solvers_table=_solvers_table(figures.solvers.runs),
        recognised_table=_recognised_table(figures),
        classes_table=_classes_table(figures.sampling.recognised),
    )


def key_figures(figures: DemoFigures) -> dict[str, str]:
    """The figures that sum up a complete demo, name => value."""
    encoding, training, sampling, stage = figures.encoding, figures.training, figures.sampling, figures.first_stage
    unconditional = next(run.rmse for run in figures.holes.runs if run.name == "told nothing")
    return {
        "samples with the right shape and colour": f"{percent(sampling.recognised.both)} of "
        f"{sampling.recognised.num_images}",
        "maps asked for and recovered": f"mean IoU {_best_iou(figures):.3f} (real images {figures.maps.real_iou:.3f})",
        "error inside holes": f"{figures.holes.runs[0].rmse:.1f} of 255, unconditional {unconditional:.1f}",
        "real images, judged alike": percent(stage.real.both),
        "their reconstructions": f"{percent(stage.reconstructed.both)}, {stage.psnr:.1f} dB",
        "encoding": f"{whole(encoding.images_per_second)} images/s",
        "training": f"{whole(training.images_per_second)} images/s, {whole(training.images_seen)} images",
        "sampling": f"{_drawn_per_second(figures):,.1f} images/s at {sampling.evaluations:.0f} network calls each",
        "seconds in all": whole(_total_seconds(figures)),
    }


def _reconstructions(figures: DemoFigures, out: Path) -> Sheet:
    shown = [f"{value:.1f}\N{NO-BREAK SPACE}dB" for value in figures.first_stage.shown_psnr]
    return Sheet(
        out / "samples" / "reconstructions.png",
        "One picture of each class and its reconstruction by the autoencoder",
        ["original", "decoded"],
        len(shown),
        columns=shown,
    )


def _samples(figures: DemoFigures, out: Path) -> Sheet:
    columns, wrong = figures.scale.num_shown, figures.sampling.recognised.wrong
    return Sheet(
        out / "samples" / "classes.png",
        f"{columns} samples of each class, one row per class",
        CLASS_NAMES,
        columns,
        marked=[(n % len(CLASS_NAMES), n // len(CLASS_NAMES)) for n in wrong if n // len(CLASS_NAMES) < columns],
    )


def _guidance_sheet(figures: DemoFigures, out: Path) -> Sheet:
    runs = figures.guidance.runs
    return Sheet(
        out / "samples" / "guidance.png",
        "Samples from the same noise at every guidance scale, one column per class",
        [f"s = {run.scale:g}" for run in runs],
        len(CLASS_NAMES),
        columns=CLASS_NAMES,
        marked=[(row, n) for row, run in enumerate(runs) for n in run.recognised.wrong if n < len(CLASS_NAMES)],
    )


def _guidance_table(figures: DemoFigures) -> Table:
    runs = figures.guidance.runs
    rows = [(f"{run.scale:g}", *_recognised_row(run.recognised), f"{run.evaluations:.0f}") for run in runs]
    best = max(run.recognised.both for run in runs)
    strong = [n for n, run in enumerate(runs) if run.recognised.both == best]
    return Table(("guidance", *_RECOGNISED, _CALLS), rows, strong)


def _maps_sheet(figures: DemoFigures, out: Path) -> Sheet:
    stage = figures.maps
    return Sheet(
        out / "samples" / "maps.png",
        "Semantic maps, samples conditioned on them at every guidance scale, and the real images",
        ["map", *(f"s = {run.scale:g}" for run in stage.runs), "real image"],
        min(NUM_COLUMNS, stage.num_images),
    )


def _maps_table(figures: DemoFigures) -> Table:
    runs = figures.maps.runs
    rows = [(f"{run.scale:g}", f"{run.iou:.3f}", f"{run.evaluations:.0f}") for run in runs]
    strong = [n for n, run in enumerate(runs) if run.iou == _best_iou(figures)]
    return Table(("guidance by the map", "mean IoU", _CALLS), rows, strong)


def _holes_sheet(figures: DemoFigures, out: Path) -> Sheet:
    stage = figures.holes
    return Sheet(
        out / "samples" / "holes.png",
        "Images, their holes, and what each method fills them with",
        ["image", "hole", *(_short_name(run) for run in stage.runs[:-1])],
        min(NUM_COLUMNS, stage.num_images),
    )


def _holes_table(figures: DemoFigures) -> Table:
    runs = figures.holes.runs
    rows = [(_name(run), f"{run.rmse:.1f}", f"{run.evaluations:.0f}") for run in runs]
    best = min(run.rmse for run in runs)
    return Table(("filled by", "error inside", _CALLS), rows, [n for n, run in enumerate(runs) if run.rmse == best])


def _name(run: HoleRun) -> str:
    """A way to fill holes in the field's words; records keep the names that they have on disk."""
    conditioned = run.name.replace("told the known part", "conditioned on the known part")
    return conditioned.replace("told nothing", "unconditional").replace("replaced along", "known part imposed along")


def _short_name(run: HoleRun) -> str:
    """The same for a label of a row of pictures."""
    return _name(run).replace("conditioned on the known part, guidance", "s =").removesuffix(" along the path")


def _losses_table(figures: DemoFigures) -> Table:
    rows = [
        (" and ".join(run.told).replace("_", " ") or "none", f"{run.loss:.4f}", f"{run.standard_error:.4f}")
        for run in figures.losses.runs
    ]
    return Table(("conditions", "loss", "standard error"), rows)


def _solvers_chart(runs: list[SolverRun]) -> Chart:
    series = [
        Series(name, [(run.evaluations, run.distance) for run in runs if run.solver == name], dashed=is_adaptive(name))
        for name in dict.fromkeys(run.solver for run in runs)
    ]
    return Chart(series, "network calls per image", "relative distance", log_x=True, log_y=True)


def _solvers_table(runs: list[SolverRun]) -> Table:
    rows = [
        (
            run.solver,
            f"{run.steps} steps" if run.steps else f"tolerance {run.tolerance:g}",
            whole(run.evaluations),
            number(run.distance, 2),
        )
        for run in runs
    ]
    return Table(("solver", "setting", _CALLS, "distance"), rows)


def _recognised_table(figures: DemoFigures) -> Table:
    judged = {
        "real images": figures.first_stage.real,
        "their reconstructions": figures.first_stage.reconstructed,
        f"samples, guidance {figures.recipe.sampling.guidance:g}": figures.sampling.recognised,
    }
    return Table(("images", *_RECOGNISED), [(name, *_recognised_row(found)) for name, found in judged.items()], [2])


def _classes_table(recognised: Recognised) -> Table:
    colours = list(dict.fromkeys(name.split()[0] for name in CLASS_NAMES))
    shapes = list(dict.fromkeys(name.split()[1] for name in CLASS_NAMES))
    rows = [
        (shape, *(percent(round(recognised.by_class[f"{colour} {shape}"], 2)) for colour in colours))
        for shape in shapes
    ]
    return Table(("both right, by class", *colours), rows)


def _recognised_row(found: Recognised) -> tuple[str, ...]:
    low, high = found.interval
    interval = f"{100 * low:.0f} to {100 * high:.0f} %"
    return percent(found.both), interval, percent(found.shape), percent(found.colour), percent(found.nothing)


def _course(lines: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(line["images_seen"], line["loss"]) for line in lines]


def _mean_by_time(lines: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(middle of the time bin, loss): the mean over lines of metrics.jsonl, with equal weights."""
    points = []
    for name in sorted({name for line in lines for name in line["loss_by_time"]}):
        low, high = map(float, name.split("-"))
        values = [line["loss_by_time"][name] for line in lines if name in line["loss_by_time"]]
        points.append(((low + high) / 2, sum(values) / len(values)))
    return points


def _best_iou(figures: DemoFigures) -> float:
    return max(run.iou for run in figures.maps.runs)


def _num_tokens(figures: DemoFigures) -> int:
    _, height, width = figures.encoding.latent_shape
    return height * width // figures.recipe.network.patch_size**2


def _drawn_per_second(figures: DemoFigures) -> float:
    return figures.sampling.recognised.num_images / figures.sampling.drawing_seconds


def _device(figures: DemoFigures) -> str:
    training = figures.training
    threads = f"{training.num_threads} thread{'s' if training.num_threads > 1 else ''}"
    return f"the CPU with {threads}" if training.device == "cpu" else training.device


def _total_seconds(figures: DemoFigures) -> float:
    names = ("encoding", "first_stage", "training", "sampling", "guidance", "maps", "holes", "losses", "solvers")
    return sum(getattr(figures, name).seconds for name in names)
