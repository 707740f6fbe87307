"""The result of `bound`: as a record, as charts and as a page."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from latentflow.analysis.bound import VARIANTS, Estimate
from latentflow.analysis.lipschitz import TimeCurve
from latentflow.evaluation.measured_bound import MeasuredBound
from latentflow.pages.charts import TIME, Chart, Series
from latentflow.pages.numbers import number, percent
from latentflow.pages.page import Table, render

KINDS = {
    "exact": "exact",
    "none": "estimate",
    "low": "lower estimate",
    "high": "upper estimate",
    "mixed": "lower and upper estimates together",
}
"""What an `Estimate.bias` is called here."""

_ERROR_NAMES = {"loss": "loss", "velocity": "velocity error"}


def growth_factor(measured: MeasuredBound, variant: str, error: str) -> float:
    """The bound on the distance of the flows over sqrt(int e dt), its value if errors did not grow."""
    bound = measured.bound
    curve = bound.loss if error == "loss" else bound.error
    root = math.sqrt(curve.integral())
    return bound.flow_distance(variant, error).value / root if root else 1.0


def parts(measured: MeasuredBound, variant: str, error: str) -> dict[str, float]:
    """The summands of one total, in pixels: reconstruction, noise left by the path, and the flow."""
    bound = measured.bound
    lipschitz = float(bound.decoder.max())
    return {
        "reconstruction": bound.reconstruction.distance.value,
        "noise left": lipschitz * bound.noise_left,
        "flow": lipschitz * bound.flow_distance(variant, error).value,
    }


def dominant_term(measured: MeasuredBound) -> str:
    """Which term dominates, and what it consists of."""
    bound = measured.bound
    tightest = parts(measured, "one_sided", "velocity")
    total = sum(tightest.values())
    name, value = max(tightest.items(), key=lambda part: part[1])
    share = percent(value / total) if 0 < total < math.inf else "all"
    factor = growth_factor(measured, "one_sided", "velocity")
    named = {
        "reconstruction": "the autoencoder's reconstruction error",
        "noise left": "the noise that the path leaves on the latents",
        "flow": "the flow",
    }[name]
    paper = growth_factor(measured, "sup", "velocity")
    return (
        f"The dominant term is {named}: {share} of the tightest total. The RMS velocity error of "
        f"{number(math.sqrt(bound.error.integral()))} grows {number(factor)} times on its way to the data, and "
        f"{number(float(bound.decoder.max()))} times in the decoder. The paper's form has a factor of {number(paper)} "
        f"instead of {number(factor)}."
    )


def looseness(measured: MeasuredBound) -> str:
    """Which variants are not vacuous, and how far they are above the measured distance."""
    bound = measured.bound
    totals = {(v, e): bound.total(v, e).value for v in VARIANTS for e in bound.errors}
    useful = [f"{v} with the {_ERROR_NAMES[e]}" for (v, e), total in totals.items() if total < measured.farthest]
    limit = f"{number(measured.farthest)}, the largest distance of two images in [-1, 1]"
    if not useful:
        found = f"All variants are vacuous here: every total is above {limit}."
    elif len(useful) == len(totals):
        found = f"Every total is below {limit}."
    else:
        found = f"Only {' and '.join(useful)} stay below {limit}; the other variants are vacuous here."
    return (
        f"{found} The distance of the flows, measured from the same noise, is {number(measured.coupling.value)}; the "
        f"tightest variant allows {number(bound.flow_distance('one_sided', 'velocity').value)}, the paper's form "
        f"{number(bound.flow_distance('sup', 'velocity').value)}."
    )


def term_rows(measured: MeasuredBound) -> list[tuple[str, ...]]:
    """Name, value, standard error, draws and kind of every term."""
    return [_row(estimate) for estimate in [*measured.bound.terms(), measured.coupling]]


def total_rows(measured: MeasuredBound) -> list[tuple[str, ...]]:
    """Variant, error, growth factor, the flow's distance, the total, and the total as a root mean square."""
    bound, rows = measured.bound, []
    for error in bound.errors:
        for variant in VARIANTS:
            total, flow = bound.total(variant, error), bound.flow_distance(variant, error)
            rows.append(
                (
                    variant,
                    _ERROR_NAMES[error],
                    number(growth_factor(measured, variant, error)),
                    number(flow.value),
                    f"{number(total.value)} ± {number(total.standard_error)}",
                    number(total.value / math.sqrt(bound.reconstruction.elements)),
                )
            )
    return rows


