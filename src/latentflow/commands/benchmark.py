"""`latentflow benchmark`: what drawing an image costs."""

from __future__ import annotations

from latentflow.evaluation.drawing_cost import BenchmarkResult, measure_cost
from latentflow.evaluation.request import BenchmarkRequest
from latentflow.model.flow_model import FlowModel
from latentflow.runtime import Runtime


def benchmark(request: BenchmarkRequest, runtime: Runtime | None = None) -> BenchmarkResult:
    """Draw images several times over and measure network calls, time and memory; nothing is written.

    Raises:
        ArtifactError, ConfigError: see `FlowModel.from_pretrained` and `make_drawing`.
    """
    return measure_cost(FlowModel.from_pretrained(request.model, runtime=runtime), request)
