"""Whether a network's blocks are compiled, and a step becomes one CUDA graph."""

from __future__ import annotations

from torch import nn

from latentflow.data.batches import TrainingImages
from latentflow.data.cache.resident import Switch
from latentflow.errors import ConfigError
from latentflow.model.config import ModelConfig
from latentflow.model.flow_model import FlowModel
from latentflow.runtime import Runtime
from latentflow.training.config import TrainingConfig
from latentflow.training.loop import micro_batches
from latentflow.training.memory import forward_flops
from latentflow.training.step import has_dropout

_WORTH_SECONDS = 180  # of the run in eager mode: compiling takes up to half a minute, and halves the rest
_EAGER_FLOPS = 100e12  # per second, of a large GPU in half precision; others are slower
_LAUNCH_SECONDS = 0.1  # more than the host takes to launch a step; products that take longer hide it


def compiles(word: Switch, config: ModelConfig, images_left: int, runtime: Runtime) -> bool:
    """Whether the network is compiled; "auto": on CUDA, if the rest of the run takes minutes.

    Args:
        images_left: to be trained on, over all processes.
    """
    if word != "auto":
        return word == "true"
    if runtime.device.type != "cuda":
        return False
    # A training step costs three forward passes: each product has two more in the backward pass.
    seconds = 3 * forward_flops(config) * images_left / runtime.world / _EAGER_FLOPS
    return seconds > _WORTH_SECONDS


def captures(config: TrainingConfig, model: FlowModel, images: TrainingImages, runtime: Runtime) -> bool:
    """Whether a step becomes one CUDA graph; auto: where it may, and launching its kernels takes longer than they do.

    Raises:
        ConfigError: it is asked for, and may not.
    """
    parts = micro_batches(config, runtime)
    refused = _why_not(model.network, images, runtime, parts.number)
    if config.cuda_graph == "true" and refused:
        raise ConfigError(f"training.cuda_graph = true: {refused}; use auto or false")
    if config.cuda_graph != "auto":
        return config.cuda_graph == "true"
    return not refused and 3 * forward_flops(model.config) * parts.size / _EAGER_FLOPS < _LAUNCH_SECONDS


def _why_not(network: nn.Module, images: TrainingImages, runtime: Runtime, num_micro_batches: int) -> str:
    """Why a step may not become one CUDA graph; empty: it may."""
    reasons = {
        f"a graph needs CUDA, and the device is {runtime.device.type}": runtime.device.type != "cuda",
        f"a graph serves one process, and there are {runtime.world}": runtime.world > 1,
        f"a graph is one micro-batch, and a step has {num_micro_batches}": num_micro_batches > 1,
        "the network has dropout, which the host seeds": has_dropout(network),
        "images are encoded in the step; encode them first": images.decodes,
        f"a graph is for one size, and there are {len(images.buckets)}": len(images.buckets) > 1,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")
