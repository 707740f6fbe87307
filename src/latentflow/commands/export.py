"""`latentflow export`: a model => a folder that another library loads."""

from __future__ import annotations

from pathlib import Path

from latentflow.artifacts import require_new
from latentflow.convert.diffusers.export import export_diffusers
from latentflow.convert.diffusers.keys import diffusers_network
from latentflow.convert.exported import Exported
from latentflow.convert.onnx.onnx_files import export_onnx, onnx_network
from latentflow.convert.pipeline.pipeline_folder import export_pipeline, require_transformer
from latentflow.convert.request import ExportRequest
from latentflow.locks import writes
from latentflow.model.flow_model import FlowModel, config_of

_FORMATS = {
    "diffusers": (diffusers_network, export_diffusers),
    "pipeline": (require_transformer, export_pipeline),
    "onnx": (onnx_network, export_onnx),
}
"""For each format: what refuses a config that it cannot express, and what writes the folder."""


@writes("out")
def export(model: str | Path, out: str | Path, request: ExportRequest | None = None) -> Exported:
    """Write a model for another library, after checking that the library computes the same.

    Args:
        model: a model folder, a run folder or a hub id.
        out: a new folder.

    Raises:
        ArtifactError: no such model, a folder that is not empty, or a network that the library cannot express.
            Nothing is written.
        ConfigError: the format needs a library that is missing.
    """
    require_new(out)
    require_expressible, write = _FORMATS[(request or ExportRequest()).format]
    require_expressible(config_of(model))  # before any weights are read
    return write(FlowModel.from_pretrained(model, device="cpu"), out)
