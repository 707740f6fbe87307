"""onnx.json: what the files of an ONNX export take and give, and what a program needs to draw with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

import latentflow
from latentflow.console import notice
from latentflow.flow.solvers import fitted_evaluations
from latentflow.model.flow_model import FlowModel

_MEANINGS = {
    "labels": "class index, 0 to the number of classes less 1, or the null label",
    "masked_latents": "latents of the image with its hole filled with gray, from the encoder",
    "mask": "fraction of each latent pixel inside the hole",
    "class_fractions": "fraction of each latent pixel that belongs to each class of the semantic map",
    "input": "the paired image at latent size",
    "columns": "the values of the named conditions, one after the other",
}


def folder_facts(model: FlowModel, names: Sequence[str], errors: Mapping[str, float], opset: int) -> dict[str, Any]:
    """The content of onnx.json.

    Args:
        names: of the files, without their suffix.
        errors: largest relative difference between each file and torch.
    """
    config, conditioning = model.config, model.config.conditioning
    latents, pixels = list(config.latent_shape), [config.pixel_format.channels, *config.image_size]
    if len(config.sizes) > 1:  # free dimensions
        latents[1:] = pixels[1:] = ["height", "width"]
    encoded = [model.autoencoder.pixel_channels, *pixels[1:]]
    shapes = {
        "velocity": ({"latents": latents, "time": []}, {"velocity": latents}),
        "decoder": ({"latents": latents}, {"pixels": pixels}),
        "encoder": ({"pixels": encoded}, {"latents": latents}),
    }
    return {
        "format_version": 1,
        "made_with": {"latentflow": latentflow.__version__, "torch": torch.__version__, "opset": opset},
        "about": "shapes are those of one image, and the first axis of every tensor is the batch; time is 1 at noise "
        "and 0 at data, and dx/dt = velocity; latents are those of the flow, normalised, also for decoder and encoder",
        "files": {
            name: {
                "file": f"{name}.onnx",
                "inputs": shapes[name][0],
                "outputs": shapes[name][1],
                "largest_relative_error": float(f"{errors[name]:.2g}"),
            }
            for name in names
        },
        "conditions": _conditions(model, latents[1:]),
        "class_names": conditioning.class_names,
        "map_class_names": conditioning.map_class_names,
        "named_conditions": [
            one.model_dump(mode="json", include={"name", "kind", "class_names", "mean", "deviation"})
            for one in conditioning.columns
        ],
        "can_guide": conditioning.can_guide,
        "image_sizes": [size.written for size in config.sizes],
        "latent_shape": list(config.latent_shape),
        "factor": config.autoencoder.factor,
        "path": config.path.model_dump(mode="json"),
        "normalisation": config.normalisation.model_dump(mode="json"),
        "pixel_format": config.pixel_format.model_dump(mode="json"),
        "masks": None if config.masks is None else config.masks.model_dump(mode="json"),
        "inputs": None if config.inputs is None else config.inputs.model_dump(mode="json"),
        "sampling": _sampling(model),
    }


def _conditions(model: FlowModel, sides: Sequence[int | str]) -> dict[str, dict[str, Any]]:
    """The inputs of the velocity that are conditions.

    For each its type, the shape of one image, the value that means "not given", and whether the preset's guidance puts
    that value in its place.
    """
    config, conditioning = model.config, model.config.conditioning
    nulls = conditioning.build((1, *config.latent_shape), "cpu")
    guided = [name for name in conditioning.can_guide if name in (config.sampling.guided_by or conditioning.can_guide)]
    fields = {field for name, kind in conditioning.kinds.items() if name in guided for field in kind.fields}
    described = {}
    for name in nulls.names:
        if name not in _MEANINGS:
            continue
        value = getattr(nulls, name)[0]
        null = value.tolist() if name == "columns" else value.flatten()[0].item()
        shape = [len(value), *sides] if value.dim() == 3 else list(value.shape)
        type_name = "int64" if value.dtype == torch.int64 else "float32"
        described[name] = {
            "type": type_name,
            "shape": shape,
            "null": null,
            "guided": name in fields,
            "meaning": _MEANINGS[name],
        }
    return described


def _sampling(model: FlowModel) -> dict[str, Any]:
    """The sampling preset; with the times and weights of a fitted solver, and without a guide, which is a model."""
    preset = model.config.sampling
    if preset.guide is not None:
        notice(
            f"the sampling preset guides away from {preset.guide.model}, another model, which is not exported; "
            "onnx.json says guidance 1"
        )
        preset = preset.model_copy(update={"guide": None, "guidance": 1.0})
    written = preset.model_dump(mode="json")
    if fitted_evaluations(preset.solver) is not None:
        _, method = model.fitted_solver(preset.solver)
        written["fitted"] = {"times": list(method.times), "weights": [list(row) for row in method.weights]}
    return written