def bound_record(measured: MeasuredBound) -> dict[str, Any]:
    """Everything as JSON; an infinite number is null."""
    bound = measured.bound
    return {
        "request": measured.request.model_dump(mode="json"),
        "model": measured.request.model,
        "data": measured.data,
        "is_training_data": measured.is_training_data,
        "told": measured.told,
        "num": measured.request.num,
        "num_data": measured.num_data,
        "points": measured.request.points,
        "terms": [_json(estimate) for estimate in bound.terms()],
        "coupling": _json(measured.coupling),
        "totals": [
            {
                "variant": variant,
                "error": error,
                "growth_factor": _finite(growth_factor(measured, variant, error)),
                "flow_distance": _json(bound.flow_distance(variant, error)),
                "total": _json(bound.total(variant, error)),
                "parts": {name: _finite(value) for name, value in parts(measured, variant, error).items()},
            }
            for error in bound.errors
            for variant in VARIANTS
        ],
        "farthest": measured.farthest,
        "pixel_rms": bound.reconstruction.pixel_rms,
        "by_time": {
            "times": bound.loss.times.tolist(),
            "two_sided": _curve(bound.growth.two_sided, highest=True),
            "one_sided": _curve(bound.growth.one_sided, highest=True),
            "loss": _curve(bound.loss),
            "velocity_error": _curve(bound.error),
        },
        "verdict": [dominant_term(measured), looseness(measured)],
        "seconds": round(measured.seconds, 1),
    }


def bound_charts(measured: MeasuredBound) -> dict[str, Chart]:
    """By name: the two-sided and the one-sided constants and the errors, over time."""
    bound = measured.bound
    two, one = bound.growth.two_sided, bound.growth.one_sided

    def line(name: str, curve: TimeCurve, values: Any, errors: Any = (), dashed: bool = False) -> Series:
        return Series(name, list(zip(curve.times.tolist(), values.tolist(), strict=True)), dashed, errors=errors)

    errors = [
        line("loss", bound.loss, bound.loss.mean, bound.loss.standard_error.tolist(), dashed=True),
        line("velocity error", bound.error, bound.error.mean, bound.error.standard_error.tolist()),
    ]
    return {
        "two_sided": Chart(
            [line("maximum", two, two.highest), line("mean", two, two.mean, dashed=True)],
            TIME,
            "two-sided constant L(t)",
            log_y=True,
        ),
        "one_sided": Chart(
            [line("maximum", one, one.highest), line("mean", one, one.mean, dashed=True)],
            TIME,
            "one-sided constant M(t)",
        ),
        "error": Chart(errors, TIME, "squared error, summed over a latent"),
    }


def bound_page(measured: MeasuredBound) -> str:
    """The page, one HTML document with its charts inside."""
    bound, totals = measured.bound, total_rows(measured)
    tightest, paper = bound.total("one_sided", "velocity"), bound.total("sup", "loss")
    return render(
        "bound.html",
        measured=measured,
        key_figures=[
            (number(tightest.value), "the tightest bound, a distance of images in pixels"),
            (number(paper.value), "the paper's form: largest constant, raw loss"),
            (number(bound.reconstruction.distance.value), "the autoencoder's share, whatever the flow does"),
            (number(measured.farthest), "the largest distance of any two images: a bound above it is vacuous"),
        ],
        verdict=dominant_term(measured),
        looseness=looseness(measured),
        terms=Table(("term", "value", "standard error", "draws", "kind"), term_rows(measured), text=(0, 4)),
        totals=Table(
            ("variant", "error", "growth factor", "flow, in latents", "total, in pixels", "per value"),
            totals,
            strong=[len(totals) - 1],
            text=(0, 1),
        ),
        charts=bound_charts(measured),
    )


def _row(estimate: Estimate) -> tuple[str, ...]:
    count = f"{estimate.count:,}" if estimate.count else ""
    return estimate.name, number(estimate.value), number(estimate.standard_error), count, KINDS[estimate.bias]


def _json(estimate: Estimate) -> dict[str, Any]:
    return {name: _finite(value) if isinstance(value, float) else value for name, value in asdict(estimate).items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _curve(curve: TimeCurve, *, highest: bool = False) -> dict[str, list[float | None]]:
    values = {"mean": curve.mean, "standard_error": curve.standard_error}
    values |= {"highest": curve.highest} if highest else {}
    return {name: [_finite(x) for x in value.tolist()] for name, value in values.items()}
