"""Sampling: one seed, one picture; requests that are checked; pictures that remember how they were made."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.autoencoder import Autoencoder
from latentflow.commands.sample import sample as sample_command
from latentflow.errors import ConfigError
from latentflow.flow.solvers import SOLVERS, integrate
from latentflow.flow.times import sampling_times
from latentflow.latent_flow import LatentFlow
from latentflow.sampling import pipeline
from latentflow.sampling.pipeline import Samples, draw, initial_noise, join_samples, sample
from latentflow.sampling.request import Blend, SampleRequest, check_request, make_request
from latentflow.shapes import Condition
from tests import processes, tiny

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
    whole = sample(model, batch_size=16, **request)
    assert whole.latents.std() > 1  # the field is far from zero
    for batch_size in (1, 3):
        same_pictures(sample(model, batch_size=batch_size, **request), whole)


def test_tight_tolerances_do_not_depend_on_the_batch(kl, monkeypatch):
    """In float64, where no error estimate comes near a threshold by rounding: the batch has no say at all."""
    model = tiny.model(kl, time_scale=20.0)
    model.network.double()
    noise = pipeline.initial_noise
    monkeypatch.setattr(pipeline, "initial_noise", lambda *given: noise(*given).double())
    monkeypatch.setattr(type(model), "decode", lambda self, latents: latents.float())
    solutions = []
    monkeypatch.setattr(pipeline, "integrate", lambda *a, **b: solutions.append(integrate(*a, **b)) or solutions[-1])
    drawn = {}
    for size in (1, 3, 8):
        solutions.clear()
        sample(model, num=8, batch_size=size, seed=5, guidance=3.0, solver="dopri5", rtol=1e-5, atol=1e-5)
        drawn[size] = [torch.cat([getattr(part, of) for part in solutions]) for of in ("x", "evaluations", "rejected")]
    for size in (1, 3):
        torch.testing.assert_close(drawn[size][0], drawn[8][0], rtol=0, atol=1e-12)
        assert torch.equal(drawn[size][1], drawn[8][1])
        assert torch.equal(drawn[size][2], drawn[8][2])


def test_adaptive_images_have_steps_of_their_own(kl):
    """Or the tests above would say little about adaptive solvers."""
    drawn = sample(tiny.model(kl), num=8, seed=5, solver="dopri5", rtol=1e-3, atol=1e-3)
    assert len(drawn.evaluations.unique()) > 2


def test_a_picture_does_not_depend_on_its_neighbours(model):
    """The same two seeds and classes amid others, and in another order."""
    preset = make_request(model, num=1, guidance=2.0, solver="dopri5", rtol=1e-3, atol=1e-3).sampling
    alone = SampleRequest(seeds=[7, 8], labels=[2, 0], told=["label"], sampling=preset)
    amid = SampleRequest(seeds=[1, 8, 2, 7, 3], labels=[0, 0, 1, 2, 1], told=["label"], sampling=preset)
    one, other = (join_samples(list(draw(model, request))) for request in (alone, amid))
    torch.testing.assert_close(one.latents, other.latents[[3, 1]], rtol=0, atol=ROUNDING)
    assert torch.equal(one.evaluations, other.evaluations[[3, 1]])


def test_seeds_and_labels_make_the_picture(model):
    preset = make_request(model).sampling
    request = SampleRequest(seeds=[3, 3, 3, 4], labels=[1, 1, 2, 1], told=["label"], sampling=preset)
    latents = join_samples(list(draw(model, request))).latents
    torch.testing.assert_close(latents[0], latents[1], rtol=0, atol=ROUNDING)
    assert (latents[0] - latents[2]).abs().max() > 0.1
    assert (latents[0] - latents[3]).abs().max() > 0.1


def test_the_same_request_gives_the_same_bits(model):
    one, other = (sample(model, num=3, seed=9, guidance=2.0) for _ in range(2))
    assert torch.equal(one.latents, other.latents)
    assert torch.equal(one.pixels, other.pixels)


def test_the_global_generator_has_no_say(model):
    torch.manual_seed(1)
    one = sample(model, num=2)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    other = sample(model, num=2)
    assert torch.equal(one.latents, other.latents)
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_is_standard_normal_and_its_own(model):
    noise = initial_noise(model, SampleRequest(seeds=range(200)))
    assert noise.shape == (200, *model.config.latent_shape)
    assert abs(noise.mean().item()) < 4 / noise.numel() ** 0.5
    assert abs(noise.std().item() - 1) < 4 / (2 * noise.numel()) ** 0.5
    assert torch.equal(initial_noise(model, SampleRequest(seeds=[17]))[0], noise[17])
    assert (noise[0] - noise[1]).abs().max() > 1


# What is computed


def test_sampling_is_the_flow_from_noise_to_data(model):
    """By hand: v = v_null + s (v_cond - v_null), Heun's method from t = 1 to t = 0, decode."""
    drawn = sample(model, num=2, classes=["cherry"], seed=3, solver="heun", steps=4, guidance=2.0)

    def velocity(x, t):
        cond, null = (
            model.network(x, t.float(), Condition(torch.full((2,), label, dtype=torch.int64))) for label in (2, 3)
        )
        return null + 2.0 * (cond - null)

    with torch.inference_mode():
        x = integrate(velocity, initial_noise(model, drawn.request), sampling_times(4), solver="heun").x
    torch.testing.assert_close(drawn.latents, x, rtol=0, atol=ROUNDING)
    raw = x / 0.5 + 0.1  # the autoencoder's scaling and shift factors, undone
    pixels = model.autoencoder.model.decode(raw).sample.clamp(-1, 1)
    assert (drawn.pixels - ((pixels + 1) * 127.5).round()).abs().max() <= 1
    assert drawn.pixels.dtype == torch.uint8
    assert drawn.evaluations.tolist() == [16, 16]


