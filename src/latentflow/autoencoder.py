"""The frozen first stage: pixels => moments => raw latents => normalised latents, and back.

Any autoencoder class of diffusers that maps [B, P, H, W] to one latent grid works. Its properties (pixel channels,
reduction factor, latent channels, scaling) are read from it, never assumed. One of several pixel channels also takes
gray images: they are repeated, and the mean of what is decoded is gray again.

Legend: B images, P channels of the pixels, H and W image height and width, C latent channels, h = H / factor,
w = W / factor.
    pixels    [B, P, H, W] float in [-1, 1]; [B, 1, H, W] is gray
    moments   [B, C, h, w] of a deterministic encoder, or [B, 2C, h, w]: mean, then log-variance
    raw       [B, C, h, w], the input of the decoder
    latents   [B, C, h, w], the space of the flow: (raw - shift) * scale, about unit variance
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from latentflow.artifacts import read_json, sha256_tensors, write_json
from latentflow.autoencoder_files import PIXELS_FILE, load_first_stage, trained_format
from latentflow.errors import ArtifactError, ConfigError
from latentflow.pixel_format import RGB, PixelFormat
from latentflow.randomness import ImageRandom
from latentflow.records import Record
from latentflow.runtime import Runtime
from latentflow.sizes import Size

BUILT_IN = {"shapes": Path(__file__).parent / "assets" / "shapes_autoencoder"}
"""Autoencoders that come with the package, by reference; "./shapes" is a folder of that name."""

_PROBE_SIDE = 64  # large enough for factor 64; encoding one such image costs milliseconds
# Tensors alive at a time, in units of the largest output of a layer: 3 to 5 were counted for four architectures.
_COPIES = 6
_PIXELS_OF_A_SLICE, _IMAGES_OF_A_SLICE = 1 << 20, 16
_BYTES_OF_A_SLICE_ON_CPU = 1 << 30
_COLOURS = 3
_LOG_VARIANCE_RANGE = (-30.0, 20.0)  # as in diffusers' DiagonalGaussianDistribution


class LatentNormalisation(Record):
    """Per-channel map between raw latents and the latents of the flow; each list holds C numbers."""

    shift: list[float]
    scale: list[Annotated[float, Field(gt=0)]]

    def normalise(self, raw: Tensor) -> Tensor:
        """raw => latents: (raw - shift) * scale, [B, C, h, w]."""
        return (raw - self._channels(self.shift, raw)) * self._channels(self.scale, raw)

    def restore(self, latents: Tensor) -> Tensor:
        """latents => raw: latents / scale + shift, [B, C, h, w]."""
        return latents / self._channels(self.scale, latents) + self._channels(self.shift, latents)

    @staticmethod
    def _channels(values: list[float], like: Tensor) -> Tensor:
        return _constant(tuple(values), like.dtype, like.device)[:, None, None]


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # the cached tensor may take part in a training step later
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on a device, copied there once: each copy from the host would wait for the device's queue."""
    return torch.tensor(values, dtype=dtype, device=device)


def latent_mean(moments: Tensor, num_channels: int) -> Tensor:
    """The mode of the posterior: moments [B, C or 2C, h, w] => raw latents [B, C, h, w]."""
    return moments[:, :num_channels]


def sample_latents(moments: Tensor, num_channels: int, random: ImageRandom) -> Tensor:
    """Draw raw latents from the posterior: moments [B, C or 2C, h, w] => [B, C, h, w].

    A deterministic encoder (C channels of moments) has nothing to draw; its output is returned.
    """
    mean = latent_mean(moments, num_channels)
    if moments.shape[1] == num_channels:
        return mean
    log_variance = moments[:, num_channels:].clamp(*_LOG_VARIANCE_RANGE)
    return mean + torch.exp(0.5 * log_variance) * random.normal(*mean.shape[1:])


