"""Verdicts on the numbers of a diagnosis: one is given only if the numbers rule out the others.

A number counts as fine, or as a problem, if it stays on one side of the limit within two standard errors. Otherwise the
verdict is "undecided", with what would decide it.
"""

from __future__ import annotations

import math
from typing import Literal

from latentflow.analysis.counts import chance_of_before, share_bounds
from latentflow.analysis.diagnosis import (
    MEMORISED,
    Diagnosis,
    Floor,
    LatentStatistics,
    LossByTime,
    Memorisation,
    Nearness,
    TrajectoryShapes,
    fine_detail,
    largest_shift,
)
from latentflow.records import Record

Mark = Literal["good", "undecided", "look", "bad"]

WORDS: dict[Mark, str] = {"good": "fine", "undecided": "undecided", "look": "warning", "bad": "problem"}
"""Marks in words."""

_SIGMAS = 2.0
_MATTERS = 0.05  # share of copies among the samples
_SURE, _LIKELY = 0.01, 0.05  # chances of a false alarm, all spaces together
_MORE_IMAGES = "more images (--num) would decide it"
_GIVE_TRAIN = "give the training images of the model with --train, and held-out ones as DATA"


class Verdict(Record):
    """One finding in words, and its rule."""

    mark: Mark
    topic: str
    text: str
    rule: str


def verdicts(diagnosis: Diagnosis) -> list[Verdict]:
    """The verdict on each number of a diagnosis."""
    found = [_loss_verdict(diagnosis.loss)]
    if diagnosis.training_loss is not None:
        found.append(_gap_verdict(diagnosis.loss, diagnosis.training_loss, diagnosis.memorisation))
    return [
        *found,
        _trajectories_verdict(diagnosis.ways),
        _latents_verdict(diagnosis.latents),
        _detail_verdict(diagnosis.latents),
        _memorisation_verdict(diagnosis.memorisation),
        _fraction_verdict(diagnosis.memorisation),
        _floor_verdict(diagnosis.floor),
    ]


def _mark(value: float, error: float, good: float, bad: float) -> Mark:
    """The mark of a value that should be small, if it is the same within two of its errors; NaN is bad."""
    if math.isinf(error):
        return "undecided"
    low, high = (_exact_mark(value + sign * _SIGMAS * error, good, bad) for sign in (-1, 1))
    return low if low == high else "undecided"


def _exact_mark(value: float, good: float, bad: float) -> Mark:
    return "good" if value <= good else "look" if value < bad else "bad"


def _advice(mark: Mark) -> str:
    return f" Undecided: a limit lies within two standard errors; {_MORE_IMAGES}." if mark == "undecided" else ""


def _loss_verdict(loss: LossByTime) -> Verdict:
    worst = max(range(len(loss.times)), key=lambda n: loss.loss[n] / loss.baseline[n])
    mark = _mark(loss.ratio, loss.ratio_error, 0.8, 1.0)
    return Verdict(
        mark=mark,
        topic="Loss",
        text=f"The loss is {loss.ratio:.2f} ± {loss.ratio_error:.2g} times that of a model that knows only mean and "
        f"variance of each channel; at its worst, near t = {loss.times[worst]:.2f}, "
        f"{loss.loss[worst] / loss.baseline[worst]:.2f} times.",
        rule="Fine up to 0.8, a problem from 1, where mean and variance are enough." + _advice(mark),
    )


def _gap_verdict(held_out: LossByTime, training: LossByTime, test: Memorisation) -> Verdict:
    gap = sum(held_out.loss) / sum(training.loss) - 1
    error = math.hypot(*held_out.standard_error, *training.standard_error) / sum(training.loss)
    mark = _mark(gap, error, 0.05, 0.25)
    rule = "Fine up to +5 %, a problem from +25 %: the network overfits. The two sets must be samples of the same "
    rule += "distribution, or the difference may be theirs." + _advice(mark)
    if not test.is_test and mark != "bad":
        mark, rule = "undecided", f"{rule} These sets are not training and held-out images: {_GIVE_TRAIN}."
    return Verdict(
        mark=mark,
        topic="Overfitting",
        text=f"The loss on held-out images differs by {100 * gap:+.1f} ± {100 * error:.1f} % from the loss on training "
        "images.",
        rule=rule,
    )