def test_evaluations_count_network_calls(model, monkeypatch):
    calls = []
    network = model.network

    def counting(latents, time, condition):
        calls.append(len(latents))
        return network(latents, time, condition)

    monkeypatch.setattr(model, "network", type("Counting", (), {"__call__": staticmethod(counting)})())
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cpu")))
    for solver, steps, expected in (("euler", 5, 5), ("heun", 5, 10), ("rk4", 5, 20), ("ab2", 5, 6)):
        for guidance, factor in ((1.0, 1), (2.0, 2)):
            calls.clear()
            drawn = sample(model, num=3, solver=solver, steps=steps, guidance=guidance)
            assert drawn.evaluations.tolist() == [expected * factor] * 3
            assert sum(calls) == drawn.evaluations.sum()


def test_a_shift_moves_the_grid(model):
    even, shifted = (sample(model, num=1, solver="euler", steps=3, shift=shift).latents for shift in (1.0, 3.0))
    assert (even - shifted).abs().max() > 0.01


def test_an_unconditional_model(kl):
    model = tiny.model(kl, class_names=(), label_dropout=0.0)
    drawn = sample(model, num=5, batch_size=2, seed=1)
    assert drawn.request.labels == []
    assert drawn.pixels.shape == (5, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    same_pictures(drawn, sample(model, num=5, batch_size=5, seed=1))


def test_the_method_of_the_model(model):
    assert torch.equal(
        model.sample(num=2, seed=4, classes=[1]).pixels, sample(model, num=2, seed=4, classes=[1]).pixels
    )


def test_a_saved_model_draws_the_same(model, model_folder):
    loaded = LatentFlow.from_pretrained(model_folder, device="cpu")
    assert loaded.config == model.config
    one, other = (sample(flow, num=2, seed=4, guidance=1.5) for flow in (model, loaded))
    assert torch.equal(one.latents, other.latents)
    assert torch.equal(one.pixels, other.pixels)


def test_large_batches_are_decoded_in_slices(kl, monkeypatch):
    sliced = Autoencoder(tiny.kl(), "sliced")
    sliced.slice_size = 2
    one, other = (sample(tiny.model(autoencoder), num=5) for autoencoder in (kl, sliced))
    assert torch.equal(one.latents, other.latents)
    assert (one.pixels.int() - other.pixels.int()).abs().max() <= 1


# Requests


def test_classes_are_dealt_out_in_turn(model):
    assert make_request(model, num=5, classes=["cherry", 0]).labels == [2, 0, 2, 0, 2]
    assert make_request(model, num=5, classes=["1"]).labels == [1] * 5
    assert make_request(model, num=5).labels == [0, 1, 2, 0, 1]


def test_seeds_count_upwards(model):
    assert make_request(model, num=3, seed=40).seeds == [40, 41, 42]


def test_what_is_not_asked_for_comes_from_the_model(kl):
    model = tiny.model(kl, solver="rk4", steps=7, guidance=2.5, guidance_interval=(0.1, 0.9))
    assert make_request(model).sampling == model.config.sampling
    assert make_request(model, steps=3).sampling == model.config.sampling.model_copy(update={"steps": 3})
    assert make_request(model, guidance=0.0).sampling.guidance == 0.0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num": 0}, "at least 1"),
        ({"steps": 0}, "at least 1 step"),
        ({"guidance": -1.0}, "guidance -1.0 is below zero"),
        ({"guidance": float("nan")}, "nan"),
        ({"guidance": float("inf")}, "inf"),
        ({"guidance_interval": (0.8, 0.2), "guidance": 2.0}, "0.8"),
        ({"guidance_interval": (-0.1, 0.2), "guidance": 2.0}, "-0.1"),
        ({"solver": "huen"}, "did you mean 'heun'?"),
        ({"solver": "dopri5", "rtol": -1e-3}, "rtol"),
        ({"solver": "dopri5", "atol": 0.0}, "atol"),
        ({"shift": 0.0}, "shift"),
        ({"classes": ["aple"]}, "did you mean 'apple'?"),
        ({"classes": [3]}, "classes 0 to 2"),
        ({"classes": [-1]}, "classes 0 to 2"),
    ],
)
def test_requests_that_cannot_be_drawn(model, given, said):
    with pytest.raises(ConfigError) as caught:
        make_request(model, **given)
    assert said in str(caught.value)


