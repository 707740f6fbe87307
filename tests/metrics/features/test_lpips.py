"""LPIPS: the formula written out, both layouts of its weights, and files that are not it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from latentflow.errors import ArtifactError, DataError
from latentflow.metrics.features.lpips import Lpips, load_lpips
from latentflow.metrics.pairs import PairJudge

LAYERS = {0: (64, 3, 11, 4, 2), 3: (192, 64, 5, 1, 2), 6: (384, 192, 3, 1, 1), 8: (256, 384, 3, 1, 1)}
LAYERS[10] = (256, 256, 3, 1, 1)
SLICES = {0: 1, 3: 2, 6: 3, 8: 4, 10: 5}


def published(seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Random weights under the names of torchvision's AlexNet and of the LPIPS package."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator) * (2 / max(1, torch.Size(shape[1:]).numel())) ** 0.5

    alexnet, linear = {"classifier.6.bias": torch.zeros(10)}, {}
    for index, (number, (out, inner, kernel, *_)) in enumerate(LAYERS.items()):
        alexnet[f"features.{number}.weight"] = draw(out, inner, kernel, kernel)
        alexnet[f"features.{number}.bias"] = 0.1 * draw(out)
        linear[f"lin{index}.model.1.weight"] = torch.rand(1, out, 1, 1, generator=generator)
    return alexnet, linear


@pytest.fixture
def folder(tmp_path):
    alexnet, linear = published()
    torch.save(alexnet, tmp_path / "alexnet-owt-7be5be79.pth")
    torch.save(linear, tmp_path / "alex.pth", _use_new_zipfile_serialization=False)
    return tmp_path


def pair(side: int = 48):
    generator = torch.Generator().manual_seed(1)
    return (torch.randint(0, 256, (2, 3, side, side), generator=generator).to(torch.uint8) for _ in range(2))


def by_hand(images: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    alexnet, linear = published()
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    total = torch.zeros(len(images))
    tensors = [((x / 255 * 2 - 1).permute(0, 2, 3, 1) - shift).div(scale).permute(0, 3, 1, 2) for x in (images, real)]
    for index, (number, (*_, stride, padding)) in enumerate(LAYERS.items()):
        if number in (3, 6):
            tensors = [F.max_pool2d(x, 3, 2) for x in tensors]
        weight, bias = alexnet[f"features.{number}.weight"], alexnet[f"features.{number}.bias"]
        tensors = [F.conv2d(x, weight, bias, stride, padding).clamp(min=0) for x in tensors]
        a, b = (x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for x in tensors)
        total += ((a - b) ** 2 * linear[f"lin{index}.model.1.weight"].view(1, -1, 1, 1)).sum(1).mean((1, 2))
    return total


def test_formula(folder):
    images, real = pair()
    lpips = load_lpips(folder)
    torch.testing.assert_close(lpips(images, real), by_hand(images, real), rtol=1e-5, atol=1e-6)
    assert torch.equal(lpips(real, real), torch.zeros(2))
    torch.testing.assert_close(lpips(images[1:], real[1:]), lpips(images, real)[1:])


def test_one_file_with_the_names_of_the_package(folder, tmp_path):
    alexnet, linear = published()
    sliced = {f"net.slice{SLICES[int(k.split('.')[1])]}.{k[9:]}": v for k, v in alexnet.items() if k[0] == "f"}
    torch.save({**sliced, **linear, "scaling_layer.shift": torch.zeros(1, 3, 1, 1)}, tmp_path / "whole.pth")
    whole = load_lpips(tmp_path / "whole.pth")
    assert whole.hash == load_lpips(folder).hash
    assert PairJudge(lpips=whole).key != PairJudge().key


def test_judge_measures_what_it_is_asked(folder):
    images, real = pair()
    assert PairJudge()(images, real).keys() == {"psnr"}
    values = PairJudge(with_ssim=True, lpips=load_lpips(folder))(images, real)
    assert values.keys() == {"psnr", "ssim", "lpips"}
    torch.testing.assert_close(values["lpips"], by_hand(images, real), rtol=1e-5, atol=1e-6)


def test_images_are_moved_to_the_network():
    """The device "meta" computes no numbers, and shows where they would be computed."""
    images, real = pair()
    assert Lpips().to("meta")(images, real).device.type == "meta"


def test_what_it_refuses(folder, tmp_path):
    (folder / "alex.pth").unlink()
    with pytest.raises(ArtifactError, match=r"lacks lin0\.model\.1\.weight of shape"):
        load_lpips(folder)
    with pytest.raises(ArtifactError, match="does not exist"):
        load_lpips(tmp_path / "nothing.pth")
    alexnet, linear = published()
    torch.save({**alexnet, **linear}, tmp_path / "whole.pth")
    small = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(DataError, match="at least 31 pixels"):
        load_lpips(tmp_path / "whole.pth")(small, small)
