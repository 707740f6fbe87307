"""Autoencoders to evaluate: that of a model, or one without a model."""

from __future__ import annotations

from pathlib import Path

from latentflow.autoencoder import BUILT_IN, Autoencoder
from latentflow.errors import ArtifactError, ConfigError
from latentflow.model.adapter_name import split_adapted
from latentflow.model.flow_model import CONFIG_FILE, FlowModel, find_model
from latentflow.pixel_format import PixelFormat
from latentflow.runtime import Runtime
from latentflow.sizes import Size


def open_autoencoder(
    reference: str, image_size: Size | None, runtime: Runtime
) -> tuple[Autoencoder, Size, PixelFormat | None]:
    """The autoencoder of a model, or one without a model, and the image size to evaluate it at.

    Returns:
        Both, and the model's pixel format; None without a model.

    Raises:
        ArtifactError: there is neither.
        ConfigError: no size is given for one without a model, or one that is not the model's, or that does not fit.
    """
    path = Path(reference)
    without_model = reference in BUILT_IN or ((path / CONFIG_FILE).is_file() and not _is_model(reference))
    if without_model or not (path.exists() or _is_model(reference)):
        autoencoder = Autoencoder.from_pretrained(reference).to(runtime)
        if image_size is None:
            raise ConfigError("an autoencoder without a model has no image size: give --image-size, for example 256")
        autoencoder.latent_size(image_size)
        return autoencoder, image_size, None
    model = FlowModel.from_pretrained(reference, runtime=runtime)
    sizes = model.config.sizes
    if image_size is not None and image_size not in sizes:
        raise ConfigError(f"--image-size {image_size}: the model has {' and '.join(map(str, sizes))}; remove it")
    return model.autoencoder, image_size or model.config.image_size, model.config.pixel_format


def _is_model(reference: str) -> bool:
    if split_adapted(reference) is not None:
        return True
    try:
        find_model(reference)
    except ArtifactError:
        return False
    return True
