"""What `latentflow sweep` decides by: which settings are candidates, which are worth more images, which to take.

Everything here is arithmetic on small records; nothing is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from latentflow.errors import ConfigError
from latentflow.flow.solvers import SOLVERS, RungeKutta, is_adaptive

Candidate = dict[str, Any]
"""What a candidate changes in a model's preset: fields of `SamplingPreset`."""

SIGMAS = 2.0
"""A difference of two distances counts where it is larger than so many of its standard errors."""
_LEAST_IMAGES, _LAST_CANDIDATES = 32, 4  # of the first round; of the last one, about


@dataclass(frozen=True)
class Point:
    """A candidate as it was measured in a round.

    Attributes:
        name: see `candidate_name`.
        evaluations: mean network calls per image, the cost.
        distance: to the reference; less is better.
        resamples: the distance for some resamples of the images, the same ones for every candidate of the round: what
            two candidates owe to the same images is not taken for a difference between them.
    """

    name: str
    evaluations: float
    distance: float
    resamples: tuple[float, ...] = ()

    @property
    def standard_error(self) -> float:
        """Of the distance; 0 without resamples."""
        return _deviation(self.resamples)

    def worse_by(self, other: Point) -> tuple[float, float]:
        """How much larger this distance is than the other one, and the standard error of this difference."""
        pairs = zip(self.resamples, other.resamples, strict=True)
        return self.distance - other.distance, _deviation([own - others for own, others in pairs])

    def surely_worse_than(self, other: Point) -> bool:
        """Whether the difference is more than chance in the choice of the images makes."""
        gap, standard_error = self.worse_by(other)
        return gap > SIGMAS * standard_error


def combinations(
    *,
    solvers: Sequence[str],
    steps: Sequence[int],
    tolerances: Sequence[float],
    guidances: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    shifts: Sequence[float],
) -> dict[str, Candidate]:
    """Every combination that differs from the others in what it draws, by name, the cheap ones of a kind first.

    Adaptive solvers take tolerances (rtol = atol) instead of steps and shifts, one step knows no shift, and guidance
    of 1 no interval.

    Raises:
        ConfigError: an unknown solver, steps, tolerances or shifts that are not above 0, or no candidate at all.
    """
    for what, values in (("steps", steps), ("tolerance", tolerances), ("shift", shifts)):
        if wrong := [value for value in values if not 0 < value < math.inf]:
            raise ConfigError(f"{what} {wrong[0]:g} must be above 0")
    made: list[Candidate] = []
    for solver, guidance in product(solvers, guidances):
        if is_adaptive(solver):
            paces = [{"rtol": tolerance, "atol": tolerance} for tolerance in tolerances]
        else:
            paces = [{"steps": n, "shift": s if n > 1 else 1.0} for n, s in product(steps, shifts)]
        for interval, pace in product(intervals if guidance != 1 else [(0.0, 1.0)], paces):
            made.append({"solver": solver, "guidance": guidance, "guidance_interval": interval, **pace})
    if not made:
        raise ConfigError(
            "no candidates to compare: give at least one solver, guidance scale, interval and shift, "
            "and steps or, for an adaptive solver, tolerances"
        )
    return {candidate_name(one): one for one in sorted(made, key=_expected_cost)}


def candidate_name(candidate: Candidate) -> str:
    """What sets a candidate apart, fit for a file name: heun-8_g1.5_i0.1-0.8_s2, or dopri5-0.001."""
    pace = candidate.get("steps", candidate.get("rtol"))
    parts = [f"{candidate['solver']}-{pace:g}"]
    if candidate["guidance"] != 1:
        parts.append(f"g{candidate['guidance']:g}")
        if candidate["guidance_interval"] != (0.0, 1.0):
            parts.append("i{:g}-{:g}".format(*candidate["guidance_interval"]))
    if candidate.get("shift", 1) != 1:
        parts.append(f"s{candidate['shift']:g}")
    return "_".join(parts)


