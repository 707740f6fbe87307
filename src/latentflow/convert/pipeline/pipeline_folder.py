"""Export a model as a folder with a pipeline of its own for diffusers.

    model_index.json     the classes, and what else the model is
    pipeline.py          noise, conditions, guidance and solver: `folder_pipeline.py` of this package
    velocity/            the network in float32, with its code: `folder_transformer.py` of this package
    vae/                 the autoencoder
    README.md            a model card

`DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)` loads it. The code is in the folder and needs torch,
numpy, Pillow and diffusers alone: a folder that imported latentflow would draw other pictures with another version of
it, and those who have latentflow do not need the folder. It holds transformers with every option and condition; what it
does not hold is refused.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentflow.artifacts import atomic_folder, require_new, write_json, write_text
from latentflow.autoencoder import Autoencoder
from latentflow.console import notice
from latentflow.convert.exported import LIMIT, Exported, largest_error, random_inputs, require_no_student
from latentflow.data.painting.latent_size import HOLE_GRAY
from latentflow.errors import ArtifactError
from latentflow.model.card import render_card
from latentflow.model.config import ModelConfig
from latentflow.model.flow_model import FlowModel

_FIELDS = ("labels", "masked_latents", "mask", "class_fractions", "input", "columns")
_OPTIONS = ("depth", "hidden_size", "num_heads", "patch_size", "mlp_ratio", "time_scale", "position", "mlp", "norm")
_SOLVERS = ("euler", "midpoint", "heun", "rk4", "ab2", "ab3", "ab4")
_NOT_NEEDED = "augmentation_embedding."
"""Weights of the numbers of variants, which are zero when images are drawn."""


def require_transformer(config: ModelConfig) -> None:
    """Refuse a model that the code of the folder cannot hold.

    Raises:
        ArtifactError: naming why, and another format.
    """
    require_no_student(config, "a pipeline")
    if config.network.kind != "dit":
        raise ArtifactError(
            f"a {config.network.title} cannot be exported as a pipeline, whose folder has the code of transformers; "
            "use --format onnx, or --format diffusers"
        )
    if config.prediction.kind != "velocity":
        raise ArtifactError(
            f"a network that predicts {config.prediction.kind} cannot be exported as a pipeline, which takes "
            "velocities; use --format onnx"
        )


@torch.no_grad()
def export_pipeline(model: FlowModel, folder: str | Path) -> Exported:
    """Write a model as a folder for `DiffusionPipeline.from_pretrained`, after comparing its network with the model's.

    Args:
        folder: new or empty.

    Raises:
        ArtifactError: the folder is not empty, its code cannot hold the model, or computes something else. Nothing is
            written.
    """
    from latentflow.convert.pipeline import folder_pipeline, folder_transformer

    folder = require_new(folder)
    require_transformer(model.config)
    network_class = folder_transformer.VelocityTransformer
    with atomic_folder(folder) as temporary:
        network = network_class(**_arguments(model.config))
        weights = model.network.state_dict()
        network.load_state_dict(
            {name: x.float().cpu() for name, x in weights.items() if not name.startswith(_NOT_NEEDED)}
        )
        network.save_pretrained(temporary / "velocity")
        shutil.copyfile(folder_transformer.__file__, temporary / "velocity" / "modeling.py")
        shutil.copyfile(folder_pipeline.__file__, temporary / "pipeline.py")
        model.autoencoder.save_pretrained(temporary / "vae")
        write_json(temporary / "model_index.json", _index(model))
        write_text(temporary / "README.md", _readme(model))

        error = _compared(model, network_class.from_pretrained(temporary / "velocity"))
        if not error <= LIMIT:
            raise ArtifactError(
                f"the pipeline's network differs from this model by {error:.1e} of the largest velocity, where "
                f"rounding explains {LIMIT:g}; nothing was written"
            )
        if Autoencoder.from_pretrained(temporary / "vae").content_hash != model.config.autoencoder.content_hash:
            raise ArtifactError("diffusers changed the autoencoder when saving it; nothing was written")
    parts = {"pipeline": "LatentFlowPipeline", "velocity": network_class.__name__, "vae": _class_of(model)}
    return Exported(folder, parts, error)


def _arguments(config: ModelConfig) -> dict[str, Any]:
    """The arguments of `VelocityTransformer`."""
    conditioning, network = config.conditioning, config.network
    return {
        "in_channels": config.autoencoder.num_channels,
        **{name: getattr(network, name) for name in (*_OPTIONS, "qk_norm", "value_residual")},
        "num_classes": conditioning.num_classes,
        "inpainting": conditioning.inpainting,
        "num_map_classes": conditioning.num_map_classes,
        "input_channels": conditioning.input_channels,
        "columns": [
            {"kind": one.kind, "num_classes": len(one.class_names), "mean": one.mean, "deviation": one.deviation}
            for one in conditioning.columns
        ],
        "constant": conditioning.constant_embedding,
    }


def _compared(model: FlowModel, network: nn.Module) -> float:
    """The largest relative error over numbers of images, times and conditions."""

    def pair(num_images: int, seed: int) -> tuple[Tensor, Tensor]:
        latents, time, condition = random_inputs(model.config, num_images, seed=seed)
        given = {name: getattr(condition, name) for name in _FIELDS if getattr(condition, name) is not None}
        return network(latents, time, given), model.network(latents, time, condition)

    return largest_error(pair(num_images, seed) for seed, num_images in enumerate((1, 3, 4)))


def _index(model: FlowModel) -> dict[str, Any]:
    """The content of model_index.json."""
    import diffusers

    return {
        "_class_name": ["pipeline", "LatentFlowPipeline"],
        "_diffusers_version": diffusers.__version__,
        "facts": _facts(model.config),
        "vae": ["diffusers", _class_of(model)],
        "velocity": ["modeling", "VelocityTransformer"],
    }


def _facts(config: ModelConfig) -> dict[str, Any]:
    """What the pipeline has to know besides its two networks."""
    conditioning, pixels = config.conditioning, config.pixel_format
    is_full = (pixels.low, pixels.high) == ([0], [255])
    as_sign = config.masks is not None and config.masks.told_as == "sign"
    return {
        "image_size": list(config.image_size),
        "latent_shape": list(config.latent_shape),
        "factor": config.autoencoder.factor,
        "shift": config.normalisation.shift,
        "scale": config.normalisation.scale,
        "is_gray": pixels.channels == 1,
        "is_8_bit": pixels.dtype == "uint8" and pixels.mode in ("gray", "rgb") and is_full,
        "class_names": conditioning.class_names,
        "seen_classes": config.seen_classes,
        "map_class_names": conditioning.map_class_names,
        "hole_as_sign": as_sign,
        "hole_level": -1.0 if as_sign else HOLE_GRAY / 127.5 - 1,
        "conditions": _conditions(config),
        "sampling": _sampling(config),
    }


def _conditions(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The network's conditions: their null value, whether guidance strengthens them, and whether they are required."""
    conditioning = config.conditioning
    nulls = conditioning.build((1, *config.latent_shape), "cpu")
    can_guide = conditioning.can_guide
    guided = [name for name in can_guide if name in (config.sampling.guided_by or can_guide)]
    found: dict[str, dict[str, Any]] = {}
    for name, kind in conditioning.kinds.items():
        for field in kind.fields:
            value = getattr(nulls, field)[0]
            one = found.setdefault(field, {"guided": True, "required": False})
            one["guided"] &= name in guided  # columns share a field
            one["required"] |= name in conditioning.required
            one["channels"] = len(value) if value.dim() == 3 else 0
            one["null"] = value.tolist() if value.dim() == 1 else value.flatten()[0].item()
    return found


def _sampling(config: ModelConfig) -> dict[str, Any]:
    """The sampling preset, as far as the pipeline has it."""
    preset = config.sampling
    changes: dict[str, Any] = {}
    if preset.guide is not None:
        notice(
            f"the sampling preset guides away from {preset.guide.model}, another model, which is not exported; the "
            "pipeline draws without guidance unless asked"
        )
        changes = {"guidance": 1.0}
    if preset.solver not in _SOLVERS:
        notice(f"the pipeline has no solver {preset.solver}; it draws with heun, {preset.steps} steps, unless asked")
        changes |= {"solver": "heun"}
    names = ("solver", "steps", "guidance", "guidance_interval", "guided_channels", "shift")
    return json.loads(preset.model_copy(update=changes).model_dump_json(include=set(names)))


def _class_of(model: FlowModel) -> str:
    return type(model.autoencoder.model).__name__


def _readme(model: FlowModel) -> str:
    """The page with its program."""
    values = {"autoencoder": _class_of(model), "sampling": model.config.sampling}
    return render_card("latentflow.convert.pipeline", "README.md.j2", model.config, "diffusers", **values)
