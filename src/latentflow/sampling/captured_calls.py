"""Network calls of a drawing as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from latentflow.flow.guidance import VelocityFunction
from latentflow.flow.solvers import is_adaptive
from latentflow.model.flow_model import FlowModel
from latentflow.networks.graphs import Capture, Graph, Inputs, cuda_graph
from latentflow.sampling.drawing import Drawing
from latentflow.shapes import Condition

Calls = Callable[[FlowModel], VelocityFunction]
"""How the network of a model is called."""

_CALLS_BEFORE = 8  # fewer are not worth a capture


def plainly(flow: FlowModel) -> VelocityFunction:
    """Call the network as it is."""
    return flow.velocity


class CapturedCalls:
    """Calls networks by CUDA graphs, one for each network, precision and shape of batch, once it was called often.

    Args:
        capture: `cuda_graph`.
    """

    def __init__(self, capture: Capture = cuda_graph):
        self._capture = capture
        self._graphs: dict[object, Graph[Tensor]] = {}

    def __call__(self, flow: FlowModel) -> VelocityFunction:
        """The velocity of a model."""

        def velocity(latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
            given = {name: getattr(condition, name) for name in condition.names}
            inputs = {"latents": latents, "time": time, **given}
            shapes = tuple((name, x.shape, x.dtype) for name, x in inputs.items())
            key = (flow.network, flow.runtime.precision, shapes)
            if key not in self._graphs:
                self._graphs[key] = self._graph_of(flow)
            return self._graphs[key](inputs).clone()  # solvers keep velocities, and a replay overwrites the last one

        return velocity

    def _graph_of(self, flow: FlowModel) -> Graph[Tensor]:
        def compute(inputs: Inputs) -> Tensor:
            given = {name: x for name, x in inputs.items() if name not in ("latents", "time")}
            return flow.velocity(inputs["latents"], inputs["time"], Condition(**given))

        return Graph(compute, calls_before=_CALLS_BEFORE, what="a network call", capture=self._capture)


def calls_for(device: torch.device, drawing: Drawing) -> Calls:
    """How networks are called for a drawing: by graphs on CUDA, unless a solver changes the number of images."""
    return CapturedCalls() if device.type == "cuda" and not is_adaptive(drawing.sampling.solver) else plainly
