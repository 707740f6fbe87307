from __future__ import annotations

import pytest
import torch

from latentflow.networks.dit import DiTConfig
from latentflow.runtime import Runtime
from latentflow.training import compiling
from latentflow.training.compiling import compiles
from tests import tiny

GPU = Runtime(torch.device("cuda", 0), precision="bf16")


@pytest.fixture(scope="module")
def small(kl):
    """DiT-S/2 on latents of 32 x 32: 12 GFLOP forward."""
    config = tiny.model(kl).config
    return config.model_copy(
        update={"network": DiTConfig(name="DiT-S/2"), "image_size": 32 * config.autoencoder.factor}
    )


def test_long_runs_on_a_gpu_are_compiled(small):
    seconds_of_an_image = 3 * 12e9 / 100e12
    assert compiles("auto", small, round(200 / seconds_of_an_image), GPU)
    assert not compiles("auto", small, round(100 / seconds_of_an_image), GPU)
    shared = Runtime(GPU.device, world=8)
    assert not compiles("auto", small, round(200 / seconds_of_an_image), shared)


def test_a_cpu_is_not_worth_it(small):
    assert not compiles("auto", small, 10**12, tiny.CPU)


def test_what_is_said_is_done(small, monkeypatch):
    monkeypatch.setattr(compiling, "forward_flops", None)
    assert compiles("true", small, 1, tiny.CPU)
    assert not compiles("false", small, 10**12, GPU)
