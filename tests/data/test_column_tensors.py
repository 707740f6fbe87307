"""Values of named columns as a cache stores them and as a network gets them: round trips and known bits."""

from __future__ import annotations

import pytest
import torch

from latentflow.columns import Column, places_of
from latentflow.data.column_tensors import row_values, rows_of, stored_values

VIEW, AGE = Column("view", "label", ("frontal", "lateral")), Column("age", "number")


def tags(number: int) -> Column:
    return Column("tags", "labels", tuple(f"tag {index}" for index in range(number)))


def test_a_label_is_its_index_and_the_null_label_the_one_after_the_last():
    stored = stored_values(VIEW, [1, None, 0])
    assert (stored.tolist(), stored.dtype) == ([1, 2, 0], torch.int32)
    assert row_values(VIEW, stored).tolist() == [[1], [2], [0]]


def test_a_number_keeps_its_digits_on_disk():
    stored = stored_values(AGE, [63, None, 1_700_000_000.25])
    assert (stored.tolist(), stored.dtype) == ([[63, 0], [0, 1], [1_700_000_000.25, 0]], torch.float64)
    assert row_values(AGE, stored)[:2].tolist() == [[63, 0], [0, 1]]


@pytest.mark.parametrize("number", [1, 7, 8, 9, 40])
def test_a_set_is_a_bit_for_each_class_and_one_for_not_known(number):
    column, every = tags(number), frozenset(range(number))
    values = [frozenset(), None, every, frozenset({number - 1}), frozenset({0})]
    stored = stored_values(column, values)
    assert (stored.shape, stored.dtype) == ((5, number // 8 + 1), torch.uint8)
    rows = row_values(column, stored)
    assert rows.shape == (5, column.row.width)
    read = [None if row[-1] else frozenset(row.nonzero().flatten().tolist()) for row in rows]
    assert read == values


def test_the_lowest_bit_of_the_first_byte_is_the_first_class():
    assert stored_values(tags(9), [frozenset({0, 8})]).tolist() == [[0b1, 0b1]]
    assert stored_values(tags(9), [None]).tolist() == [[0, 0b10]]


def test_columns_stand_one_after_the_other():
    columns = [VIEW, tags(3), AGE]
    assert places_of([column.row for column in columns]) == [slice(0, 1), slice(1, 5), slice(5, 7)]
    rows = rows_of(columns, [(1, frozenset({2}), 63), (None, None, None)])
    assert rows.dtype == torch.float32
    assert rows.tolist() == [[1, 0, 0, 1, 0, 63, 0], [2, 0, 0, 0, 1, 0, 1]]


@pytest.mark.parametrize("column", [VIEW, AGE, tags(9)])
def test_no_images(column):
    assert row_values(column, stored_values(column, [])).shape == (0, column.row.width)


def test_the_null_row_is_that_of_a_value_that_is_not_known():
    for column in (VIEW, AGE, tags(4)):
        row = [0.0] * (column.row.width - 1) + [column.row.null]
        assert rows_of([column], [(None,)]).tolist() == [row]
