"""The record of a named column, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from latentflow.columns import Column, check_columns, written_values
from latentflow.data.items import fingerprint_of
from latentflow.data.sources.synthetic import SyntheticShapes
from latentflow.errors import DataError

VIEW, FINDINGS, AGE = (
    Column("view", "label", ("frontal", "lateral")),
    Column("findings", "labels", ("edema", "nodule", "effusion")),
    Column("age", "number"),
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", "number"), "a column named '': a name has 1 to 100 printable characters"),
        ((" age", "number"), "without spaces around them; rename it"),
        (("a=b", "number"), "could not be given on the command line; rename it"),
        (("a,b", "number"), "could not be given on the command line; rename it"),
        (("label", "number"), "this is the name of a condition that is no column; rename it"),
        (("age", "numbr"), "column age: unknown kind 'numbr'; did you mean 'number'?"),
        (("age", "number", ("young",)), "column age: a number has no classes; make it a label"),
        (("view", "label"), "column view: 0 classes; a column of label has 1 to 1,000,000"),
        (("tags", "labels", tuple(map(str, range(4097)))), "column tags: 4,097 classes; a column of labels has 1 to"),
        (("view", "label", ("a", "b", "a")), "column view: two classes are called 'a'"),
    ],
)
def test_what_is_no_column(arguments, message):
    with pytest.raises(DataError) as error:
        Column(*arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("column", "value"),
    [(VIEW, 0), (VIEW, 1), (FINDINGS, frozenset()), (FINDINGS, frozenset({0, 2})), (AGE, 63), (AGE, -0.5)],
)
def test_values_that_fit(column, value):
    column.check(value, "a.png")
    column.check(None, "a.png")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (VIEW, 2, "a.png: column view has the value 2, which is not an index below 2 or None"),
        (VIEW, True, "column view has the value True"),
        (VIEW, "lateral", "column view has the value 'lateral'"),
        (FINDINGS, frozenset({3}), "which is not a frozenset of indices below 3 or None"),
        (FINDINGS, [0], "column findings has the value [0]"),
        (AGE, float("nan"), "column age has the value nan, which is not a finite number or None"),
        (AGE, "63", "column age has the value '63'"),
    ],
)
def test_values_that_do_not(column, value, message):
    with pytest.raises(DataError) as error:
        column.check(value, "a.png")
    assert message in str(error.value)


def test_columns_that_cannot_stand_side_by_side():
    check_columns([VIEW, FINDINGS, AGE])
    with pytest.raises(DataError, match="two columns are called 'age'"):
        check_columns([AGE, VIEW, AGE])
    with pytest.raises(DataError, match="65 columns; at most 64"):
        check_columns([replace(AGE, name=f"n{number}") for number in range(65)])


def test_values_as_text_do_not_depend_on_the_order_of_a_set():
    assert written_values((1, frozenset({10, 2}), 0.1, None)) == "1 {2,10} 0.1 None"
    assert written_values((frozenset(),)) == "{}"


class WithAge(SyntheticShapes):
    def values(self, index):
        return (float(index),)


class Older(WithAge):
    def values(self, index):
        return (index + (index == 3) * 0.5,)


def test_the_fingerprint_covers_the_values():
    without, own, older = SyntheticShapes(4), WithAge(4, columns=(AGE,)), Older(4, columns=(AGE,))
    assert len({fingerprint_of(source, range(4)) for source in (without, own, older)}) == 3
    assert fingerprint_of(own, range(3)) == fingerprint_of(older, range(3))


def test_sources_without_columns():
    source = SyntheticShapes(2)
    assert (source.columns, source.values(0)) == ((), ())
