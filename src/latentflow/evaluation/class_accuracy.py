"""Do images show their class? The judge of classes of an evaluation or a sweep, and the score.

Legend: N images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latentflow.errors import ConfigError, DataError
from latentflow.evaluation.real_images import RealFeatures, RealImages
from latentflow.metrics.class_judge import ClassJudge
from latentflow.metrics.evaluation_report import Score
from latentflow.metrics.features.extractors import FeatureExtractor, JudgeFeatures
from latentflow.metrics.names import CLASS_ACCURACY
from latentflow.metrics.resampling import interval_over_images

_NAMED = 3


def require_judged(judged: Sequence[str], known: Sequence[str], judge: str) -> None:
    """Refuse a judge of other classes than those of the images.

    Args:
        judged: class names of the judge; none: it judges no classes.
        known: those of the images; none: they have no classes.
        judge: its folder.

    Raises:
        ConfigError: some classes of the images are not among those of the judge.
    """
    missing = [name for name in known if name not in judged]
    if judged and missing:
        some = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
        raise ConfigError(
            f"--features {judge}: this judge was trained on other classes: it does not know {some}; train one on "
            "images of these classes, or choose other features"
        )


def require_class_judge(judged: Sequence[str], known: Sequence[str], real: RealImages) -> None:
    """Refuse class accuracy that cannot be measured, as far as that is known before the features.

    Raises:
        ConfigError: the images have no classes.
        DataError: there is nothing that could judge them.
    """
    if not known:
        raise ConfigError(f"--metrics {CLASS_ACCURACY}: these images have no classes; remove it")
    if not judged:
        _require_labelled(real, known)


def _require_labelled(real: RealImages, known: Sequence[str]) -> None:
    if real.source is None or not real.source.class_names:
        raise DataError(f"{real.data} holds no labelled images")
    if sorted(real.source.class_names) != sorted(known):
        raise DataError(f"{real.data} has other classes than the model")


def class_judge(
    extractor: FeatureExtractor, known: Sequence[str], real: RealImages, reference: RealFeatures
) -> ClassJudge:
    """A judge of the classes `known`, in their order: that of the features, or one fitted to the real images.

    Raises:
        DataError: there is none, with the reason.
    """
    if isinstance(extractor, JudgeFeatures) and extractor.classes:
        return extractor.classes.for_classes(extractor.record.class_names, known)
    _require_labelled(real, known)
    place = torch.tensor([list(known).index(name) for name in real.source.class_names])
    return ClassJudge.of(reference.features, place[reference.labels], len(known))


def class_accuracy(judge: ClassJudge, features: Tensor, labels: Tensor) -> Score:
    """The share of images that show their class, with that of held-out real images: [N, D] and [N] => a score."""
    right = judge.right(features, labels).double()
    found = interval_over_images(right, float(right.mean()))
    return Score(
        label="class accuracy",
        value=found.estimate,
        low=max(found.low, 0.0),
        high=min(found.high, 1.0),
        standard_error=found.standard_error,
        limit=judge.ceiling(labels),
    )