def _expected_cost(candidate: Candidate) -> float:
    """Network calls per image, roughly: an adaptive solver's are guessed, as are the times at which guidance acts."""
    method = SOLVERS[candidate["solver"]]
    stages = len(method.nodes) if isinstance(method, RungeKutta) else 1
    steps = candidate.get("steps", 0) or 4 * candidate["rtol"] ** (-1 / method.order)
    return stages * steps * (1 if candidate["guidance"] == 1 else 2)


def round_sizes(num: int, num_candidates: int) -> list[int]:
    """Images per candidate in each round of successive halving; twice as many each time, `num` in the last one.

    There are as many rounds as leave about four candidates for the last one, but no round of fewer than 32 images.
    """
    by_candidates = math.log2(max(num_candidates / _LAST_CANDIDATES, 1))
    by_images = math.log2(max(num / _LEAST_IMAGES, 1))
    halvings = int(min(by_candidates, by_images))
    return [-(-num // 2**n) for n in range(halvings, -1, -1)]


def worth_keeping(points: Sequence[Point], keep: int) -> list[Point]:
    """The `keep` candidates that tell most about quality against cost, by rising cost.

    The one that would be missed least is dropped, over and over: the one whose distance is improved upon most, or
    improves least, by the best of those that cost no more. The best of all stays, and so does the cheapest where
    there is room for two.
    """
    kept = sorted(points, key=_by_cost)
    while len(kept) > max(keep, 1):
        best = min(kept, key=_by_distance)
        missed = _missed(kept)
        kept.remove(min((p for p in kept if p is not best), key=lambda p: missed[p.name]))
    return kept


def affordable(
    points: Sequence[Point], keep: int, seconds_left: float, seconds: Callable[[Point], float]
) -> list[Point]:
    """The most candidates worth keeping, up to `keep`, that can all be measured in `seconds_left`; maybe none.

    Fewer than two (or than there are) answer no question and are not worth a round.
    """
    for number in range(min(keep, len(points)), min(2, len(points)) - 1, -1):
        kept = worth_keeping(points, number)
        if sum(map(seconds, kept)) <= seconds_left:
            return kept
    return []


def marks(points: Sequence[Point]) -> dict[str, str]:
    """Where each candidate stands: "front", "undecided" or "beaten".

    Going up in cost, a candidate is on the Pareto front where it is surely better than everything on the front that
    costs no more; so noise puts nothing there. It is beaten where something that costs no more is surely better.
    """
    ordered = sorted(points, key=_by_cost)
    front: list[Point] = []
    marked = {}
    for number, point in enumerate(ordered):
        if all(cheaper.surely_worse_than(point) for cheaper in front):
            front.append(point)
            marked[point.name] = "front"
        else:
            beaten = any(point.surely_worse_than(cheaper) for cheaper in ordered[:number])
            marked[point.name] = "beaten" if beaten else "undecided"
    return marked


def knee(points: Sequence[Point], margin: float) -> Point:
    """The cheapest candidate that is as good as the best one, as far as can be told or as it matters.

    One that measured worse than something that costs no more is not taken, however little is known of it.

    Args:
        margin: a difference that does not matter, as a share of the best distance.
    """
    best = min(points, key=_by_distance)
    least = math.inf
    for point in sorted(points, key=_by_cost):
        as_good = point.distance - best.distance <= margin * best.distance or not point.surely_worse_than(best)
        if as_good and point.distance < least:
            return point
        least = min(least, point.distance)
    return best


def _missed(ordered: Sequence[Point]) -> dict[str, float]:
    """By how much each is better than the best of those before it, as a share of its own distance."""
    missed, best = {}, math.inf
    for point in ordered:
        missed[point.name] = math.inf if math.isinf(best) else (best - point.distance) / max(point.distance, 1e-12)
        best = min(best, point.distance)
    return missed


def _by_cost(point: Point) -> tuple[float, float, str]:
    return point.evaluations, point.distance, point.name


def _by_distance(point: Point) -> tuple[float, float, str]:
    return point.distance, point.evaluations, point.name


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
