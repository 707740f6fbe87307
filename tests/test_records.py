"""What pydantic has against a record, in one line."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from latentflow.records import Record, explain


class Small(Record):
    kind: Literal["small"] = "small"
    depth: int = Field(1, ge=1)


class Large(Record):
    kind: Literal["large"] = "large"
    depth: int = Field(10, ge=10)


class Settings(Record):
    name: str
    rate: float = 1.0
    network: Annotated[Small | Large, Field(discriminator="kind")] = Small()

    @model_validator(mode="after")
    def _check(self) -> Settings:
        if self.name == "none":
            raise ValueError("none is no name")
        return self


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "name is missing"),
        ({"name": "none"}, "none is no name"),
        ({"name": "a", "rate": "fast"}, "rate = 'fast': give a number"),
        ({"name": "a", "rate": float("nan")}, "rate = nan: give a finite number"),
        ({"name": "a", "rat": 1}, "unknown key 'rat'; did you mean 'rate'? (valid: name, rate, network)"),
        ({"name": "a", "network": {"kind": "large", "depth": 3}}, "network.depth = 3: give at least 10"),
        (
            {"name": "a", "network": {"kind": "large", "dept": 3}},
            "unknown key 'network.dept'; did you mean 'depth'? (valid: kind, depth)",
        ),
    ],
)
def test_one_line_names_key_value_and_reason(given, said):
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate(given)
    assert explain(caught.value, Settings).startswith(said)


def test_without_the_schema_the_nearest_key_is_not_known():
    with pytest.raises(ValidationError) as caught:
        Settings(name="a", rat=1)
    assert explain(caught.value) == "unknown key 'rat'"


def test_a_long_value_is_cut():
    with pytest.raises(ValidationError) as caught:
        Settings(name=["word"] * 1000)
    assert len(explain(caught.value, Settings)) < 300


def test_a_record_stays_as_it_is():
    with pytest.raises(ValidationError, match="frozen"):
        Settings(name="a").name = "b"
