"""What `bound` measured: as a record, as charts, and as a page to read."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from latentflow.analysis.bound import VARIANTS, Estimate, WassersteinBound
from latentflow.analysis.lipschitz import TimeCurve
from latentflow.pages.html import Series, figure, line_chart, page, paragraph, table, tiles

KINDS = {
    "exact": "exact",
    "none": "estimate",
    "low": "lower estimate",
    "high": "upper estimate",
    "mixed": "lower and upper estimates together",
}
"""What an `Estimate.bias` is called here."""

_TIME = "time t: 0 is data, 1 is noise"
_ERROR_NAMES = {"loss": "loss", "velocity": "velocity error"}


@dataclass(frozen=True)
class MeasuredBound:
    """A bound with what was measured beside it.

    Attributes:
        bound: its terms.
        coupling: sqrt(E|y - x|^2) of latents that the model (y) and the flow of the data (x) make from the same noise:
            what `WassersteinBound.flow_distance` bounds, but for the steps of the solvers.
        data: which images.
        told: what the model was told of them, in words.
        num, num_data, points: see `bound`.
        is_training_data: whether these are the very images that the model was trained on.
        model: where it came from.
        seconds: it took in all.
    """

    bound: WassersteinBound
    coupling: Estimate
    data: str
    told: str
    num: int
    num_data: int
    points: int
    is_training_data: bool
    model: str = ""
    seconds: float = 0.0

    @property
    def farthest(self) -> float:
        """No two images with values in [-1, 1] are further apart than this."""
        return 2 * math.sqrt(self.bound.reconstruction.elements)


@dataclass(frozen=True)
class Chart:
    """The arguments of `line_chart` and `chart_file`, and what there is to see."""

    lines: tuple[list[Series], str, str]
    caption: str
    options: dict[str, bool] = field(default_factory=dict)


def growth_factor(measured: MeasuredBound, variant: str, error: str) -> float:
    """By how much the bound on the flows' distance exceeds sqrt(int e dt), which it would be if errors did not grow."""
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


def verdict(measured: MeasuredBound) -> str:
    """Which term dominates, in one sentence, and what that is made of, in another."""
    bound = measured.bound
    tightest = parts(measured, "one_sided", "velocity")
    total = sum(tightest.values())
    name, value = max(tightest.items(), key=lambda part: part[1])
    share = f"{100 * value / total:.3g} %" if 0 < total < math.inf else "all"
    factor = growth_factor(measured, "one_sided", "velocity")
    named = {
        "reconstruction": "the autoencoder's reconstruction error",
        "noise left": "the noise that the path leaves on the latents",
        "flow": "the flow",
    }[name]
    first = f"The term that dominates is {named}: {share} of the tightest total."
    root = math.sqrt(bound.error.integral())
    second = (
        f" There the velocity's error, {number(root)} as a root mean square, is stretched {number(factor)} times on "
        f"its way to the data and {number(float(bound.decoder.max()))} times by the decoder; the paper's form has the "
        f"factor {number(growth_factor(measured, 'sup', 'velocity'))} in place of {number(factor)}."
    )
    return first + second


def looseness(measured: MeasuredBound) -> str:
    """How much the bound says, in one sentence."""
    totals = {(v, e): measured.bound.total(v, e).value for v in VARIANTS for e in measured.bound.errors}
    useful = [f"{v} with the {_ERROR_NAMES[e]}" for (v, e), total in totals.items() if total < measured.farthest]
    limit = f"{number(measured.farthest)}, which no two images in [-1, 1] exceed"
    reached = measured.coupling.value
    bounded = measured.bound.flow_distance("one_sided", "velocity").value
    measured_words = (
        f" The flows' distance itself, measured from the same noise, is {number(reached)}, where the tightest variant "
        f"allows {number(bounded)} and the paper's {number(measured.bound.flow_distance('sup', 'velocity').value)}."
    )
    if not useful:
        return f"No variant says anything here: every total is above {limit}.{measured_words}"
    if len(useful) == len(totals):
        return f"Every total is below {limit}.{measured_words}"
    return f"Below {limit}, stay only {' and '.join(useful)}; the others say nothing here.{measured_words}"


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
        "model": measured.model,
        "data": measured.data,
        "is_training_data": measured.is_training_data,
        "told": measured.told,
        "num": measured.num,
        "num_data": measured.num_data,
        "points": measured.points,
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
        "verdict": [verdict(measured), looseness(measured)],
        "seconds": round(measured.seconds, 1),
    }


