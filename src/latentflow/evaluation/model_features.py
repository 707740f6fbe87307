"""The features that the images of a model are compared by."""

from __future__ import annotations

from pathlib import Path

from latentflow.evaluation.class_accuracy import require_judged
from latentflow.metrics.features.extractors import FeatureExtractor, JudgeFeatures, open_features
from latentflow.model.flow_model import FlowModel


def open_features_for(flow: FlowModel, name: str, *, weights: str | Path | None = None) -> FeatureExtractor:
    """Features by name, for images of a model, on its device; see `open_features`.

    Raises:
        ConfigError: it is a judge of other classes than the model's, or see `open_features`.
        ArtifactError: the weights cannot be read or downloaded.
    """
    extractor = open_features(
        name,
        weights=weights,
        autoencoder=flow.autoencoder,
        image_size=flow.config.image_size,
        device=flow.device,
        pixel_format=flow.config.pixel_format,
    )
    if isinstance(extractor, JudgeFeatures):
        require_judged(extractor.record.class_names, flow.config.conditioning.class_names, name)
    return extractor
