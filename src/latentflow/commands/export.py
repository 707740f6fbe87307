"""`latentflow export`: a model => a folder that diffusers loads."""

from __future__ import annotations

from pathlib import Path

from latentflow.artifacts import require_new
from latentflow.convert.diffusers.export import Exported, export_diffusers
from latentflow.convert.diffusers.keys import diffusers_network
from latentflow.locks import writes
from latentflow.model.flow_model import FlowModel, find_model, read_config


@writes("out")
def export(model: str | Path, out: str | Path) -> Exported:
    """Write a model for diffusers, after diffusers has been seen to compute the same with it.

    Args:
        model: a model folder, a run folder or a hub id.
        out: a new folder.

    Raises:
        ArtifactError: no such model, a folder that is not empty, or a network that no class of diffusers is the same
            function as. Nothing was written.
    """
    require_new(out)
    diffusers_network(read_config(find_model(model)))  # refused before any weights are read
    return export_diffusers(FlowModel.from_pretrained(model, device="cpu"), out)
