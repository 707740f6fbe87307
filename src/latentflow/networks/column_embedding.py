"""Named columns of an image as one vector: embeddings of labels, of sets of labels and of numbers, added up.

Legend: B images, W numbers of all columns (see `latentflow.columns.ColumnRow`), D hidden channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, silu

from latentflow.columns import ColumnRow, places_of
from latentflow.networks.layers import time_sinusoid

_FEATURES = 256
_FASTEST = 8.0
"""Radians of the fastest sinusoid per standard deviation of a number; the slowest is 10,000 times slower."""


@dataclass(frozen=True)
class ColumnInput:
    """One column that a network gets.

    Attributes:
        row: the shape of its values.
        mean, deviation: of a number in the training data; the network gets (number - mean) / deviation.
    """

    row: ColumnRow
    mean: float = 0.0
    deviation: float = 1.0


class ClassesEmbedding(nn.Module):
    """The index of a class, or a set of them: a learned vector for each class and for "not known", added up."""

    def __init__(self, row: ColumnRow, size: int):
        super().__init__()
        self.is_set = row.kind == "labels"
        self.table = nn.Parameter(torch.empty(row.num_classes + 1, size))

    def reset_parameters(self) -> None:
        """Draw new vectors."""
        nn.init.normal_(self.table, std=0.02)

    def forward(self, values: Tensor) -> Tensor:
        """[B, width] => [B, D]."""
        if self.is_set:
            return values.to(self.table.dtype) @ self.table
        return embedding(values[:, 0].long(), self.table)


class NumberEmbedding(nn.Module):
    """A number: sinusoids of the normalised number, then Linear-SiLU-Linear; a learned vector if it is not known.

    Sinusoids of many frequencies are Fourier features (arXiv 2006.10739): the slow ones are almost linear in the
    number, and the fast ones tell close numbers apart.
    """

    def __init__(self, column: ColumnInput, size: int):
        super().__init__()
        self.mean, self.deviation = column.mean, column.deviation
        self.linear1, self.linear2 = nn.Linear(_FEATURES, size), nn.Linear(size, size)
        self.unknown = nn.Parameter(torch.empty(size))

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for linear in (self.linear1, self.linear2):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.unknown, std=0.02)

    def forward(self, values: Tensor) -> Tensor:
        """[B, 2] => [B, D]."""
        number, is_unknown = values.float().unbind(1)
        features = time_sinusoid((number - self.mean) * (_FASTEST / self.deviation), _FEATURES)
        known = self.linear2(silu(self.linear1(features.to(self.linear1.weight.dtype))))
        return torch.where(is_unknown[:, None] > 0.5, self.unknown.to(known.dtype), known)


class ColumnEmbedding(nn.Module):
    """The columns of each image as one vector: the sum of the vectors of its columns. [B, W] => [B, D].

    Args:
        columns: at least one, in the order in which they stand in a row.
        size: D.
    """

    def __init__(self, columns: Sequence[ColumnInput], size: int):
        super().__init__()
        self.places = places_of([column.row for column in columns])
        self.parts = nn.ModuleList(
            NumberEmbedding(column, size) if column.row.kind == "number" else ClassesEmbedding(column.row, size)
            for column in columns
        )

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for part in self.parts:
            part.reset_parameters()

    def forward(self, columns: Tensor) -> Tensor:
        return sum(part(columns[:, place]) for part, place in zip(self.parts, self.places, strict=True))
