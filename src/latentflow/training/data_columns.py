"""The named columns of the training data as conditions of a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from latentflow.columns import Column
from latentflow.data.batches import TrainingImages
from latentflow.data.column_tensors import row_values
from latentflow.errors import ConfigError, nearest
from latentflow.model.conditioning import ColumnCondition
from latentflow.training.config import ConditioningConfig

_LEAST_DEVIATION = 1e-4
"""Of a number, relative to the number: networks get float32, which resolves 6e-8 of it."""


def chosen_columns(conditioning: ConditioningConfig, columns: Sequence[Column], where: object) -> list[ColumnCondition]:
    """The columns of the data that a recipe asks for, with their dropout; nothing is known of their values yet.

    Args:
        where: the data, for the message.

    Raises:
        ConfigError: the data have no such column; the nearest one is named.
    """
    names, chosen = [column.name for column in columns], []
    for asked in names if conditioning.columns is None else conditioning.columns:
        name, dropout = asked, conditioning.column_dropout
        if asked not in names:
            name, dropout = _with_dropout(asked)
        if name not in names:
            own = nearest(name, names) if names else "they have none"
            raise ConfigError(f"conditioning.columns: {where} has no column {name!r}; {own}")
        if any(one.name == name for one in chosen):
            raise ConfigError(f"conditioning.columns: {name} is given twice; give it once")
        column = columns[names.index(name)]
        own = {"kind": column.kind, "class_names": list(column.class_names)}
        chosen.append(ColumnCondition(name=name, dropout=dropout, **own))
    return chosen


def _with_dropout(asked: str) -> tuple[str, float]:
    """A name and its dropout, of "age:0.2"."""
    name, colon, share = asked.rpartition(":")
    try:
        dropout = float(share) if colon else None
    except ValueError:
        dropout = None
    if dropout is None:
        return asked, 0.0
    if not 0 <= dropout < 1:
        raise ConfigError(f"conditioning.columns: {asked!r}: the dropout of a column is at least 0 and below 1")
    return name, dropout


def measured_columns(chosen: Sequence[ColumnCondition], images: TrainingImages) -> list[ColumnCondition]:
    """The same columns, with what is known of their values in the training images, which reads these columns.

    Raises:
        ConfigError: a column of which nothing can be learned; with the remedy.
    """
    return [_measured(one, values) for one, values in zip(chosen, images.column_values(), strict=True)]


def _measured(one: ColumnCondition, stored: Tensor) -> ColumnCondition:
    row, remedy = one.column.row, f"leave it out, with conditioning.columns (all but {one.name})"
    if one.kind == "number":
        numbers = stored[stored[:, 1] == 0, 0]  # float64
        if not len(numbers):
            raise ConfigError(f"column {one.name}: it is not known of any training image; {remedy}")
        low, high = numbers.min().item(), numbers.max().item()
        mean, deviation = numbers.mean().item(), numbers.std(correction=0).item()
        if deviation <= _LEAST_DEVIATION * max(abs(low), abs(high)):
            what, more = f"all of its numbers are {low:g}", ""
            if low < high:
                what, more = f"its numbers, {low:g} to {high:g}, hardly differ", ", or subtract a constant from it"
            raise ConfigError(f"column {one.name}: {what}, so nothing can be learned from it; {remedy}{more}")
        return one.model_copy(update={"mean": mean, "deviation": deviation, "low": low, "high": high})
    if one.kind == "label":
        counts = stored.bincount(minlength=row.num_classes + 1)
    else:
        counts = row_values(one.column, stored).double().sum(0).long()
    if int(counts[-1]) == len(stored):
        raise ConfigError(f"column {one.name}: it is not known of any training image; {remedy}")
    return one.model_copy(update={"images_per_class": counts[:-1].tolist()})
