"""Feature networks, which images are compared by, with a common interface.

Legend: B images, H and W image height and width in pixels, D features of an image.
"""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from latentflow.artifacts import sha256_tensors
from latentflow.autoencoder import Autoencoder, latent_mean
from latentflow.data.pictures.shown import as_shown
from latentflow.errors import ArtifactError, ConfigError, DataError, nearest
from latentflow.metrics.features.inception import InceptionV3, download_weights, load_inception
from latentflow.metrics.features.judge_folder import Judge, JudgeRecord, load_judge
from latentflow.metrics.features.random_pyramid import RandomPyramid
from latentflow.metrics.names import FEATURE_PRECISIONS, FEATURES, JUDGE, is_judge
from latentflow.networks.feature_network import FeatureNetwork
from latentflow.pixel_format import RGB, PixelFormat
from latentflow.runtime import Precision, Runtime
from latentflow.sizes import Size
from latentflow.weights import LOADING

DINOV2 = "facebook/dinov2-large"

_RELATIVE = "a relative measure: compare models by it, never with published figures"


class FeatureExtractor(Protocol):
    """A frozen network that turns images into rows of numbers.

    Features of an image depend on no other image; another batch size moves them by rounding errors only. They are
    computed in IEEE float32, as published ones are, unless `precision` says otherwise.

    Attributes:
        name: one of `FEATURES`, or `JUDGE`.
        label: the name of a Fréchet distance of these features, and what it may be compared with.
        dim: D.
        hash: SHA-256 over the weights, the preprocessing, a precision other than fp32, and a pixel format other than
            8-bit RGB.
        device: where features are computed and returned.
        precision: what the network computes in.
        pixel_format: of the images. Networks see what is shown of them (see `data.pictures.shown`), the first stage
            their stored values.
    """

    name: str
    label: str
    dim: int
    hash: str
    device: torch.device
    precision: Precision
    pixel_format: PixelFormat

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, P, H, W], stored values in `pixel_format`, on any device => [B, D] float32 on `device`.

        Raises:
            DataError: the images are of another format, or of a size that does not fit.
        """
        ...


def open_features(
    name: str,
    *,
    weights: str | Path | None = None,
    autoencoder: Autoencoder | None = None,
    image_size: Size | int | None = None,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    pixel_format: PixelFormat = RGB,
) -> FeatureExtractor:
    """A feature network by name.

    Args:
        name: "inception" (FID), "dinov2" (FD-DINOv2), "latents" (means of the model's own first stage), "random"
            (a fixed random network, which needs no download), or the folder of a judge, by `latentflow train-features`.
        weights: of "inception": the published .pth file or a .safetensors copy; None: download them if need be. Of
            "dinov2": a folder or a hub id; None: `DINOV2`.
        autoencoder: of "latents", which needs it.
        image_size: of "latents", which needs it: that of the images.
        precision: "fp32", which published figures are computed in; "tf32" and "bf16" are faster, and move a distance.
            On other devices than CUDA tf32 is fp32.
        pixel_format: of the images.

    Raises:
        ConfigError: no such name or precision, something that "latents" needs is missing, or the `transformers`
            library is.
        ArtifactError: the weights cannot be read or downloaded.
    """
    if precision not in FEATURE_PRECISIONS:
        raise ConfigError(f"features in precision {precision!r}: {nearest(precision, FEATURE_PRECISIONS)}")
    device = torch.device(device)
    precision = "fp32" if precision == "tf32" and device.type != "cuda" else precision
    Runtime(device).with_precision(precision)  # refuses one that the device has not
    found = _opened(name, weights, autoencoder, image_size, device, precision)
    if pixel_format != RGB:
        found.pixel_format = pixel_format
        found.hash = hashlib.sha256(f"{found.hash} of {pixel_format.model_dump_json()}".encode()).hexdigest()
    return found


def _opened(
    name: str,
    weights: str | Path | None,
    autoencoder: Autoencoder | None,
    image_size: int | None,
    device: torch.device,
    precision: Precision,
) -> FeatureExtractor:
    """The network for 8-bit RGB; arguments as of `open_features`."""
    if name == "inception":
        return InceptionFeatures(load_inception(weights or download_weights()), device, precision)
    if name == "dinov2":
        return DinoFeatures(str(weights or DINOV2), device, precision)
    if name == "random":
        return RandomFeatures(device, precision)
    if is_judge(name):
        return JudgeFeatures(*load_judge(name), device, precision)
    if name != "latents":
        raise ConfigError(f"unknown features {name!r}; {nearest(name, FEATURES)}")
    if autoencoder is None or image_size is None:
        raise ConfigError("features 'latents' are those of a model's autoencoder: give a model, or choose 'random'")
    return LatentFeatures(autoencoder.to(device), image_size, precision)


class InceptionFeatures:
    """The pooled features of the FID Inception network: the ones that published FID, KID and Inception Score take."""

    name = "inception"
    label = "FID"
    dim = 2048
    pixel_format = RGB

    def __init__(self, network: InceptionV3, device: torch.device | str = "cpu", precision: Precision = "fp32"):
        self.device, self.precision = torch.device(device), precision
        self.network = network.to(self.device)

    @cached_property
    def hash(self) -> str:
        weights = {name: x for name, x in self.network.state_dict().items() if not name.endswith("num_batches_tracked")}
        return _hash(
            "bilinear 299, no antialias, no rounding, [-1, 1]; last block, spatial mean", weights, self.precision
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        with _computing(self):
            return self.network(_shown(self, images)).float()

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """[B, 2048] features => [B, 1008] logits without bias, which the Inception Score is defined by."""
        with Runtime(self.device).autocast():  # in float32
            return self.network.logits(features.to(self.device), bias=False)


class DinoFeatures:
    """The class token of DINOv2 after its last norm, at 224 pixels: FD-DINOv2 of arXiv 2306.04675.

    Args:
        model: a folder or a hub id of a DINOv2 model with safetensors weights.

    Raises:
        ConfigError: the `transformers` library is not installed.
        ArtifactError: the model cannot be loaded.
    """

    name = "dinov2"
    label = "FD-DINOv2"
    pixel_format = RGB
    side = 224
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]  # of ImageNet
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

    def __init__(self, model: str = DINOV2, device: torch.device | str = "cpu", precision: Precision = "fp32"):
        try:
            from transformers import Dinov2Model  # slow to import, and an extra
        except ImportError as error:
            raise ConfigError(
                "features 'dinov2' need the transformers library: pip install 'latentflow[dinov2]', "
                "or choose other features"
            ) from error
        try:
            with LOADING:
                network = Dinov2Model.from_pretrained(model, use_safetensors=True)
        except Exception as error:  # transformers raises OSError, ValueError, SafetensorError, ... here
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ArtifactError(f"cannot load DINOv2 from {model}: {reason}") from error
        self.device, self.precision = torch.device(device), precision
        self.network = network.eval().requires_grad_(False).float().to(self.device)
        self._mean, self._std = self.mean.to(self.device), self.std.to(self.device)
        self.dim: int = network.config.hidden_size

    @cached_property
    def hash(self) -> str:
        rule = f"bicubic {self.side} with antialias, clipped, ImageNet mean and std; class token after the norm"
        return _hash(rule, self.network.state_dict(), self.precision)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        pixels = _shown(self, images).float()
        resized = F.interpolate(pixels, (self.side, self.side), mode="bicubic", antialias=True, align_corners=False)
        normal = (resized.clamp(0, 255) / 255 - self._mean) / self._std
        with _computing(self):
            return self.network(pixel_values=normal).last_hidden_state[:, 0].float()


class LatentFeatures:
    """The means of the first stage's posterior, normalised as for the flow, flattened."""

    name = "latents"
    pixel_format = RGB
    label = f"Fréchet distance of latents, {_RELATIVE}"

    def __init__(self, autoencoder: Autoencoder, image_size: Size | int, precision: Precision = "fp32"):
        self.precision = precision
        self.autoencoder = autoencoder.under(autoencoder.runtime.with_precision(precision))
        self.image_size = Size.of(image_size)
        self.dim = autoencoder.num_channels * autoencoder.latent_size(self.image_size).area

    @property
    def device(self) -> torch.device:
        return self.autoencoder.device

    @cached_property
    def hash(self) -> str:
        text = f"posterior means, normalised, {self.image_size} pixels, {self.autoencoder.content_hash}"
        return _precisely(hashlib.sha256(text.encode()).hexdigest(), self.precision)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if _checked(images, self.pixel_format).shape[2:] != self.image_size:
            size = list(self.image_size)
            raise DataError(f"images of {list(images.shape[2:])} pixels do not fit features of latents at {size}")
        values = images.to(self.device, non_blocking=True)
        moments = self.autoencoder.encode(self.pixel_format.to_unit(values))
        raw = latent_mean(moments, self.autoencoder.num_channels)
        return self.autoencoder.normalisation.normalise(raw).flatten(1)


class RandomFeatures:
    """Means and spreads of a fixed random convolution pyramid: no download, and the same numbers everywhere."""

    name = "random"
    pixel_format = RGB
    label = f"Fréchet distance of random features, {_RELATIVE}"

    def __init__(self, device: torch.device | str = "cpu", precision: Precision = "fp32"):
        self.device, self.precision = torch.device(device), precision
        self.network = RandomPyramid().to(self.device)
        self.dim = self.network.dim
        self.hash = _precisely(hashlib.sha256(self.network.recipe.encode()).hexdigest(), precision)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        with _computing(self):
            return self.network(_shown(self, images)).float()


class JudgeFeatures:
    """The features of a judge, each standardised by mean and deviation over its training images.

    Attributes:
        record: of the judge.
        classes: judges whether images show their class; None: it knows no classes.
    """

    name = JUDGE
    pixel_format = RGB

    def __init__(
        self,
        record: JudgeRecord,
        judge: Judge,
        device: torch.device | str = "cpu",
        precision: Precision = "fp32",
    ):
        self.device, self.precision = torch.device(device), precision
        self.record, self.classes = record, judge.classes
        self.label = f"FD of a judge ({record.judged}), {_RELATIVE}"
        self.dim = record.network.dim
        self.hash = _hash(f"{FeatureNetwork.rule}, {record.network.side} pixels", judge.feature_tensors(), precision)
        self.network = judge.network.eval().requires_grad_(False)
        self.network = self.network.to(self.device, memory_format=torch.channels_last)
        self._mean, self._std = judge.mean.to(self.device), judge.std.to(self.device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        with _computing(self):
            features = self.network(_shown(self, images))
        return (features - self._mean) / self._std


def _computing(features: FeatureExtractor) -> AbstractContextManager[None]:
    """Compute in the precision of the features, not in the caller's: even TF32 changes features by 1e-3."""
    return Runtime(features.device, precision=features.precision).autocast()


def _shown(features: FeatureExtractor, images: Tensor) -> Tensor:
    """What is shown of images, on the device: [B, 3, H, W] uint8; pinned ones are sent without blocking."""
    sent = _checked(images, features.pixel_format).to(features.device, non_blocking=True)
    return as_shown(sent, features.pixel_format)


def _checked(images: Tensor, pixel_format: PixelFormat) -> Tensor:
    dtype, channels = pixel_format.dtype, pixel_format.channels
    if images.dtype != getattr(torch, dtype) or images.dim() != 4 or images.shape[1] != channels:
        raise DataError(f"features need {dtype} images [B, {channels}, H, W], not {images.dtype} {list(images.shape)}")
    return images


def _hash(rule: str, tensors: dict[str, Any], precision: Precision) -> str:
    return _precisely(hashlib.sha256(f"{rule}; {sha256_tensors(tensors)}".encode()).hexdigest(), precision)


def _precisely(hash: str, precision: Precision) -> str:
    """The hash, changed for every precision but that of published features."""
    return hash if precision == "fp32" else hashlib.sha256(f"{hash} in {precision}".encode()).hexdigest()
