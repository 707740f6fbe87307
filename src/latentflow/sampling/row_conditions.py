"""Labels and named columns of real images, as the conditions of images that are drawn.

Image i of a set has the conditions of one real image, in a random order of all of them that follows from the seed. So
conditions that belong together stay together, and as many images as there are real ones have exactly their conditions.

Legend: n real images, W numbers of all columns of an image (see `latentflow.columns.ColumnRow`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from latentflow.data.batches import epoch_order
from latentflow.data.items import ImageSource
from latentflow.errors import ConfigError, nearest
from latentflow.model.conditioning import ColumnCondition, Conditioning, ConditionName
from latentflow.model.flow_model import FlowModel
from latentflow.sampling.drawing import Drawing, make_drawing
from latentflow.sampling.named_conditions import NamedValue, condition_rows, named_value
from latentflow.sampling.pipeline import Given
from latentflow.sampling.request import SampleRequest


@dataclass(frozen=True)
class RowConditions:
    """The conditions of real images.

    Attributes:
        labels: [n] int64; None: no label is given.
        columns: [n, W] float32; None: a model without columns.
        seed: of the order.
        named: the columns that are given; what `columns` holds of others is not known.
        first: the place in the order of the first image of the set.
    """

    labels: Tensor | None
    columns: Tensor | None
    seed: int
    named: tuple[ConditionName, ...] = ()
    first: int = 0

    @property
    def told(self) -> list[ConditionName]:
        """The conditions that are given."""
        return [*(() if self.labels is None else ("label",)), *self.named]

    def places(self, images: Sequence[int]) -> Tensor:
        """Which real image each image of the set takes its conditions from: [B] int64."""
        num = len(self.columns if self.labels is None else self.labels)
        steps = [self.first + image for image in images]
        found = [int(_order(self.seed, num, step // num)[step % num]) for step in steps]
        return torch.tensor(found, dtype=torch.int64)

    def of(self, images: Sequence[int]) -> tuple[list[int], Given]:
        """The labels of some images of the set, or none, and their named conditions."""
        places = self.places(images)
        labels = [] if self.labels is None else self.labels[places].tolist()
        return labels, Given(columns=None if self.columns is None else self.columns[places])

    @property
    def digest(self) -> str:
        """A hash of all of it."""
        parts = [part.numpy().tobytes() for part in (self.labels, self.columns) if part is not None]
        order = f"{self.seed} from {self.first}" if self.first else str(self.seed)
        return hashlib.sha256(b"".join([order.encode(), *parts])).hexdigest()


@lru_cache(maxsize=4)
def _order(seed: int, num: int, epoch: int) -> Tensor:
    return epoch_order(seed, num, epoch)


def drawing_of_rows(model: FlowModel, request: SampleRequest, rows: RowConditions | None) -> tuple[Drawing, Given]:
    """The drawing of a request whose images have the conditions of real ones, and the tensors that belong to it.

    Args:
        rows: None: the conditions of the request.

    Raises:
        ConfigError: see `make_drawing`.
    """
    if rows is None:
        return make_drawing(model, request), Given()
    labels, given = rows.of(range(request.num))
    request = request.model_copy(update={"classes": labels})
    return make_drawing(model, request, conditions=rows.named), given


def known_columns(conditioning: Conditioning, source: ImageSource) -> tuple[ConditionName, ...]:
    """The columns of a model that images have as well, with classes that the model knows.

    Raises:
        ConfigError: one that the model requires is not among them; see `require_known_columns`.
    """
    found = {one.name: why_unknown(one, source) for one in conditioning.columns}
    for name, reason in found.items():
        if reason and name in conditioning.required:
            raise ConfigError(f"{reason}; it was trained with column_dropout = 0 for {name}, so it cannot do without")
    return tuple(name for name, reason in found.items() if not reason)


def require_known_columns(conditioning: Conditioning, source: ImageSource) -> None:
    """Refuse images that lack a column of the model, or whose column has a class that the model does not know.

    Raises:
        ConfigError: naming the column, and the nearest one or the class.
    """
    for one in conditioning.columns:
        if reason := why_unknown(one, source):
            raise ConfigError(reason)


def why_unknown(own: ColumnCondition, source: ImageSource) -> str:
    """Why images cannot give a named condition, in words; "": they can."""
    found = {column.name: column for column in source.columns}
    if own.name not in found:
        near = nearest(own.name, found) if found else "they have none"
        return f"{source.description} have no column {own.name!r}, which the model is conditioned on ({near})"
    theirs = found[own.name]
    if theirs.kind != own.kind:
        return f"{source.description}: the column {own.name} holds {theirs.kind}, not {own.kind}"
    if unknown := [name for name in theirs.class_names if name not in own.class_names]:
        near = nearest(unknown[0], own.class_names)
        return f"{source.description}: the model does not know {unknown[0]!r} of the column {own.name}; {near}"
    return ""


def row_conditions(
    conditioning: Conditioning,
    source: ImageSource,
    rows: Sequence[int],
    labels: Tensor | None,
    seed: int,
    among: Collection[ConditionName] | None = None,
) -> RowConditions:
    """The conditions of some images of a source: of the columns of the model those that it has.

    Args:
        rows: the images.
        labels: [n] int64 of these images; None: no label is given.
        among: which columns; None: all.

    Raises:
        ConfigError: see `known_columns`.
    """
    place = {column.name: number for number, column in enumerate(source.columns)}
    told = [name for name in known_columns(conditioning, source) if among is None or name in among]
    values = [source.values(row) for row in rows] if told else []
    named: dict[str, list[NamedValue]] = {}
    for name in told:
        names = source.columns[place[name]].class_names
        named[name] = [named_value(names, one[place[name]]) for one in values]
    return RowConditions(labels, condition_rows(conditioning, named, len(rows)), seed, tuple(told))
