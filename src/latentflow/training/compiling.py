"""Whether compiling a network's blocks is worth its time."""

from __future__ import annotations

from latentflow.data.cache.resident import Switch
from latentflow.model.config import ModelConfig
from latentflow.runtime import Runtime
from latentflow.training.memory import forward_flops

_WORTH_SECONDS = 180  # of the run in eager mode: compiling takes up to half a minute, and halves the rest
_EAGER_FLOPS = 100e12  # per second, of a large GPU in half precision; others are slower


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
