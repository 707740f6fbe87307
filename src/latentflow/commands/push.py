"""`latentflow push`: a model or an adapter on disk => a repository on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentflow.console import notice
from latentflow.hub import HubId, push_folder, require_token
from latentflow.model.adapter import ADAPTER_WEIGHTS, is_adapter
from latentflow.model.flow_model import ADAPTER_FILES, MODEL_FILES, WEIGHTS_FILE, FlowModel, find_model, open_adapter


def push(model: str | Path, repo_id: str, *, private: bool = False, message: str = "Upload a latentflow model") -> str:
    """Upload the files of a model or an adapter unchanged, after checking that they load; returns their page.

    Args:
        model: a model folder, a run folder, of which only `model/` is sent, another hub id, or an adapter's folder.
        repo_id: owner/name or owner/name@branch.
        private: create the repository private.

    Raises:
        ConfigError: the hub id is malformed, or there is no token.
        ArtifactError: the model is incomplete, or the hub refuses it.
    """
    target, token = HubId.parse(repo_id), require_token()
    sent: dict[str, Any] = {"private": private, "message": message, "token": token}
    if is_adapter(Path(model)):
        folder = open_adapter(model).folder
        return push_folder(folder, target, ADAPTER_FILES, marker=ADAPTER_WEIGHTS, **sent)
    if (guide := FlowModel.from_pretrained(model, device="cpu").config.sampling.guide) is not None:
        notice(f"the guide of the model's preset, {guide.model}, is not pushed with it; without it, give --guide none")
    return push_folder(find_model(model), target, MODEL_FILES, marker=WEIGHTS_FILE, **sent)
