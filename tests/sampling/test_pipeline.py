"""Sampling: one seed, one picture; requests that are checked; pictures that remember how they were made."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from latentflow.api import LatentFlow
from latentflow.autoencoder import Autoencoder
from latentflow.commands.sample import sample as sample_command
from latentflow.errors import ConfigError, NonFiniteError
from latentflow.flow.guidance import ConditionedVelocity
from latentflow.flow.solvers import SOLVERS, integrate, is_adaptive
from latentflow.flow.times import sampling_times
from latentflow.runtime import Runtime
from latentflow.sampling import pipeline
from latentflow.sampling.drawing import Drawing, check_drawing, make_drawing
from latentflow.sampling.pipeline import Given, draw, draw_all, initial_noise, join_samples
from latentflow.sampling.request import SampleRequest
from latentflow.shapes import Condition
from latentflow.sizes import Size
from tests import processes, tiny
from tests.dispatch import watched

ROUNDING = 1e-5
"""Between the latents of one seed in batches of different sizes, whose matrix products round differently.

Measured on a CPU: 2e-6, with latents up to 6. One pixel in thousands may differ by one level of 255.
"""


@pytest.fixture(scope="module")
def model(kl) -> LatentFlow:
    """A model whose every weight is random, so that the field bends, and guidance and labels matter."""
    return tiny.model(kl, time_scale=20.0)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, model) -> Path:
    folder = tmp_path_factory.mktemp("models") / "fruit"
    model.save_pretrained(folder)
    return folder


def same_pictures(one, other) -> None:
    """Equal up to rounding, after equally many evaluations."""
    assert torch.equal(one.evaluations, other.evaluations)
    torch.testing.assert_close(one.latents, other.latents, rtol=0, atol=ROUNDING)
    assert (one.pixels.int() - other.pixels.int()).abs().max() <= 1


# One seed, one picture

GUIDANCE = {
    "unguided": {},
    "guided": {"guidance": 3.0},
    "guided in an interval": {"guidance": 3.0, "guidance_interval": (0.2, 0.7)},
}


@pytest.mark.parametrize("guidance", GUIDANCE.values(), ids=GUIDANCE)
@pytest.mark.parametrize(
    "solver",
    [
        {"solver": "euler", "steps": 6},
        {"solver": "heun", "steps": 6},
        {"solver": "ab3", "steps": 6},
        {"solver": "bosh3", "rtol": 1e-2, "atol": 1e-2},
        {"solver": "dopri5", "rtol": 1e-3, "atol": 1e-3},
    ],
    ids=lambda given: given["solver"],
)
def test_a_picture_does_not_depend_on_its_batch(model, solver, guidance):
    request = {"num": 16, "seed": 5, **solver, **guidance}
    whole = model.sample(batch_size=16, **request)
    assert whole.latents.std() > 1  # the field is far from zero
    for batch_size in (1, 3):
        same_pictures(model.sample(batch_size=batch_size, **request), whole)


def test_tight_tolerances_do_not_depend_on_the_batch(kl, monkeypatch):
    """In float64, where no error estimate comes near a threshold by rounding: the batch has no say at all."""
    model = tiny.model(kl, time_scale=20.0)
    model.network.double()
    noise = pipeline.initial_noise
    monkeypatch.setattr(pipeline, "initial_noise", lambda *given: noise(*given).double())
    monkeypatch.setattr(pipeline, "announce_cost", lambda *given: None)
    monkeypatch.setattr(type(model), "pixels", lambda self, latents: latents.float())
    solutions = []
    monkeypatch.setattr(pipeline, "integrate", lambda *a, **b: solutions.append(integrate(*a, **b)) or solutions[-1])
    drawn = {}
    for size in (1, 3, 8):
        solutions.clear()
        model.sample(num=8, batch_size=size, seed=5, guidance=3.0, solver="dopri5", rtol=1e-5, atol=1e-5)
        drawn[size] = [torch.cat([getattr(part, of) for part in solutions]) for of in ("x", "evaluations", "rejected")]
    for size in (1, 3):
        torch.testing.assert_close(drawn[size][0], drawn[8][0], rtol=0, atol=1e-12)
        assert torch.equal(drawn[size][1], drawn[8][1])
        assert torch.equal(drawn[size][2], drawn[8][2])


def test_adaptive_images_have_steps_of_their_own(kl):
    """Or the tests above would say little about adaptive solvers."""
    drawn = tiny.model(kl).sample(num=32, seed=5, solver="dopri5", rtol=1e-4, atol=1e-4)
    assert len(drawn.evaluations.unique()) > 2


def test_a_picture_does_not_depend_on_its_neighbours(model):
    """The same two seeds and classes amid others, and in another order."""
    preset = make_drawing(model, SampleRequest(num=1, guidance=2.0, solver="dopri5", rtol=1e-3, atol=1e-3)).sampling
    alone = Drawing(seeds=[7, 8], labels=[2, 0], told=["label"], sampling=preset)
    amid = Drawing(seeds=[1, 8, 2, 7, 3], labels=[0, 0, 1, 2, 1], told=["label"], sampling=preset)
    one, other = (join_samples(list(draw(model, request))) for request in (alone, amid))
    torch.testing.assert_close(one.latents, other.latents[[3, 1]], rtol=0, atol=ROUNDING)
    assert torch.equal(one.evaluations, other.evaluations[[3, 1]])


def test_seeds_and_labels_make_the_picture(model):
    preset = make_drawing(model, SampleRequest(num=1)).sampling
    request = Drawing(seeds=[3, 3, 3, 4], labels=[1, 1, 2, 1], told=["label"], sampling=preset)
    latents = join_samples(list(draw(model, request))).latents
    torch.testing.assert_close(latents[0], latents[1], rtol=0, atol=ROUNDING)
    assert (latents[0] - latents[2]).abs().max() > 0.1
    assert (latents[0] - latents[3]).abs().max() > 0.1


def test_the_same_request_gives_the_same_bits(model):
    one, other = (model.sample(num=3, seed=9, guidance=2.0) for _ in range(2))
    assert torch.equal(one.latents, other.latents)
    assert torch.equal(one.pixels, other.pixels)


def test_the_global_generator_has_no_say(model):
    torch.manual_seed(1)
    one = model.sample(num=2)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    other = model.sample(num=2)
    assert torch.equal(one.latents, other.latents)
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_is_standard_normal_and_its_own(model):
    noise = initial_noise(model, Drawing(seeds=range(200)))
    assert noise.shape == (200, *model.config.latent_shape)
    assert abs(noise.mean().item()) < 4 / noise.numel() ** 0.5
    assert abs(noise.std().item() - 1) < 4 / (2 * noise.numel()) ** 0.5
    assert torch.equal(initial_noise(model, Drawing(seeds=[17]))[0], noise[17])
    assert (noise[0] - noise[1]).abs().max() > 1


# What is computed


def test_sampling_is_the_flow_from_noise_to_data(model):
    """By hand: v = v_null + s (v_cond - v_null), Heun's method from t = 1 to t = 0, decode."""
    drawn = model.sample(num=2, classes=["cherry"], seed=3, solver="heun", steps=4, guidance=2.0)

    def velocity(x, t):
        cond, null = (
            model.network(x, t.float(), Condition(torch.full((2,), label, dtype=torch.int64))) for label in (2, 3)
        )
        return null + 2.0 * (cond - null)

    with torch.inference_mode():
        x = integrate(velocity, initial_noise(model, drawn.drawing), sampling_times(4), solver="heun").x
    torch.testing.assert_close(drawn.latents, x, rtol=0, atol=ROUNDING)
    raw = x / 0.5 + 0.1  # the autoencoder's scaling and shift factors, undone
    pixels = model.autoencoder.model.decode(raw).sample.clamp(-1, 1)
    assert (drawn.pixels - ((pixels + 1) * 127.5).round()).abs().max() <= 1
    assert drawn.pixels.dtype == torch.uint8
    assert drawn.evaluations.tolist() == [16, 16]


