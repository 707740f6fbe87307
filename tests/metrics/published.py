"""The published weights' recipe and values of ../shared/parity, read once."""

from __future__ import annotations

import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentflow.artifacts import read_json, read_tensors
from latentflow.metrics.features.inception import InceptionV3

INDEX = "parity/index.json"


@cache
def entry(shared: Path, name: str) -> dict[str, Any]:
    """What index.json says of a fixture."""
    return next(one for one in read_json(shared / INDEX)["fixtures"] if one["id"] == name)


@cache
def tensors(shared: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a fixture."""
    return read_tensors(shared / "parity" / f"{name}.safetensors")


def drawn_weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Random Inception weights by the recipe of index.json: each tensor from a generator seeded with its name."""
    return {name: _drawn(name, shape) for name, shape in shapes.items()}


def untrained_shapes() -> dict[str, list[int]]:
    """The shapes that the network itself has."""
    with torch.device("meta"):
        return {name: list(tensor.shape) for name, tensor in InceptionV3().state_dict().items()}


def _drawn(name: str, shape: list[int]) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    z = np.random.RandomState(zlib.crc32(name.encode("ascii"))).standard_normal(shape)
    if name.endswith(("conv.weight", "fc.weight")):
        z = z * np.sqrt(2 / np.prod(shape[1:]))
    elif name.endswith("bn.weight"):
        z = 1 + 0.1 * z
    elif name.endswith("running_var"):
        z = 1 + 0.1 * np.abs(z)
    else:
        z = 0.1 * z
    return torch.from_numpy(z.astype(np.float32))
