"""The Inception network that FID is defined by: the TensorFlow model of 2015-12-05 with the weights of pytorch-fid.

It differs from the Inception v3 of other libraries: padding does not count in the means of its pooling branches, the
last block pools by maximum, and it knows 1008 classes. Architecture: arXiv 1512.00567; FID: arXiv 1706.08500.

Legend: B images, H and W image height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentflow.artifacts import read_tensors, read_torch_file, sha256_file
from latentflow.errors import ArtifactError
from latentflow.weights import without_memory

WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
WEIGHTS_HASH = "6726825d"
"""What the SHA-256 of the published file starts with."""

IMAGE_SIDE = 299
BLOCK_DIMS = (64, 192, 768, 2048)
"""Features after the first pooling, the second pooling, the 17x17 blocks and the last block."""


class InceptionV3(nn.Module):
    """The network, in eval mode and without gradients, untrained until weights are loaded.

    Tensors have the names of the published file: those of torchvision's Inception v3, without the auxiliary head.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBlock(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBlock(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvBlock(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvBlock(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBlock(80, 192, 3)
        self.Mixed_5b = Block35(192, pooled=32)
        self.Mixed_5c = Block35(256, pooled=64)
        self.Mixed_5d = Block35(288, pooled=64)
        self.Mixed_6a = Reduction17(288)
        self.Mixed_6b = Block17(768, inner=128)
        self.Mixed_6c = Block17(768, inner=160)
        self.Mixed_6d = Block17(768, inner=160)
        self.Mixed_6e = Block17(768, inner=192)
        self.Mixed_7a = Reduction8(768)
        self.Mixed_7b = Block8(1280, pool=_average_pool)
        self.Mixed_7c = Block8(2048, pool=_max_pool)
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 RGB images [B, 3, H, W] of any size => features [B, 2048], float32."""
        return self.blocks(images)[-1]

    def blocks(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """uint8 RGB images [B, 3, H, W] => spatial means after each stage: [B, D] for D in `BLOCK_DIMS`, float32."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(preprocess(images))))
        first = F.max_pool2d(x, 3, stride=2)
        second = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(first)), 3, stride=2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(second))))
        third = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        last = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(third)))
        return tuple(x.mean((2, 3)) for x in (first, second, third, last))

    def logits(self, features: Tensor, *, bias: bool = True) -> Tensor:
        """features [B, 2048] => the logits of the classes: [B, 1008].

        Args:
            bias: the Inception Score is defined without it, by the program of arXiv 1606.03498.
        """
        return F.linear(features, self.fc.weight, self.fc.bias if bias else None)


