"""The part of `latentflow evaluate` that sets the floor: how well an autoencoder gives real images back.

Legend: B and N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentflow.autoencoder import BUILT_IN, Autoencoder
from latentflow.data.items import ImageSource
from latentflow.errors import ArtifactError, ConfigError
from latentflow.evaluation.real_images import image_features
from latentflow.metrics.evaluation_report import Score
from latentflow.metrics.features.extractors import FeatureExtractor
from latentflow.metrics.pairs import PairJudge
from latentflow.metrics.resampling import interval_over_images
from latentflow.model.flow_model import CONFIG_FILE, FlowModel, find_model
from latentflow.runtime import Runtime


def open_autoencoder(reference: str, image_size: int | None, runtime: Runtime) -> tuple[Autoencoder, int]:
    """The autoencoder of a model, or one on its own, and the size of images to be evaluated at.

    Raises:
        ArtifactError: there is neither.
        ConfigError: no size is given for one on its own, or one that is not its model's, or that does not fit.
    """
    path = Path(reference)
    alone = reference in BUILT_IN or ((path / CONFIG_FILE).is_file() and not _is_model(reference))
    if alone or not (path.exists() or _is_model(reference)):
        autoencoder = Autoencoder.from_pretrained(reference).to(runtime)
        if image_size is None:
            raise ConfigError("an autoencoder on its own has no size of images: give --image-size, for example 256")
        autoencoder.latent_side(image_size)
        return autoencoder, image_size
    model = FlowModel.from_pretrained(reference, runtime=runtime)
    if image_size not in (None, model.config.image_size):
        raise ConfigError(f"--image-size {image_size}: the model has {model.config.image_size}; leave it out")
    return model.autoencoder, model.config.image_size


def _is_model(reference: str) -> bool:
    try:
        find_model(reference)
    except ArtifactError:
        return False
    return True


def reconstructed(
    autoencoder: Autoencoder,
    source: ImageSource,
    rows: Sequence[int],
    extractor: FeatureExtractor,
    *,
    judge: PairJudge,
    plan: dict[str, Any],
    **options: Any,
) -> dict[str, Tensor]:
    """Features of reconstructions, and what `judge` says of them, [N]; the options are `image_features`'."""

    def change(pixels: Tensor, rows: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        given_back = torch.cat([autoencoder.reconstruct(part) for part in autoencoder.slices(pixels)])
        return given_back, judge(given_back, pixels)

    plan = {**plan, "autoencoder": autoencoder.content_hash, "pairs": judge.key}
    return image_features(source, rows, extractor, plan=plan, change=change, **options)


def pair_scores(metrics: Sequence[str], columns: dict[str, Tensor]) -> dict[str, Score]:
    """The means of those columns that are asked for."""
    labels = {
        "psnr": "PSNR in dB",
        "ssim": "SSIM",
        "lpips": "LPIPS",
        "psnr-hole": "PSNR in dB in the hole",
        "ssim-hole": "SSIM of windows that touch the hole",
    }
    return {name: mean_score(labels[name], columns[name]) for name in metrics if name in labels}


def mean_score(label: str, values: Tensor, **more: Any) -> Score:
    """The mean over images of one number each, with the interval that its spread gives: [N] => a score."""
    found = interval_over_images(values, float(values.double().mean()))
    bounds = {"low": found.low, "high": found.high, "standard_error": found.standard_error}
    return Score(label=label, value=found.estimate, **bounds, **more)
