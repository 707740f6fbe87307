"""`latentflow loss`: the loss on images that a model may not have seen, and what each condition improves."""

from __future__ import annotations

from pathlib import Path

from latentflow.model.flow_model import FlowModel
from latentflow.progress import image_progress
from latentflow.runtime import Runtime
from latentflow.training.held_out import HeldOutLoss, condition_sets, held_out_loss, images_for
from latentflow.training.request import LossRequest


def loss(
    model: str | Path, request: LossRequest, *, batch_size: int = 64, runtime: Runtime | None = None
) -> list[HeldOutLoss]:
    """The mean loss without any condition, with each condition by itself, and with all of them.

    Raises:
        ArtifactError, ConfigError, DataError: the model or the data cannot be used, or do not fit each other.
    """
    flow = FlowModel.from_pretrained(model, precision="fp32", runtime=runtime)
    images = images_for(flow, request.data, split=request.split, seed=request.seed)
    num, seed = request.num, request.seed
    sets = condition_sets(flow.config.conditioning)
    with image_progress("measuring", num * len(sets)) as on_images:
        return [
            held_out_loss(flow, images, given, num_draws=num, batch_size=batch_size, seed=seed, on_images=on_images)
            for given in sets
        ]
