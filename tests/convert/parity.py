"""Numeric fixtures of published networks: weights, inputs, and the outputs that the published programs computed.

Four networks come with the tests, in `fixtures/`. Many more are read from `../shared/parity` where that folder exists.
No weights were trained: they are random, and either stored or drawn again by the recipe of `drawn`.
"""

from __future__ import annotations

import json
import math
import zlib
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

SHIPPED = Path(__file__).parent / "fixtures"
PARITY = Path(__file__).parents[2].parent / "shared" / "parity"
needs_parity = pytest.mark.skipif(not PARITY.is_dir(), reason=f"{PARITY} does not exist")

FAMILY_OF_KIND = {"lfm_dit": "lfm", "lfm_unet": "lfm", "lfm_edm": "lfm", "sit": "sit", "fbdit": "dit"}


@cache
def index() -> dict[str, dict[str, Any]]:
    """Every fixture by its id, with the path of its tensors."""
    return {
        fixture["id"]: {**fixture, "path": folder / fixture["file"]}
        for folder in (SHIPPED, PARITY)
        if folder.is_dir()
        for fixture in json.loads((folder / "index.json").read_text(encoding="utf-8"))["fixtures"]
    }


def fixtures() -> list[dict[str, Any]]:
    """Every fixture of a whole network."""
    return [fixture for fixture in index().values() if fixture.get("kind") in FAMILY_OF_KIND]


def find(identity: str) -> dict[str, Any]:
    return index()[identity]


def tensors(fixture: dict[str, Any]) -> dict[str, Tensor]:
    return load_file(fixture["path"])


def weights(fixture: dict[str, Any], gain: float = 1.0) -> dict[str, Tensor]:
    """The published weights in float32, every matrix multiplied by `gain`."""
    stored = {key.removeprefix("weights/"): t for key, t in tensors(fixture).items() if key.startswith("weights/")}
    about = fixture["weights"]
    if "recipe" in about:
        assert gain == 1
        return stored | drawn(about["recipe"])
    fixed = {*about["weight_gain_excludes"], *about["not_drawn"]}
    assert fixed <= stored.keys()

    def grows(name: str, tensor: Tensor) -> bool:
        return tensor.dim() >= 2 and name not in about["weight_gain_excludes"]

    return {name: t.float() * (gain if grows(name, t) else 1.0) for name, t in stored.items()}


def drawn(recipe: dict[str, Any]) -> dict[str, Tensor]:
    """Weights that follow from their names: z ~ N(0, 1) of NumPy's frozen `RandomState`, seeded by the name's CRC-32.

    Tables of labels are z, other matrices gain z / sqrt(fan-in), scales of norms 1 + z / 10, biases z / 10; all are
    rounded to float16, which float32 and float64 hold exactly.
    """
    found, digest = {}, sha256()
    for name, shape in sorted(recipe["shapes"].items()):
        z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        if name in recipe["tables"]:
            value = z
        elif len(shape) > 1:
            value = recipe["gain"] * z / np.sqrt(math.prod(shape[1:]))
        else:
            value = 0.1 * z + name.endswith("weight")
        value = value.astype(np.float16).astype("<f4")
        digest.update(value.tobytes())
        found[name] = torch.from_numpy(value)
    assert digest.hexdigest() == recipe["sha256"], "NumPy draws other numbers than those the outputs were computed with"
    return found


def dtype_of(case: dict[str, Any]) -> torch.dtype:
    return torch.float64 if case.get("dtype") == "float64" else torch.float32


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()
