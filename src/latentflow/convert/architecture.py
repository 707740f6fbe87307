"""A published network as one of ours: its config, and where each weight goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import get_args, get_origin

import torch
from pydantic import ConfigDict, ValidationError, model_validator
from torch import Tensor, nn

from latentflow.convert.keymap import KeyMap
from latentflow.errors import ConfigError, nearest
from latentflow.networks.dit import DiTConfig
from latentflow.networks.unet import UNetConfig
from latentflow.networks.velocity_network import NETWORKS
from latentflow.records import Record, explain
from latentflow.weights import filled, without_memory


class PublishedOptions(Record):
    """Arguments of a published class, under its own names.

    Raises:
        ConfigError: an unknown argument (the nearest one is named), or an impossible value.
    """

    model_config = ConfigDict(populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: dict) -> dict:
        names = {name for key, field in cls.model_fields.items() for name in (key, field.alias) if name}
        for key in given:
            if key not in names:
                raise ConfigError(f"unknown option {key!r} of the published network; {nearest(key, sorted(names))}")
        lists = {key for key, field in cls.model_fields.items() if _is_list(field.annotation)}
        return {key: _numbers(value) if key in lists else value for key, value in given.items()}

    @classmethod
    def read(cls, values: Mapping[str, object]):
        """Check the options in `values`.

        Raises:
            ConfigError: see the class.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise explained(error) from error


def explained(error: ValidationError) -> ConfigError:
    """What pydantic says about the options of a published network, as one line."""
    missing = [str(e["loc"][-1]) for e in error.errors() if e["type"] == "missing"]
    if missing:
        name = ", or its name, such as name=SiT-XL/2" if "hidden_size" in missing else ""
        return ConfigError(f"the published network needs {', '.join(missing)}; give them as key=value{name}")
    return ConfigError(f"published network: {explain(error)}")


def _is_list(annotation: object) -> bool:
    return tuple in (get_origin(annotation), *map(get_origin, get_args(annotation)))


def _numbers(value: object) -> object:
    """A list as written on a command line: 16 8, or 16,8, or 16."""
    if isinstance(value, int):
        return (value,)
    if isinstance(value, str):
        return tuple(value.replace(",", " ").split())
    return value


@dataclass(frozen=True)
class Architecture:
    """A published network in our terms.

    Attributes:
        network: our config.
        channels: latent channels.
        out_channels: channels of the network's output.
        keys: where the published weights go.
        num_classes, inpainting, num_map_classes: its conditions; see `DiT` and `UNet`.
    """

    network: DiTConfig | UNetConfig
    channels: int
    out_channels: int
    keys: KeyMap
    num_classes: int = 0
    inpainting: bool = False
    num_map_classes: int = 0

    def empty(self, device: torch.device | str = "meta") -> nn.Module:
        """The network without the published weights; on the meta device it uses no memory."""
        with without_memory() if str(device) == "meta" else torch.device(device):
            return NETWORKS[self.network.kind](
                self.network,
                in_channels=self.channels,
                out_channels=self.out_channels,
                num_classes=self.num_classes,
                inpainting=self.inpainting,
                num_map_classes=self.num_map_classes,
            )

    def load(self, weights: Mapping[str, Tensor], origin: str = "the checkpoint") -> nn.Module:
        """The network with published weights, in evaluation mode and without gradients.

        Raises:
            ArtifactError: they do not fit; see `KeyMap.ours`.
        """
        state = self.keys.ours(weights, self.empty().state_dict(), origin)
        return filled(partial(self.empty, "cpu"), state, origin).eval().requires_grad_(False)
