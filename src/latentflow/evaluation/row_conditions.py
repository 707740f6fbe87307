"""Labels and named columns of real images, as the conditions of images that are drawn.

Image i of a set has the conditions of one real image, in a random order of all of them that follows from the seed. So
conditions that belong together stay together, and as many images as there are real ones have exactly their conditions.

Legend: n real images, W numbers of all columns of an image (see `latentflow.columns.ColumnRow`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from latentflow.data.batches import epoch_order
from latentflow.data.items import ImageSource
from latentflow.errors import ConfigError, nearest
from latentflow.model.conditioning import Conditioning
from latentflow.sampling.named_conditions import NamedValue, condition_rows, named_value


@dataclass(frozen=True)
class RowConditions:
    """The conditions of real images.

    Attributes:
        labels: [n] int64; None: no label is given.
        columns: [n, W] float32; None: a model without columns.
        seed: of the order.
    """

    labels: Tensor | None
    columns: Tensor | None
    seed: int

    def places(self, images: Sequence[int]) -> Tensor:
        """Which real image each image of the set takes its conditions from: [B] int64."""
        num = len(self.columns if self.labels is None else self.labels)
        found = [int(_order(self.seed, num, image // num)[image % num]) for image in images]
        return torch.tensor(found, dtype=torch.int64)

    @property
    def digest(self) -> str:
        """A hash of all of it."""
        parts = [part.numpy().tobytes() for part in (self.labels, self.columns) if part is not None]
        return hashlib.sha256(b"".join([str(self.seed).encode(), *parts])).hexdigest()


@lru_cache(maxsize=4)
def _order(seed: int, num: int, epoch: int) -> Tensor:
    return epoch_order(seed, num, epoch)


def require_known_columns(conditioning: Conditioning, source: ImageSource) -> None:
    """Refuse images that lack a column of the model, or whose column has a class that the model does not know.

    Raises:
        ConfigError: naming the column, and the nearest one or the class.
    """
    found = {column.name: column for column in source.columns}
    for own in conditioning.columns:
        if own.name not in found:
            near = nearest(own.name, found) if found else "they have none"
            raise ConfigError(
                f"{source.description} have no column {own.name!r}, which the model is conditioned on ({near}); add "
                "it, or give --labels balanced, which leaves named conditions out"
            )
        theirs = found[own.name]
        if theirs.kind != own.kind:
            raise ConfigError(f"{source.description}: the column {own.name} holds {theirs.kind}, not {own.kind}")
        if unknown := [name for name in theirs.class_names if name not in own.class_names]:
            raise ConfigError(
                f"{source.description}: the model does not know {unknown[0]!r} of the column {own.name}; "
                f"{nearest(unknown[0], own.class_names)}"
            )


def row_conditions(
    conditioning: Conditioning, source: ImageSource, rows: Sequence[int], labels: Tensor | None, seed: int
) -> RowConditions:
    """The conditions of some images of a source, which has the columns of the model.

    Args:
        rows: the images.
        labels: [n] int64 of these images; None: no label is given.
    """
    place = {column.name: number for number, column in enumerate(source.columns)}
    values = [source.values(row) for row in rows] if conditioning.columns else []
    named: dict[str, list[NamedValue]] = {}
    for own in conditioning.columns:
        names = source.columns[place[own.name]].class_names
        named[own.name] = [named_value(names, one[place[own.name]]) for one in values]
    return RowConditions(labels, condition_rows(conditioning, named, len(rows)), seed)
