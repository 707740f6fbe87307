"""Requests of several users in one batch, and back; and which batches may hold them without changing a picture."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentflow.flow.solvers import is_adaptive
from latentflow.model.flow_model import FlowModel
from latentflow.sampling.drawing import Drawing
from latentflow.sampling.pipeline import Given
from latentflow.sampling.samples import Samples

if TYPE_CHECKING:
    from latentflow.studio.queue import DrawingJob


@dataclass(frozen=True)
class Piece:
    """Images of one request that are drawn at once.

    Attributes:
        job: the request.
        model_number: of its model; see `DrawingQueue.number_of`.
        rows: which of its images.
        drawing: reduced to them.
        given: the same.
    """

    job: DrawingJob
    model_number: int
    rows: slice
    drawing: Drawing
    given: Given

    @property
    def model(self) -> FlowModel:
        return self.job.model

    @property
    def num(self) -> int:
        return len(self.drawing.seeds)

    @cached_property
    def kind(self) -> Hashable:
        """Equal for pieces that one batch can hold: the same network calls at the same times."""
        drawing, given = self.drawing, self.given
        shapes = tuple((one.name, _shape(getattr(given, one.name))) for one in fields(given))
        blended = {(blend.label is not None, *blend.conditions) for blend in drawing.blends}
        conditions = (*drawing.told, bool(drawing.labels), *drawing.conditions)
        settings = (drawing.task, drawing.start, drawing.image_size, drawing.precision)
        return self.model_number, drawing.sampling.model_dump_json(), settings, conditions, frozenset(blended), shapes

    @cached_property
    def shape(self) -> Hashable:
        """Equal for pieces whose arithmetic is of the same shapes, whatever the numbers are."""
        sampling = self.drawing.sampling
        guided = (sampling.guidance in (0, 1), sampling.guided_channels, sampling.guide is not None)
        return *self.kind[:1], sampling.solver, guided, *self.kind[2:]

    @property
    def joins_others(self) -> bool:
        """Not with a solver that lets images leave the batch: what remains of it is of any size."""
        return not is_adaptive(self.drawing.sampling.solver)


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape[1:])


def in_one_batch(pieces: Sequence[Piece]) -> tuple[Drawing, Given]:
    """The drawing of all pieces, which are of one kind."""
    if len(pieces) == 1:
        return pieces[0].drawing, pieces[0].given
    drawings = [piece.drawing for piece in pieces]
    lists = {name: [x for one in drawings for x in getattr(one, name)] for name in ("seeds", "labels", "blends")}
    named = {name: [x for one in drawings for x in one.conditions[name]] for name in drawings[0].conditions}
    drawing = drawings[0].model_copy(update={**lists, "conditions": named, "inputs": {}})
    return drawing, Given(**{one.name: _rows([(piece, one.name) for piece in pieces]) for one in fields(Given)})


def _rows(parts: Sequence[tuple[Piece, str]]) -> Tensor | None:
    tensors = [(piece, getattr(piece.given, name)) for piece, name in parts]
    if tensors[0][1] is None:
        return None
    return torch.cat([x.expand(piece.num, *x.shape[1:]) for piece, x in tensors])


def parted(samples: Samples, pieces: Sequence[Piece]) -> list[Samples]:
    """What was drawn for each of the pieces."""
    ends, parts = 0, []
    for piece in pieces:
        rows, ends = slice(ends, ends + piece.num), ends + piece.num
        tensors = {name: getattr(samples, name)[rows] for name in ("pixels", "latents", "evaluations")}
        parts.append(replace(samples, **tensors, drawing=piece.drawing))
    return parts


class EqualBits:
    """Which batches give the pictures that smaller ones give, bit for bit, as far as has been seen.

    Matrix products of other shapes may add in another order, which depends on the shapes alone. So what was seen of one
    batch holds for all of its shape.
    """

    def __init__(self) -> None:
        self._seen: dict[Hashable, bool] = {}

    def allows(self, pieces: Sequence[Piece]) -> bool | None:
        """Whether pieces may be drawn in one batch; None: it has not been seen yet."""
        if len(pieces) == 1:
            return True
        seen = [self._seen.get(key) for key in self._keys(pieces)]
        return False if False in seen else None if None in seen else True

    def learn(self, pieces: Sequence[Piece], together: Sequence[Samples], apart: Sequence[Samples]) -> None:
        """Take note of pieces that were drawn in one batch and each in its own."""
        for key, one, other in zip(self._keys(pieces), together, apart, strict=True):
            same = torch.equal(one.latents, other.latents) and torch.equal(one.pixels, other.pixels)
            self._seen[key] = self._seen.get(key, True) and same

    def _keys(self, pieces: Sequence[Piece]) -> list[Hashable]:
        total = sum(piece.num for piece in pieces)
        return [(piece.shape, piece.num, total) for piece in pieces]
