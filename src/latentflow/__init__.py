"""latentflow: flow matching in the latent space of a pretrained autoencoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentflow.api import LatentFlow
    from latentflow.networks.registered import RegisteredNetwork, register_network

__version__ = "0.1.0"
__all__ = ["LatentFlow", "RegisteredNetwork", "__version__", "register_network"]


def __getattr__(name: str) -> object:
    """Import what is offered when it is first asked for, so that `latentflow --help` need not import torch."""
    if name == "LatentFlow":
        from latentflow.api import LatentFlow

        return LatentFlow
    if name in __all__:
        from latentflow.networks import registered

        return getattr(registered, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
