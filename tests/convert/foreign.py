"""Published networks of every family in the smallest sizes, and files of random weights for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentflow.convert.architecture import Architecture
from latentflow.convert.families.registry import architecture

_DIT = {"in_channels": 4, "patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 2}
_LFM_DIT = {**_DIT, "img_resolution": 8}
_META_DIT = {**_DIT, "input_size": 8, "num_classes": 3, "class_dropout_prob": 0.1}
_ORIGIN = {
    "use_origin_adm": True,
    "model_type": "adm",
    "image_size": 64,
    "num_in_channels": 4,
    "num_out_channels": 4,
    "nf": 32,
    "num_res_blocks": 1,
    "ch_mult": (1, 2),
    "attn_resolutions": (1, 2),
    "num_heads": 2,
}
_EDM = {
    "img_resolution": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (8, 4),
}
_PAINTING = {key: value for key, value in _ORIGIN.items() if key != "model_type"}

NETWORKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lfm DiT, 1 class": ("lfm", {**_LFM_DIT, "num_classes": 1, "label_dropout": 0}, {}),
    "lfm DiT, 1 class or none": ("lfm", {**_LFM_DIT, "num_classes": 1, "label_dropout": 0.1}, {}),
    "lfm DiT, 10 classes": ("lfm", {**_LFM_DIT, "num_classes": 10, "label_dropout": 0.1}, {}),
    "lfm DiT, 10 classes, none dropped": ("lfm", {**_LFM_DIT, "num_classes": 10, "label_dropout": 0}, {}),
    "lfm DiT, half of its output unused": (
        "lfm",
        {**_LFM_DIT, "num_classes": 10, "label_dropout": 0.1, "learn_sigma": True},
        {},
    ),
    "sit": ("sit", _META_DIT, {}),
    "sit, velocity only": ("sit", {**_META_DIT, "learn_sigma": False}, {}),
    "dit": ("dit", _META_DIT, {}),
    "dit, noise only": ("dit", {**_META_DIT, "learn_sigma": False}, {}),
    "guided": ("lfm", _ORIGIN, {}),
    "guided, updown": ("lfm", {**_ORIGIN, "resblock_updown": True}, {}),
    "guided, 10 classes": ("lfm", {**_ORIGIN, "num_classes": 10}, {}),
    "guided, head channels": ("lfm", {**_ORIGIN, "num_head_channels": 16}, {}),
    "guided, other order": ("lfm", {**_ORIGIN, "use_new_attention_order": True}, {}),
    "guided, other heads upwards": ("lfm", {**_ORIGIN, "num_head_upsample": 4}, {}),
    "guided, no convolution between levels": ("lfm", {**_ORIGIN, "resamp_with_conv": False}, {}),
    "guided, shifts": ("lfm", {**_ORIGIN, "use_scale_shift_norm": False}, {}),
    "guided, inpainting": ("lfm", {**_PAINTING, "num_in_channels": 9}, {"inpainting": True}),
    "guided, semantic maps": ("lfm", {**_PAINTING, "num_in_channels": 8}, {"num_map_classes": 5}),
    **{
        f"edm {model_type}, {label_dim} classes": (
            "edm",
            {**_EDM, "model_type": model_type, "label_dim": label_dim},
            {},
        )
        for model_type in ("adm", "ddpm++", "ncsn++")
        for label_dim in (0, 3)
    },
    "edm adm, augmented": ("edm", {**_EDM, "model_type": "adm", "augment_dim": 9}, {}),
}
"""By name: family, options, task."""


def network(name: str) -> Architecture:
    """One of `NETWORKS`."""
    family, options, task = NETWORKS[name]
    return architecture(family, options, **task)


def draw(published: Architecture, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A state_dict of the published network with random weights, and with whatever else its files hold."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for key, shape in published.keys.foreign_shapes(published.empty().state_dict()).items():
        fan_in = shape[1:].numel() if len(shape) > 1 else 16
        made[key] = (torch.randn(shape, generator=generator) / fan_in**0.5).to(dtype)
    made |= {constant.theirs: constant.value.clone() for constant in published.keys.constants}
    return made | {key: torch.ones(2, 2) for key in published.keys.unused}


def save(weights: dict[str, Tensor], file: Path, *, prefix: str = "", **others: Any) -> Path:
    """Weights as torch.save writes them; with `others`, as "model" of a training state."""
    prefixed = {prefix + key: tensor for key, tensor in weights.items()}
    torch.save({"model": prefixed, **others} if others else prefixed, file)
    return file


def vae(num_channels: int = 4) -> torch.nn.Module:
    """An autoencoder of factor 8, as the published ones are, that decodes 256 x 256 pixels quickly."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        latent_channels=num_channels,
        layers_per_block=1,
        mid_block_add_attention=False,
        scaling_factor=0.5,
    )
