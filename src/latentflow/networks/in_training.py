"""A network together with what only its training needs, and without what it leaves as it is."""

from __future__ import annotations

from torch import nn


class InTraining(nn.Module):
    """Several networks that are trained, and checkpointed, as one.

    Attributes:
        network: the one that the model consists of; only it is averaged and saved.
    """

    network: nn.Module


def frozen_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a network that training leaves as they are, by each of their names."""
    named = network.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if not parameter.requires_grad}


def sampled_part(network: nn.Module) -> nn.Module:
    """What of a network in training belongs to the model: all but the other parts of an `InTraining`."""
    return network.network if isinstance(network, InTraining) else network
