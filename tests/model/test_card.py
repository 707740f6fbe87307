"""The README.md of a model folder: its commands and its program work as they are printed."""

from __future__ import annotations

import html
import re
import shlex

import pytest
from huggingface_hub import ModelCard

from latentflow.hub import CARD_NAME
from latentflow.model.card import model_card
from latentflow.model.conditioning import ColumnCondition
from tests import tiny
from tests.processes import run_here


@pytest.fixture
def folder(tmp_path, kl):
    tiny.model(kl).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_program_runs(folder):
    [program] = blocks((folder / "README.md").read_text(encoding="utf-8"), "python")
    found: dict = {}
    exec(program.replace(CARD_NAME, str(folder)), found)
    assert len(found["images"]) == 16


def test_the_command_runs(folder, tmp_path, capsys, monkeypatch):
    [commands] = blocks((folder / "README.md").read_text(encoding="utf-8"), "bash")
    name, *words = shlex.split(commands.replace(CARD_NAME, str(folder)))
    monkeypatch.chdir(tmp_path)
    assert name == "latentflow"
    assert run_here(words, capsys, monkeypatch).code == 0
    assert len(list((tmp_path / "samples").glob("*.png"))) >= 16


def test_facts_cannot_break_the_table(kl):
    """Names of data and classes are other people's words."""
    config = tiny.model(kl).config
    training = config.training.model_copy(update={"data": "a | b\nc {{ 1 + 1 }}"})
    text = model_card(config.model_copy(update={"training": training}))
    assert "| trained on | a \\| b c {{ 1 + 1 }} |\n" in text
    assert ModelCard(text).data.tags == ["flow-matching", "image-generation", "class-conditional"]


def test_named_conditions_are_in_the_table_and_in_the_command(kl):
    columns = [
        ColumnCondition(name="age at scan", kind="number", mean=51.2, deviation=9, low=18, high=95),
        ColumnCondition(name="view", kind="label", class_names=["frontal", "lateral"]),
    ]
    text = model_card(tiny.model(kl, conditioning={"columns": columns}).config)
    assert "| named conditions | age at scan (number, 18 to 95); view (label: frontal, lateral) |\n" in text
    assert "--condition 'age at scan=51.2' --out samples\n" in text
    assert "| guidance | on label, age at scan, view |\n" in text


@pytest.mark.parametrize(
    "name", ["<img src=x onerror=alert(1)>", "```<b>` `", "![x](http://x/y.png)", "a&lt;b", "\\<i>"]
)
def test_names_of_classes_are_no_html_and_no_links(kl, name):
    """Also where they hold the marks of code, which would hide what stands between them."""
    conditioning = {"map_class_names": [name, "road"], "map_palette": [(0, 0, 0), (1, 1, 1)]}
    config = tiny.model(kl, class_names=(name, "cat"), conditioning=conditioning).config
    training = config.training.model_copy(update={"data": f"/data/{name}"})
    text = model_card(config.model_copy(update={"training": training}))
    table = text.partition("| | |")[2].partition("```bash")[0]
    assert ", cat |" in table
    plain = re.sub(r"\\[\\`!\[\]]", "", table).replace("`autoencoder`", "")
    assert not set("<>[]`!") & set(plain)
    assert "&lt;b" not in table if name == "a&lt;b" else name in html.unescape(re.sub(r"\\(.)", r"\1", table))