def preprocess(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] => the input of the network: [B, 3, 299, 299] float32 in [-1, 1].

    The bilinear resize neither smooths before shrinking nor rounds after it: published FID depends on that.
    """
    resized = F.interpolate(images.float() / 255, (IMAGE_SIDE, IMAGE_SIDE), mode="bilinear", align_corners=False)
    return 2 * resized - 1


class ConvBlock(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], **options: int | tuple[int, int]):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, bias=False, **options)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


_row = partial(ConvBlock, kernel=(1, 7), padding=(0, 3))
_column = partial(ConvBlock, kernel=(7, 1), padding=(3, 0))
_max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_average_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)


class Block35(nn.Module):
    """Mixed_5b to 5d, at 35x35: four branches side by side."""

    def __init__(self, inputs: int, pooled: int):
        super().__init__()
        self.branch1x1 = ConvBlock(inputs, 64, 1)
        self.branch5x5_1 = ConvBlock(inputs, 48, 1)
        self.branch5x5_2 = ConvBlock(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvBlock(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvBlock(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvBlock(96, 96, 3, padding=1)
        self.branch_pool = ConvBlock(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average_pool(x))], 1)


class Reduction17(nn.Module):
    """Mixed_6a: 35x35 => 17x17."""

    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3 = ConvBlock(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvBlock(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvBlock(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvBlock(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class Block17(nn.Module):
    """Mixed_6b to 6e, at 17x17: 7x7 convolutions as rows and columns, through `inner` channels."""

    def __init__(self, inputs: int, inner: int):
        super().__init__()
        self.branch1x1 = ConvBlock(inputs, 192, 1)
        self.branch7x7_1 = ConvBlock(inputs, inner, 1)
        self.branch7x7_2 = _row(inner, inner)
        self.branch7x7_3 = _column(inner, 192)
        self.branch7x7dbl_1 = ConvBlock(inputs, inner, 1)
        self.branch7x7dbl_2 = _column(inner, inner)
        self.branch7x7dbl_3 = _row(inner, inner)
        self.branch7x7dbl_4 = _column(inner, inner)
        self.branch7x7dbl_5 = _row(inner, 192)
        self.branch_pool = ConvBlock(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average_pool(x))], 1)


class Reduction8(nn.Module):
    """Mixed_7a: 17x17 => 8x8."""

    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3_1 = ConvBlock(inputs, 192, 1)
        self.branch3x3_2 = ConvBlock(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvBlock(inputs, 192, 1)
        self.branch7x7x3_2 = _row(192, 192)
        self.branch7x7x3_3 = _column(192, 192)
        self.branch7x7x3_4 = ConvBlock(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(seven), F.max_pool2d(x, 3, 2)], 1)


class Block8(nn.Module):
    """Mixed_7b and 7c, at 8x8: branches that end in a row and a column side by side; the last one pools by maximum."""

    def __init__(self, inputs: int, pool: Callable[[Tensor], Tensor]):
        super().__init__()
        self.branch1x1 = ConvBlock(inputs, 320, 1)
        self.branch3x3_1 = ConvBlock(inputs, 384, 1)
        self.branch3x3_2a = ConvBlock(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = ConvBlock(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = ConvBlock(inputs, 448, 1)
        self.branch3x3dbl_2 = ConvBlock(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvBlock(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = ConvBlock(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = ConvBlock(inputs, 192, 1)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *parts, self.branch_pool(self.pool(x))], 1)


def build_inception(tensors: Mapping[str, Tensor]) -> InceptionV3:
    """The network with weights under the published names, on the CPU.

    Raises:
        ArtifactError: a tensor is missing, left over, or of another shape.
    """
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ArtifactError("the file does not hold named tensors, as the weights of the FID Inception network do")
    with without_memory():
        network = InceptionV3()
    counters = {name: torch.tensor(0) for name in network.state_dict() if name.endswith("num_batches_tracked")}
    try:
        network.load_state_dict({**counters, **tensors}, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"these are not the weights of the FID Inception network: {reason[:300]}") from error
    return network.float().requires_grad_(False)


def load_inception(path: str | Path) -> InceptionV3:
    """The network with the weights in a .safetensors file, or in the published .pth file.

    Raises:
        ArtifactError: the file is missing, damaged, or holds something else.
    """
    read = read_tensors if Path(path).suffix == ".safetensors" else read_torch_file
    try:
        return build_inception(read(path))
    except ArtifactError as error:
        raise ArtifactError(f"cannot load the FID Inception network from {path}: {error}") from error


def default_weights() -> Path:
    """The place of the published weights once they are downloaded: in the cache folder of `torch.hub`."""
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_URL.rpartition("/")[2]


def download_weights() -> Path:
    """The published weights (91 MiB), downloaded from GitHub unless they are there already.

    Raises:
        ArtifactError: the network cannot be reached, or the file is not the published one.
    """
    file = default_weights()
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(WEIGHTS_URL, str(file), hash_prefix=WEIGHTS_HASH, progress=False)
        except (OSError, RuntimeError) as error:  # URLError is an OSError; RuntimeError: a wrong hash
            raise ArtifactError(
                f"cannot download the FID Inception weights: {error}. Download {WEIGHTS_URL} elsewhere and put "
                f"the file at {file}, or name it by --weights"
            ) from error
    elif not sha256_file(file).startswith(WEIGHTS_HASH):
        raise ArtifactError(
            f"{file} is not the published file (its SHA-256 does not start with {WEIGHTS_HASH}): delete it "
            "to download it again"
        )
    return file
