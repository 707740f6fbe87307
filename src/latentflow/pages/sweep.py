"""The result of a sweep: as a record, as a chart and as a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from latentflow.evaluation.sweep import SweepResult
from latentflow.evaluation.sweep_rounds import Round
from latentflow.evaluation.sweep_rules import ACCURACY_MARGIN, CONFIDENCE, SIGMAS, Point
from latentflow.pages.charts import Chart, Series, chart_file
from latentflow.pages.numbers import number, percent
from latentflow.pages.page import Table, render

HEADER = ("preset", "evaluations", "distance", "std error", "classes", "ms per image", "mark")
_MOST_IMAGES = 100_000  # more than is practical to draw for a comparison
_MARKS = {"front": "front", "undecided": "undecided", "beaten": ""}


def verdict(result: SweepResult) -> list[str]:
    """What the sweep found, in sentences; where it is undecided, also what would decide it."""
    margins = f"a distance larger by more than {100 * result.request.margin:g} %"
    if result.ceiling:
        margins = f"class accuracy lower by more than {100 * ACCURACY_MARGIN:g} points, or {margins} at equal accuracy"
    basis = f"{result.final.num:,} images each of {len(result.final.measured)} presets, the same seeds for all"
    if result.best is not None:
        found = (
            f"{result.best} is the cheapest preset that is as good as any other: none beats it by {margins} "
            f"({100 * CONFIDENCE:g} % confidence; {basis})."
        )
        if len(result.final.measured) == 1:
            found = f"{result.best} is the only preset that was measured; there is nothing to compare it with."
        return [
            found,
            *_what_follows(result),
        ]
    return [
        f"Undecided: no preset is shown to be as good as all others ({basis}); worse means {margins}, at "
        f"{100 * CONFIDENCE:g} % confidence.",
        _would_decide(result),
        *(["Nothing was written: the model keeps its preset."] if result.request.write else []),
    ]


def _what_follows(result: SweepResult) -> list[str]:
    """What the model is now, or what the best candidate needs."""
    length = result.lengths.get(result.best)
    if result.written:
        of = "" if length is None else f", with weights averaged to the length {length:g}"
        return [f"It is the preset of the model now{of}."]
    if length is None:
        return []
    return [f"Its weights: latentflow ema {result.request.model} --length {length:g} --write."]


def _would_decide(result: SweepResult) -> str:
    """What to do about an undecided result."""
    if result.final.missing:
        return (
            f"{len(result.final.missing)} of {len(result.presets)} presets were not measured for lack of time: repeat "
            "the command to go on."
        )
    name = min(result.needed, key=lambda one: (result.needed[one], one))
    if math.isinf(result.needed[name]):
        return "No number of images would decide it: give a larger --margin."
    digits = 10 ** (len(str(math.ceil(result.needed[name]))) - 2)
    num = math.ceil(result.needed[name] / digits) * digits
    seconds = math.ceil(1.5 * (num - result.final.num) * result.seconds_per_image)
    text = f"About {num:,} images each would decide it, {name} being the closest to it"
    if num > _MOST_IMAGES:
        return f"{text}: too close to tell apart in practice; give a larger --margin, or fewer presets."
    options = [f"--num {num}"] if num > result.last_size else []
    options += [f"--budget {seconds}"] if result.request.budget is not None else []
    how = f" with {' '.join(options)}" if options else ""
    minutes = max(round(seconds / 60), 1)
    return f"{text}: repeat the command{how} to go on; it takes about {minutes:,} minute{'s' if minutes > 1 else ''}."


def summary(result: SweepResult) -> dict[str, Any]:
    """A sweep as JSON. Resamples and earlier rounds of a candidate are in OUT/candidates."""
    return {
        "request": result.request.model_dump(mode="json"),
        "model": result.request.model,
        "distance": result.label,
        "num": result.final.num,
        "decided": result.best is not None,
        "best": result.best,
        "verdict": " ".join(verdict(result)),
        "confidence": CONFIDENCE,
        "margin": result.request.margin,
        "accuracy_margin": ACCURACY_MARGIN if result.ceiling else None,
        "real_accuracy": result.ceiling.accuracy if result.ceiling else None,
        "old_preset": result.old.model_dump(mode="json"),
        "new_preset": None if result.new is None else result.new.model_dump(mode="json"),
        "written": result.written,
        "candidates": [
            {
                "name": point.name,
                "mark": result.marks[point.name],
                "evaluations": point.evaluations,
                "distance": point.distance,
                "standard_error": point.standard_error,
                "class_accuracy": point.accuracy,
                "images_needed": None
                if math.isinf(result.needed[point.name])
                else math.ceil(result.needed[point.name]),
                "milliseconds": result.final.measured[point.name].milliseconds,
                "preset": result.presets[point.name],
                "ema_length": result.lengths.get(point.name),
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
    return chart_file(_chart(result))


def sweep_page(result: SweepResult) -> str:
    """The whole result as one HTML document."""
    table = rows(result)
    return render(
        "sweep.html",
        result=result,
        verdict=verdict(result),
        key_figures=_tiles(result) if result.best is not None else [],
        options=_options(result) if result.best is not None else "",
        quality=_chart(result),
        candidates=Table(
            HEADER, table, strong=[n for n, row in enumerate(table) if row[0] == result.best], text=(0, 6)
        ),
        other_rounds=[
            (one, Table(HEADER[:-1], [_figures(point, one) for point in _by_cost(one)]))
            for one in result.rounds
            if one is not result.final
        ],
        confidence=CONFIDENCE,
        sigmas=SIGMAS,
    )


def _tiles(result: SweepResult) -> list[tuple[str, str]]:
    point = next(p for p in result.final.points if p.name == result.best)
    tiles = [
        (point.name, "the cheapest preset that is as good as any other"),
        (number(point.evaluations, 4), "network calls per image"),
        (number(point.distance, 4), f"distance, standard error {number(point.standard_error, 2)}"),
        (f"{number(result.final.measured[point.name].milliseconds)} ms", "per image"),
    ]
    if point.accuracy is not None:
        real = percent(result.ceiling.accuracy)
        tiles.insert(2, (percent(point.accuracy), f"of the images show their class; of real images {real}"))
    return tiles


def _options(result: SweepResult) -> str:
    """The best preset as options of the command line."""
    parts = []
    for name, value in result.presets[result.best].items():
        text = ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else f"{value}"
        text = value["model"] if name == "guide" else text
        parts.append(f"--{name.replace('_', '-')} {text}")
    return " ".join(parts)


def _chart(result: SweepResult) -> Chart:
    """The front of the final round as a line, and the candidates of each solver as points."""
    points = _by_cost(result.final)
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.name.partition("-")[0], []).append(point)
    series = [
        Series(
            solver,
            [(p.evaluations, p.distance) for p in group],
            line=False,
            errors=[p.standard_error for p in group],
            tips=[f"{p.name}: {number(p.evaluations, 4)} evaluations, {number(p.distance, 4)}" for p in group],
        )
        for solver, group in groups.items()
    ]
    front = [(p.evaluations, p.distance) for p in points if result.marks[p.name] == "front"]
    distances = [point.distance for point in points]
    return Chart(
        [*series, Series("Pareto front", front, dashed=True, markers=False)],
        "network calls per image",
        "distance",
        log_x=True,
        log_y=min(distances) > 0 and max(distances) > 8 * min(distances),
    )


def _figures(point: Point, one: Round) -> tuple[str, ...]:
    return (
        point.name,
        number(point.evaluations, 4),
        number(point.distance, 4),
        number(point.standard_error, 2),
        "" if point.accuracy is None else percent(point.accuracy),
        number(one.measured[point.name].milliseconds, 4),
    )


def _by_cost(one: Round) -> Sequence[Point]:
    return sorted(one.points, key=lambda point: (point.evaluations, point.distance))
