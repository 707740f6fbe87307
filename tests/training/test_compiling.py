from __future__ import annotations

import pytest
import torch

from latentflow.data.batches import TrainingImages
from latentflow.data.cache.reader import LatentCache
from latentflow.data.sources.images import open_images
from latentflow.errors import ConfigError
from latentflow.model.flow_model import FlowModel
from latentflow.networks.dit import DiTConfig
from latentflow.runtime import Runtime
from latentflow.sizes import Size
from latentflow.training import compiling
from latentflow.training.compiling import captures, compiles
from latentflow.training.config import TrainingConfig
from tests import tiny

GPU = Runtime(torch.device("cuda", 0), precision="bf16")


@pytest.fixture(scope="module")
def small(kl):
    """DiT-S/2 on latents of 32 x 32: 12 GFLOP forward."""
    config = tiny.model(kl).config
    return config.model_copy(
        update={"network": DiTConfig(name="DiT-S/2"), "image_size": Size.of(32 * config.autoencoder.factor)}
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


@pytest.fixture
def asked(small, kl, cache):
    """`captures` for a run of DiT-S/2 on a GPU, with what differs."""

    def ask(runtime=GPU, source=None, dropout=0.0, **training):
        model = tiny.model(kl)
        model.network.blocks.append(torch.nn.Dropout(dropout))
        images = TrainingImages(source or LatentCache(cache), seed=0, flip=False)
        config = TrainingConfig(**{"batch_size": 64, **training})
        return captures(config, FlowModel(small, model.network, model.autoencoder), images, runtime)

    return ask


def test_small_steps_of_one_process_become_a_graph(asked):
    assert asked()
    assert asked(cuda_graph=True)
    assert not asked(cuda_graph=False)
    assert asked(micro_batch_size=64)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"runtime": tiny.CPU}, "the device is cpu"),
        ({"runtime": Runtime(GPU.device, world=2)}, "one process, and there are 2"),
        ({"micro_batch_size": 16}, "one micro-batch, and a step has 4"),
        ({"dropout": 0.1}, "dropout"),
        ({"source": open_images("synthetic:4", 32)}, "images are encoded in the step"),
    ],
)
def test_what_cannot_be_a_graph_is_none_and_is_refused_if_asked_for(asked, given, reason):
    assert not asked(**given)
    with pytest.raises(ConfigError, match=f"training.cuda_graph = true: .*{reason}.*; use auto or false"):
        asked(**given, cuda_graph=True)


def test_large_steps_need_no_graph(asked, small):
    """At batch 4096 the products of DiT-S/2 alone take 1.5 s by the rule."""
    assert not asked(batch_size=4096)
    assert asked(batch_size=4096, cuda_graph=True)