def test_evaluations_count_network_calls(model, monkeypatch):
    calls = []
    network = model.network.forward

    def counting(latents, time, condition):
        calls.append(len(latents))
        return network(latents, time, condition)

    monkeypatch.setattr(model.network, "forward", counting)
    for solver, steps, expected in (("euler", 5, 5), ("heun", 5, 10), ("rk4", 5, 20), ("ab2", 5, 6)):
        for guidance, factor in ((1.0, 1), (2.0, 2)):
            calls.clear()
            drawn = model.sample(num=3, solver=solver, steps=steps, guidance=guidance)
            assert drawn.evaluations.tolist() == [expected * factor] * 3
            assert sum(calls) == drawn.evaluations.sum()


def test_a_shift_moves_the_grid(model):
    even, shifted = (model.sample(num=1, solver="euler", steps=3, shift=shift).latents for shift in (1.0, 3.0))
    assert (even - shifted).abs().max() > 0.01


def test_an_unconditional_model(kl):
    model = tiny.model(kl, class_names=(), label_dropout=0.0)
    drawn = model.sample(num=5, batch_size=2, seed=1)
    assert drawn.drawing.labels == []
    assert drawn.pixels.shape == (5, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    same_pictures(drawn, model.sample(num=5, batch_size=5, seed=1))


def test_a_saved_model_draws_the_same(model, model_folder):
    loaded = LatentFlow.from_pretrained(model_folder, device="cpu")
    assert loaded.config == model.config
    one, other = (flow.sample(num=2, seed=4, guidance=1.5) for flow in (model, loaded))
    assert torch.equal(one.latents, other.latents)
    assert torch.equal(one.pixels, other.pixels)


def test_large_batches_are_decoded_in_slices(kl, monkeypatch):
    sliced = Autoencoder(tiny.kl(), "sliced")
    sliced.slice_size = 2
    one, other = (tiny.model(autoencoder).sample(num=5) for autoencoder in (kl, sliced))
    assert torch.equal(one.latents, other.latents)
    assert (one.pixels.int() - other.pixels.int()).abs().max() <= 1


# Precision


def computing(model: LatentFlow, word: str, *, asked: bool = True) -> LatentFlow:
    """The model as it is where this precision was asked for, or came of itself."""
    model = copy.copy(model)
    model.runtime = Runtime(torch.device("cpu"), precision=word, precision_is_explicit=asked)
    return model


@pytest.mark.parametrize(
    ("word", "asked", "solver", "computed"),
    [
        ("bf16", False, "heun", "bf16"),
        ("bf16", False, "dopri5", "fp32"),
        ("bf16", False, "bosh3", "fp32"),
        ("bf16", True, "heun", "bf16"),
        ("bf16", True, "dopri5", "bf16"),
        ("tf32", True, "bosh3", "tf32"),
        ("fp32", False, "dopri5", "fp32"),
    ],
)
def test_what_a_network_computes_in(model, word, asked, solver, computed, caplog):
    """As requested; by default, a solver that estimates its error gets float32. A picture records which."""
    request = make_drawing(computing(model, word, asked=asked), SampleRequest(num=1, solver=solver))
    assert request.precision == computed
    coarse = is_adaptive(solver) and computed != "fp32"
    assert (f"{computed} rounds more coarsely" in caplog.text) == coarse
    assert Drawing(seeds=[0]).precision == "fp32"


@pytest.mark.parametrize("solver", ["heun", "ab2", "bosh3"])
def test_in_half_precision_state_and_time_stay_wide(model, monkeypatch, solver):
    """Only the network computes in bf16; the state of the solver is float32, and its times float64."""
    computed, stepped = [], []
    network, call = model.network.forward, ConditionedVelocity.__call__

    def forward(x, time, condition):
        v = network(x, time, condition)
        computed.append((torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu"), x.dtype, time.dtype))
        return v.bfloat16()

    def velocity(self, x, time):
        v = call(self, x, time)
        stepped.append((x.dtype, time.dtype, v.dtype, torch.is_autocast_enabled("cpu")))
        return v

    monkeypatch.setattr(model.network, "forward", forward)
    monkeypatch.setattr(ConditionedVelocity, "__call__", velocity)
    preset = {"solver": solver, "guidance": 2.0, **({"rtol": 0.1, "atol": 0.1} if solver == "bosh3" else {"steps": 3})}
    half = computing(model, "bf16").sample(num=3, **preset)
    assert set(computed) == {(torch.bfloat16, True, torch.float32, torch.float32)}
    assert set(stepped) == {(torch.float32, torch.float64, torch.float32, False)}
    assert half.latents.dtype == torch.float32
    if solver != "bosh3":
        full = computing(model, "fp32").sample(num=3, **preset)
        assert 0 < (half.latents - full.latents).abs().max() < 0.5


# Ahead of the device


@pytest.mark.parametrize("guidance", GUIDANCE.values(), ids=GUIDANCE)
@pytest.mark.parametrize("solver", ["euler", "heun", "ab2"])
def test_a_batch_is_asked_for_without_waiting(kl, monkeypatch, solver, guidance):
    """From its seeds to 8-bit pixels. What is sent to the device is sent by `shapes.send`, which pins it for a GPU."""
    model = tiny.model(Autoencoder(tiny.kl(), "meta"))
    model.to("meta")
    monkeypatch.setattr(pipeline, "_fetched", lambda tensor: tensor)
    request = make_drawing(model, SampleRequest(num=5, solver=solver, steps=3, **guidance))
    for _ in range(2):  # constants are sent once, before the first batch
        with watched() as waits:
            begun = pipeline._begin(model, request, Given())
    assert [wait for wait in waits if "shapes.py" not in wait] == []
    assert len(waits) <= 1  # the labels
    assert (begun.pixels.device.type, begun.pixels.dtype) == ("meta", torch.uint8)


def test_the_next_batch_is_begun_before_the_first_one_arrives(model, monkeypatch):
    """As on a GPU; the pictures are the same, in the same order."""
    usual = list(draw(model, make_drawing(model, SampleRequest(num=5)), batch_size=2))
    begin, begun, seen = pipeline._begin, [], []
    monkeypatch.setattr(pipeline, "_batches_ahead", lambda device: 1)
    monkeypatch.setattr(pipeline, "_begin", lambda *given: begun.append(given[1].seeds) or begin(*given))
    for samples in draw(model, make_drawing(model, SampleRequest(num=5)), batch_size=2):
        assert torch.equal(samples.pixels, usual[len(seen)].pixels)
        seen.append(samples.drawing.seeds)
        assert len(begun) == min(len(seen) + 1, 3)
    assert seen == begun == [[0, 1], [2, 3], [4]]


def test_nothing_is_delivered_in_the_place_of_what_failed(model, monkeypatch):
    """A batch whose pictures arrive damaged ends it all, though the next one has been begun."""
    arrived, seen = pipeline._Begun.arrived, []

    def damaged(batch):
        if batch.drawing.seeds == [1]:
            raise NonFiniteError("no picture")
        return arrived(batch)

    monkeypatch.setattr(pipeline, "_batches_ahead", lambda device: 1)
    monkeypatch.setattr(pipeline._Begun, "arrived", damaged)
    with pytest.raises(NonFiniteError, match="no picture"):
        seen.extend(
            samples.drawing.seeds for samples in draw(model, make_drawing(model, SampleRequest(num=5)), batch_size=1)
        )
    assert seen == [[0]]


def test_what_was_drawn_before_an_error_is_delivered(model, monkeypatch):
    begin, seen = pipeline._begin, []

    def fails_at_the_third(*given):
        if given[1].seeds == [2]:
            raise NonFiniteError("no picture")
        return begin(*given)

    monkeypatch.setattr(pipeline, "_batches_ahead", lambda device: 1)
    monkeypatch.setattr(pipeline, "_begin", fails_at_the_third)
    with pytest.raises(NonFiniteError, match="no picture"):
        seen.extend(
            samples.drawing.seeds for samples in draw(model, make_drawing(model, SampleRequest(num=5)), batch_size=1)
        )
    assert seen == [[0], [1]]


# Requests


def test_classes_are_dealt_out_in_turn(model):
    assert make_drawing(model, SampleRequest(num=5, classes=["cherry", "apple"], seed=7)).labels == [2, 0, 2, 0, 2]
    assert make_drawing(model, SampleRequest(num=3, classes=["#1", 2])).labels == [1, 2, 1]
    assert make_drawing(model, SampleRequest(num=3, classes="berry")).labels == [1] * 3


def test_a_seed_has_a_class_of_its_own_where_none_is_asked_for(model):
    assert make_drawing(model, SampleRequest(num=5)).labels == [0, 1, 2, 0, 1]
    for seed in range(5):
        assert make_drawing(model, SampleRequest(num=1, seed=seed)).labels == [seed % 3]
    assert make_drawing(model, SampleRequest(num=1, seed=5), task="image-to-image").labels == []


def test_a_class_that_no_training_image_had_is_never_drawn(kl):
    model = tiny.model(kl)
    training = model.config.training.model_copy(update={"images_per_class": [6, 0, 6]})
    model.config = model.config.model_copy(update={"training": training})
    assert make_drawing(model, SampleRequest(num=5)).labels == [0, 2, 0, 2, 0]
    assert make_drawing(model, SampleRequest(num=2, classes=["cherry", "apple"])).labels == [2, 0]
    for asked in (["berry"], ["#1"], [2, 1], "berry"):
        with pytest.raises(ConfigError, match="of the class 'berry'; the model was trained on 2 of its 3 classes"):
            make_drawing(model, SampleRequest(num=2, classes=asked))


def test_seeds_count_upwards(model):
    assert make_drawing(model, SampleRequest(num=3, seed=40)).seeds == [40, 41, 42]


def test_what_is_not_asked_for_comes_from_the_model(kl):
    model = tiny.model(kl, solver="rk4", steps=7, guidance=2.5, guidance_interval=(0.1, 0.9))
    assert make_drawing(model, SampleRequest(num=1)).sampling == model.config.sampling
    assert make_drawing(model, SampleRequest(num=1, steps=3)).sampling == model.config.sampling.model_copy(
        update={"steps": 3}
    )
    assert make_drawing(model, SampleRequest(num=1, guidance=0.0)).sampling.guidance == 0.0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num": 0}, "number of images 0: give a whole number from 1 to 1,000,000"),
        ({"num": 10**9}, "number of images 1000000000"),
        ({"num": 1.5}, "number of images 1.5"),
        ({"seed": -1}, "seed -1: give a whole number from 0"),
        ({"seed": 2**63}, "seed 9223372036854775808"),
        ({"seed": 2**63 - 1, "num": 2}, "seed 9223372036854775807"),
        ({"seed": 10**5000}, "seed of more than 40 digits"),
        ({"seed": 1.0}, "seed 1.0"),
        ({"steps": 0}, "steps 0: give a whole number from 1 to 10,000"),
        ({"steps": 10**9}, "steps 1000000000"),
        ({"steps": 2.5}, "steps 2.5"),
        ({"steps": "3"}, "steps '3'"),
        ({"guidance": -1.0}, "guidance -1: give a number from 0 to 1000; 1 switches it off"),
        ({"guidance": float("nan")}, "guidance nan"),
        ({"guidance": float("inf")}, "guidance inf"),
        ({"guidance": 1e30}, "guidance 1e+30"),
        ({"guidance": "much"}, "guidance 'much'"),
        ({"guidance_interval": (0.8, 0.2), "guidance": 2.0}, "0.8"),
        ({"guidance_interval": (-0.1, 0.2), "guidance": 2.0}, "-0.1"),
        ({"guided_channels": 5, "guidance": 2.0}, "guided_channels 5: give a whole number from 1 to 4"),
        ({"solver": "huen"}, "did you mean 'heun'?"),
        ({"solver": "dopri5", "rtol": -1e-3}, "rtol -0.001"),
        ({"solver": "dopri5", "rtol": 1e-30}, "rtol 1e-30"),
        ({"solver": "dopri5", "atol": 0.0}, "atol 0"),
        ({"shift": 0.0}, "shift 0"),
        ({"shift": 1e30}, "shift 1e+30"),
        ({"classes": ["aple"]}, "did you mean 'apple'?"),
        ({"classes": [3]}, "classes #0 to #2"),
        ({"classes": [-1]}, "classes #0 to #2"),
        ({"classes": "3"}, "no class is named '3'"),
        ({"classes": ["apple", 1]}, "in one list"),
        ({"solver": "dopri5", "steps": 3}, "steps 3 has no effect with dopri5: it chooses its own steps"),
        ({"solver": "bosh3", "shift": 2.0}, "shift 2.0 has no effect with bosh3"),
        ({"rtol": 1e-3}, "rtol 0.001 has no effect with euler, the solver of the model's preset"),
        ({"solver": "heun", "atol": 1e-3}, "atol 0.001 has no effect with heun: it takes a fixed number of steps"),
        ({"guidance_interval": (0.1, 0.5)}, "guidance_interval 0.1,0.5 has no effect: guidance is 1"),
        ({"guided_by": ["label"]}, "guided_by label has no effect: guidance is 1"),
        ({"guided_channels": 3, "guidance": 1.0}, "guided_channels 3 has no effect: guidance is 1"),
    ],
)
def test_requests_that_cannot_be_drawn(model, given, said):
    with pytest.raises(ConfigError) as caught:
        make_drawing(model, SampleRequest(**{"num": 1, **given}))
    assert said in str(caught.value)


def test_guidance_needs_a_null_condition_that_was_trained(kl):
    never_dropped = tiny.model(kl, label_dropout=0.0)
    with pytest.raises(ConfigError, match=r"conditioning\.label_dropout = 0"):
        never_dropped.sample(guidance=1.5)
    assert never_dropped.sample(guidance=1.0).pixels.shape[0] == 1
    unconditional = tiny.model(kl, class_names=(), label_dropout=0.0)
    with pytest.raises(ConfigError, match="unconditional"):
        unconditional.sample(guidance=1.5)
    with pytest.raises(ConfigError, match="this model has no classes"):
        unconditional.sample(classes=[0])


@pytest.mark.parametrize("labels", [[], [0], [0, 1, 2]])
def test_labels_that_do_not_fit_the_seeds(labels):
    with pytest.raises(ValidationError, match=f"{len(labels)} labels for 2 seeds; give one per image"):
        Drawing(seeds=[0, 1], labels=labels, told=["label"])
    with pytest.raises(ValidationError, match="2 labels, but the label is not among the conditions"):
        Drawing(seeds=[0, 1], labels=[0, 1])


def test_labels_that_the_model_does_not_have(model):
    with pytest.raises(ConfigError, match="class #3 does not exist"):
        check_drawing(model, Drawing(seeds=[0, 1], labels=[0, 3], told=["label"]))


def test_every_solver_draws(model):
    for solver in SOLVERS:
        pace = {"rtol": 1e-2, "atol": 1e-2} if is_adaptive(solver) else {"steps": 4}
        drawn = model.sample(num=1, solver=solver, **pace)
        assert drawn.latents.isfinite().all()


def test_another_solver_says_what_it_keeps_of_the_preset(model, caplog):
    make_drawing(model, SampleRequest(num=1, solver="dopri5"))
    make_drawing(model, SampleRequest(num=1, solver="dopri5"))
    assert caplog.messages == ["dopri5 takes rtol 1e-05 and atol 1e-05 from the model's preset, which draws with euler"]
    make_drawing(model, SampleRequest(num=1, solver="dopri5", rtol=1e-2, atol=1e-2, shift=1.0))
    make_drawing(model, SampleRequest(num=1, solver="heun"))
    make_drawing(model, SampleRequest(num=1, guidance_interval=(0.0, 1.0), guidance=1.0))
    assert len(caplog.messages) == 1


def test_steps_of_an_adaptive_preset_are_said(kl, caplog):
    model = tiny.model(kl, solver="dopri5", steps=7)
    with pytest.raises(ConfigError, match="steps 3 has no effect with dopri5, the solver of the model's preset"):
        make_drawing(model, SampleRequest(num=1, steps=3))
    assert make_drawing(model, SampleRequest(num=1, solver="heun")).sampling.steps == 7
    assert caplog.messages == ["heun takes steps 7 from the model's preset, which draws with dopri5"]
    assert (
        make_drawing(model, SampleRequest(num=1, solver="heun", steps=3)).sampling.steps == 3
    )  # what the error advises
    assert len(caplog.messages) == 1


def test_what_costs_much_is_said_before_it_is_drawn(model, caplog):
    model.sample(num=2, solver="dopri5", rtol=1e-4, atol=1e-4, guidance=2.0)
    (said,) = caplog.messages
    assert said.startswith("dopri5 with tolerance 0.0001 takes about 189 network calls per image, about ")
    assert " s for 2 here; --solver heun --steps 25 takes 100, about " in said
    model.sample(num=1, solver="dopri5", rtol=1e-4, atol=1e-4, guidance=2.0)
    model.sample(num=1, solver="heun", steps=25, guidance=2.0)
    model.sample(num=1, solver="dopri5", rtol=1e-2, atol=1e-2)
    assert len(caplog.messages) == 1
    model.sample(num=1, solver="euler", steps=300)
    assert caplog.messages[1].startswith("euler with 300 steps takes 300 network calls per image")


@pytest.mark.parametrize("solver", ["euler", "ab3", "dopri5"])
def test_latents_that_are_not_finite_raise(kl, solver):
    model = tiny.model(kl)
    next(model.network.parameters()).data.fill_(float("nan"))
    with pytest.raises(NonFiniteError) as caught:
        model.sample(num=2, solver=solver)
    assert caught.value.exit_code == 1


def test_overflow_in_half_precision_names_a_remedy(model):
    begun = pipeline._begin(model, make_drawing(model, SampleRequest(num=3)), Given())
    latents = torch.zeros(begun.latents.shape)
    latents[1, 0, 0, 0] = float("inf")
    for word, remedy in (("bf16", "the weights are damaged"), ("fp16", "use --precision bf16 or tf32")):
        request = begun.drawing.model_copy(update={"precision": word})
        with pytest.raises(NonFiniteError, match=f"latents of seed 1 are not finite.* {remedy}"):
            replace(begun, drawing=request, latents=latents).arrived()


def test_batches_and_memory_are_bounded(model):
    for size in (0, -1, 10**9, 2.5):
        with pytest.raises(ConfigError, match=f"batch size {size}: give a whole number from 1 to 65,536"):
            model.sample(batch_size=size)
    request = make_drawing(model, SampleRequest(num=10**6)).model_copy(update={"image_size": Size(256, 256)})
    with pytest.raises(ConfigError, match="1,000,000 images of 256 x 256 pixels at once in memory: at most 43,690"):
        draw_all(model, request)


# Files


def test_a_png_holds_its_request_and_can_be_made_again(model, tmp_path):
    request = {"solver": "heun", "steps": 3, "guidance": 2.0, "guidance_interval": (0.1, 0.9), "shift": 2.0}
    drawn = model.sample(num=3, classes=["cherry", "apple"], seed=40, **request)
    files = drawn.save(tmp_path)
    assert [file.name for file in files] == [
        "cherry_seed-00000040.png",
        "apple_seed-00000041.png",
        "cherry_seed-00000042.png",
    ]
    for row, file in enumerate(files):
        with Image.open(file) as image:
            stored = json.loads(image.text["latentflow"])
            pixels = np.array(image)
        assert (pixels == drawn.pixels[row].permute(1, 2, 0).numpy()).all()
        assert stored["class_name"] == ("cherry", "apple", "cherry")[row]
        assert stored["evaluations"] == drawn.evaluations[row]
        again = Drawing.model_validate({key: stored[key] for key in Drawing.model_fields if key in stored})
        assert again.seeds == [40 + row]
        assert again.sampling == drawn.drawing.sampling
        redrawn = join_samples(list(draw(model, again)))
        torch.testing.assert_close(redrawn.latents[0], drawn.latents[row], rtol=0, atol=ROUNDING)
        assert np.abs(np.array(redrawn.images[0]).astype(int) - pixels).max() <= 1


def read_pngs(folder: Path) -> dict[str, np.ndarray]:
    return {file.name: np.array(Image.open(file)).astype(int) for file in folder.glob("*seed-*.png")}


def same_files(one: Path, other: Path) -> None:
    left, right = read_pngs(one), read_pngs(other)
    assert left.keys() == right.keys()
    for name, pixels in left.items():
        assert np.abs(pixels - right[name]).max() <= 1, name


def test_two_processes_draw_what_one_draws(model_folder, tmp_path):
    """`latentflow sample` under torchrun: 7 images, so that the shares differ."""
    arguments = ("--num", "7", "--seed", "3", "--guidance", "2", "--steps", "4", "--device", "cpu")
    request = SampleRequest(num=7, seed=3, guidance=2.0, steps=4)
    sample_command(model_folder, request, tmp_path / "one", runtime=tiny.CPU)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ("torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port))
    # Without "--" torchrun itself stumbles over --num, which it takes for the beginning of one of its own options.
    command = ("-m", "--", "latentflow", "sample", model_folder, *arguments, "--out", tmp_path / "two")
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(read_pngs(tmp_path / "one")) == 7
    same_files(tmp_path / "one", tmp_path / "two")
    assert {file.name for file in (tmp_path / "two").glob("grid*")} == {"grid-0-of-2.png", "grid-1-of-2.png"}


def test_more_processes_than_images(model_folder, tmp_path):
    for rank in range(3):
        runtime = Runtime(torch.device("cpu"), rank, world=3)
        result = sample_command(model_folder, SampleRequest(num=2), tmp_path / "three", runtime=runtime)
        assert len(result.files) == (1 if rank < 2 else 0)
    sample_command(model_folder, SampleRequest(num=2), tmp_path / "one", runtime=tiny.CPU)
    same_files(tmp_path / "one", tmp_path / "three")


def test_an_idle_process_says_so_and_succeeds(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("latentflow.runtime.open_runtime", lambda *asked: Runtime(torch.device("cpu"), 2, world=3))
    command = ("sample", model_folder, "--num", 1, "--out", tmp_path / "out", "--device", "cpu", "--json")
    result = processes.run_here(command, capsys, monkeypatch)
    assert result.code == 0
    assert json.loads(result.out)["images"] == 0
