"""Images that are painted over real ones: what is measured in the hole."""

from __future__ import annotations

import numpy as np
import torch

from latentflow.evaluation.painted import hole_values
from latentflow.metrics.pairs import PairJudge


def test_values_in_the_hole_are_those_of_the_whole_where_all_is_hole():
    generator = torch.Generator().manual_seed(0)
    filled, real = torch.randint(0, 256, (2, 3, 3, 16, 16), generator=generator, dtype=torch.uint8)
    values = hole_values(filled, real, [np.ones((16, 16), np.uint8)] * 3, judge=PairJudge(with_ssim=True))
    torch.testing.assert_close(values["psnr-hole"], values["psnr"])
    torch.testing.assert_close(values["ssim-hole"], values["ssim"])
    corner = np.zeros((16, 16), np.uint8)
    corner[0, 0] = 1
    filled = torch.where(torch.from_numpy(corner) > 0, filled, real)
    values = hole_values(filled, real, [corner] * 3, judge=PairJudge(with_ssim=True))
    torch.testing.assert_close(1 - values["ssim-hole"], 36 * (1 - values["ssim"]))  # one of 6 x 6 windows
