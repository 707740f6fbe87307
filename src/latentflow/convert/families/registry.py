"""The families of networks whose weights can be converted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from latentflow.convert.architecture import Architecture, explained
from latentflow.convert.families.dit import DiTOptions, dit
from latentflow.convert.families.edm_unet import EdmUNetOptions, edm_unet
from latentflow.convert.families.lfm import lfm
from latentflow.errors import ConfigError, nearest

FAMILIES = ("lfm", "sit", "dit", "edm")


def architecture(
    family: str,
    options: Mapping[str, Any],
    *,
    inpainting: bool = False,
    num_map_classes: int = 0,
) -> Architecture:
    """A published network as one of ours, from the options of the program that built it.

        network = architecture("sit", {"hidden_size": 1152, "depth": 28, "num_heads": 16}).load(weights)
        velocity = network(latents, time, Condition(labels))

    Args:
        family: "lfm" (flags of its training scripts, or arguments of its class DiT), "sit" and "dit" (arguments of
            their classes), "edm" (arguments of DhariwalUNet and SongUNet, and `model_type`).
        inpainting, num_map_classes: for "lfm": what follows the latents in the input; see `lfm`.

    Raises:
        ConfigError: an unknown family or option, or values that do not fit together.
    """
    require_family(family)
    if family != "lfm" and (inpainting or num_map_classes):
        raise ConfigError(f"inpainting and num_map_classes are for lfm; networks of {family} have no such conditions")
    try:
        if family == "lfm":
            return lfm(options, inpainting=inpainting, num_map_classes=num_map_classes)
        if family == "edm":
            return edm_unet(EdmUNetOptions.read(options))
        return dit(DiTOptions.read(options), family)
    except ValidationError as error:  # of the network that these options describe
        raise explained(error) from error


def require_family(family: str) -> None:
    """Refuse an unknown family.

    Raises:
        ConfigError: naming the nearest one.
    """
    if family not in FAMILIES:
        raise ConfigError(f"unknown family {family!r}: {nearest(family, FAMILIES)}")
