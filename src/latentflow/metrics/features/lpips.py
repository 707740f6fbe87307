"""LPIPS (arXiv 1801.03924, version 0.1, AlexNet): the perceptual distance of two images.

The weights are the published ones, in files that the user gives: those of torchvision's AlexNet
(alexnet-owt-7be5be79.pth) and the five layers of the LPIPS package (alex.pth), in one folder, or the state_dict of
`lpips.LPIPS(net="alex")` in one file.

Legend: B images, H and W height and width, C channels of a layer, h and w its size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentflow.artifacts import read_tensors, read_torch_file, sha256_tensors
from latentflow.errors import ArtifactError, DataError

_CONVOLUTIONS = {0: (3, 64, 11, 4, 2), 3: (64, 192, 5, 1, 2), 6: (192, 384, 3, 1, 1), 8: (384, 256, 3, 1, 1)}
_CONVOLUTIONS[10] = (256, 256, 3, 1, 1)
"""Number in torchvision's AlexNet => channels in and out, kernel, stride, padding."""

_POOLED = (3, 6)  # before these, the maximum over 3 x 3 is taken at every second pixel
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [-1, 1]
_LEAST_SIDE = 31  # smaller images vanish before the last layers


class Lpips(nn.Module):
    """The distance of pairs; 0 for equal images.

    Attributes:
        hash: SHA-256 over the weights, once they are loaded.
    """

    hash: str = ""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(i, o, kernel, stride, padding) for i, o, kernel, stride, padding in _CONVOLUTIONS.values()
        )
        self.weights = nn.ModuleList(nn.Conv2d(o, 1, 1, bias=False) for _, o, *_ in _CONVOLUTIONS.values())
        for name, values in (("shift", _SHIFT), ("scale", _SCALE)):  # not in the published weights
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor, real: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] twice, on any device => distances [B], float32, on that of the network.

        Raises:
            DataError: they are smaller than 31 pixels, or not of one size.
        """
        if images.shape != real.shape or min(images.shape[2:]) < _LEAST_SIDE:
            raise DataError(
                f"LPIPS of images of {list(images.shape)} and {list(real.shape)}: it needs pairs of one size, of at "
                f"least {_LEAST_SIDE} pixels a side"
            )
        images, real = images.to(self.shift.device), real.to(self.shift.device)
        distance = torch.zeros(len(images), device=images.device)
        pairs = zip(self._layers(images), self._layers(real), self.weights, strict=True)
        for one, other, weight in pairs:
            # sum over channels of w (a - b)^2, with a and b of unit length in every pixel; then the mean over pixels
            distance += weight((_unit(one) - _unit(other)).square()).mean((1, 2, 3))
        return distance

    def _layers(self, images: Tensor) -> list[Tensor]:
        x, layers = (images.float() / 127.5 - 1 - self.shift) / self.scale, []
        for number, convolution in zip(_CONVOLUTIONS, self.convolutions, strict=True):
            x = F.relu(convolution(F.max_pool2d(x, 3, 2) if number in _POOLED else x))
            layers.append(x)
        return layers


def load_lpips(path: str | Path, device: torch.device | str = "cpu") -> Lpips:
    """LPIPS with the published weights; see the head of this file for what `path` may be.

    Raises:
        ArtifactError: a file is missing, damaged or of another network; no code in it is run.
    """
    path = Path(path)
    files = sorted(path.glob("*.pth")) + sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    found: dict[str, Tensor] = {}
    for file in files:
        content = read_tensors(file) if file.suffix == ".safetensors" else read_torch_file(file)
        if isinstance(content, Mapping):
            found |= {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    network, state = Lpips(), {}
    for key, tensor in network.state_dict().items():
        room, index, part = key.split(".")
        number = list(_CONVOLUTIONS)[int(index)]
        pattern = rf"lin{index}\.model\.1\.weight"
        if room == "convolutions":
            pattern = rf"(features|net\.slice\d)\.{number}\.{part}"
        theirs = next((name for name in found if re.fullmatch(pattern, name)), None)
        if theirs is None or found[theirs].shape != tensor.shape:
            raise ArtifactError(
                f"{path} lacks {pattern.replace(chr(92), '')} of shape {list(tensor.shape)}: give a folder with "
                "alexnet-owt-7be5be79.pth of torchvision and alex.pth of the LPIPS package (weights/v0.1), or one file "
                "with the state_dict of lpips.LPIPS(net='alex')"
            )
        state[key] = found[theirs].float()
    network.load_state_dict(state)
    network.hash = sha256_tensors(state)
    return network.eval().requires_grad_(False).to(device)


def _unit(x: Tensor) -> Tensor:
    """Every pixel's channels divided by their length: [B, C, h, w] => [B, C, h, w]."""
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
