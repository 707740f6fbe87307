"""Moving averages of the weights, which are what gets sampled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from latentflow.networks.in_training import frozen_parameters
from latentflow.training.averaging import exponent_of


class Average:
    """A moving average of a network's parameters: average <- average + share * (weights - average).

    Buffers, such as the statistics of a batch normalisation, are copied without averaging. Frozen parameters are their
    own average, and not copied.

    Args:
        network: whose weights are averaged; the average starts as a copy of them.

    Attributes:
        average: by name, as in the network's `state_dict`; updated in place.
        frozen: the parameters among them that are frozen.
    """

    def __init__(self, network: nn.Module):
        state = network.state_dict(keep_vars=True)  # the parameters themselves, which are never replaced
        self.frozen = {name: tensor.detach() for name, tensor in frozen_parameters(network).items()}
        moving = {name: tensor for name, tensor in state.items() if name not in self.frozen}
        copies = {name: tensor.detach().clone() for name, tensor in moving.items()}
        self.average = {name: copies[name] if name in copies else self.frozen[name] for name in state}
        learned = {name for name, _ in network.named_parameters(remove_duplicate=False)}
        self._averaged = [tensor for name, tensor in copies.items() if name in learned]
        self._weights = [tensor for name, tensor in moving.items() if name in learned]
        self._copied = [tensor for name, tensor in copies.items() if name not in learned]
        self._buffers = [tensor for name, tensor in moving.items() if name not in learned]

    @torch.no_grad()
    def move(self, share: float) -> None:
        """Move by `share`, in (0, 1], towards the weights."""
        torch._foreach_lerp_(self._averaged, self._weights, share)
        if self._copied:
            torch._foreach_copy_(self._copied, self._buffers)

    @property
    def moving(self) -> dict[str, Tensor]:
        """The average of what is not frozen."""
        return {name: tensor for name, tensor in self.average.items() if name not in self.frozen}

    def load(self, average: Mapping[str, Tensor]) -> None:
        """Copy a saved average of what is not frozen in place."""
        for name, tensor in self.moving.items():
            tensor.copy_(average[name])


class PowerAverage(Average):
    """The average with a power function as its profile (arXiv 2312.02696, section 3.1).

    average(t) = beta average(t - 1) + (1 - beta) weights(t), beta = (1 - 1 / t)^(gamma + 1), which holds the weights of
    step i by (i^(gamma + 1) - (i - 1)^(gamma + 1)) / t^(gamma + 1): nothing of those before the first step.

    Args:
        length: standard deviation of the profile as a share of the steps so far; see `training.averaging`.
    """

    def __init__(self, network: nn.Module, length: float):
        super().__init__(network)
        self.length, self.exponent = length, exponent_of(length)

    def update(self, num_updates: int) -> None:
        """Take in the weights after `num_updates` earlier updates."""
        t = num_updates + 1
        # 1 - beta = 1 - (1 - 1 / t)^(gamma + 1), without the difference of two numbers near 1
        self.move(1.0 if t == 1 else -math.expm1((self.exponent + 1) * math.log1p(-1 / t)))


class EMA(Average):
    """The exponential moving average of a run, and the power function averages next to it.

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates, so that the random initial weights are soon
    forgotten.

    Args:
        decay: in [0, 1); 0 keeps the newest weights.
        lengths: of the averages next to it.

    Attributes:
        powers: the averages next to it, by length.
    """

    def __init__(self, network: nn.Module, decay: float, lengths: Sequence[float] = ()):
        super().__init__(network)
        self.decay = decay
        self.powers = {length: PowerAverage(network, length) for length in lengths}

    def update(self, num_updates: int) -> None:
        """Take in the weights after `num_updates` earlier updates."""
        self.move(1.0 - min(self.decay, (1 + num_updates) / (10 + num_updates)))
        for power in self.powers.values():
            power.update(num_updates)
