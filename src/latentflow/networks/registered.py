"""One's own networks in a model: registered under a name, so that a folder can say which one it holds.

A model folder holds no code. Its config names the network and the options to build it with, and a program that loads
the folder registers the network first.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal, TypeVar

from pydantic import Field, JsonValue
from torch import nn

from latentflow.errors import ConfigError, nearest
from latentflow.records import Record

NAMING = "register it with register_network, and assemble the model from RegisteredNetwork(name=..., options=...)"
"""How one's own network gets a name."""

Make = TypeVar("Make", bound=Callable[..., nn.Module])

_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}"
_MAKERS: dict[str, Callable[..., nn.Module]] = {}


class RegisteredNetwork(Record):
    """A network that a program registered with `register_network`."""

    kind: Literal["registered"] = "registered"
    name: str = Field(pattern=f"^{_NAME}$", description="What it was registered as.")
    options: dict[str, JsonValue] = Field(
        default_factory=dict, description="Arguments to build it with; JSON holds them."
    )
    size_multiple: int = Field(
        default=1, ge=1, le=4096, description="The number that height and width of the latents must be multiples of."
    )

    @property
    def title(self) -> str:
        """Its name, for people."""
        return f"registered network {self.name}"

    @property
    def maker(self) -> Callable[..., nn.Module]:
        """The class or function that was registered.

        Raises:
            ConfigError: no network of this name is registered in this program.
        """
        make = _MAKERS.get(self.name)
        if make is None:
            known = f"; {nearest(self.name, _MAKERS)}" if _MAKERS else ""
            raise ConfigError(
                f"no network is registered as {self.name!r} in this program{known}; import the module that calls "
                f"register_network({self.name!r}) before the model is loaded"
            )
        return make

    def build(self) -> nn.Module:
        """The network with fresh weights.

        Raises:
            ConfigError: see `maker`; or it does not take these options.
        """
        make = self.maker
        try:
            return make(**self.options)
        except TypeError as error:
            raise ConfigError(
                f"network {self.name!r} cannot be built with the options {self.options}: {error}"
            ) from None


class UnnamedNetwork(Record):
    """A network that exists in this program alone: it can be trained and drawn with, but not saved."""

    kind: Literal["unnamed"] = "unnamed"
    class_name: str = Field(description="Of the module, for people.")
    size_multiple: int = Field(default=1, ge=1, le=4096)

    @property
    def title(self) -> str:
        """Its class, for people."""
        return f"unnamed network {self.class_name}"

    @property
    def maker(self) -> Callable[..., nn.Module]:
        """Refuse: nothing says how it is built.

        Raises:
            ConfigError: always, with the remedy.
        """
        raise ConfigError(f"the network is a {self.class_name} without a name, so no folder can hold it; {NAMING}")

    def build(self) -> nn.Module:
        """Refuse, as `maker` does."""
        return self.maker()


def register_network(name: str) -> Callable[[Make], Make]:
    """Register one's own network, so that models with it can be saved and loaded.

        @register_network("convnet")
        class ConvNet(nn.Module): ...

    The network is called as network(latents [B, C, h, w], time [B], condition) => velocity [B, C, h, w], with time 0 at
    data and 1 at noise, and a `Condition`. Its config is `RegisteredNetwork(name="convnet", options={...})`.

    Args:
        name: of letters, digits, "_", "-" and "."; it stands in the config.json of saved models.

    Returns:
        A decorator for a class, or for a function, that is called with the options and returns the network.

    Raises:
        ConfigError: the name is not one, or it belongs to another network. The same class may be registered again, as
            when a notebook's cell is repeated.
    """
    if not re.fullmatch(_NAME, name):
        raise ConfigError(f"the network name {name!r}: give letters and digits, like convnet, with _ - . between them")

    def registered(make: Make) -> Make:
        before = _MAKERS.get(name)
        if before is not None and _place(before) != _place(make):
            raise ConfigError(
                f"the network name {name!r} belongs to {_place(before)}; give {_place(make)} another name"
            )
        _MAKERS[name] = make
        return make

    return registered


def _place(make: Callable[..., nn.Module]) -> str:
    return f"{make.__module__}.{getattr(make, '__qualname__', repr(make))}"
