"""The numeric fixtures of published networks: what they hold, and how one is run through the conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

PARITY = Path(__file__).parents[2].parent / "shared" / "parity"
needs_parity = pytest.mark.skipif(not PARITY.is_dir(), reason="parity fixtures are not beside the repository")

FAMILY_OF_KIND = {"lfm_dit": "lfm", "lfm_unet": "lfm", "lfm_edm": "lfm", "sit": "sit", "fbdit": "dit"}


def fixtures() -> list[dict[str, Any]]:
    """Every fixture of a whole network; none where the folder is absent."""
    if not PARITY.is_dir():
        return []
    every = json.loads((PARITY / "index.json").read_text())["fixtures"]
    return [fixture for fixture in every if fixture.get("kind") in FAMILY_OF_KIND]


def find(identity: str) -> dict[str, Any]:
    every = json.loads((PARITY / "index.json").read_text())["fixtures"]
    return next(fixture for fixture in every if fixture["id"] == identity)


def tensors(fixture: dict[str, Any]) -> dict[str, Tensor]:
    return load_file(PARITY / fixture["file"])


def weights(fixture: dict[str, Any], gain: float = 1.0) -> dict[str, Tensor]:
    """The published weights in float32, every matrix multiplied by `gain`."""
    fixed = {*fixture["weights"]["weight_gain_excludes"], *fixture["weights"]["not_drawn"]}
    found = {}
    for key, tensor in tensors(fixture).items():
        if key.startswith("weights/"):
            name = key.removeprefix("weights/")
            grows = tensor.dim() >= 2 and name not in fixture["weights"]["weight_gain_excludes"]
            found[name] = tensor.float() * (gain if grows else 1.0)
    assert fixed <= found.keys()
    return found


def dtype_of(case: dict[str, Any]) -> torch.dtype:
    return torch.float64 if case.get("dtype") == "float64" else torch.float32


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()
