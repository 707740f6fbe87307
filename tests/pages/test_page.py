"""What pages are made of."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest
from jinja2 import UndefinedError
from PIL import Image

from latentflow.pages.charts import Chart, Series
from latentflow.pages.page import Sheet, Table, _environment, render

VOID = {"meta", "img", "br"}


def made(template: str, **values) -> str:
    parts = '{% from "parts.html" import chart, code, figure, sheet, table, tiles %}'
    return _environment().from_string(parts + template).render(values)


class Balanced(HTMLParser):
    """Fails where tags do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_tables_escape_their_cells_and_name_their_rows():
    html = made("{{ table(t) }}", t=Table(["name", "value"], [["<i>", "1 & 2"], ["x", "3"]], strong=[1]))
    assert '<th scope="row" class="words"><span>&lt;i&gt;</span></th><td>1 &amp; 2</td>' in html
    assert html.count('class="strong"') == 1
    assert html.index('class="strong"') > html.index("&lt;i&gt;")
    Balanced(html)


def test_a_chart_comes_in_two_layouts_with_one_legend():
    html = made("{{ chart(c) }}", c=Chart([Series("a <b>", [(1, 1), (2, 3)])], "x", "y"))
    assert re.findall(r'<svg class="(\w+)" viewBox="0 0 (\d+)', html) == [("wide", "960"), ("narrow", "360")]
    assert html.count("<li>") == 1 and html.count('aria-label="Chart of y against x: a &lt;b&gt;."') == 2
    assert "<b>" not in html
    Balanced(html)


def test_a_sheet_holds_its_picture(tmp_path):
    file = tmp_path / "sheet.png"
    Image.new("RGB", (20, 10), "red").save(file)
    html = made(
        "{{ sheet(s) }}", s=Sheet(file, "two & more", ["<top>", "below"], 3, columns=["a", "b", "c"], marked=[(1, 2)])
    )
    source = re.search(r'<img src="data:image/png;base64,([^"]+)" alt="two &amp; more">', html)
    assert base64.b64decode(source[1]) == file.read_bytes()
    assert 'style="--columns: 3; --rows: 2"' in html
    assert '<span class="frame" style="grid-area: 3 / 4"></span>' in html
    assert "&lt;top&gt;" in html and "<top>" not in html
    Balanced(html)


def test_captions_commands_and_key_figures_are_escaped():
    html = made(
        "{% call figure(code_of) %}{{ text }}{% endcall %}{% call code() %}run {{ text }}{% endcall %}{{ tiles(t) }}",
        code_of="<x>",
        text="<y>",
        t=[("<1>", "<what>")],
    )
    assert "<figcaption>&lt;y&gt;</figcaption>" in html and "&lt;x&gt;" in html
    assert "<code>run &lt;y&gt;</code>" in html
    assert "<dt>&lt;what&gt;</dt><dd>&lt;1&gt;</dd>" in html
    Balanced(html)


def test_a_missing_value_is_an_error():
    with pytest.raises(UndefinedError):
        render("sweep.html")


def test_the_styles_of_pages_and_charts_share_no_class():
    """Both are part of every page: what one says of a class would hold for the other's."""
    templates = _environment().loader
    of_pages, of_charts = (
        set(re.findall(r"\.([a-z][\w-]*)(?=[^;}]*\{)", templates.get_source(_environment(), name)[0]))
        for name in ("style.css", "chart.css")
    )
    assert {"sheet", "words"} <= of_pages and {"label", "s0"} <= of_charts
    assert of_pages & of_charts == set()
