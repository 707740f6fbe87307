"""Confidence intervals of scores, from the spread over images or by the bootstrap.

Legend: N images, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from latentflow.errors import ConfigError
from latentflow.metrics.scores import Resampled

_FOR_TAILS = 100  # resamples; fewer do not determine the tails that bounds are read from
_AT_A_TIME = 20  # resamples scored together; bounds the memory of their counts


@dataclass(frozen=True)
class Interval:
    """A score, and its uncertainty over the choice of the images.

    Attributes:
        estimate: the score of the images themselves.
        low, high: bounds of the interval.
        standard_error: standard deviation of the resampled scores.
        level: the share of such intervals that contain the score's expectation at this number of images.
        num_resamples: R; 0: none were drawn.
    """

    estimate: float
    low: float
    high: float
    standard_error: float
    level: float
    num_resamples: int


def interval_over_images(contributions: Tensor, estimate: float, *, level: float = 0.95) -> Interval:
    """The interval of a score from the contributions of N independent images: the delta method.

    To first order every score is a mean of contributions, and its standard error is that of this mean. For scores that
    are smallest for equal sets, FID and KID, the interval is conservative there: the variance of N contributions holds
    twice the second-order term, and that of a bootstrap three times.

    Args:
        contributions: [N] derivatives of the score with respect to the weight of each image, times N; their mean does
            not matter.
        estimate: the score.
        level: strictly between 0 and 1.
    """
    error = float(contributions.double().std()) / len(contributions) ** 0.5 if len(contributions) > 1 else 0.0
    reach = NormalDist().inv_cdf((1 + level) / 2) * error
    return Interval(estimate, estimate - reach, estimate + reach, error, level, 0)


def bootstrap(
    scores: Resampled,
    n: int,
    *,
    estimate: float | None = None,
    num: int = 200,
    level: float = 0.95,
    seed: int = 0,
    on_images: Callable[[int], None] = lambda num_images: None,
) -> Interval:
    """The interval of a score over resamples of its N images, each of N draws with replacement.

    Duplicates bias distances such as FID upward, by about as much as the finite number of images does already. The
    resampled scores therefore give the width only, and are shifted so that their mean is the estimate. With fewer than
    100 resamples the bounds are standard errors times Student's factor instead of quantiles.

    Args:
        scores: scores of [R, N] counts; see `resampled_frechet`, `resampled_kernel`, `resampled_inception_score` and
            `Neighbours.resampled`.
        n: N.
        estimate: the score itself; None: it is computed from counts of 1.
        num: R; 100 are enough for the standard error, 1000 for the bounds' second digit.
        level: strictly between 0 and 1.
        seed: of the draws; the same on every device.
        on_images: called with N for each resample, several at a time.

    Raises:
        ConfigError: `num` or `level` are out of range.
    """
    if num < 2 or not 0 < level < 1:
        raise ConfigError(f"{num} resamples at level {level}; take 2 or more, and a level between 0 and 1 such as 0.95")
    if estimate is None:
        estimate = float(scores(torch.ones(1, n, dtype=torch.float64)))
    generator = torch.Generator().manual_seed(seed)
    parts = [min(_AT_A_TIME, num - start) for start in range(0, num, _AT_A_TIME)]
    values = torch.zeros(0, dtype=torch.float64)
    for size in parts:
        values = torch.cat([values, scores(draw_counts(n, size, generator)).double().cpu()])
        on_images(size * n)
    if num < _FOR_TAILS:
        reach = _student((1 + level) / 2, num - 1) * float(values.std())
        return Interval(estimate, estimate - reach, estimate + reach, float(values.std()), level, num)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = (torch.quantile(values, tails) - values.mean() + estimate).tolist()
    return Interval(estimate, low, high, float(values.std()), level, num)


def _student(probability: float, freedom: int) -> float:
    """The quantile of Student's distribution; exact for 1 and 2 degrees of freedom, to 1 % at 95 % beyond.

    Abramowitz and Stegun 26.7.5.
    """
    if freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom == 2:
        return (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom ** (n + 1) for n, term in enumerate(terms))


def draw_counts(n: int, num: int, generator: torch.Generator) -> Tensor:
    """How often each of N images comes up in N draws with replacement: [num, N] float64, each row of sum N."""
    draws = torch.randint(n, (num, n), generator=generator)
    return torch.zeros(num, n, dtype=torch.float64).scatter_add_(1, draws, torch.ones(num, n, dtype=torch.float64))
