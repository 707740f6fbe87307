"""The rules of a sweep: which settings are candidates, which are worth more images, and which one is the best.

Everything here is arithmetic on small records; nothing is drawn.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import NormalDist
from typing import Any

import numpy as np

from latentflow.errors import ConfigError
from latentflow.flow.solvers import JUMPS, SOLVERS, RungeKutta, fitted_evaluations, is_adaptive
from latentflow.model.guide_reference import NO_GUIDE

Candidate = dict[str, Any]
"""The fields of `SamplingPreset` that a candidate changes in a model's preset."""

SIGMAS = 2.0
"""In the marks, a difference of two distances counts if it exceeds this many of its standard errors."""
CONFIDENCE = 0.95
"""The share of sweeps whose best preset, if one is named, is not worse by more than the margins."""
ACCURACY_MARGIN = 0.02
"""Differences of class accuracy below this share of the images are ties."""
LEAST_TO_DECIDE = 100
"""With fewer images each no preset is named: their standard errors are too uncertain."""
_TESTS = 4  # kinds of tests that may fail when a preset is named; see `images_needed`
_LEAST_IMAGES, _LAST_CANDIDATES = 32, 4  # of the first round; of the last one, about


@dataclass(frozen=True)
class Gap:
    """The difference of two candidates that drew the same seeds, or of a candidate and real images.

    Attributes:
        estimate: positive if the first one is worse.
        standard_error: of the difference itself, in which the noise of common seeds cancels.
    """

    estimate: float
    standard_error: float

    def share_needed(self, margin: float, z: float) -> float:
        """How many times as many images would show that the first is worse by at most `margin` if the estimate holds.

        At most 1: it is shown already. Infinite: no number of images would.
        """
        return _share_needed(margin - self.estimate, z * self.standard_error)

    def share_needed_to_refute(self, margin: float, z: float) -> float:
        """The same for showing that the first is worse by more than `margin`."""
        return _share_needed(self.estimate - margin, z * self.standard_error)


def _share_needed(room: float, reach: float) -> float:
    if reach <= room:
        return (reach / room) ** 2 if room else 0.0
    return (reach / room) ** 2 if room > 0 else math.inf


@dataclass(frozen=True)
class Ceiling:
    """The accuracy of the class judge on held-out real images.

    Attributes:
        accuracy: share that is judged right.
        num: number of images.
    """

    accuracy: float
    num: int


@dataclass(frozen=True)
class Point:
    """A candidate as it was measured in a round.

    Attributes:
        name: see `candidate_name`.
        evaluations: mean network calls per image, the cost.
        distance: to the reference; less is better.
        resamples: the distance for some resamples of the images, the same ones for every candidate of the round, so
            that their common noise cancels in differences.
        right: of each image, whether it is judged to show its class; empty if classes are not judged.
    """

    name: str
    evaluations: float
    distance: float
    resamples: tuple[float, ...] = ()
    right: tuple[bool, ...] = ()

    @property
    def accuracy(self) -> float | None:
        """The share of images judged right; None if classes are not judged."""
        return sum(self.right) / len(self.right) if self.right else None

    @property
    def standard_error(self) -> float:
        """Of the distance; 0 without resamples."""
        return _deviation(self.resamples)

    def worse_by(self, other: Point) -> Gap:
        """How much larger this distance is than the other one."""
        pairs = zip(self.resamples, other.resamples, strict=True)
        return Gap(self.distance - other.distance, _deviation([own - others for own, others in pairs]))

    def less_accurate_by(self, other: Point) -> Gap:
        """How much lower the accuracy is than the other one, over the same images.

        The standard error of paired proportions has half an image added to each of the four cells of right and wrong,
        so that a few images without a difference do not count as certainty; Agresti and Min (2005).
        """
        pairs = list(zip(self.right, other.right, strict=True))
        lost, won = sum(o and not s for s, o in pairs), sum(s and not o for s, o in pairs)
        n = len(pairs) + 2
        error = math.sqrt(lost + won + 1 - (lost - won) ** 2 / n) / n
        return Gap((lost - won) / len(pairs), error)

    def less_accurate_than_real(self, ceiling: Ceiling) -> Gap:
        """How much lower the accuracy is than that of real images; two images are added to each (Agresti, Caffo)."""
        rows = ((sum(self.right), len(self.right)), (ceiling.accuracy * ceiling.num, ceiling.num))
        variances = [(p := (right + 1) / (n + 2)) * (1 - p) / (n + 2) for right, n in rows]
        return Gap(ceiling.accuracy - sum(self.right) / len(self.right), math.sqrt(sum(variances)))

    def surely_worse_than(self, other: Point) -> bool:
        """Whether the difference of distances is larger than the choice of the images explains."""
        gap = self.worse_by(other)
        return gap.estimate > SIGMAS * gap.standard_error


