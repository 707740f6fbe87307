"""Verdicts on made-up numbers: what is fine, what is a problem, and what is undecided."""

from __future__ import annotations

import math

import pytest
import torch

from latentflow.analysis.diagnosis import (
    ChannelMoments,
    Diagnosis,
    Floor,
    LatentStatistics,
    LossByTime,
    Memorisation,
    Nearness,
    TrajectoryShapes,
    fine_detail,
    nearness,
)
from latentflow.analysis.latent_space import LatentSpace
from latentflow.analysis.verdicts import Verdict, verdicts


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def diagnosis(**changes) -> Diagnosis:
    """A model that is fine in all respects, and what is changed about it."""
    moments = ChannelMoments(mean=[0.0], std=[1.0], skew=[0.0], kurtosis=[0.0])
    spread = [1 + n / 100 for n in range(100)]
    space = Nearness(
        space="latents",
        samples=spread,
        held_out=spread,
        nearest_of_samples=[0] * 100,
        nearest_of_held_out=[0] * 100,
        samples_alone=spread,
        samples_ratio=[0.9] * 100,
        held_out_ratio=[0.9] * 100,
        held_out_alone=spread,
    )
    loss = LossByTime(data="x", times=[0.25, 0.75], loss=[0.5, 0.5], standard_error=[0.0, 0.0], baseline=[1.0, 1.0])
    fine = {
        "model": "m",
        "data": "x",
        "is_training_data": False,
        "told": "nothing",
        "sampling": "heun",
        "num": 100,
        "loss": loss,
        "training_loss": loss,
        "ways": [
            TrajectoryShapes(
                guidance=1,
                num=2,
                straightness=0.1,
                straightness_error=0.01,
                straightness_quantiles=(0.1, 0.1),
                total_turning=1.0,
                times=[0.5],
                turning=[1.0],
            )
        ],
        "latents": LatentStatistics(
            samples=moments,
            data=moments,
            halves=(moments, moments),
            frequencies=[1, 2, 3],
            spectrum_samples=[1, 1, 1],
            spectrum_data=[1, 1, 1],
            spectrum_halves=([1, 1, 1], [1, 1, 1]),
        ),
        "memorisation": Memorisation(
            against="a", is_test=True, covers=True, num_training=100, num_all=100, spaces=[space]
        ),
        "floor": Floor(label="f", num=50, real=1.0, reconstructed=2.0, samples=2.5, standard_errors=(0.1, 0.1, 0.1)),
        "latent_space": LatentSpace(
            num=50,
            turning_error=0.5,
            shrinking_error=None,
            fine_share=0.2,
            fine_share_of_images=0.1,
            fine_share_of_noise=0.75,
        ),
        "seconds": 1.0,
    }
    return Diagnosis(**{**fine, **changes})


def marks(one: Diagnosis) -> dict[str, str]:
    return {found.topic: found.mark for found in verdicts(one)}


def test_a_model_that_is_fine():
    found = verdicts(diagnosis())
    assert {one.mark for one in found} == {"good"}
    assert [one.topic for one in found] == [
        *("Loss", "Overfitting", "Straightness", "Latent statistics", "Fine detail", "Memorisation"),
        *("Memorised fraction", "Generator and autoencoder"),
    ]
    assert "Overfitting" not in marks(diagnosis(training_loss=None))


@pytest.mark.parametrize(
    ("factor", "loss", "overfitting"), [(1.04, "good", "good"), (1.7, "look", "bad"), (2.1, "bad", "bad")]
)
def test_verdicts_on_the_loss(factor, loss, overfitting):
    higher = diagnosis().loss.model_copy(update={"loss": [0.5 * factor] * 2})
    found = marks(diagnosis(loss=higher))
    assert (found["Loss"], found["Overfitting"]) == (loss, overfitting)


@pytest.mark.parametrize(
    ("value", "mark"), [(0.27, "good"), (0.29, "undecided"), (0.4, "look"), (0.7, "look"), (math.nan, "bad")]
)
def test_verdicts_on_straightness(value, mark):
    bent = diagnosis().ways[0].model_copy(update={"straightness": value})
    assert marks(diagnosis(ways=[bent]))["Straightness"] == mark


