"""What a sweep found: the record of it, as JSON, as a chart and as a page to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentflow.commands.report import Series, chart_file, code, details, figure, line_chart, page, paragraph, tiles
from latentflow.commands.report import table as html_table
from latentflow.commands.sweep_rounds import Round
from latentflow.commands.sweep_rules import SIGMAS, Candidate, Point
from latentflow.model_config import SamplingPreset

HEADER = ("preset", "evaluations", "distance", "std error", "ms per image", "")
_MARKS = {"front": "front", "undecided": "undecided", "beaten": ""}


@dataclass(frozen=True)
class SweepResult:
    """What `sweep` found.

    Attributes:
        out: the folder with page.html, sweep.json, sweep.svg and the candidates.
        model: as it was given.
        label: what the distance is called.
        rounds: in order of their number of images.
        final: the last complete round, which everything below is about; the first one where none is complete.
        marks: by name: "front", "undecided" or "beaten"; see `sweep_rules.marks`.
        best: name of the cheapest candidate that is as good as the best one.
        old, new: the model's preset, and that of `best`.
        written: whether the model has the new preset now.
        presets: by name, what every candidate changes in the model's preset.
        failed: by name, why a candidate could not be measured.
        notes: what one should know about the figures.
        seconds: of this call, the reference not counted.
    """

    out: Path
    model: str
    label: str
    rounds: list[Round]
    final: Round
    marks: dict[str, str]
    best: str
    old: SamplingPreset
    new: SamplingPreset
    written: bool
    presets: dict[str, Candidate]
    failed: dict[str, str]
    notes: list[str]
    seconds: float


def summary(result: SweepResult) -> dict[str, Any]:
    """A sweep as JSON. Resamples and earlier rounds of a candidate stand in OUT/candidates."""
    return {
        "model": result.model,
        "distance": result.label,
        "num": result.final.num,
        "best": result.best,
        "old_preset": result.old.model_dump(mode="json"),
        "new_preset": result.new.model_dump(mode="json"),
        "written": result.written,
        "candidates": [
            {
                "name": point.name,
                "mark": result.marks[point.name],
                "evaluations": point.evaluations,
                "distance": point.distance,
                "standard_error": point.standard_error,
                "milliseconds": result.final.measured[point.name].milliseconds,
                "preset": result.presets[point.name],
            }
            for point in _by_cost(result.final)
        ],
        "rounds": [
            {"num": one.num, "distances": {p.name: p.distance for p in _by_cost(one)}, "missing": one.missing}
            for one in result.rounds
        ],
        "failed": result.failed,
        "notes": result.notes,
        "seconds": result.seconds,
    }


def rows(result: SweepResult) -> list[tuple[str, ...]]:
    """The table of the final round under `HEADER`, by rising cost."""
    return [
        (
            *_figures(point, result.final),
            _MARKS[result.marks[point.name]] + (", BEST" if point.name == result.best else ""),
        )
        for point in _by_cost(result.final)
    ]


def sweep_picture(result: SweepResult) -> str:
    """Distance against evaluations as an SVG file."""
    return chart_file(_series(result.final, result.marks), **_axes(result.final))


def sweep_page(result: SweepResult) -> str:
    """The whole result as one HTML document."""
    sections = [
        ("The best preset", _best(result)),
        ("Quality against cost", _chart(result)),
        ("Every candidate", _table(result)),
    ]
    if earlier := [one for one in result.rounds if one is not result.final]:
        sections.append(("Other rounds", "".join(_other_round(one) for one in earlier)))
    sections.append(("What to keep in mind", "".join(map(paragraph, _remarks(result)))))
    lead = (
        f"How the images of {result.model} get better with the network calls that are spent on them, for "
        f"{len(result.presets)} presets. All of them drew the same seeds."
    )
    return page("latentflow: sweep", lead, sections, "Written by latentflow sweep; the figures are in sweep.json.")


def _best(result: SweepResult) -> str:
    point = next(p for p in result.final.points if p.name == result.best)
    key = [
        (point.name, "the cheapest preset that is as good as the best"),
        (f"{point.evaluations:g}", "network calls per image"),
        (f"{point.distance:.4g}", f"distance, standard error {point.standard_error:.2g}"),
        (f"{result.final.measured[point.name].milliseconds:.3g} ms", "per image"),
    ]
    done = "It is the preset of the model now." if result.written else "To use it, repeat the command with --write."
    return tiles(key) + paragraph(done) + code(_command(result))


def _command(result: SweepResult) -> str:
    parts = []
    for name, value in result.presets[result.best].items():
        text = ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else f"{value}"
        parts.append(f"--{name.replace('_', '-')} {text}")
    return f"latentflow sample {result.model} --out samples \\\n    {' '.join(parts)}"


def _chart(result: SweepResult) -> str:
    caption = (
        f"{result.label}; less is better. Every preset drew {result.final.num} images; bars are one standard error of "
        "the distance, most of which the presets have in common. The line joins the Pareto front: presets that are "
        "surely better than everything on the front that costs no more."
    )
    return figure(line_chart(_series(result.final, result.marks), **_axes(result.final)), caption)


def _table(result: SweepResult) -> str:
    made = rows(result)
    return html_table(HEADER, made, strong=[n for n, row in enumerate(made) if row[0] == result.best])


def _other_round(one: Round) -> str:
    text = f"{one.num} images each, {len(one.measured)} presets"
    text += f", {len(one.missing)} not measured" if one.missing else ""
    return details(text, html_table(HEADER[:-1], [_figures(point, one) for point in _by_cost(one)]))


def _remarks(result: SweepResult) -> list[str]:
    return [
        *result.notes,
        *(f"{name} could not be measured: {why}" for name, why in result.failed.items()),
        f"A difference counts where it is larger than {SIGMAS:g} of its own standard errors, found by drawing the same "
        "images of both presets again and again with replacement.",
        "Distances of different numbers of images are never compared, as they depend on the number.",
    ]


def _series(one: Round, marks: dict[str, str]) -> list[Series]:
    """The front as a line, and the candidates of each solver as points."""
    points = _by_cost(one)
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.name.partition("-")[0], []).append(point)
    front = [(p.evaluations, p.distance) for p in points if marks[p.name] == "front"]
    return [
        *(
            Series(
                solver,
                [(p.evaluations, p.distance) for p in group],
                line=False,
                errors=[p.standard_error for p in group],
                tips=[f"{p.name}: {p.evaluations:g} evaluations, {p.distance:.4g}" for p in group],
            )
            for solver, group in groups.items()
        ),
        Series("Pareto front", front, dashed=True, markers=False),
    ]


def _axes(one: Round) -> dict[str, Any]:
    distances = [point.distance for point in one.points]
    wide = min(distances) > 0 and max(distances) > 8 * min(distances)
    return {"x_label": "network calls per image", "y_label": "distance", "log_x": True, "log_y": wide}


def _figures(point: Point, one: Round) -> tuple[str, ...]:
    return (
        point.name,
        f"{point.evaluations:.4g}",
        f"{point.distance:.4g}",
        f"{point.standard_error:.2g}",
        f"{one.measured[point.name].milliseconds:.4g}",
    )


def _by_cost(one: Round) -> Sequence[Point]:
    return sorted(one.points, key=lambda point: (point.evaluations, point.distance))
