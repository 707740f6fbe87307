"""What an autoencoder's latents are like: do they turn and shrink with the image, and how fine is their detail?

Legend: N images, S their side, C latent channels, h and w latent height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from latentflow.records import Record
from latentflow.shapes import shrink
from latentflow.sizes import Size


class LatentSpace(Record):
    """Figures of an autoencoder on some images, by the modes of their posteriors."""

    num: int
    turning_error: float = Field(description="Of latents turned by a quarter; see `equivariance_error`.")
    shrinking_error: float | None = Field(description="Of latents shrunk to half; null: they have one pixel.")
    fine_share: float = Field(description="Of the latents; see `fine_share`.")
    fine_share_of_images: float = Field(description="Of the images, shrunk to the size of the latents.")
    fine_share_of_noise: float = Field(description="Of white noise of this size.")


def measure_latent_space(encode: Callable[[Tensor], Tensor], pixels: Tensor) -> LatentSpace:
    """Encode images, turned and shrunken images, and compare.

    Args:
        encode: pixels [N, 3, H, W] of any size that the autoencoder takes => latents [N, C, h, w].
        pixels: [N, 3, H, W] in [-1, 1].
    """
    latents = encode(pixels).to(pixels.device)
    size, half = Size(*latents.shape[-2:]), Size(*latents.shape[-2:]).over(2)
    shrunken = None
    if min(half):
        of_shrunken = encode(shrink(pixels, half.times(pixels.shape[-1] // size.width))).to(pixels.device)
        shrunken = equivariance_error(shrink(latents, half), of_shrunken)
    coarse = Size((size.height + 1) // 2, (size.width + 1) // 2)
    of_turned = encode(torch.rot90(pixels, 1, (-2, -1))).to(pixels.device)
    return LatentSpace(
        num=len(pixels),
        turning_error=equivariance_error(torch.rot90(latents, 1, (-2, -1)), of_turned),
        shrinking_error=shrunken,
        fine_share=fine_share(latents),
        fine_share_of_images=fine_share(shrink(pixels, size)),
        fine_share_of_noise=(size.area - coarse.area) / max(size.area - 1, 1),
    )


def equivariance_error(transformed: Tensor, of_transformed: Tensor) -> float:
    """|tau E(x) - E(tau x)| / |E(tau x)|, norms over all images: how far encoding is from commuting with tau.

    The mean of each channel is removed from the denominator. 0: it commutes; 1: as wrong as the mean of all latents;
    sqrt(2): as wrong as latents of other images. EQ-VAE (arXiv 2502.09509) measures the same in its latents.

    Args:
        transformed: tau E(x), latents [N, C, h, w] that were transformed.
        of_transformed: E(tau x), latents of transformed images, of the same shape.
    """
    expected = of_transformed.double()
    scale = (expected - expected.mean((0, 2, 3), keepdim=True)).norm()
    error = (transformed.double() - expected).norm()
    return float(error / scale) if scale else math.inf if error else 0.0


def fine_share(images: Tensor) -> float:
    """The share of the variance of [N, C, h, w] within images that is lost at half the side, 0 to 1.

    That is the power in the discrete cosine transform (DCT-II) at half of the highest frequency or above, of rows or of
    columns; unlike Fourier's it takes no edge of an image for a jump. The mean of each channel of an image is left out.
    "Improving the Diffusability of Autoencoders" (arXiv 2502.14831) compares latents with images by the same transform.
    """
    height, width = images.shape[-2:]
    rows, columns = (_cosines(size).to(images.device) for size in (height, width))
    deviations = images.double() - images.double().mean((2, 3), keepdim=True)
    power = (rows @ deviations @ columns.T).square().sum((0, 1))
    coarse, total = power[: (height + 1) // 2, : (width + 1) // 2].sum(), power.sum()
    return float(1 - coarse / total) if total else 0.0


def _cosines(size: int) -> Tensor:
    """The orthonormal DCT-II as a matrix [size, size]: row k is sqrt(2 / size) cos(pi (n + 1/2) k / size) over n."""
    n = torch.arange(size, dtype=torch.float64)
    matrix = (2 / size) ** 0.5 * torch.cos(math.pi * (n + 0.5) * n[:, None] / size)
    matrix[0] /= 2**0.5
    return matrix
