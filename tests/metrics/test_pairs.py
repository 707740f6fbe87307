"""Scores of pairs: SSIM, PSNR, P-IDS, U-IDS, intersection over union."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from latentflow.errors import ConfigError, DataError
from latentflow.metrics.pairs import confusion, discriminative_scores, iou, pair_order, psnr, ssim


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_pairs_are_made_by_name():
    assert pair_order(["0.png", "10.png", "2.png"], ["2.png", "0.png", "10.png"]) == [1, 2, 0]
    with pytest.raises(DataError, match=r"2 images have no partner.*b\.png"):
        pair_order(["a.png", "b.png"], ["a.png", "c.png"])
    with pytest.raises(DataError, match=r"two images are called a\.png"):
        pair_order(["a.png"], ["a.png", "a.png"])


def test_psnr_is_that_of_torchmetrics(shapes):
    functional = pytest.importorskip("torchmetrics.functional.image")
    first, second = shapes[:4], shapes[4:8]
    options = {"data_range": 255.0, "reduction": "none", "dim": (1, 2, 3)}
    expected = functional.peak_signal_noise_ratio(first.double(), second.double(), **options)
    torch.testing.assert_close(psnr(first, second), expected)


def test_pairs_are_measured_where_they_lie(shapes):
    pytest.importorskip("torchmetrics")
    there = shapes[:2].to("meta")
    assert [found(there, there).device.type for found in (psnr, ssim)] == ["meta", "meta"]


def test_ssim_by_its_definition(shapes):
    """Images of a window's size have one window."""
    pytest.importorskip("torchmetrics")
    first, second = shapes[:3, :, 8:19, 8:19], shapes[3:6, :, 8:19, 8:19]
    steps = torch.arange(-5, 6, dtype=torch.float64)
    line = torch.exp(-(steps**2) / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2

    def mean(x):
        return (x * window).sum((2, 3))

    x, y = first.double(), second.double()
    mean_x, mean_y = mean(x), mean(y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    spread = mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2
    structure = (2 * (mean(x * y) - mean_x * mean_y) + c2) / (spread + c2)
    torch.testing.assert_close(ssim(first, second), (luminance * structure).mean(1))


def test_ssim_of_equal_images_and_of_one(shapes):
    pytest.importorskip("torchmetrics")
    torch.testing.assert_close(ssim(shapes[:3], shapes[:3]), torch.ones(3, dtype=torch.float64))
    noisy = (shapes[:3].float() + 40 * normal(3, 3, 32, 32)).clamp(0, 255).to(torch.uint8)
    assert ssim(shapes[:3], noisy).max() < 0.9
    assert ssim(shapes[:1], noisy[:1]).shape == (1,)
    with pytest.raises(DataError, match="11 pixels"):
        ssim(shapes[..., :10], shapes[..., :10])
    with pytest.raises(DataError, match="not pairs"):
        ssim(shapes[:2], shapes[:3])


def test_discriminative_scores_of_sets_that_a_line_parts():
    pytest.importorskip("sklearn")
    real = normal(200, 3)
    apart = discriminative_scores(real + 20, real)
    assert (apart.p_ids, apart.u_ids) == (0, 0)
    alike = discriminative_scores(normal(200, 3, seed=1), real)
    assert 0.4 < alike.u_ids <= 0.5
    assert 0.35 < alike.p_ids < 0.65


def test_discriminative_scores_by_hand():
    """On a line the classifier is a threshold between the two sets' middles; the larger is the more real."""
    pytest.importorskip("sklearn")
    real = torch.tensor([[4.0], [5.0], [6.0], [-1.0]])
    generated = torch.tensor([[-4.0], [-5.0], [-6.0], [1.0]])
    found = discriminative_scores(generated, real)
    assert found.p_ids == 0.25  # the last pair only
    assert found.u_ids == 0.25  # two images of eight


def test_pairs_decide_the_paired_score_only():
    pytest.importorskip("sklearn")
    real, generated = normal(100, 3), 0.3 * normal(100, 3, seed=1) + 0.5
    found = discriminative_scores(generated, real)
    turned = discriminative_scores(generated.flip(0), real)
    assert found.u_ids == turned.u_ids
    assert found.p_ids != turned.p_ids


def test_discriminative_scores_refuse():
    pytest.importorskip("sklearn")
    with pytest.raises(DataError, match="5 generated and 6 real"):
        discriminative_scores(normal(5, 3), normal(6, 3))
    with pytest.raises(DataError, match="5 of 5 real"):
        discriminative_scores(normal(5, 3), normal(5, 3) / 0)


def test_missing_libraries_are_named(monkeypatch, shapes):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    with pytest.raises(ConfigError, match=r"torchmetrics library: pip install 'latentflow\[eval\]'"):
        ssim(shapes[:1], shapes[:1])
    with pytest.raises(ConfigError, match="scikit-learn library"):
        discriminative_scores(normal(5, 3), normal(5, 3))


def test_intersection_over_union_by_hand():
    true = torch.tensor([[0, 0, 1], [1, 2, 255]])
    predicted = torch.tensor([[0, 1, 1], [1, 0, 7]])  # 7 is no class, where nothing is known
    counts = confusion(predicted, true, 4)
    assert counts.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    found = iou(counts)
    assert found.per_class == (1 / 3, 2 / 3, 0, None)
    assert found.mean == pytest.approx(1 / 3)


def test_intersection_over_union_is_that_of_torchmetrics_and_adds_up():
    jaccard = pytest.importorskip("torchmetrics.functional.classification").multiclass_jaccard_index
    generator = torch.Generator().manual_seed(0)
    true, predicted = (torch.randint(0, 5, (6, 8, 8), generator=generator) for _ in range(2))
    true[:, :2] = 255
    whole = iou(confusion(predicted, true, 5))
    parts = confusion(predicted[:2], true[:2], 5) + confusion(predicted[2:], true[2:], 5)
    assert iou(parts) == whole
    assert whole.mean == pytest.approx(jaccard(predicted, true, 5, ignore_index=255).item(), rel=1e-6)


def test_maps_that_do_not_fit():
    maps = torch.zeros(2, 4, dtype=torch.uint8)
    with pytest.raises(DataError, match="class 9; there are 3"):
        confusion(maps + 9, maps, 3)
    with pytest.raises(DataError, match="not pairs"):
        confusion(maps, maps[:1], 3)
    with pytest.raises(DataError, match="no labelled pixel"):
        iou(confusion(maps, maps + 255, 3))


def test_perfect_maps():
    maps = torch.arange(9).reshape(3, 3) % 3
    found = iou(confusion(maps, maps, 3))
    assert found.mean == 1 and math.fsum(found.per_class) == 3
