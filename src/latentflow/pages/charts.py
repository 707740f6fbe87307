"""Line charts as SVG: where everything lies on them. What it looks like is said in templates/chart.svg and chart.css.

A chart on a page is laid out twice, for a desk and for a phone; the style sheet shows the one that fits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from latentflow.pages.numbers import number
from latentflow.pages.page import render

TIME = "time t: 0 is data, 1 is noise"
"""The label of an axis of time."""

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: in the legend.
        points: (x, y) pairs, drawn in this order.
        dashed: whether its line is dashed.
        markers: whether each point is marked.
        line: whether the points are joined.
        errors: half the length of each point's error bar, in units of y; empty for no bars.
        tips: the tooltip of each point; empty for its coordinates.
    """

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    markers: bool = True
    line: bool = True
    errors: Sequence[float] = ()
    tips: Sequence[str] = ()


@dataclass(frozen=True)
class Chart:
    """Lines over x, with axes and a legend. A logarithmic axis leaves out values that are not positive."""

    series: Sequence[Series]
    x_label: str
    y_label: str
    log_x: bool = False
    log_y: bool = False

    @property
    def description(self) -> str:
        """For those who cannot see the chart."""
        names = [one.name for one in self.series]
        listed = " and ".join([", ".join(names[:-1]), names[-1]] if names[:-1] else names)
        return f"Chart of {self.y_label} against {self.x_label}: {listed}."

    @cached_property
    def wide(self) -> Plot:
        """The layout for a desk."""
        return _plot(self, ChartFrame(960, 386, left=64, right=930, top=40, bottom=332, x_spacing=140, y_spacing=52))

    @cached_property
    def narrow(self) -> Plot:
        """The layout for a phone."""
        return _plot(self, ChartFrame(360, 300, left=50, right=330, top=34, bottom=250, x_spacing=78, y_spacing=44))


def chart_file(chart: Chart) -> str:
    """A chart as an SVG file, with its legend."""
    return render("chart_file.svg", chart=chart, plot=chart.wide)


@dataclass(frozen=True)
class ChartFrame:
    """The size of a chart, the box that its axes span, and the least distance of the ticks, in CSS pixels."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    x_spacing: int
    y_spacing: int


@dataclass(frozen=True)
class Line:
    """A series in pixels.

    Attributes:
        name, dashed: those of the series.
        path: the SVG path through its points; empty for points that are not joined.
        bars: (x, y, y) of each error bar.
        marks: (x, y, tooltip) of each point; empty for a line without markers.
    """

    name: str
    dashed: bool
    path: str
    bars: list[tuple[float, float, float]]
    marks: list[tuple[float, float, str]]


@dataclass(frozen=True)
class Plot:
    """A chart in pixels: its frame, the (place, text) of its ticks, and its lines."""

    frame: ChartFrame
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]


def _plot(chart: Chart, frame: ChartFrame) -> Plot:
    series = [_positive(one, chart) for one in chart.series]
    points = [point for one in series for point in one.points]
    ends = [y + error for one in series for (_, y), error in zip(one.points, one.errors, strict=False)]
    x = Axis([x for x, _ in points], frame.left, frame.right, frame.x_spacing, log=chart.log_x)
    y = Axis([*(y for _, y in points), *ends], frame.bottom, frame.top, frame.y_spacing, log=chart.log_y)
    return Plot(
        frame,
        [(x.place(value), x.text(value)) for value in x.ticks],
        [(y.place(value), y.text(value)) for value in y.ticks],
        [_line(one, x, y) for one in series],
    )


def _positive(series: Series, chart: Chart) -> Series:
    """The series without the points that have no place on a logarithmic axis."""
    kept = [n for n, (x, y) in enumerate(series.points) if (x > 0 or not chart.log_x) and (y > 0 or not chart.log_y)]
    return replace(
        series,
        points=[series.points[n] for n in kept],
        errors=[series.errors[n] for n in kept] if series.errors else (),
        tips=[series.tips[n] for n in kept] if series.tips else (),
    )


def _line(series: Series, x: Axis, y: Axis) -> Line:
    places = [(x.place(a), y.place(b)) for a, b in series.points]
    tips = series.tips or [f"{series.name}: {number(a, 4)}, {number(b, 4)}" for a, b in series.points]
    return Line(
        series.name,
        series.dashed,
        path="M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places) if series.line and places else "",
        bars=[
            (place[0], y.place(max(value - error, y.least)), y.place(value + error))
            for place, (_, value), error in zip(places, series.points, series.errors, strict=False)
        ],
        marks=[(*place, tip) for place, tip in zip(places, tips, strict=True)] if series.markers else [],
    )


class Axis:
    """Where values lie between two ends of a chart, and which of them are written on it.

    Args:
        values: to be shown; a linear axis shows 0 as well.
        start, end: pixels of the axis's two ends.
        spacing: the least distance of two ticks of a linear axis, in pixels.
        log: for a logarithmic axis; all values must be positive.
    """

    def __init__(self, values: Sequence[float], start: float, end: float, spacing: float, *, log: bool):
        self.log, self.start, self.end = log, start, end
        low, high = (min(values), max(values)) if values else (1.0, 10.0)
        if log:
            self.ticks = _log_ticks(low, high)
            self.low, self.high = math.log10(min(low, self.ticks[0])), math.log10(max(high, self.ticks[-1]))
        else:
            low, high = min(low, 0.0), max(high, 0.0)
            step = _nice_step((high - low) / (abs(end - start) // spacing) or 1.0)
            self.ticks = [n * step for n in range(math.floor(low / step), math.ceil(high / step - 1e-9) + 1)]
            self.low, self.high = self.ticks[0], self.ticks[-1]

    @property
    def least(self) -> float:
        """The lowest value on the axis."""
        return 10**self.low if self.log else self.low

    def place(self, value: float) -> float:
        """The pixel of a value."""
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / ((self.high - self.low) or 1.0) * (self.end - self.start)

    def text(self, value: float) -> str:
        """A tick's value; very small and large ones on a logarithmic axis are powers of ten."""
        if not self.log or 1e-3 <= value < 1e6:
            return number(value, 4)
        exponent = math.floor(math.log10(value) + 1e-9)
        factor = round(value / 10.0**exponent)
        return ("" if factor == 1 else f"{factor}·") + "10" + str(exponent).translate(_SUPERSCRIPTS)


def _log_ticks(low: float, high: float) -> list[float]:
    """Decades around the values; where they span less than two, 2 and 5 times them as well."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
    ticks = [factor * 10.0**n for n in range(first, last + 1) for factor in factors]
    below = [tick for tick in ticks if tick <= low * (1 + 1e-9)]
    above = [tick for tick in ticks if tick >= high * (1 - 1e-9)]
    return [tick for tick in ticks if below[-1] <= tick <= above[0]]


def _nice_step(rough: float) -> float:
    """The least of 1, 2, 2.5, 5 and 10 times a power of ten that is not below `rough`."""
    decade = 10.0 ** math.floor(math.log10(rough))
    return next(factor * decade for factor in (1, 2, 2.5, 5, 10) if factor * decade >= rough * (1 - 1e-9))