def _trajectories_verdict(ways: list[TrajectoryShapes]) -> Verdict:
    used = ways[0]
    plain = f" Without guidance it is {ways[-1].straightness:.3f}." if len(ways) > 1 else ""
    mark = _mark(used.straightness, used.straightness_error, 0.3, math.inf)
    return Verdict(
        mark=mark,
        topic="Straightness",
        text=f"At guidance {used.guidance:g}, a share of {used.straightness:.3f} ± {used.straightness_error:.2g} of "
        f"the path energy is off the straight line from noise to data, and the trajectory turns by "
        f"{math.degrees(used.total_turning):.0f} degrees in total.{plain}",
        rule="0 is a straight trajectory, which one Euler step integrates exactly. Fine up to 0.3; beyond, check "
        "whether more steps change the pictures. `latentflow sweep` measures how many are needed." + _advice(mark),
    )


def _latents_verdict(statistics: LatentStatistics) -> Verdict:
    shift, ratio = largest_shift(statistics.samples, statistics.data)
    by_chance = largest_shift(*statistics.halves)
    mark = _mark(_off(shift, ratio), _off(*by_chance) / _SIGMAS, 0.1, 0.3)
    return Verdict(
        mark=mark,
        topic="Latent statistics",
        text=f"The mean of a channel is off by up to {shift:.2f} standard deviations, and the standard deviation by a "
        f"factor of up to {ratio:.2f}; between two halves of the data it is {by_chance[0]:.2f} and "
        f"{by_chance[1]:.2f}.",
        rule="Fine within 0.1 and a factor of 1.1, a problem from 0.3 and 1.35, within the difference of two halves of "
        "the data. Guidance shifts both by design: use guidance 1 to measure the model itself."
        + (f" Undecided: the halves differ too much; {_MORE_IMAGES}." if mark == "undecided" else ""),
    )


def _off(shift: float, ratio: float) -> float:
    return max(shift, _log(ratio))


def _log(ratio: float) -> float:
    return abs(math.log(ratio)) if 0 < ratio < math.inf else math.inf


def _detail_verdict(statistics: LatentStatistics) -> Verdict:
    ratio = fine_detail(statistics.frequencies, statistics.spectrum_samples, statistics.spectrum_data)
    by_chance = fine_detail(statistics.frequencies, *statistics.spectrum_halves)
    mark = _mark(_log(ratio), _log(by_chance) / _SIGMAS, math.log(1.25), math.log(2))
    if not statistics.frequencies:
        return Verdict(mark=mark, topic="Fine detail", text="Latents of one pixel have no frequencies.", rule="")
    kind = "" if mark in ("good", "undecided") else ": too smooth" if ratio < 1 else ": too rough"
    return Verdict(
        mark=mark,
        topic="Fine detail",
        text=f"Latents of samples have {ratio:.2f} times the power of the data in the highest third of the "
        f"frequencies{kind}; one half of the data has {by_chance:.2f} times that of the other.",
        rule="Fine between 0.8 and 1.25, a problem below 0.5 and above 2, within the difference of two halves of the "
        "data." + (f" Undecided: the halves differ too much; {_MORE_IMAGES}." if mark == "undecided" else ""),
    )


def _memorisation_verdict(test: Memorisation) -> Verdict:
    found = [_copies(space, len(test.spaces)) for space in test.spaces]
    mark, space, p_value, low, high = max(found, key=lambda one: _RANKS.index(one[0]))
    num, share = len(space.samples), test.num_training / test.num_all
    text = (
        f"In {space.space}, {space.copies} of {num} samples are nearer to one training image than {_all_but(space)} of "
        f"{len(space.held_out)} held-out images; by chance that many occur with probability {p_value:.2g}, and the "
        f"share of such samples lies between {100 * low:.1f} and {100 * high:.1f} %. A sample is nearer to the "
        f"training images than a held-out image with probability {space.nearer:.2f}, where 0.5 means no difference."
    )
    rule = (
        f"A problem if chance gives so many in fewer than {100 * _SURE:g} of 100 such tests and the share is certainly "
        f"above {100 * _MATTERS:g} %; fine if it is certainly below. A sample counts if it is near to one training "
        "image but not to ten: smooth samples, as strong guidance makes them, are nearer to all."
    )
    highest = max(bounds[4] for bounds in found) / share
    if mark == "undecided" and highest <= _MATTERS and test.covers:
        mark = "good"
    elif mark == "undecided":
        rule += f" Undecided: {_what_would_decide(test, highest, num)}."
    twins = (
        f" {test.num_twins} images of DATA are training images themselves and were left out." if test.num_twins else ""
    )
    return Verdict(mark=mark, topic="Memorisation", text=text + twins, rule=rule)