def bound_charts(measured: MeasuredBound) -> dict[str, Chart]:
    """By name: the two-sided and the one-sided constants and the errors, over time."""
    bound = measured.bound
    two, one = bound.growth.two_sided, bound.growth.one_sided

    def line(name: str, curve: TimeCurve, values: Any, errors: Any = (), dashed: bool = False) -> Series:
        return Series(name, list(zip(curve.times.tolist(), values.tolist(), strict=True)), dashed, errors=errors)

    return {
        "two_sided": Chart(
            ([line("largest", two, two.highest), line("mean", two, two.mean, dashed=True)], _TIME, "L(t)"),
            "The two-sided Lipschitz constant of the velocity: the largest singular value of its derivative. The "
            "paper's form takes the largest of all times, whichever way it stretches.",
            {"log_y": True},
        ),
        "one_sided": Chart(
            ([line("largest", one, one.highest), line("mean", one, one.mean, dashed=True)], _TIME, "M(t)"),
            "The one-sided constant: the rate at which generated neighbours part on their way to the data. Below zero "
            "they draw together, and errors made earlier shrink.",
        ),
        "error": Chart(
            (
                [
                    line("loss", bound.loss, bound.loss.mean, bound.loss.standard_error.tolist(), dashed=True),
                    line("velocity error", bound.error, bound.error.mean, bound.error.standard_error.tolist()),
                ],
                _TIME,
                "squared, summed over a latent",
            ),
            "The loss, and the same with the variance taken out that no velocity can avoid. Bars are one standard "
            "error. Where the lines meet, towards t = 0, the velocity of a finite set of images points at one of them, "
            "which no model follows that generalises; with more images they part earlier.",
        ),
    }


def bound_page(measured: MeasuredBound) -> str:
    """The page, one HTML document with its charts inside."""
    bound = measured.bound
    tightest = bound.total("one_sided", "velocity")
    key = [
        (number(tightest.value), "the tightest bound, as a distance of images in pixels"),
        (number(bound.total("sup", "loss").value), "the paper's form: largest constant, raw loss"),
        (number(bound.reconstruction.distance.value), "of it the autoencoder's, whatever the flow does"),
        (number(measured.farthest), "the largest distance of any two images: above it, a bound says nothing"),
    ]
    result = tiles(key) + paragraph(verdict(measured)) + paragraph(looseness(measured))
    terms = table(("term", "value", "standard error", "draws", "kind"), term_rows(measured))
    totals = table(
        ("variant", "error", "growth factor", "flow, in latents", "total, in pixels", "per value"),
        total_rows(measured),
        strong=[len(total_rows(measured)) - 1],
    )
    charts = "".join(
        figure(line_chart(*chart.lines, **chart.options), chart.caption) for chart in bound_charts(measured).values()
    )
    sections = [
        ("The result", result),
        (
            "The terms",
            figure(
                terms,
                "Distances are summed over all values of an image or a latent. A lower estimate is the largest of the "
                "points looked at; an upper one exceeds what stands in the theorem.",
            ),
        ),
        (
            "The totals",
            figure(
                totals,
                "The growth factor is what the flow's distance is, divided by the root of the integrated error. The "
                "last column is the total divided by the root of the number of pixel values.",
            ),
        ),
        ("By time", charts),
        ("How it was measured", _method(measured)),
    ]
    lead = f"How far can the images of {measured.model or 'this model'} be from the data? The Wasserstein-2 bound."
    footer = "Written by latentflow bound. Every figure on this page is in bound.json beside it."
    return page("latentflow: the bound", lead, sections, footer)


def _method(measured: MeasuredBound) -> str:
    same = (
        " These are the images that the model was trained on: its errors on them may be smaller than on others."
        if measured.is_training_data
        else ""
    )
    texts = [
        f"The images: {measured.data}. The model was told {measured.told}, without guidance.{same}",
        f"{measured.num:,} images were encoded and decoded for the first term. The loss has {measured.num:,} draws of "
        f"image, time and noise in each bin of time. Derivatives were taken at {measured.points} states on the path, "
        f"at {measured.points} on the model's own trajectories, and at {measured.points} latents for the decoder.",
        f"The velocity error is one against the velocity of the latents of {measured.num_data:,} images"
        f"{' (of the same label)' if measured.told != 'nothing' else ''}, each as likely as the other. That knows more "
        "than can be learnt of what the images are a sample of: in the mean, the figure lies between the true error "
        "and the loss, and it falls with more images (--num-data).",
        "The constants are the largest of the points looked at, and so too low; a proof would need the largest of all. "
        "What stands here is an estimate of the bound, and no certificate. The bound is one of the exact solution: the "
        "steps of a solver are not in it. The decoder's constant is that of the decoder before its values are clamped, "
        "which cannot bring images further apart.",
    ]
    return "".join(map(paragraph, texts))


def number(value: float | None) -> str:
    """Three digits, as people write them."""
    if value is None or math.isnan(value):
        return ""
    if math.isinf(value):
        return "beyond 1e308"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


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