class Autoencoder:
    """A diffusers autoencoder in eval mode, without gradients.

    Args:
        model: an instance with diffusers' `encode` and `decode`.
        reference: the folder, hub id or built-in name that it was loaded from.
        runtime: device and precision; None: the model's device, fp32.
    """

    def __init__(self, model: nn.Module, reference: str, runtime: Runtime | None = None):
        self.model: Any = model.eval().requires_grad_(False)
        self.reference = reference
        self.runtime = runtime or Runtime(self.device)
        self.slice_size: int | None = None
        """Images encoded or decoded at a time, which limits the memory of large batches; None: see `slices`."""
        self.pixel_format: PixelFormat | None = None
        """What it was trained on; None: not known, or 8-bit RGB."""
        self.to(self.runtime)

    @classmethod
    def from_pretrained(cls, reference: str | Path) -> Autoencoder:
        """Load a folder, a hub id `owner/name` or `owner/name/subfolder`, or a name in `BUILT_IN`; safetensors only.

        Of a pipeline, its `vae/` is loaded.

        Raises:
            ArtifactError: there is no usable autoencoder.
        """
        loaded = cls(load_first_stage(str(reference), BUILT_IN), str(reference))
        loaded.require_images()
        loaded.pixel_format = trained_format(str(reference), BUILT_IN)
        return loaded

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config and safetensors weights in the layout of diffusers."""
        self.model.save_pretrained(folder, safe_serialization=True)
        config = read_json(Path(folder) / "config.json")
        config.pop("_name_or_path", None)  # usually a path of this machine
        write_json(Path(folder) / "config.json", config)
        if self.pixel_format is not None:
            write_json(Path(folder) / PIXELS_FILE, self.pixel_format.model_dump(mode="json"))

    def to(self, place: Runtime | torch.device | str) -> Autoencoder:
        """Move the weights, and compute on this device (and in the precision of a runtime); returns itself."""
        self.runtime = place if isinstance(place, Runtime) else replace(self.runtime, device=torch.device(place))
        self.model.to(self.runtime.device)
        self.model.to(memory_format=self._layout)
        return self

    def under(self, runtime: Runtime) -> Autoencoder:
        """The same weights, in the precision of `runtime`."""
        other = copy.copy(self)
        other.runtime = replace(self.runtime, precision=runtime.precision)
        return other

    @property
    def _layout(self) -> torch.memory_format:
        """Channels last, fastest for convolutions, except on the CPU, where torch's GroupNorm is then inexact."""
        exact = self.device.type != "cpu" or not any(isinstance(m, nn.GroupNorm) for m in self.model.modules())
        flat = all(parameter.dim() <= 4 for parameter in self.model.parameters())
        return torch.channels_last if exact and flat else torch.contiguous_format

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @cached_property
    def _probe(self) -> tuple[int, int, int, int]:
        """(factor, latent channels, moment channels, widest), measured by encoding and decoding one gray image.

        The widest layer has so many values per pixel.
        """
        pixels, sizes, found = self._gray, [0], ""
        try:
            with _noting_outputs(self.model, sizes):
                moments = self.encode(pixels)
                shape = list(moments.shape[1:])
                fits = len(shape) == 3 and _PROBE_SIDE % shape[1] == 0
                channels = shape[0] // 2 if self._is_variational else shape[0]
                fits = fits and self._decoded(moments[:, :channels]).shape == pixels.shape
        except Exception as error:  # models of videos or sounds fail at any place inside
            found, fits = str(error).strip().partition("\n")[0] or type(error).__name__, False
        if not fits:
            images = f"[B, {self.pixel_channels}, {_PROBE_SIDE}, {_PROBE_SIDE}]"
            raise ArtifactError(
                f"{self.reference} holds a model of the class {type(self.model).__name__}, which does not map images "
                f"{images} to one latent grid and back ({found or shape}); give one for images"
            )
        return _PROBE_SIDE // shape[1], channels, shape[0], max(sizes) // _PROBE_SIDE**2

    @cached_property
    def _is_variational(self) -> bool:
        return hasattr(self._encoded(self._gray), "parameters")

    @property
    def _gray(self) -> Tensor:
        """One image of zeros."""
        return torch.zeros(1, self.pixel_channels, _PROBE_SIDE, _PROBE_SIDE, device=self.device)

    @cached_property
    def _widest(self) -> int:
        """Values per pixel in the largest output of any layer."""
        return max(1, self._probe[3])

    @property
    def pixel_channels(self) -> int:
        """Channels P of the images it was made for; 3 where its config does not say."""
        said = self.model.config.get("in_channels")
        return said if isinstance(said, int) and said > 0 else _COLOURS

    @property
    def factor(self) -> int:
        """Image side divided by latent side."""
        return self._probe[0]

    @property
    def num_channels(self) -> int:
        """Latent channels C."""
        return self._probe[1]

    @property
    def num_moments(self) -> int:
        """Channels of the moments: C for a deterministic encoder, 2C for a variational one."""
        return self._probe[2]

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over class, scaling and weights: equal for equal latent spaces, wherever the files are."""
        tensors = dict(self.model.state_dict())
        normalisation = self.normalisation
        tensors["latentflow.shift"] = torch.tensor(normalisation.shift)
        tensors["latentflow.scale"] = torch.tensor(normalisation.scale)
        return sha256_tensors({f"{type(self.model).__name__}.{name}": tensor for name, tensor in tensors.items()})

    @cached_property
    def normalisation(self) -> LatentNormalisation:
        """The scaling in the autoencoder's config.

        diffusers has two forms: a scalar `scaling_factor` with an optional `shift_factor`, or lists `latents_mean` and
        `latents_std`, on top of which the scalar still applies.
        """
        config = self.model.config
        scale = float(config.get("scaling_factor") or 1.0)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            if not len(mean) == len(std) == self.num_channels:
                raise ArtifactError(
                    f"{self.reference}: latents_mean and latents_std hold {len(mean)} and {len(std)} numbers for "
                    f"{self.num_channels} channels; restore the original config.json"
                )
            return LatentNormalisation(shift=list(mean), scale=[scale / float(s) for s in std])
        shift = float(config.get("shift_factor") or 0.0)
        return LatentNormalisation(shift=[shift] * self.num_channels, scale=[scale] * self.num_channels)

    def require_images(self) -> None:
        """Refuse an autoencoder of anything but images, such as videos, or one whose scaling does not fit.

        Raises:
            ArtifactError: naming the problem.
        """
        _ = self.normalisation

    def require_channels(self, channels: int, where: str) -> None:
        """Refuse images of another number of channels; gray ones are repeated, so they always fit.

        Args:
            where: the images, for the message.

        Raises:
            ConfigError: with the remedy.
        """
        if channels not in (1, self.pixel_channels):
            raise ConfigError(
                f"{where} has images of {channels} channels, but {self.reference} was made for {self.pixel_channels}; "
                "train an autoencoder for them with latentflow train-autoencoder, or read them with --pixels "
                f"{'rgb' if self.pixel_channels == _COLOURS else 'gray'}"
            )

    def latent_size(self, image_size: Size | int) -> Size:
        """Latent height and width of images of a size in pixels.

        Raises:
            ConfigError: a side is not a positive multiple of the factor; the nearest sizes that fit are named.
        """
        size = Size.of(image_size)
        if not size.is_multiple_of(self.factor):
            raise ConfigError(
                f"image size {size} is not a multiple of {self.factor}, the reduction factor of "
                f"{self.reference}; use {' or '.join(map(str, size.nearest(self.factor)))}"
            )
        return size.over(self.factor)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """pixels [B, P or 1, H, W] in [-1, 1] => moments [B, C or 2C, h, w], float32.

        Raises:
            ArtifactError: the autoencoder overflows in fp16.
        """
        return self._finite(torch.cat([self._moments(part) for part in self.slices(pixels)]))

    @torch.no_grad()
    def decode(self, raw: Tensor, channels: int | None = None) -> Tensor:
        """raw latents [B, C, h, w] => pixels [B, channels, H, W] in [-1, 1], clamped, float32.

        Args:
            channels: 1: gray, the mean of the P channels; None: all P.

        Raises:
            ArtifactError: the autoencoder overflows in fp16.
        """
        return torch.cat([self._decoded(part, channels) for part in self.slices(raw, latents=True)])

    @torch.no_grad()
    def decode_stored(self, raw: Tensor, pixel_format: PixelFormat = RGB) -> Tensor:
        """raw latents [B, C, h, w] => stored values [B, P or 1, H, W], rounded slice by slice to save memory.

        Args:
            pixel_format: of the values; the default is 8-bit RGB.

        Raises:
            ArtifactError: the autoencoder overflows in fp16.
        """
        decoded = (self._decoded(part, pixel_format.channels) for part in self.slices(raw, latents=True))
        return torch.cat([pixel_format.from_unit(part) for part in decoded])

    def reconstruct(self, pixels: Tensor, pixel_format: PixelFormat = RGB) -> Tensor:
        """Encode to the posterior's mode and decode: stored values [B, P or 1, H, W] => the same, on the CPU."""
        moments = self.encode(pixel_format.to_unit(pixels))
        return self.decode_stored(latent_mean(moments, self.num_channels), pixel_format).cpu()

    def slices(self, images: Tensor, *, latents: bool = False) -> tuple[Tensor, ...]:
        """Split images into parts to encode or decode at a time: `slice_of` images, or half, or a quarter ...

        A part takes at most half of the free memory of a GPU, and 1 GiB on a CPU.

        Args:
            images: pixels [B, P or 1, H, W]; with `latents`, latents or moments [B, ..., h, w].
        """
        if len(images) < 2:
            return (images,)
        pixels = images.shape[-2] * images.shape[-1] * (self.factor**2 if latents else 1)
        most = self.slice_size or self.slice_of(pixels)
        if self.slice_size is None:
            fits = _usable_bytes(self.device) // (pixels * 4 * _COPIES * self._widest)
            while most > max(fits, 1):
                most //= 2
        return cast(tuple[Tensor, ...], images.split(most))  # type: ignore[no-untyped-call]

    def slice_of(self, num_pixels: int) -> int:
        """Images per slice if memory allows: one megapixel, at least one image.

        On a CPU at most 16 images, which is faster, since the working set stays in its caches.
        """
        most = max(_PIXELS_OF_A_SLICE // num_pixels, 1)
        return min(most, _IMAGES_OF_A_SLICE) if self.device.type == "cpu" else most

    def _decoded(self, raw: Tensor, channels: int | None = None) -> Tensor:
        with self.runtime.autocast():
            raw = raw.to(self.device).contiguous(memory_format=self._layout)
            decoded: Tensor = self.model.decode(raw, return_dict=False)[0].float()
        pixels = self._finite(decoded).clamp(-1, 1)
        return pixels.mean(1, keepdim=True) if channels == 1 and self.pixel_channels > 1 else pixels

    def _finite(self, values: Tensor) -> Tensor:
        """Refuse non-finite values in fp16, whose range some autoencoders exceed; other precisions are not checked."""
        if self.runtime.precision == "fp16" and not values.isfinite().all():
            raise ArtifactError(f"the autoencoder {self.reference} overflows in fp16; use --precision bf16 or tf32")
        return values

    def _moments(self, pixels: Tensor) -> Tensor:
        if pixels.shape[1] == 1:
            pixels = pixels.expand(-1, self.pixel_channels, -1, -1)
        encoded = self._encoded(pixels.to(self.device))
        moments: Tensor = encoded.parameters if self._is_variational else encoded
        return moments.float()

    def _encoded(self, pixels: Tensor) -> Any:
        """A latent tensor, or diffusers' Gaussian with its `parameters`."""
        with torch.no_grad(), self.runtime.autocast():
            return self.model.encode(pixels.contiguous(memory_format=self._layout), return_dict=False)[0]


@contextmanager
def _noting_outputs(model: nn.Module, sizes: list[int]) -> Iterator[None]:
    """Inside, the number of values in the output of every layer is appended to `sizes`, if this thread computes it."""
    own = threading.get_ident()

    def note(module: nn.Module, given: object, output: object) -> None:
        if isinstance(output, Tensor) and threading.get_ident() == own:
            sizes.append(output.numel())

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _usable_bytes(device: torch.device) -> int:
    """Memory for one slice: on a GPU half of what is free, including memory that torch has reserved but not used."""
    if device.type != "cuda":
        return _BYTES_OF_A_SLICE_ON_CPU
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + unused) // 2


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 pixels in 0..255 => float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


def to_uint8(pixels: Tensor) -> Tensor:
    """float pixels in [-1, 1] => uint8 in 0..255, rounded to the nearest level."""
    return ((pixels + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
