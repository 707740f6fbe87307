"""latentflow: flow matching in the latent space of a pretrained autoencoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentflow.api import LatentFlow

__version__ = "0.1.0"
__all__ = ["LatentFlow", "__version__"]


def __getattr__(name: str) -> object:
    """Import `LatentFlow` when it is first asked for, so that `latentflow --help` need not import torch."""
    if name == "LatentFlow":
        from latentflow.api import LatentFlow

        return LatentFlow
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
