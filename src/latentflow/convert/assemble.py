"""A model from a published network, its weights and the facts of its training."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from latentflow.autoencoder import Autoencoder, LatentNormalisation
from latentflow.convert.published import Published
from latentflow.data.painting.mask_rules import MaskRules
from latentflow.data.painting.semantic_maps import default_palette
from latentflow.errors import ConfigError
from latentflow.model.conditioning import Conditioning
from latentflow.model.config import AutoencoderRecord, ModelConfig
from latentflow.model.flow_model import FlowModel
from latentflow.networks.velocity_network import wrap_network


def assemble(
    published: Published, network: nn.Module, autoencoder: Autoencoder, *, class_names: Sequence[str] = ()
) -> FlowModel:
    """A model of a converted network.

    Args:
        network: as `published.architecture.load` returns it.
        autoencoder: the one the network was trained with.
        class_names: one per class; none given: "0", "1", ...

    Raises:
        ConfigError: the autoencoder, the image size or the class names do not fit the network.
    """
    _require_fit(published, autoencoder, class_names)
    architecture = published.architecture
    names = list(class_names) or [str(index) for index in range(architecture.num_classes)]
    normalisation = autoencoder.normalisation
    if published.latent_scale is not None:
        channels = architecture.channels
        normalisation = LatentNormalisation(shift=[0.0] * channels, scale=[published.latent_scale] * channels)
    maps = published.map_class_names
    config = ModelConfig(
        image_size=published.image_size,
        network=architecture.network,
        prediction=published.prediction,
        path=published.path,
        conditioning=Conditioning(
            class_names=names,
            label_dropout=published.label_dropout,
            inpainting=architecture.inpainting,
            inpainting_dropout=0,
            map_class_names=list(maps),
            map_palette=list(default_palette(len(maps))),
            map_dropout=0,
        ),
        masks=MaskRules(told_as="sign") if architecture.inpainting else None,
        autoencoder=AutoencoderRecord.of(autoencoder),
        normalisation=normalisation,
        sampling=published.sampling,
        training=published.training,
    )
    return FlowModel(config, wrap_network(network, published.prediction).eval(), autoencoder)


def _require_fit(published: Published, autoencoder: Autoencoder, class_names: Sequence[str]) -> None:
    architecture, image_size = published.architecture, published.image_size
    if architecture.out_channels != architecture.channels:
        raise ConfigError(
            f"a velocity has the channels of its latents, but the network takes {architecture.channels} and gives "
            f"{architecture.out_channels}; check num_in_channels and num_out_channels"
        )
    if len(set(class_names)) != len(class_names):
        doubled = sorted({name for name in class_names if list(class_names).count(name) > 1})
        raise ConfigError(f"class names must differ; given twice: {', '.join(doubled)}")
    if autoencoder.num_channels != architecture.channels:
        raise ConfigError(
            f"autoencoder {autoencoder.reference} has {autoencoder.num_channels} latent channels, the network "
            f"{architecture.channels}; give the autoencoder it was trained with (--autoencoder)"
        )
    latents = autoencoder.latent_size(image_size)
    if not latents.is_multiple_of(architecture.network.size_multiple):
        raise ConfigError(
            f"images of {image_size} pixels make latents of {latents.words}; this network needs multiples of "
            f"{architecture.network.size_multiple}"
        )
    if class_names and len(class_names) != architecture.num_classes:
        raise ConfigError(f"{len(class_names)} class names for a network of {architecture.num_classes} classes")