def combinations(
    *,
    solvers: Sequence[str],
    steps: Sequence[int],
    tolerances: Sequence[float],
    guidances: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    shifts: Sequence[float],
    guides: Sequence[str] = (),
) -> dict[str, Candidate]:
    """Every combination that draws different images, by name, the cheapest first.

    Adaptive solvers take tolerances (rtol = atol) instead of steps and shifts, and fitted ones their own times; a shift
    has no effect on one step, nor an interval or a guide on guidance 1.

    Args:
        guides: names of models, or `NO_GUIDE`; none: candidates have the guide of the preset.

    Raises:
        ConfigError: an unknown solver, steps, tolerances or shifts that are not above 0, or no candidate at all.
    """
    for what, values in (("steps", steps), ("tolerance", tolerances), ("shift", shifts)):
        if wrong := [value for value in values if not 0 < value < math.inf]:
            raise ConfigError(f"{what} {wrong[0]:g} must be above 0")
    made: list[Candidate] = []
    for solver, guidance in product(solvers, guidances):
        if (number := fitted_evaluations(solver)) is not None:
            paces = [{"steps": number}]
        elif is_adaptive(solver):
            paces = [{"rtol": tolerance, "atol": tolerance} for tolerance in tolerances]
        else:
            paces = [{"steps": n, "shift": s if n > 1 else 1.0} for n, s in product(steps, shifts)]
        hows = [{"guidance": 1.0, "guidance_interval": (0.0, 1.0)}]
        if guidance != 1:
            names = [{"guide": {"model": name, "weights": ""}} for name in guides] or [{}]
            hows = [{"guidance": guidance, "guidance_interval": i, **name} for i, name in product(intervals, names)]
        made += [{"solver": solver, **how, **pace} for how, pace in product(hows, paces)]
    if not made:
        raise ConfigError(
            "no candidates to compare: give at least one solver, guidance scale, interval and shift, "
            "and steps or, for an adaptive solver, tolerances"
        )
    return {candidate_name(one): one for one in sorted(made, key=_expected_cost)}


def candidate_name(candidate: Candidate) -> str:
    """The name of a candidate, valid as a file name: heun-8_g1.5_i0.1-0.8_s2, dopri5-0.001, or heun-8_g2_by-1-8."""
    pace = candidate.get("steps", candidate.get("rtol"))
    is_fitted = fitted_evaluations(candidate["solver"]) is not None
    parts = [candidate["solver"] if is_fitted else f"{candidate['solver']}-{pace:g}"]
    if candidate["guidance"] != 1:
        parts.append(f"g{candidate['guidance']:g}")
        if candidate["guidance_interval"] != (0.0, 1.0):
            parts.append("i{:g}-{:g}".format(*candidate["guidance_interval"]))
        if (guide := candidate.get("guide", {}).get("model", NO_GUIDE)) != NO_GUIDE:
            parts.append(f"by-{_short(guide)}")
    if candidate.get("shift", 1) != 1:
        parts.append(f"s{candidate['shift']:g}")
    return "_".join(parts)


