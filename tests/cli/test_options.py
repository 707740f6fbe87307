"""Options generated from requests: what is typed, what the help shows, and what a refusal names."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from pydantic import Field

from latentflow.cli import options
from latentflow.errors import ConfigError
from latentflow.requests import (
    Classes,
    Conditions,
    Names,
    Numbers,
    Option,
    Request,
    RequestError,
    Times,
    Whole,
    WholeNumbers,
)


class Asked(Request):
    source: Annotated[Path, Option(argument=True, metavar="SOURCE")] = Field(description="A file.")
    size: Whole = Field(8, ge=1, le=64, description="A size.")
    kind: Literal["one", "two"] = Field("one", description="A kind.")
    flat: bool = Field(False, description="Flat.")
    safe: bool = Field(True, description="Safe.")
    names: Names | None = Field(None, description="Names.")
    classes: Classes | None = Field(None, description="Classes.")
    conditions: Conditions | None = Field(None, description="Conditions.")
    sizes: WholeNumbers = Field([4, 8], description="Sizes.")
    scales: Numbers | None = Field(None, description="Scales.")
    times: Times | None = Field(None, description="Times.")
    folder: Path | None = Field(None, description="A folder.")
    other: Annotated[int | None, Option(name="--map")] = Field(None, description="Another.")


@pytest.fixture
def call(monkeypatch):
    """Parses a command line; returns what the verb got."""
    monkeypatch.setattr(options, "_VERBS", {})
    got = []

    @options.command(example="latentflow ask file", group="Test")
    def ask(asked: Asked, out: Annotated[str, typer.Option(help="Where.")] = "here") -> None:
        """Ask."""
        got.append((asked, out))

    def parse(line: str):
        command = options.every_command()["ask"]
        with command.make_context("ask", shlex.split(line)) as context:
            command.invoke(context)
        return got[-1]

    return parse


def test_defaults_are_those_of_the_request(call):
    asked, out = call("file.png")
    assert asked == Asked(source=Path("file.png"))
    assert out == "here"


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("f --size 3", "size", 3),
        ("f --kind two", "kind", "two"),
        ("f --flat", "flat", True),
        ("f --no-safe", "safe", False),
        ("f --names 'fid, kid'", "names", ["fid", "kid"]),
        ("f --classes 'cat,\"Doe, Jane\"'", "classes", ["cat", "Doe, Jane"]),
        ("f --condition age=63", "conditions", {"age": "63"}),
        ("f --condition 'a b = c=d' --condition age=63,64", "conditions", {"a b": "c=d", "age": "63,64"}),
        ("f --condition tags=", "conditions", {"tags": ""}),
        ("f --sizes 1,2,3", "sizes", [1, 2, 3]),
        ("f --scales 1,1.5", "scales", [1.0, 1.5]),
        ("f --times 0.1,0.8", "times", (0.1, 0.8)),
        ("f --map 5", "other", 5),
    ],
)
def test_what_is_typed_becomes_the_value_of_the_field(call, line, name, value):
    asked, _ = call(line)
    assert getattr(asked, name) == value
    assert asked == Asked(source=Path("f"), **{name: value})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("f --size 0", "--size 0: give a whole number from 1 to 64"),
        ("f --sizes a,b", "--sizes 'a,b' is not a list of numbers like 4,8,16"),
        ("f --scales x", "--scales 'x' is not a list of numbers like 1,1.5,2"),
        ("f --times 0.5", "--times '0.5' is not two numbers like 0.1,0.8"),
        ("f --condition age", "--condition 'age' is not a name and a value like age=63"),
        ("f --condition =63", "--condition '=63' is not a name and a value like age=63"),
        ("f --condition age=6 --condition age=7", "--condition 'age=7': age is given twice; give it once"),
        ("f --classes 'cat,\"dog'", "is not a list like cat,dog; a name with a comma"),
        ("f --classes 'cat\ndog'", "is not a list like cat,dog; a name with a comma"),
    ],
)
def test_a_refusal_names_the_option_as_it_is_written(call, line, said):
    with pytest.raises(ConfigError, match=r"^--") as caught:
        call(line)
    assert said in str(caught.value)


@pytest.mark.parametrize("line", ["''", "f --out=", "f --out ''", "f --folder ''"])
def test_an_empty_text_is_no_path(call, line):
    with pytest.raises(typer.BadParameter, match="give a value; this one is empty"):
        call(line)


def test_an_empty_list_is_for_the_request_to_judge(call):
    assert call("f --sizes ''")[0].sizes == []


def test_what_the_model_cannot_do_is_refused_by_the_options_that_were_given(monkeypatch):
    monkeypatch.setattr(options, "_VERBS", {})

    @options.command(example="latentflow ask", group="Test")
    def ask(asked: Asked) -> None:
        """Ask."""
        raise RequestError("other", " 5: the model has 4")

    command = options.every_command()["ask"]
    for line, said in (("f --map 5", "--map 5: the model has 4"), ("f", "other 5: the model has 4")):
        with command.make_context("ask", line.split()) as context, pytest.raises(ConfigError) as caught:
            command.invoke(context)
        assert str(caught.value) == said


def test_the_help_shows_description_range_and_default(call):
    params = {one.name: one for one in options.every_command()["ask"].params}
    assert params["size"].help == "A size. (1 to 64)"
    assert params["size"].default == 8
    assert params["sizes"].default == "4,8"
    assert params["source"].param_type_name == "argument"
    assert params["flat"].opts == ["--flat"]
    assert not params["flat"].secondary_opts
    assert params["safe"].secondary_opts == ["--no-safe"]


def test_the_list_of_verbs_makes_no_options(monkeypatch):
    made = []
    monkeypatch.setattr(options._Verb, "command", lambda verb: made.append(verb.name))
    group = typer.main.get_command(options.app)
    context = group.make_context("latentflow", ["recipes"], resilient_parsing=True)
    assert [group.get_command(context, name).name for name in group.list_commands(context)] == list(options._VERBS)
    assert len(options._VERBS) > 20
    assert made == []
