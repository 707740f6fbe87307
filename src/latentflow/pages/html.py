"""A page that explains a result: HTML in one file, with its pictures and charts inside, and no script.

Every function returns a piece of HTML; `page` puts the pieces together. Texts are escaped, except where a
parameter is called `html`.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from latentflow.data.pictures.decode import open_image

_WIDTH, _LABEL_WIDTH, _LARGEST_CELL = 960, 118, 104  # of pictures and charts, in CSS pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 920, 14, 330  # the frame of a chart of 960 x 386
_INK, _SOFT = "#1d2530", "#5b6675"
# Okabe and Ito's colours, told apart by everyone; a series also has a marker of its own.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#b8860b", "#3b3b3b", "#7a5195")
_MARKERS = ("circle", "square", "triangle", "diamond")
_MARKER_PATHS = {
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
    "square": "M-3.6-3.6h7.2v7.2h-7.2z",
    "triangle": "M0-4.8L4.5 3.4H-4.5z",
    "diamond": "M0-5L5 0L0 5L-5 0z",
}

_STYLE = """
:root { --ink: #1d2530; --soft: #5b6675; --line: #dfe4ea; --tint: #f5f7f9; --accent: #0072b2; --bad: #d01c3f; }
* { box-sizing: border-box; }
html { font: 17px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  color: var(--ink); background: #fff; -webkit-text-size-adjust: 100%; }
body { max-width: 60rem; margin: 0 auto; padding: 3rem 1.5rem 5rem; }
h1 { font-size: 2.1rem; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 .4rem; }
h2 { font-size: 1.35rem; line-height: 1.3; letter-spacing: -0.01em; margin: 0 0 .8rem; }
section { margin-top: 3.2rem; padding-top: 1.6rem; border-top: 1px solid var(--line); }
p { margin: 0 0 1rem; max-width: 44rem; }
.lead { font-size: 1.1rem; color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1.6rem 0; }
.tile { background: var(--tint); border-radius: .6rem; padding: .9rem 1.1rem; }
.tile b { display: block; font-size: 1.65rem; line-height: 1.25; letter-spacing: -0.02em; font-weight: 650; }
.tile span { color: var(--soft); font-size: .85rem; line-height: 1.35; display: block; }
figure { margin: 1.4rem 0; }
figcaption { color: var(--soft); font-size: .88rem; line-height: 1.5; margin-top: .6rem; max-width: 44rem; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
.scroll { overflow-x: auto; }
.scroll > svg { min-width: 34rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .9rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
tr.strong td { font-weight: 650; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .88rem; margin: .3rem 0 0; padding: 0; }
.legend li { list-style: none; display: flex; align-items: center; gap: .4rem; }
.legend svg { width: 30px; flex: none; }
pre { background: var(--tint); border-radius: .6rem; padding: 1rem 1.2rem; overflow-x: auto; margin: 0 0 1.2rem;
  font: .84rem/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.verdicts { list-style: none; margin: 0; padding: 0; }
.verdicts li { border-left: .3rem solid #009e73; padding: .1rem 0 .1rem 1rem; margin: 0 0 1.1rem; max-width: 44rem; }
.verdicts li.undecided { border-color: #9aa4b0; }
.verdicts li.look { border-color: #e69f00; }
.verdicts li.bad { border-color: var(--bad); }
.verdicts span { display: block; color: var(--soft); font-size: .88rem; line-height: 1.5; }
summary { cursor: pointer; color: var(--accent); font-size: .92rem; margin-bottom: .6rem; }
footer { margin-top: 3.2rem; color: var(--soft); font-size: .85rem; }
@media (max-width: 40rem) { html { font-size: 16px; } body { padding: 1.8rem 1rem 3rem; } }
@media print { section { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: in the legend.
        points: (x, y) pairs, drawn in this order.
        dashed: a second way to tell lines apart.
        markers: whether each point is marked.
        line: whether the points are joined.
        errors: half the length of each point's error bar, in units of y; none: no bars.
        tips: what is said of each point under the pointer; none: its numbers.
    """

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    markers: bool = True
    line: bool = True
    errors: Sequence[float] = ()
    tips: Sequence[str] = ()


def page(title: str, lead: str, sections: Sequence[tuple[str, str]], footer: str) -> str:
    """The whole document.

    Args:
        sections: pairs of heading and HTML.
    """
    parts = [
        f"<section>\n<h2>{number}. {escape(heading)}</h2>\n{html}\n</section>"
        for number, (heading, html) in enumerate(sections, start=1)
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            f'<header>\n<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n</header>',
            *parts,
            f"<footer>{escape(footer)}</footer>\n</body>\n</html>\n",
        ]
    )


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def code(text: str) -> str:
    """Commands, as they are typed."""
    return f"<pre><code>{escape(text)}</code></pre>"


def tiles(figures: Sequence[tuple[str, str]]) -> str:
    """Key figures in a row: pairs of the figure and what it is."""
    items = [f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in figures]
    return f'<div class="tiles">{"".join(items)}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, strong: Collection[int] = ()) -> str:
    """A table; the first column is text, the others are numbers. The rows numbered in `strong` stand out."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = ""
    for number, row in enumerate(rows):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        body += f'<tr class="strong">{cells}</tr>' if number in strong else f"<tr>{cells}</tr>"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def verdicts(lines: Sequence[tuple[str, str, str, str]]) -> str:
    """A list of findings: mark ("good", "undecided", "look" or "bad"), title, what was found, and the rule."""
    items = [
        f'<li class="{mark}"><b>{escape(title)}.</b> {escape(text)}<span>{escape(rule)}</span></li>'
        for mark, title, text, rule in lines
    ]
    return f'<ul class="verdicts">{"".join(items)}</ul>'


def details(summary: str, html: str) -> str:
    """Something to unfold."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def figure(html: str, caption: str) -> str:
    """A picture or chart with what there is to see in it."""
    return f"<figure>{html}<figcaption>{escape(caption)}</figcaption></figure>"


def contact_sheet(
    file: Path,
    rows: Sequence[str],
    columns: Sequence[str] = (),
    *,
    num_columns: int,
    gap: int = 2,
    marked: Collection[tuple[int, int]] = (),
) -> str:
    """A PNG of many pictures (see `commands.grid`) with a label for each row and each column.

    Args:
        file: the PNG; its bytes become part of the page.
        gap: pixels between the pictures.
        marked: (row, column) of the pictures to frame in red.
    """
    with open_image(file) as image:
        width, height = image.size
    lines = max((len(label.split(" ")) for label in columns), default=0)  # one word a line: columns are narrow
    left, top = _LABEL_WIDTH, 15 * lines + 8 if columns else 0
    total_width = min(_WIDTH, left + num_columns * _LARGEST_CELL)
    scale = (total_width - left) / width
    cell_x, cell_y = (width + gap) / num_columns * scale, (height + gap) / len(rows) * scale
    total_height = top + height * scale
    data = base64.b64encode(file.read_bytes()).decode()
    parts = [
        f'<image href="data:image/png;base64,{data}" x="{left}" y="{top}" '
        f'width="{total_width - left}" height="{_number(height * scale)}"/>'
    ]
    for row, label in enumerate(rows):
        y = top + row * cell_y + (cell_y - gap * scale) / 2
        parts.append(f'<text x="0" y="{_number(y)}" dy=".35em" font-size="15" fill="{_INK}">{escape(label)}</text>')
    for column, label in enumerate(columns):
        x = _number(left + column * cell_x + (cell_x - gap * scale) / 2)
        words = [f'<tspan x="{x}" y="{13 + 15 * n}">{escape(word)}</tspan>' for n, word in enumerate(label.split(" "))]
        parts.append(f'<text text-anchor="middle" font-size="12.5" fill="{_SOFT}">{"".join(words)}</text>')
    for row, column in sorted(marked):
        place = f'x="{_number(left + column * cell_x + 1)}" y="{_number(top + row * cell_y + 1)}"'
        size = f'width="{_number(cell_x - gap * scale - 2)}" height="{_number(cell_y - gap * scale - 2)}"'
        parts.append(f'<rect {place} {size} fill="none" stroke="#d01c3f" stroke-width="3"/>')
    view = f'viewBox="0 0 {total_width} {_number(total_height)}" style="max-width: {total_width}px"'
    return f'<div class="scroll"><svg {view} role="img">{"".join(parts)}</svg></div>'


def line_chart(
    series: Sequence[Series], x_label: str, y_label: str, *, log_x: bool = False, log_y: bool = False
) -> str:
    """Lines over x with axes and a legend; a logarithmic axis leaves out what is not positive."""
    parts, keys = _chart(series, x_label, y_label, log_x=log_x, log_y=log_y)
    legend = [f'<li><svg viewBox="0 0 30 14">{swatch}</svg>{escape(name)}</li>' for name, swatch in keys]
    chart = f'<svg viewBox="0 0 960 386" role="img" font-size="13.5" fill="{_SOFT}">{"".join(parts)}</svg>'
    return f'<div class="scroll">{chart}</div><ul class="legend">{"".join(legend)}</ul>'


def chart_file(
    series: Sequence[Series], x_label: str, y_label: str, *, log_x: bool = False, log_y: bool = False
) -> str:
    """The chart of `line_chart` as an SVG file of its own, with the legend below."""
    parts, keys = _chart(series, x_label, y_label, log_x=log_x, log_y=log_y)
    per_row = 5
    for number, (name, swatch) in enumerate(keys):
        x, y = _LEFT + number % per_row * (_RIGHT - _LEFT) // per_row, 400 + number // per_row * 22
        label = f'<text x="36" y="7" dy=".35em">{escape(name)}</text>'
        parts.append(f'<g transform="translate({x} {y})">{swatch}{label}</g>')
    height = 400 + 22 * math.ceil(len(keys) / per_row)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 {height}" width="960" height="{height}"'
    style = f'font-family="system-ui, sans-serif" font-size="13.5" fill="{_SOFT}"'
    return f'{head} role="img" {style}><rect width="960" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n'


def _chart(
    series: Sequence[Series], x_label: str, y_label: str, *, log_x: bool, log_y: bool
) -> tuple[list[str], list[tuple[str, str]]]:
    """What a chart of 960 x 386 consists of, and the name and swatch (30 x 14) of each series."""
    series = [_positive(s, log_x, log_y) for s in series]
    x_axis = _Axis([x for s in series for x, _ in s.points], _LEFT, _RIGHT, log=log_x)
    tops = [y + error for s in series for (_, y), error in zip(s.points, s.errors, strict=False)]
    y_axis = _Axis([*(y for s in series for _, y in s.points), *tops], _BOTTOM, _TOP, log=log_y)
    parts = []
    for value in y_axis.ticks:
        y = _number(y_axis.place(value))
        parts.append(f'<path d="M{_LEFT} {y}H{_RIGHT}" stroke="#e6eaee"/>')
        parts.append(f'<text x="60" y="{y}" dy=".35em" text-anchor="end">{_tick(value, log_y)}</text>')
    for value in x_axis.ticks:
        x = _number(x_axis.place(value))
        parts.append(f'<path d="M{x} {_TOP}V{_BOTTOM}" stroke="#e6eaee"/>')
        parts.append(f'<text x="{x}" y="350" text-anchor="middle">{_tick(value, log_x)}</text>')
    parts.append(f'<path d="M{_LEFT} {_BOTTOM}H{_RIGHT}" stroke="#9aa5b1"/>')
    parts.append(f'<text x="{(_LEFT + _RIGHT) // 2}" y="378" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text transform="translate(14 172) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    keys = []
    for number, one in enumerate(series):
        colour, marker = _COLOURS[number % len(_COLOURS)], _MARKER_PATHS[_MARKERS[number % len(_MARKERS)]]
        dashes = ' stroke-dasharray="6 4"' if one.dashed else ""
        style = f'fill="none" stroke="{colour}" stroke-width="2"{dashes}'
        places = [(x_axis.place(x), y_axis.place(y)) for x, y in one.points]
        if one.line:
            parts.append(f'<path d="M{"L".join(f"{_number(x)} {_number(y)}" for x, y in places)}" {style}/>')
        for (x, _), (_, value), error in zip(places, one.points, one.errors, strict=False):
            ends = [_number(y_axis.place(end)) for end in (max(value - error, y_axis.least), value + error)]
            parts.append(f'<path d="M{_number(x)} {ends[0]}V{ends[1]}" stroke="{colour}" stroke-opacity=".5"/>')
        if one.markers:
            tips = one.tips or [f"{one.name}: {_short(x)}, {_short(y)}" for x, y in one.points]
            for (x, y), tip in zip(places, map(escape, tips), strict=True):
                place = f'transform="translate({_number(x)} {_number(y)})"'
                parts.append(f'<path d="{marker}" {place} fill="{colour}"><title>{tip}</title></path>')
        dot = f'<path d="{marker}" transform="translate(15 7)" fill="{colour}"/>' if one.markers else ""
        stroke = f'<path d="M0 7H30" {style}/>' if one.line else ""
        keys.append((one.name, stroke + dot))
    return parts, keys


def _positive(series: Series, log_x: bool, log_y: bool) -> Series:
    """Without the points that have no place on a logarithmic axis."""
    kept = [n for n, (x, y) in enumerate(series.points) if (x > 0 or not log_x) and (y > 0 or not log_y)]
    return replace(
        series,
        points=[series.points[n] for n in kept],
        errors=[series.errors[n] for n in kept] if series.errors else (),
        tips=[series.tips[n] for n in kept] if series.tips else (),
    )


class _Axis:
    """Where values lie between two ends of a chart, and which of them are written on it.

    Args:
        values: to be shown.
        start, end: pixels of the axis's two ends.
        log: a logarithmic axis; all values are positive.
    """

    def __init__(self, values: Sequence[float], start: float, end: float, *, log: bool):
        self.log, self.start, self.end = log, start, end
        low, high = (min(values), max(values)) if values else (1.0, 10.0)
        if log:
            self.ticks = _log_ticks(low, high)
            self.low, self.high = math.log10(min(low, self.ticks[0])), math.log10(max(high, self.ticks[-1]))
        else:
            low = min(low, 0.0)
            step = _nice_step((high - low) / 6 or 1.0)
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


def _log_ticks(low: float, high: float) -> list[float]:
    """Decades around the values; where they span less than two, 2 and 5 times them as well."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
    ticks = [factor * 10.0**n for n in range(first, last + 1) for factor in factors]
    below = [tick for tick in ticks if tick <= low * (1 + 1e-9)]
    above = [tick for tick in ticks if tick >= high * (1 - 1e-9)]
    return [tick for tick in ticks if below[-1] <= tick <= above[0]]


def _nice_step(rough: float) -> float:
    decade = 10.0 ** math.floor(math.log10(rough))
    return next(factor * decade for factor in (1, 2, 2.5, 5, 10) if factor * decade >= rough * (1 - 1e-9))


def _tick(value: float, log: bool) -> str:
    if log and (value < 1e-2 or value >= 1e5):
        exponent = math.floor(math.log10(value) + 1e-9)
        factor = round(value / 10.0**exponent)
        times = "" if factor == 1 else f"{factor}·"
        return f'{times}10<tspan dy="-5" font-size="10">{exponent}</tspan>'
    return _short(value)


def _short(value: float) -> str:
    """A number as people write it."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _number(value: float) -> str:
    """A coordinate without needless digits."""
    return f"{value:.1f}".rstrip("0").rstrip(".")
