"""A network together with what only its training needs."""

from __future__ import annotations

from torch import nn


class InTraining(nn.Module):
    """Several networks that are trained, and checkpointed, as one.

    Attributes:
        network: the one that the model consists of; only it is averaged and saved.
    """

    network: nn.Module


def sampled_part(network: nn.Module) -> nn.Module:
    """What of a network in training belongs to the model: all but the other parts of an `InTraining`."""
    return network.network if isinstance(network, InTraining) else network
