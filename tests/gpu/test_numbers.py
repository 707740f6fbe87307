"""The same numbers on the CPU and on a GPU, up to rounding: random ones, velocities, pictures, steps of training."""

from __future__ import annotations

import pytest
import torch

from latentflow.commands.train import train
from latentflow.data.cache.reader import LatentCache
from latentflow.flow.guidance import ConditionedVelocity
from latentflow.flow.solvers import integrate
from latentflow.flow.times import sampling_times
from latentflow.randomness import ImageRandom
from latentflow.runtime import Runtime
from latentflow.shapes import Condition
from latentflow.training.log import read_metrics
from tests import tiny
from tests.gpu.test_training import checkpoint, furthest

POSITIONS = torch.tensor([0, 1, 7, 4096, 2**31 + 5, 2**40])


def drawn(device: str) -> list[torch.Tensor]:
    """Numbers of every kind, in the order that a step asks for them."""
    random = ImageRandom.at(5, "step", POSITIONS.to(device), torch.device(device))
    return [x.cpu() for x in (random.uniform(), random.normal(4, 8, 8), random.uniform(), random.normal(3))]


def test_random_numbers_do_not_depend_on_the_device(device):
    for ours, theirs in zip(drawn(device), drawn("cpu"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_uniform_numbers_are_the_same_to_the_bit(device):
    """What is decided by comparing, such as which label is dropped, must be decided alike on every device."""
    ours, theirs = drawn(device), drawn("cpu")
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[2], theirs[2])


@pytest.mark.parametrize("conditioning", [{}, tiny.SPATIAL], ids=["labels", "everything"])
def test_velocities_agree(device, kl, conditioning):
    """In IEEE float32, for every condition that a model can have."""
    model = tiny.model(kl, conditioning=conditioning)
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(3, *model.config.latent_shape, generator=random)
    time = torch.tensor([0.1, 0.5, 0.9])
    conditions = {"labels": torch.tensor([0, 2, 3])}
    if conditioning:
        conditions["masked_latents"] = torch.randn(latents.shape, generator=random)
        conditions["mask"] = torch.rand(3, 1, *latents.shape[2:], generator=random)
        conditions["class_fractions"] = torch.rand(3, 3, *latents.shape[2:], generator=random)
    here = model.velocity(latents, time, model.config.conditioning.build(latents.shape, "cpu", Condition(**conditions)))
    model.to(Runtime(torch.device(device), precision="fp32"))
    conditions = {name: value.to(device) for name, value in conditions.items()}
    condition = model.config.conditioning.build(latents.shape, device, Condition(**conditions))
    there = model.velocity(latents.to(device), time.to(device), condition).cpu()
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", ["euler", "heun", "rk4", "ab4", "dpmpp3m", "unipc3", "dopri5"])
def test_pictures_agree(device, kl, solver):
    """One seed, one picture, on any device: latents to rounding, pixels to a level."""
    asked = {"num": 4, "seed": 7, "classes": [0, 1], "solver": solver, "guidance": 2.0}
    asked |= {} if solver == "dopri5" else {"steps": 6}
    here = tiny.model(kl, time_scale=1.0).sample(**asked)
    there = tiny.model(kl, time_scale=1.0).to(Runtime(torch.device(device), precision="fp32")).sample(**asked)
    torch.testing.assert_close(there.latents.cpu(), here.latents, rtol=1e-3, atol=1e-4)
    assert (there.pixels.int().cpu() - here.pixels.int()).abs().max() <= 1


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_pictures_in_less_are_nearly_the_same(device, kl, precision):
    if device == "cpu" and precision == "fp16":
        pytest.skip("fp16 needs a GPU")
    asked = {"num": 4, "seed": 7, "classes": [0, 1], "solver": "heun", "steps": 6}
    here = tiny.model(kl, time_scale=1.0).sample(**asked).latents
    place = Runtime(torch.device(device), precision=precision)
    there = tiny.model(kl, time_scale=1.0).to(place).sample(**asked).latents.cpu()
    assert there.dtype == torch.float32
    assert (there - here).abs().max() < 0.05 * here.abs().max()


def test_training_agrees(recipe, runtime, device):
    """The first steps of a run in IEEE float32 have the losses and weights that they have on the CPU."""
    given = {"precision": "fp32", "steps": 5, "log_every": 1}
    here = train(recipe("here", training=given), runtime=tiny.CPU).run
    there = train(recipe("there", training=given), runtime=runtime("fp32")).run
    for ours, theirs in zip(read_metrics(there), read_metrics(here), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert furthest(checkpoint(here, 5)[1], checkpoint(there, 5)[1]) < 2e-2  # Adam divides by what is nearly zero


def test_a_cache_encoded_on_a_gpu_is_the_one_of_the_cpu(cache, gpu_cache):
    """To the rounding of float16, in which moments are stored, and of TF32 convolutions."""
    ours, theirs = LatentCache(gpu_cache), LatentCache(cache)
    rows = list(range(len(theirs)))
    assert ours.names() == theirs.names()
    assert ours.labels(rows).tolist() == theirs.labels(rows).tolist()
    for flipped in ([False] * len(rows), [True] * len(rows)):
        here, there = (one.moments(rows, flipped) for one in (theirs, ours))
        assert (there - here).abs().max() < 1e-2 * here.abs().max()


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.7)], ids=["everywhere", "in an interval"])
@pytest.mark.parametrize("solver", ["euler", "heun", "ab3"])
def test_fixed_steps_never_wait_for_the_gpu(cuda, kl, solver, interval):
    """CUDA itself raises where the solver's loop synchronises."""
    model = tiny.model(kl).to(Runtime(torch.device("cuda"), precision="bf16"))
    conditioning = model.config.conditioning
    noise = torch.randn(4, *model.config.latent_shape, device="cuda")
    labels = torch.tensor([0, 1, 2, 0], device="cuda")
    condition = conditioning.build(noise.shape, "cuda", Condition(labels=labels))
    null = conditioning.without(condition, ["label"])
    velocity = ConditionedVelocity(model.velocity, condition, null, 2.0, interval=interval)
    times = sampling_times(5)
    with torch.inference_mode():
        integrate(velocity, noise, times, solver=solver)  # what is made once is made
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            integrate(velocity, noise, times, solver=solver)
        finally:
            torch.cuda.set_sync_debug_mode("default")
