"""The families of networks whose weights are understood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentflow.convert.architecture import Architecture
from latentflow.convert.dit import DiTOptions, dit
from latentflow.convert.edm_unet import EdmUNetOptions, edm_unet
from latentflow.convert.lfm import lfm
from latentflow.errors import ConfigError, nearest

FAMILIES = ("lfm", "sit", "dit", "edm")


def architecture(family: str, options: Mapping[str, Any], **task: Any) -> Architecture:
    """A published network as one of ours, from the options its own program builds it with.

        network = architecture("sit", {"hidden_size": 1152, "depth": 28, "num_heads": 16}).load(weights)
        velocity = network(latents, time, Condition(labels))

    Args:
        family: "lfm" (flags of its training scripts, or arguments of its class DiT), "sit" and "dit" (arguments of
            their classes), "edm" (arguments of DhariwalUNet and SongUNet, and `model_type`).
        task: of "lfm", `inpainting` and `num_map_classes`; of "dit", `keep_variance`.

    Raises:
        ConfigError: an unknown family or option.
    """
    if family == "lfm":
        return lfm(options, **task)
    if family in ("sit", "dit"):
        return dit(DiTOptions.read(options), family, **task)
    if family == "edm":
        return edm_unet(EdmUNetOptions.read(options), **task)
    raise ConfigError(f"unknown family {family!r}: {nearest(family, FAMILIES)}")