def test_guidance_needs_a_null_condition_that_was_trained(kl):
    never_dropped = tiny.model(kl, label_dropout=0.0)
    with pytest.raises(ConfigError, match=r"conditioning\.label_dropout = 0"):
        sample(never_dropped, guidance=1.5)
    assert sample(never_dropped, guidance=1.0).pixels.shape[0] == 1
    unconditional = tiny.model(kl, class_names=(), label_dropout=0.0)
    with pytest.raises(ConfigError, match="unconditional"):
        sample(unconditional, guidance=1.5)
    with pytest.raises(ConfigError, match="this model has no classes"):
        sample(unconditional, classes=[0])


@pytest.mark.parametrize("labels", [[], [0], [0, 1, 2], [0, 3]])
def test_labels_that_do_not_fit_the_seeds(model, labels):
    with pytest.raises(ConfigError):
        check_request(model, SampleRequest(seeds=[0, 1], labels=labels, told=["label"]))


def test_every_solver_draws(model):
    for solver in SOLVERS:
        drawn = sample(model, num=1, solver=solver, steps=4, rtol=1e-2, atol=1e-2)
        assert drawn.latents.isfinite().all()


# Files


def test_a_png_holds_its_request_and_can_be_made_again(model, tmp_path):
    request = {"solver": "heun", "steps": 3, "guidance": 2.0, "guidance_interval": (0.1, 0.9), "shift": 2.0}
    drawn = sample(model, num=3, classes=["cherry", "apple"], seed=40, **request)
    files = drawn.save(tmp_path)
    assert [file.name for file in files] == [f"class-00{c}_seed-000000{s}.png" for c, s in ((2, 40), (0, 41), (2, 42))]
    for row, file in enumerate(files):
        with Image.open(file) as image:
            told = json.loads(image.text["latentflow"])
            pixels = np.array(image)
        assert (pixels == drawn.pixels[row].permute(1, 2, 0).numpy()).all()
        assert told["class_name"] == ("cherry", "apple", "cherry")[row]
        assert told["evaluations"] == drawn.evaluations[row]
        again = SampleRequest.model_validate({key: told[key] for key in SampleRequest.model_fields})
        assert again.seeds == [40 + row]
        assert again.sampling == drawn.request.sampling
        redrawn = join_samples(list(draw(model, again)))
        torch.testing.assert_close(redrawn.latents[0], drawn.latents[row], rtol=0, atol=ROUNDING)
        assert np.abs(np.array(redrawn.images[0]).astype(int) - pixels).max() <= 1


@pytest.mark.parametrize(
    ("of", "name"),
    [
        ({"labels": [3]}, "class-003_seed-00000017.png"),
        ({}, "seed-00000017.png"),
        ({"blends": [Blend(seed=18, weight=0.25)]}, "seed-00000017_to-seed-00000018_at-0.250.png"),
        (
            {"labels": [3], "blends": [Blend(seed=17, weight=0.5, label=12)]},
            "class-003_seed-00000017_to-class-012_at-0.500.png",
        ),
    ],
)
def test_names_of_files(of, name):
    nothing = torch.zeros(1, 0)
    assert Samples(nothing, nothing, nothing, SampleRequest(seeds=[17], **of)).name(0) == name


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
    sample_command(model_folder, tmp_path / "one", num=7, seed=3, guidance=2.0, steps=4, device="cpu")
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


def test_more_processes_than_images(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        result = sample_command(model_folder, tmp_path / "three", num=2, device="cpu")
        assert len(result.files) == (1 if rank < 2 else 0)
    monkeypatch.undo()
    sample_command(model_folder, tmp_path / "one", num=2, device="cpu")
    same_files(tmp_path / "one", tmp_path / "three")


def test_an_idle_process_says_so_and_succeeds(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    command = ("sample", model_folder, "--num", 1, "--out", tmp_path / "out", "--device", "cpu", "--json")
    result = processes.run_here(command, capsys, monkeypatch)
    assert result.code == 0
    assert json.loads(result.out)["images"] == 0
