"""The exponential moving average of the weights, which is what gets sampled."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class EMA:
    """Moving average of a network's parameters: average <- average + (1 - decay) * (weights - average).

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates, so that the random initial weights are soon
    forgotten. Buffers, such as the statistics of a batch normalisation, are copied without averaging.

    Args:
        network: whose weights are averaged; the average starts as a copy of them.
        decay: in [0, 1); 0 keeps the newest weights.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        state = network.state_dict(keep_vars=True)  # the parameters themselves, which are never replaced
        self.average = {name: tensor.detach().clone() for name, tensor in state.items()}
        learned = {name for name, _ in network.named_parameters(remove_duplicate=False)}
        self._averaged = [tensor for name, tensor in self.average.items() if name in learned]
        self._weights = [tensor for name, tensor in state.items() if name in learned]
        self._copied = [tensor for name, tensor in self.average.items() if name not in learned]
        self._buffers = [tensor for name, tensor in state.items() if name not in learned]

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Take in the weights after `num_updates` earlier updates."""
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        torch._foreach_lerp_(self._averaged, self._weights, 1.0 - decay)
        if self._copied:
            torch._foreach_copy_(self._copied, self._buffers)

    def load(self, average: Mapping[str, Tensor]) -> None:
        """Copy a saved average in place."""
        for name, tensor in self.average.items():
            tensor.copy_(average[name])
