"""The forward and backward passes of a training step as one CUDA graph.

A step launches hundreds of kernels, and launching one takes the host longer than a small network's kernel takes the
GPU. A graph launches all of them at once. It repeats the same kernels on the same memory: a batch is copied to where
the first one lay, and the gradients appear where the first ones lay. So a step may be captured if nothing in it
depends on a number that the host would have to know, and nothing waits for the device (`training_step`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from latentflow.console import notice
from latentflow.data.batches import Batch
from latentflow.randomness import on_device

Result = TypeVar("Result")
Capture = Callable[[Callable[[], Result]], tuple[Result, Callable[[], None]]]
"""Records the kernels of a function that it calls; returns its result, and what computes it again in the same place."""

_STEPS_BEFORE = 3  # in which a network is compiled, and libraries choose and set up their kernels


class CapturedPasses:
    """Calls `passes`, from the fourth call on by a graph of its kernels; if it cannot be captured, as before.

    Args:
        passes: batch => its losses; leaves gradients in `parameters`.
        parameters: whose gradients are None before each call.
        device: of the batches that `passes` gets: a batch with positions there.
    """

    def __init__(
        self, passes: Callable[[Batch], Result], parameters: Sequence[Tensor], device: torch.device, capture: Capture
    ):
        self._passes, self._parameters, self._device, self._capture = passes, parameters, device, capture
        self._calls = 0
        self._captured: tuple[Batch, Result, Callable[[], None], list[Tensor | None]] | None = None

    def __call__(self, batch: Batch) -> Result:
        """The losses of a batch. Those of a graph are overwritten by the next call."""
        self._calls += 1
        if self._calls == _STEPS_BEFORE + 1:
            self._record(batch)
        if self._captured is None:
            return self._passes(batch)
        place, result, replay, gradients = self._captured
        _fill(place, batch)
        replay()
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return result

    def _record(self, batch: Batch) -> None:
        """Capture the passes over a place for batches like this one."""
        place = _place_like(batch, self._device)
        _fill(place, batch)
        try:
            result, replay = self._capture(lambda: self._passes(place))
        except RuntimeError as error:  # out of memory is one, too
            notice(f"a step could not become one CUDA graph, and is launched kernel by kernel: {error}")
            for parameter in self._parameters:
                parameter.grad = None
            return
        self._captured = place, result, replay, [parameter.grad for parameter in self._parameters]


def cuda_graph(compute: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
    """A `Capture` for CUDA."""
    graph = torch.cuda.CUDAGraph()
    # Other threads go on: they read batches, and write checkpoints.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = compute()
    return result, graph.replay


def _place_like(batch: Batch, device: torch.device) -> Batch:
    """Memory on `device` for a batch of the same shapes."""
    return replace(batch, **{name: torch.empty_like(x, device=device) for name, x in _tensors(batch).items()})


def _fill(place: Batch, batch: Batch) -> None:
    """Copy a batch to its place; consecutive positions are made there without a copy."""
    given = _tensors(batch)
    for name, x in _tensors(place).items():
        x.copy_(on_device(given[name], x.device) if name == "positions" else given[name], non_blocking=True)


def _tensors(batch: Batch) -> dict[str, Any]:
    """The fields that a step computes with."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch) if field.name != "indices"}
    return {name: value for name, value in values.items() if value is not None}