def _short(guide: str) -> str:
    """A guide in a file name: "1-8" of the own run, otherwise the end of its name and some digits of a hash."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", guide.rpartition("/")[2] if guide[0] != "@" else guide).strip("-.")
    return name if guide[0] == "@" else f"{name[-40:]}-{hashlib.sha256(guide.encode()).hexdigest()[:6]}"


def _expected_cost(candidate: Candidate) -> float:
    """Network calls per image, roughly: those of an adaptive solver and of a guidance interval are estimated."""
    method = SOLVERS.get(candidate["solver"])  # none: it is fitted or jumps, one call per step
    stages = len(method.nodes) if isinstance(method, RungeKutta) else 1
    steps = candidate.get("steps", 0) or 4 * candidate["rtol"] ** (-1 / method.order)
    return stages * steps * (1 if candidate["guidance"] == 1 or candidate["solver"] == JUMPS else 2)


def round_sizes(num: int, num_candidates: int) -> list[int]:
    """Images per candidate in each round of successive halving; twice as many each time, `num` in the last one.

    There are as many rounds as leave about four candidates for the last one, but no round of fewer than 32 images.
    """
    by_candidates = math.log2(max(num_candidates / _LAST_CANDIDATES, 1))
    by_images = math.log2(max(num / _LEAST_IMAGES, 1))
    halvings = int(min(by_candidates, by_images))
    return [-(-num // 2**n) for n in range(halvings, -1, -1)]


def with_more(sizes: Sequence[int], num: int) -> list[int]:
    """The rounds of a sweep that goes on to `num` images: twice as many each time after the last of `sizes`."""
    more = list(sizes)
    while more[-1] < num:
        more.append(min(2 * more[-1], num))
    return more


def worth_keeping(points: Sequence[Point], keep: int) -> list[Point]:
    """The `keep` most informative candidates about quality against cost, by rising cost.

    The least informative candidate is dropped, again and again: the one that improves least in distance and in share of
    wrong images over the best of those that cost no more, or is improved upon most. The best in either stays as long as
    there is room, the best distance to the last, and so does the cheapest.
    """
    kept = sorted(points, key=_by_cost)
    while len(kept) > max(keep, 1):
        stay = {min(kept, key=_by_distance).name}
        if len(kept) > 2:
            stay.add(min(kept, key=lambda p: (_wrong(p), *_by_cost(p))).name)
        missed = _missed(kept)
        kept.remove(min((p for p in kept if p.name not in stay), key=lambda p: missed[p.name]))
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

    Going up in cost, a candidate is on the Pareto front if it is surely better than everything on the front that
    costs no more; so noise puts nothing there. It is beaten if something that costs no more is surely better.
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


def images_needed(points: Sequence[Point], num: int, margin: float, ceiling: Ceiling | None = None) -> dict[str, float]:
    """How many images each would show, if the estimates are right, that a candidate is as good as any other.

    It must not be less accurate than any other by more than `ACCURACY_MARGIN`, or reach real images as nearly; and
    its distance must not be larger than that of any other by more than `margin` of it, except of others that are
    surely less accurate than some candidate and than real images by more than `ACCURACY_MARGIN`: a low distance does
    not make up for pictures of the wrong class. Candidates with at most `num` here are as good as the best.

    Each test is one-sided, of paired differences over the same seeds, at a level that leaves `CONFIDENCE` for all
    candidates together (Bonferroni); that a candidate passes against every other needs no further correction.

    Args:
        num: images of each candidate.
        margin: of distances, as a share of the other's.
        ceiling: None if classes are not judged.

    Returns:
        By name; infinite where no number of images would.
    """
    z = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / (_TESTS * len(points)))

    def as_accurate(point: Point, other: Point) -> float:
        return min(
            point.less_accurate_by(other).share_needed(ACCURACY_MARGIN, z),
            point.less_accurate_than_real(ceiling).share_needed(ACCURACY_MARGIN, z),
        )

    def no_rival(point: Point) -> float:
        to_some = (
            point.less_accurate_by(o).share_needed_to_refute(ACCURACY_MARGIN, z) for o in points if o is not point
        )
        return max(min(to_some), point.less_accurate_than_real(ceiling).share_needed_to_refute(ACCURACY_MARGIN, z))

    out_of_account = {point.name: no_rival(point) if ceiling and len(points) > 1 else math.inf for point in points}

    def against(point: Point, other: Point) -> float:
        as_near = point.worse_by(other).share_needed(margin * max(other.distance, 0.0), z)
        as_near = min(as_near, out_of_account[other.name])
        return max(as_accurate(point, other), as_near) if ceiling else as_near

    shares = {point.name: max((against(point, o) for o in points if o is not point), default=0.0) for point in points}
    least = LEAST_TO_DECIDE if len(points) > 1 else 0
    return {name: max(num * share, least) for name, share in shares.items()}


def cheapest_as_good(points: Sequence[Point], num: int, needed: dict[str, float]) -> str | None:
    """The cheapest candidate that `num` images show to be as good as any other; None: there is none."""
    return next((p.name for p in sorted(points, key=_by_cost) if needed[p.name] <= num), None)


def _missed(ordered: Sequence[Point]) -> dict[str, float]:
    """The improvement of each over the best of those before it, as a share of its own distance or wrong images."""
    missed, distance, wrong = {}, math.inf, math.inf
    for point in ordered:
        gains = [(distance - point.distance) / max(point.distance, 1e-12)]
        if point.right:
            gains.append((wrong - _wrong(point)) / max(_wrong(point), 1 / len(point.right)))
        missed[point.name] = max(gains)
        distance, wrong = min(distance, point.distance), min(wrong, _wrong(point))
    return missed


def _wrong(point: Point) -> float:
    """The share of images judged wrong; 0 if classes are not judged."""
    return 1 - point.accuracy if point.right else 0.0


def _by_cost(point: Point) -> tuple[float, float, str]:
    return point.evaluations, point.distance, point.name


def _by_distance(point: Point) -> tuple[float, float, str]:
    return point.distance, point.evaluations, point.name


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