@pytest.mark.parametrize(("std", "mark"), [(1.09, "good"), (0.92, "good"), (1.2, "look"), (0.5, "bad"), (0.0, "bad")])
def test_verdicts_on_latents(std, mark):
    statistics = diagnosis().latents
    moments = statistics.samples.model_copy(update={"std": [std]})
    assert marks(diagnosis(latents=statistics.model_copy(update={"samples": moments})))["Latent statistics"] == mark


@pytest.mark.parametrize(("power", "mark", "word"), [(1.2, "good", "."), (0.7, "look", "smooth"), (3, "bad", "rough")])
def test_verdicts_on_fine_detail(power, mark, word):
    statistics = diagnosis().latents.model_copy(update={"spectrum_samples": [5.0, 5.0, power]})
    assert fine_detail([1, 2, 3], [5.0, 5.0, power], [1, 1, 1]) == pytest.approx(power)
    found = next(one for one in verdicts(diagnosis(latents=statistics)) if one.topic == "Fine detail")
    assert found.mark == mark and word in found.text


@pytest.mark.parametrize(("powers", "ratio"), [([4.0], 4), ([1, 4.0], 4), ([1, 1, 4.0], 4), ([9, 9, 9, 4.0], 4)])
def test_the_highest_frequencies_are_at_least_one(powers, ratio):
    assert fine_detail(list(range(1, len(powers) + 1)), powers, [1.0] * len(powers)) == ratio


@pytest.mark.parametrize("spectrum", [[], [0.0], [0.0, 0.0]])
def test_no_power_at_all_is_no_problem(spectrum):
    """Latents of one pixel, or data without any variation."""
    nothing = {
        "frequencies": list(range(1, len(spectrum) + 1)),
        "spectrum_samples": spectrum,
        "spectrum_data": spectrum,
        "spectrum_halves": (spectrum, spectrum),
    }
    found = diagnosis(latents=diagnosis().latents.model_copy(update=nothing))
    assert marks(found)["Fine detail"] == "undecided"


def copying(copied: int, num: int = 100, **changes) -> Diagnosis:
    """`copied` of `num` samples are copies; with as many held-out images."""
    spread = [1 + n / num for n in range(num)]
    samples = [0.1] * copied + [1.005 + n / num for n in range(num - copied)]
    space = (
        diagnosis()
        .memorisation.spaces[0]
        .model_copy(update={"samples": samples, "samples_alone": samples, "held_out": spread, "held_out_alone": spread})
    )
    return diagnosis(memorisation=diagnosis().memorisation.model_copy(update={"spaces": [space, space], **changes}))


def memorisation(one: Diagnosis):
    return next(found for found in verdicts(one) if found.topic == "Memorisation")


@pytest.mark.parametrize(
    ("copied", "num", "mark"),
    [
        *((0, 100, "good"), (1, 100, "good"), (3, 100, "undecided"), (6, 100, "look"), (20, 100, "bad")),
        *((0, 30, "undecided"), (3, 30, "undecided"), (6, 30, "look"), (30, 30, "bad"), (4, 4, "look"), (8, 8, "bad")),
    ],
)
def test_verdicts_on_memorisation(copied, num, mark):
    assert memorisation(copying(copied, num)).mark == mark


def test_what_would_decide_on_memorisation_is_said():
    assert "with 30 samples up to 10 % may be copies; --num 236 would decide it" in memorisation(copying(0, 30)).rule
    assert memorisation(copying(0, 118)).mark == "good"  # half of 236 are drawn
    part = memorisation(copying(0, num_all=1000))
    assert part.mark == "undecided" and "only 100 of 1,000" in part.rule and "--num-train 1000" in part.rule
    unknown = memorisation(copying(0, covers=False, is_test=False))
    assert unknown.mark == "undecided" and "with --train" in unknown.rule
    assert memorisation(copying(50, covers=False, is_test=False)).mark == "bad"
    plain = copying(50).memorisation.spaces[0]
    plain = plain.model_copy(update={"samples_alone": plain.held_out_alone})
    found = diagnosis(memorisation=copying(50).memorisation.model_copy(update={"spaces": [plain]}))
    assert memorisation(found).mark == "good"


