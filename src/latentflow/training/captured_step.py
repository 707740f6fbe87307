"""The forward and backward passes of a training step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from latentflow.data.batches import Batch
from latentflow.networks.graphs import Capture, Graph, Inputs
from latentflow.randomness import on_device
from latentflow.training.step import StepLosses

_CALLS_BEFORE = 3  # in which a network is compiled


class CapturedPasses:
    """Calls `passes`, from the fourth call on by a graph of its kernels.

    Args:
        passes: batch of B images => its losses [B]; leaves gradients in `parameters`.
        device: of the batches that `passes` gets, their positions included.
        parameters: whose gradients are None before each call.
        capture: `cuda_graph`.
    """

    def __init__(
        self,
        passes: Callable[[Batch], StepLosses],
        parameters: Sequence[Tensor],
        device: torch.device,
        capture: Capture,
    ):
        self._parameters, self._device = parameters, device
        self._gradients: list[Tensor | None] | None = None  # which every replay writes again

        def compute(inputs: Inputs) -> StepLosses:
            for parameter in parameters:
                parameter.grad = None  # of a capture that failed
            return passes(Batch(**inputs, indices=inputs["positions"]))  # no step reads indices

        self._graph = Graph(compute, calls_before=_CALLS_BEFORE, what="a training step", capture=capture)

    def __call__(self, batch: Batch) -> StepLosses:
        """The losses of a batch. Those of a graph are overwritten by the next call."""
        given = {field.name: getattr(batch, field.name) for field in fields(batch) if field.name != "indices"}
        moved = {name: x.to(self._device, non_blocking=True) for name, x in given.items() if x is not None}
        result = self._graph({**moved, "positions": on_device(batch.positions, self._device)})
        if self._graph.is_captured:
            self._gradients = self._gradients or [parameter.grad for parameter in self._parameters]
            for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                parameter.grad = gradient
        return result
