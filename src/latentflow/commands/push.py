"""`latentflow push`: a model on disk => a repository on the hub."""

from __future__ import annotations

from pathlib import Path

from latentflow.console import notice
from latentflow.hub import HubId, push_folder, require_token
from latentflow.model.flow_model import MODEL_FILES, WEIGHTS_FILE, FlowModel, find_model


def push(model: str | Path, repo_id: str, *, private: bool = False, message: str = "Upload a latentflow model") -> str:
    """Upload the files of a model folder unchanged, after checking that they load; returns their page on the hub.

    Args:
        model: a model folder, a run folder, of which only `model/` is sent, or another hub id.
        repo_id: owner/name or owner/name@branch.
        private: create the repository private.

    Raises:
        ConfigError: the hub id is malformed, or there is no token.
        ArtifactError: the model is incomplete, or the hub refuses it.
    """
    target, token = HubId.parse(repo_id), require_token()
    if (guide := FlowModel.from_pretrained(model, device="cpu").config.sampling.guide) is not None:
        notice(f"the guide of the model's preset, {guide.model}, is not pushed with it; without it, give --guide none")
    return push_folder(
        find_model(model),
        target,
        MODEL_FILES,
        marker=WEIGHTS_FILE,
        private=private,
        message=message,
        token=token,
    )