def _copies(space: Nearness, num_spaces: int) -> tuple[Mark, Nearness, float, float, float]:
    """The verdict of one space, "undecided" if it raises no alarm; the probability by chance; bounds of the share."""
    count, num = space.copies, len(space.samples)
    p_value = chance_of_before(count, num, space.rank, len(space.held_out))
    low, high = share_bounds(count, num)
    p_of_all = p_value * num_spaces
    mark: Mark = "undecided"
    if p_of_all <= _SURE and low > _MATTERS:
        mark = "bad"
    elif p_of_all <= _LIKELY:
        mark = "look"
    return mark, space, p_value, low, high


def _fraction_verdict(test: Memorisation) -> Verdict:
    """The memorised fraction of arXiv 2505.17638, in the space with the most."""
    space = max(test.spaces, key=lambda one: one.memorised / max(len(one.samples_ratio), 1))
    count, num, others = space.memorised, len(space.samples_ratio), len(space.held_out_ratio)
    low, high = share_bounds(count, num) if num else (0.0, 1.0)
    most = high * test.num_all / test.num_training
    mark: Mark = "bad" if low > _MATTERS else "good" if most <= _MATTERS and test.covers else "undecided"
    rule = (
        f"A sample counts if its nearest training image is less than {MEMORISED:.2f} times as far away as the second-"
        f"nearest. Fine if the share is certainly below {100 * _MATTERS:g} %, a problem if it is certainly above. "
        "Training images that are there twice count once; mirrored copies are not found."
    )
    if mark == "undecided":
        rule += f" Undecided: {_what_would_decide(test, most, num)}."
    return Verdict(
        mark=mark,
        topic="Memorised fraction",
        text=f"In {space.space}, {count} of {num} samples are memorised training images; the share of such samples "
        f"lies between {100 * low:.1f} and {100 * high:.1f} %. By the same rule it is {space.memorised_held_out} of "
        f"{others} held-out images.",
        rule=rule,
    )


def _all_but(space: Nearness) -> str:
    return "any" if space.rank == 1 else f"all but {space.rank - 1}"


def _what_would_decide(test: Memorisation, highest: float, num: int) -> str:
    if not test.covers:
        return f"it is not known whether the model was trained on any of these images; {_GIVE_TRAIN}"
    if test.num_training < test.num_all and highest * test.num_training / test.num_all <= _MATTERS:
        return (
            f"only {test.num_training:,} of {test.num_all:,} training images were searched; --num-train {test.num_all} "
            "searches all"
        )
    least = math.ceil(math.log(1 - 0.95) / math.log(1 - _MATTERS))
    room = f"with {num} samples up to {100 * min(highest, 1):.0f} % may be copies"
    return f"{room}; --num {max(4 * num, 4 * least)} would decide it"


def _floor_verdict(floor: Floor) -> Verdict:
    lost, made = max(floor.reconstructed - floor.real, 0.0), floor.samples - floor.real
    error = math.hypot(floor.standard_errors[0], floor.standard_errors[2])
    fine, bad = max(2 * lost, floor.real), 10 * max(lost, floor.real)
    mark = _mark(made, error, fine, bad)
    words = {
        "good": "autoencoder or chance explain the distance of the generator",
        "undecided": "a limit lies within two standard errors",
        "look": "the generator limits the quality, not the autoencoder",
        "bad": "the generator is far from the data, and the autoencoder contributes little to that",
    }[mark]
    return Verdict(
        mark=mark,
        topic="Generator and autoencoder",
        text=f"The Fréchet distance of {floor.features} features is {floor.samples:.3g} ± "
        f"{floor.standard_errors[2]:.2g} for samples, {floor.reconstructed:.3g} ± {floor.standard_errors[1]:.2g} for "
        "reconstructions and "
        f"{floor.real:.3g} ± {floor.standard_errors[0]:.2g} for other real images: {words}.",
        rule="Fine if the excess of samples over other real images is at most the distance of these, or twice the "
        "excess of reconstructions; a problem beyond ten times the larger."
        + (" Random features capture colours and textures, not objects." if floor.features == "random" else "")
        + (f" Undecided: {_MORE_IMAGES}." if mark == "undecided" else ""),
    )


_RANKS = ("good", "undecided", "look", "bad")