def fraction(ratios: list[float], held_out: tuple[float, ...] = (0.9,) * 50, **given) -> Verdict:
    test = copying(0, **given).memorisation
    space = test.spaces[0].model_copy(update={"samples_ratio": ratios, "held_out_ratio": list(held_out)})
    found = diagnosis(memorisation=test.model_copy(update={"spaces": [test.spaces[0], space]}))
    (verdict,) = (one for one in verdicts(found) if one.topic == "Memorised fraction")
    return verdict


def test_verdicts_on_the_memorised_fraction():
    few, many = [0.2] * 2 + [0.8] * 198, [0.2] * 60 + [0.8] * 140
    assert fraction(few).mark == "good"
    bad = fraction(many, (0.1, 0.9))
    assert bad.mark == "bad"
    assert "60 of 200 samples are memorised" in bad.text and "it is 1 of 2 held-out images" in bad.text
    assert "between 24.7 and 35.8 %" in bad.text  # one-sided bounds of Clopper and Pearson, each at 95 %
    unclear = fraction([0.2] * 2 + [0.8] * 28)
    assert unclear.mark == "undecided" and "--num" in unclear.rule
    part = fraction(few, num_all=1000)
    assert part.mark == "undecided" and "--num-train 1000" in part.rule
    unknown = fraction(few, covers=False, is_test=False)
    assert unknown.mark == "undecided" and "with --train" in unknown.rule


def test_a_model_that_copies_nothing_is_seldom_alarmed_about():
    """Samples, held-out and training images of one distribution, thirty each: 1 in 20 may be looked at."""
    alarms = 0
    for run in range(60):
        parts = [normal(30, 1, 4, 4, seed=3 * run + n) for n in range(3)]
        space = nearness("x", *parts)
        test = Memorisation(against="", is_test=True, covers=True, num_training=30, num_all=30, spaces=[space])
        mark = memorisation(diagnosis(memorisation=test)).mark
        assert mark != "bad"
        alarms += mark == "look"
    assert alarms <= 3


def test_numbers_that_reach_across_a_limit_decide_nothing():
    noisy = diagnosis().loss.model_copy(update={"loss": [0.78] * 2, "standard_error": [0.05] * 2})
    found = {one.topic: one for one in verdicts(diagnosis(loss=noisy))}
    assert found["Loss"].mark == "undecided" and "--num" in found["Loss"].rule
    gap = diagnosis().loss.model_copy(update={"loss": [0.52] * 2, "standard_error": [0.05] * 2})
    assert marks(diagnosis(loss=gap))["Overfitting"] == "undecided"
    weak = diagnosis().memorisation.model_copy(update={"is_test": False})
    assert marks(diagnosis(memorisation=weak))["Overfitting"] == "undecided"
    shifted = ChannelMoments(mean=[0.2], std=[1.0], skew=[0.0], kurtosis=[0.0])
    statistics = diagnosis().latents.model_copy(update={"halves": (shifted, diagnosis().latents.data)})
    assert marks(diagnosis(latents=statistics))["Latent statistics"] == "undecided"
    statistics = diagnosis().latents.model_copy(update={"spectrum_halves": ([1, 1, 2], [1, 1, 1])})
    assert marks(diagnosis(latents=statistics))["Fine detail"] == "undecided"
    floor = diagnosis().floor.model_copy(update={"standard_errors": (1.0, 0.1, 1.0)})
    assert marks(diagnosis(floor=floor))["Generator and autoencoder"] == "undecided"


@pytest.mark.parametrize(("samples", "mark"), [(2.7, "good"), (5.0, "look"), (20.0, "bad")])
def test_verdicts_on_the_floor(samples, mark):
    floor = diagnosis().floor.model_copy(update={"samples": samples})
    assert marks(diagnosis(floor=floor))["Generator and autoencoder"] == mark
