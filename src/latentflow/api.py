"""The Python interface: `LatentFlow`, a model with a method for every verb that draws.

Keyword arguments are the fields of the request of the same name in `latentflow.sampling.request`, which are the options
of the command line as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from latentflow.autoencoder import Autoencoder
from latentflow.data.painting.mask_reader import Mask
from latentflow.errors import ConfigError
from latentflow.flow.loss import flow_matching_loss
from latentflow.flow.path import CosinePath, LinearPath
from latentflow.model.class_names import ClassList
from latentflow.model.conditioning import Conditioning
from latentflow.model.config import AutoencoderRecord, ModelConfig, SamplingPreset
from latentflow.model.flow_model import FlowModel
from latentflow.model.guide_reference import GuideReference
from latentflow.networks.dit import DiTConfig
from latentflow.networks.registered import RegisteredNetwork, UnnamedNetwork
from latentflow.networks.unet import UNetConfig
from latentflow.pixel_format import RGB
from latentflow.progress import image_progress, in_notebook
from latentflow.records import Record, explain
from latentflow.requests import with_fields_of
from latentflow.runtime import open_runtime
from latentflow.sampling import edits, inpaint, inversion, mask_to_image, pipeline
from latentflow.sampling import translate as translation
from latentflow.sampling.inputs import ImageInput, MapInput
from latentflow.sampling.inversion import Inversion
from latentflow.sampling.request import (
    Fit,
    ImageToImageRequest,
    InpaintRequest,
    InterpolateRequest,
    InvertRequest,
    MaskToImageRequest,
    Method,
    SampleRequest,
    TranslateRequest,
    VaryRequest,
)
from latentflow.sampling.samples import Samples
from latentflow.shapes import Condition
from latentflow.sizes import Size

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack  # typing has them from Python 3.11 on


class SamplingOptions(TypedDict, total=False):
    """`SamplingRequest`, for type checkers. What is left out comes from the preset in the model folder."""

    guidance: float | None
    guidance_interval: tuple[float, float] | None
    guided_by: list[str] | None
    guided_channels: int | None
    guide: str | Path | GuideReference | None
    solver: str | None
    steps: int | None
    evaluations: int | None
    shift: float | None
    rtol: float | None
    atol: float | None


class DrawOptions(SamplingOptions, total=False):
    """`DrawRequest` without `num`, for type checkers."""

    classes: ClassList | None
    conditions: Mapping[str, Any] | None
    seed: int


class SampleOptions(DrawOptions, total=False):
    """`SampleRequest` without `num`, for type checkers."""

    image_size: Size | int | str | None


class EditOptions(DrawOptions, total=False):
    """`EditRequest`, for type checkers."""

    num: int


class InpaintOptions(EditOptions, total=False):
    """`InpaintRequest`, for type checkers."""

    fit: Fit | None
    feather: int
    method: Method | None


class MaskToImageOptions(EditOptions, total=False):
    """`MaskToImageRequest`, for type checkers."""

    native: bool


class TranslateOptions(EditOptions, total=False):
    """`TranslateRequest`, for type checkers."""

    native: bool


class ImageToImageOptions(EditOptions, total=False):
    """`ImageToImageRequest`, for type checkers."""

    strength: float


class InterpolateOptions(SamplingOptions, total=False):
    """`InterpolateRequest`, for type checkers."""

    seeds: tuple[int, int]
    num: int
    classes: ClassList | None
    conditions: Mapping[str, Any] | None


class VaryOptions(SamplingOptions, total=False):
    """`VaryRequest`, for type checkers."""

    seed: int
    amount: float
    num: int
    classes: ClassList | None
    conditions: Mapping[str, Any] | None


class InvertOptions(SamplingOptions, total=False):
    """`InvertRequest`, for type checkers."""

    classes: ClassList | None
    conditions: Mapping[str, Any] | None


class LatentFlow(FlowModel):
    """A flow-matching model that draws; load one with `LatentFlow.from_pretrained(...)`.

    The same seeds and options give the same pictures as on the command line. Every method raises `ConfigError` or
    `DataError` for bad input, before anything is computed.
    """

    @classmethod
    def assemble(
        cls,
        network: nn.Module | DiTConfig | UNetConfig | RegisteredNetwork,
        autoencoder: Autoencoder | str | Path,
        *,
        image_size: Size | int | str,
        conditioning: Conditioning | None = None,
        path: LinearPath | CosinePath | None = None,
        sampling: SamplingPreset | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """An untrained model for one's own training loop.

        LatentFlow.assemble(DiTConfig(name="DiT-S/2"), "shapes", image_size=32)

        Args:
            network: a config, by which the network is built with fresh weights; or any module, called as
                network(latents [B, C, h, w], time [B], condition) => velocity [B, C, h, w]. A model with a module can
                draw, but not be saved: for that, give the `RegisteredNetwork` of `register_network`.
            autoencoder: a folder, a hub id, a built-in name, or one that is loaded.
            image_size: in pixels.
            conditioning: classes, columns and the other conditions; None: unconditional.
            device: None: a GPU if there is one, else the CPU.

        Raises:
            ConfigError: the parts do not fit together, or the network is not registered.
            ArtifactError: there is no such autoencoder.
        """
        named = network if isinstance(network, Record) else UnnamedNetwork(class_name=type(network).__name__)
        if not isinstance(autoencoder, Autoencoder):
            autoencoder = Autoencoder.from_pretrained(autoencoder)
        try:
            config = ModelConfig(
                image_size=Size.of(image_size),
                pixel_format=autoencoder.pixel_format or RGB,
                network=named,
                path=path or LinearPath(),
                conditioning=conditioning or Conditioning(),
                autoencoder=AutoencoderRecord.of(autoencoder),
                normalisation=autoencoder.normalisation,
                sampling=sampling or SamplingPreset(),
            )
        except ValidationError as error:
            raise ConfigError(explain(error, ModelConfig)) from None
        module = network if isinstance(network, nn.Module) else config.build_network()
        return cls(config, module, autoencoder).to(open_runtime(device, "fp32", alone=True))

    def loss(
        self,
        latents: Tensor,
        condition: Condition | None = None,
        *,
        time: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """The flow matching loss of each image, [B] float32 with its graph, for one's own training loop.

        model.loss(model.encode(pixels), Condition(labels=labels)).mean().backward()

        While the network is in training mode, conditions are dropped at random, as the config says; so is what is not
        given. Random numbers are torch's own (`torch.manual_seed`).

        Args:
            latents: [B, C, h, w], normalised; see `encode`.
            condition: what is given; None: nothing.
            time: [B] in [0, 1]; None: uniform.
            noise: [B, C, h, w]; None: standard normal.

        Raises:
            ConfigError: the model does not have a condition that is given.
        """
        conditioning, device = self.config.conditioning, self.device
        data = latents.to(device)
        whole = conditioning.build(data.shape, device, condition or Condition())
        if self.network.training:
            rows = {name: torch.rand(len(data), device=device) < share for name, share in conditioning.dropout.items()}
            whole = conditioning.drop(whole, rows)
        time = torch.rand(len(data), device=device) if time is None else time.to(device)
        noise = torch.randn_like(data) if noise is None else noise.to(device)
        return flow_matching_loss(lambda x, t: self.velocity(x, t, whole), self.config.path, data, noise, time)

    @with_fields_of(SampleRequest, SampleOptions)
    def sample(
        self,
        num: int = 1,
        *,
        noise: Tensor | None = None,
        batch_size: int = 16,
        **options: Unpack[SampleOptions],
    ) -> Samples:
        """Draw images from seeds and classes.

        LatentFlow.from_pretrained("runs/photos").sample(num=16, classes=["cat", "dog"], guidance=1.5, seed=0).images

        Args:
            noise: [num, C, h, w] to start from instead of the seeds' noise, for example from `invert`.
            batch_size: images computed together; it changes speed and memory, not the pictures.
            options: the other fields of `SampleRequest`.
        """
        request = SampleRequest(num=num, **options)
        with _progress(request.num) as on_images:
            return pipeline.sample(self, request, noise=noise, batch_size=batch_size, on_images=on_images)

    @with_fields_of(InpaintRequest, InpaintOptions)
    def inpaint(
        self,
        image: ImageInput | np.ndarray,
        mask: Mask,
        *,
        semantic_map: MapInput | None = None,
        batch_size: int = 4,
        **options: Unpack[InpaintOptions],
    ) -> Samples:
        """Fill the hole of an image; see `latentflow.sampling.inpaint.inpaint`.

        model.inpaint("street.jpg", "hole.png", num=4, seed=0).images

        Args:
            mask: of the image's size, white where the image is to be filled.
            semantic_map: of the image's size, for a model that is conditioned on maps as well.
            options: the fields of `InpaintRequest`.
        """
        request = InpaintRequest(**options)
        with _progress(request.num) as on_images:
            return inpaint.inpaint(
                self, image, mask, request, semantic_map=semantic_map, batch_size=batch_size, on_images=on_images
            )

    @with_fields_of(MaskToImageRequest, MaskToImageOptions)
    def mask_to_image(
        self, semantic_map: MapInput, *, batch_size: int = 16, **options: Unpack[MaskToImageOptions]
    ) -> Samples:
        """Draw images of a semantic map; see `latentflow.sampling.mask_to_image.mask_to_image`.

        Args:
            options: the fields of `MaskToImageRequest`.
        """
        request = MaskToImageRequest(**options)
        with _progress(request.num) as on_images:
            return mask_to_image.mask_to_image(self, semantic_map, request, batch_size=batch_size, on_images=on_images)

    @with_fields_of(TranslateRequest, TranslateOptions)
    def translate(self, image: ImageInput, *, batch_size: int = 16, **options: Unpack[TranslateOptions]) -> Samples:
        """Draw images from a paired image; see `latentflow.sampling.translate.translate`.

        model.translate("small.png", num=4).images

        Args:
            options: the fields of `TranslateRequest`.
        """
        request = TranslateRequest(**options)
        with _progress(request.num) as on_images:
            return translation.translate(self, image, request, batch_size=batch_size, on_images=on_images)

    @with_fields_of(ImageToImageRequest, ImageToImageOptions)
    def image_to_image(
        self, image: ImageInput, *, batch_size: int = 16, **options: Unpack[ImageToImageOptions]
    ) -> Samples:
        """Redraw an image; see `latentflow.sampling.edits.image_to_image`.

        model.image_to_image("cat.jpg", strength=0.6, classes=["dog"], num=4).images

        Args:
            options: the fields of `ImageToImageRequest`.
        """
        request = ImageToImageRequest(**options)
        with _progress(request.num) as on_images:
            return edits.image_to_image(self, image, request, batch_size=batch_size, on_images=on_images)

    @with_fields_of(InterpolateRequest, InterpolateOptions)
    def interpolate(self, *, batch_size: int = 16, **options: Unpack[InterpolateOptions]) -> Samples:
        """Draw the frames between two seeds or classes; see `latentflow.sampling.edits.interpolation`.

        model.interpolate(seeds=(3, 8), classes=["cat", "dog"], num=9).images

        Args:
            options: the fields of `InterpolateRequest`.
        """
        request = InterpolateRequest(**options)
        with _progress(request.num) as on_images:
            return edits.interpolate(self, request, batch_size=batch_size, on_images=on_images)

    @with_fields_of(VaryRequest, VaryOptions)
    def vary(self, *, batch_size: int = 16, **options: Unpack[VaryOptions]) -> Samples:
        """Draw variations of the picture of one seed; see `latentflow.sampling.edits.variations`.

        Args:
            options: the fields of `VaryRequest`.
        """
        request = VaryRequest(**options)
        with _progress(request.num) as on_images:
            return edits.vary(self, request, batch_size=batch_size, on_images=on_images)

    @with_fields_of(InvertRequest, InvertOptions)
    def invert(self, image: ImageInput, **options: Unpack[InvertOptions]) -> Inversion:
        """Find the noise that an image would be drawn from; see `latentflow.sampling.inversion.invert`.

        inversion = model.invert("cat.jpg", classes=["cat"])
        model.sample(noise=inversion.noise, classes=["dog"], guidance=1).images

        Args:
            options: the fields of `InvertRequest`.
        """
        return inversion.invert(self, image, InvertRequest(**options))


def _progress(num_images: int) -> AbstractContextManager[Callable[[int], None]]:
    """A bar below a notebook's cell; elsewhere a program says itself what it shows."""
    return image_progress("drawing", num_images, enabled=in_notebook())
