"""`latentflow merge`: a model and an adapter => a model folder."""

from __future__ import annotations

from pathlib import Path

from latentflow.artifacts import require_new
from latentflow.errors import ConfigError
from latentflow.locks import writes
from latentflow.model.adapter_name import adapted_name
from latentflow.model.flow_model import FlowModel


@writes("out")
def merge(
    model: str | Path, out: str | Path, *, adapter: str | Path | None = None, adapter_strength: float | None = None
) -> FlowModel:
    """Write the model folder of a model with an adapter, and return the model. It needs neither of them any more.

    Args:
        model: a model folder, a run folder, a snapshot or a hub id; may name the adapter, as MODEL+ADAPTER.
        out: a new folder.
        adapter, adapter_strength: see `FlowModel.from_pretrained`.

    Raises:
        ArtifactError, ConfigError: there is no such model or adapter, they do not fit each other, or `out` is not
            empty. Nothing is written.
    """
    named = adapted_name(model, adapter, adapter_strength)
    if named is None:
        raise ConfigError(f"{model} is to be merged with an adapter, and none is given; add --adapter ADAPTER")
    require_new(out)
    flow = FlowModel.from_pretrained(str(named), device="cpu")
    flow.save_pretrained(out)
    return flow
