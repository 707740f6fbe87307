"""Where a chart puts what it shows, and that its file is a picture on its own."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from latentflow.pages.charts import Axis, Chart, Series, chart_file

SVG = "{http://www.w3.org/2000/svg}"


def test_points_lie_at_their_values():
    chart = Chart([Series("a", [(1, 1), (10, 0.1), (100, 0.01)])], "x", "y", log_x=True, log_y=True)
    for plot in (chart.wide, chart.narrow):
        (x0, y0, _), (x1, y1, _), (x2, y2, _) = plot.lines[0].marks
        assert (x0, x2) == (plot.frame.left, plot.frame.right)
        assert (y0, y2) == (plot.frame.top, plot.frame.bottom)
        assert x1 == pytest.approx((x0 + x2) / 2) and y1 == pytest.approx((y0 + y2) / 2)


def test_ticks_lie_at_their_values():
    plot = Chart([Series("a", [(0, 0), (0.9, 3)])], "x", "y").wide
    ticks = {float(text): place for place, text in plot.x_ticks}
    assert min(ticks) == 0 and max(ticks) >= 0.9
    step = (ticks[max(ticks)] - ticks[0]) / max(ticks)
    for value, place in ticks.items():
        assert place == pytest.approx(ticks[0] + value * step)
    assert plot.lines[0].marks[1][0] == pytest.approx(ticks[0] + 0.9 * step)


def test_a_phone_gets_fewer_ticks():
    chart = Chart([Series("a", [(0, 0), (100_000, 3)])], "x", "y")
    assert 2 <= len(chart.narrow.x_ticks) < len(chart.wide.x_ticks)


@pytest.mark.parametrize("values", [[-3, -1], [1, 3], [-1, 2], [0, 0], [5], []])
def test_a_linear_axis_shows_zero_and_all_values(values):
    axis = Axis(values, 0, 100, 20, log=False)
    assert 0 in axis.ticks
    assert all(0 <= axis.place(value) <= 100 for value in values)


@pytest.mark.parametrize("values", [[1e-7, 1e7], [0.3, 0.4], [20, 300], [5], []])
def test_a_logarithmic_axis_shows_all_values(values):
    axis = Axis(values, 0, 100, 20, log=True)
    assert axis.ticks == sorted(axis.ticks)
    assert all(0 <= axis.place(value) <= 100 for value in values)


def test_ticks_of_a_logarithmic_axis_are_powers_of_ten_where_decimals_are_long():
    axis = Axis([1e-7, 1e7], 0, 100, 20, log=True)
    assert [axis.text(value) for value in (1e-7, 2e-4, 0.001, 0.5, 100, 1e5, 1e7)] == [
        *("10⁻⁷", "2·10⁻⁴", "0.001", "0.5", "100", "100,000", "10⁷")
    ]


def test_a_logarithmic_axis_leaves_out_what_is_not_positive():
    series = Series("a", [(1, 0), (2, 1), (3, -1), (4, 2)], errors=[1, 2, 3, 4], tips=["a", "b", "c", "d"])
    line = Chart([series], "x", "y", log_y=True).wide.lines[0]
    assert [tip for _, _, tip in line.marks] == ["b", "d"]
    assert len(line.bars) == 2


def test_error_bars_end_at_the_axis():
    plot = Chart([Series("a", [(1, 1.0), (2, 2.0)], errors=[0.5, 4.0])], "x", "y").wide
    (_, low, high), (_, lowest, highest) = plot.lines[0].bars
    middle = plot.lines[0].marks[0][1]
    assert low - middle == pytest.approx(middle - high)
    assert lowest == plot.frame.bottom
    assert plot.frame.top <= highest < high


def test_points_alone_have_no_line_and_a_line_alone_has_no_points():
    points, line = Chart([Series("a", [(1, 1)], line=False), Series("b", [(1, 1)], markers=False)], "x", "y").wide.lines
    assert points.path == "" and len(points.marks) == 1
    assert line.path.startswith("M") and line.marks == []


def test_a_chart_is_described_in_words():
    series = [Series(name, [(1, 1)]) for name in ("a", "b", "c")]
    assert Chart(series, "time", "loss").description == "Chart of loss against time: a, b and c."
    assert Chart(series[:1], "time", "loss").description == "Chart of loss against time: a."


def test_a_file_holds_the_chart_and_its_legend():
    chart = Chart([Series(f"<{n}>", [(1, n), (2, n)], dashed=n == 1) for n in range(6)], "x & y", "z")
    root = ElementTree.fromstring(chart_file(chart))
    assert root.tag == f"{SVG}svg" and root.get("role") == "img"
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert {f"<{n}>" for n in range(6)} | {"x & y", "z"} <= set(texts)
    titles = [element.text for element in root.iter(f"{SVG}title")]
    assert titles == [f"<{n}>: {x}, {n}" for n in range(6) for x in (1, 2)]
    dashed = [element for element in root.iter(f"{SVG}path") if "dashed" in element.get("class", "")]
    assert len(dashed) == 2  # the line, and its sample in the legend


def test_names_and_tooltips_of_a_chart_file_are_no_mark_up():
    name = '"><script>alert(1)</script>'
    svg = chart_file(Chart([Series(name, [(1, 1), (2, 3)], markers=True, tips=[name, name])], name, name))
    assert "<script" not in svg and svg.count("&lt;script&gt;") >= 5
    ElementTree.fromstring(svg)
