"""Read the weights of a foreign checkpoint file, whatever they are wrapped in."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from latentflow.artifacts import read_tensors, read_torch_file
from latentflow.errors import ArtifactError

WRAPPERS = (
    *("ema", "ema_model", "model_ema", "params_ema"),
    *("model_dict", "state_dict", "model_state_dict", "model", "net", "network", "params"),
)
"""Keys of the network in training states, the best first: SiT and DiT have "ema" and "model", LFM "model_dict"."""

_MOST_BYTES = 1 << 20  # of a config.yaml

PARTS = ("ema_model.", "model_ema.", "ema.", "model.diffusion_model.")
"""Prefixes of the network's keys in a state_dict of several networks, the best first."""

PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "model.", "net.", "network.", "diffusion_model.", *PARTS)
"""Prefixes that DistributedDataParallel, torch.compile, FSDP, Lightning and latent-diffusion add to every key."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a foreign file.

    Attributes:
        weights: by key, without prefixes.
        options: arguments of the training program, if the file or a config.yaml in its folder has them.
        origin: the file, for messages.
        part: the part of the file that held the weights; "" if it holds only weights.
    """

    weights: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    origin: str = ""
    part: str = ""


def read_checkpoint(path: str | Path, *, encoder: str | Path | None = None) -> Checkpoint:
    """Read a .safetensors, .pth, .pt or .ckpt file; no code in it is run.

    Args:
        encoder: the file with LFM's encoder of semantic maps, if it is separate.

    Raises:
        ArtifactError: the file is missing or truncated, needs code to be read, or holds no weights.
    """
    path = Path(path)
    content = read_tensors(path) if path.suffix == ".safetensors" else read_torch_file(path)
    if not isinstance(content, Mapping):
        raise ArtifactError(f"{path} holds a {type(content).__name__}, not a state_dict of named tensors")
    wrapper = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), "")
    weights, start = _part(content[wrapper] if wrapper else content)
    part = ", ".join(name for name in (wrapper, start.rstrip(".")) if name)
    weights = _weights(weights, path)
    if isinstance(content.get("cond_stage_model_dict"), Mapping):
        weights |= _encoder(content["cond_stage_model_dict"], path)
    if encoder is not None:
        found = read_checkpoint(encoder)
        weights |= _encoder(found.weights, Path(encoder))
    return Checkpoint(weights, _options(content, path), str(path), part)


def _part(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The network in a state_dict of several, and the prefix of its keys; "" if there is only one."""
    for start in PARTS:
        found = {key: value for key, value in content.items() if str(key).startswith(start)}
        if 0 < len(found) < len(content):
            return found, start
    return content, ""


def _weights(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    others = [key for key, value in content.items() if not (isinstance(value, Tensor) and isinstance(key, str))]
    if others or not content:
        what = f"has {others[0]!r}, which is not a named tensor" if others else "is empty"
        raise ArtifactError(f"{path} is not a state_dict of named tensors: it {what}")
    weights = dict(content)
    while start := next((start for start in PREFIXES if any(key.startswith(start) for key in weights)), ""):
        odd = next((key for key in weights if not key.startswith(start)), None)
        if odd is not None:
            with_it = next(key for key in weights if key.startswith(start))
            raise ArtifactError(f"{path}: {with_it!r} has the prefix {start!r}, but {odd!r} does not")
        weights = {key.removeprefix(start): value for key, value in weights.items()}
    for key, tensor in weights.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ArtifactError(f"{path}: {key!r} is not a dense tensor")
    return weights


def _encoder(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    return {f"cond_stage_model.{key}": tensor for key, tensor in _weights(content, path).items()}


def _options(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The arguments in a training state, or in the config.yaml that LFM writes to the folder of its checkpoints."""
    args = content.get("args")
    if isinstance(args, Namespace):
        return vars(args)
    if isinstance(args, Mapping):
        return dict(args)
    config = path.parent / "config.yaml"
    try:
        small = config.is_file() and config.stat().st_size < _MOST_BYTES
        found = yaml.safe_load(config.read_text(encoding="utf-8")) if small else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
