"""Load weights from files into a network: every key and shape is checked before memory is allocated."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from latentflow.artifacts import open_tensors
from latentflow.errors import ArtifactError

LOADING = threading.RLock()
"""Held while a library builds modules: several libraries change global state of the process for that."""


@contextmanager
def without_memory() -> Iterator[None]:
    """Build modules on the meta device: they have shapes, but use no memory."""
    with LOADING, torch.device("meta"):  # the default device of torch is shared by all threads
        yield


class _WithoutStart(TorchFunctionMode):
    """Skip the random initialisation of weights, which loading overwrites, in the thread that enters it."""

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def tensor_shapes(path: Any) -> dict[str, list[int]]:
    """The shape of every tensor in a safetensors file, from its header.

    Raises:
        ArtifactError: see `open_tensors`.
    """
    with open_tensors(path) as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a dict


def require_fit(
    make: Callable[[], nn.Module], shapes: Mapping[str, Sequence[int]], origin: object, config: str = "its config"
) -> None:
    """Refuse weights whose names or shapes differ from those of the network that `make` builds; uses no memory.

    Raises:
        ArtifactError: a key is missing or unknown, or a shape differs.
    """
    try:
        with without_memory():
            expected = make().state_dict()
    except Exception as error:  # ConfigError from our networks, anything from torch and diffusers
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ArtifactError(f"{config} describes a network that cannot be built: {reason}") from error
    _compare({name: list(tensor.shape) for name, tensor in expected.items()}, shapes, origin, config)


def filled(make: Callable[[], nn.Module], weights: Mapping[str, Tensor], origin: object) -> nn.Module:
    """The network that `make` builds, with `weights`; torch's random state is not advanced.

    Raises:
        ArtifactError: see `load_weights`.
    """
    with LOADING, _WithoutStart():
        network = make()
    load_weights(network, weights, origin)
    return network


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], origin: object) -> None:
    """Copy `weights` into `network`, after checking every key and shape.

    Raises:
        ArtifactError: a key is missing or unknown, a shape differs, or a value is not finite.
    """
    require_values(network.state_dict(), weights, origin)
    network.load_state_dict(dict(weights))


def require_values(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], origin: object) -> None:
    """Refuse weights whose names, shapes or kinds of numbers differ from `expected`, or that are not finite.

    Raises:
        ArtifactError: naming the tensor.
    """
    shapes = {name: list(tensor.shape) for name, tensor in expected.items()}
    _compare(shapes, {name: list(tensor.shape) for name, tensor in weights.items()}, origin, "its config")
    for name, tensor in weights.items():
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise ArtifactError(f"{origin}: {name!r} holds {tensor.dtype}, and {expected[name].dtype} is needed")
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise ArtifactError(f"{origin}: {name!r} holds values that are not finite; copy or fetch the file again")


def _compare(
    expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], origin: object, config: str
) -> None:
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        key, what = (missing[0], "is missing") if missing else (unknown[0], "is unknown")
        raise ArtifactError(
            f"{origin} does not fit {config}: {key!r} {what} ({len(missing)} missing, {len(unknown)} unknown)"
        )
    for key, shape in expected.items():
        if list(found[key]) != list(shape):
            raise ArtifactError(f"{origin}: {key!r} has shape {list(found[key])}, {config} asks for {list(shape)}")
