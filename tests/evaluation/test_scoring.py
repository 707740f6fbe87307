"""Scores from the numbers of images."""

from __future__ import annotations

import pytest
import torch

from latentflow.evaluation.scoring import mean_score


def test_mean_score():
    score = mean_score("PSNR", torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert score.value == 3
    assert score.standard_error == pytest.approx((14 / 3 / 4) ** 0.5)
    assert score.high - score.value == pytest.approx(1.96 * score.standard_error, rel=1e-4)
    assert mean_score("PSNR", torch.tensor([4.0])).standard_error == 0
