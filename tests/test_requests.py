"""Requests: fields with ranges, checked once, with one line for what is wrong."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import pytest
from pydantic import Field, model_validator

from latentflow.errors import ConfigError
from latentflow.requests import Names, Number, Option, PathText, Request, RequestError, Whole, range_text
from latentflow.sampling.request import SampleRequest


class Ask(Request):
    count: Annotated[Whole, Option(called="number of things", remedy="ask again for more")] = Field(
        2, ge=1, le=5_000, description="How many."
    )
    share: Number | None = Field(None, ge=0, le=1, description="A share.")
    large: Whole = Field(0, ge=0, description="Anything.")
    word: str = Field("", description="A word.")
    free: Number = Field(0.0, le=1e40, description="Any number.")
    place: PathText = Field("here", description="A place.")
    names: Names | None = Field(None, description="Names.")
    flag: bool = Field(False, description="A flag.")

    @model_validator(mode="after")
    def _fits(self) -> Ask:
        if self.word == "five" and self.count != 5:
            raise ValueError(f"five things are not {self.count}")
        return self


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"count": 0}, "number of things 0: give a whole number from 1 to 5,000; ask again for more"),
        ({"count": 5_001}, "number of things 5001: give a whole number from 1 to 5,000; ask again for more"),
        ({"count": True}, "number of things True: give a whole number from 1 to 5,000; ask again for more"),
        ({"count": 2.0}, "number of things 2.0: give a whole number from 1 to 5,000; ask again for more"),
        ({"count": 10**50}, "number of things of more than 40 digits: give a whole number from 1 to 5,000; ask again"),
        ({"share": 1.5}, "share 1.5: give a number from 0 to 1"),
        ({"share": float("nan")}, "share nan: give a number from 0 to 1"),
        ({"share": "half"}, "share 'half': give a number from 0 to 1"),
        ({"share": "x" * 100}, "share of 102 characters: give a number from 0 to 1"),
        ({"large": -1}, "large -1: give a whole number of at least 0"),
        ({"cuont": 3}, "unknown argument 'cuont'; did you mean 'count'?"),
        ({"free": float("inf")}, "free inf: give a finite number"),
        ({"free": 10**50}, "free of more than 40 digits"),
        ({"place": 3}, "place 3: give a text"),
        ({"names": "one"}, "names 'one': give a list"),
        ({"flag": "perhaps"}, "flag 'perhaps': give True or False"),
        ({"word": "five"}, "five things are not 2"),
    ],
)
def test_what_is_refused_is_refused_in_one_line(given, said):
    with pytest.raises(RequestError) as caught:
        Ask(**given)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ConfigError)


def test_numbers_of_other_libraries_become_pythons():
    asked = Ask(count=np.int64(3), share=np.float32(0.5))
    assert (asked.count, asked.share) == (3, 0.5)
    assert (type(asked.count), type(asked.share)) == (int, float)


def test_a_request_cannot_be_changed():
    with pytest.raises(Exception, match="frozen"):
        Ask().count = 3


def test_what_follows_the_advice_is_accepted():
    assert Ask(count=5_000, share=1, large=0, word="five words").count == 5_000
    assert Ask(word="five", count=5).word == "five"


@pytest.mark.parametrize(
    ("name", "text"), [("count", "1 to 5,000"), ("share", "0 to 1"), ("large", "at least 0"), ("word", "")]
)
def test_the_range_as_the_help_shows_it(name, text):
    assert range_text(Ask.model_fields[name]) == text


def test_only_what_was_asked_for_overrides_the_preset():
    assert SampleRequest(num=3, seed=7).preset() == {}
    assert SampleRequest(steps=3, guidance=1).preset() == {"steps": 3, "guidance": 1.0}
