"""What the page has to know of a model to make its controls: names, palette, preset, solvers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from latentflow.data.painting.semantic_maps import UNLABELLED_COLOUR, colour_map
from latentflow.flow.solvers import SOLVERS, is_adaptive
from latentflow.model.config import ModelConfig
from latentflow.model.flow_model import FlowModel
from latentflow.sampling.inputs import map_indices
from latentflow.sampling.inversion import ROUND_TRIPS


def model_facts(model: FlowModel) -> dict[str, Any]:
    """The conditions, sizes, preset and solvers of a model, as JSON; sizes are height and width in pixels."""
    config = model.config
    conditioning = config.conditioning
    return {
        "image_size": list(config.image_size),
        "sizes": [list(size) for size in config.sizes],
        "pixel_multiple": config.pixel_multiple,
        "pixel_format": config.pixel_format.title,
        "class_names": list(conditioning.class_names),
        "seen_classes": config.seen_classes,
        "columns": _columns(config),
        "required": list(conditioning.required),
        "can_guide": list(conditioning.can_guide),
        "inpainting": conditioning.inpainting,
        "map": _map(config),
        "takes_input": conditioning.input_channels > 0,
        "preset": config.sampling.model_dump(mode="json"),
        "solvers": [*SOLVERS, *model.fitted_solvers.solvers],
        "adaptive": [name for name in SOLVERS if is_adaptive(name)],
        "trained": {"step": config.training.step, "images": config.training.num_images},
        "inversion": next(dict(one) for one in ROUND_TRIPS if one["solver"] == "heun" and one["steps"] == 32),
    }


def coloured_map(model: FlowModel, file: Path) -> np.ndarray:
    """A semantic map of a file in the colours of the model's palette: [H, W, 3] uint8; unlabelled pixels are light.

    Raises:
        ConfigError, DataError: the model knows no maps, or this is none of its classes.
    """
    model.config.conditioning.require("semantic_map")
    return colour_map(map_indices(model, file), model.config.conditioning.map_palette)


def _columns(config: ModelConfig) -> list[dict[str, Any]]:
    conditioning = config.conditioning
    return [
        {
            "name": one.name,
            "kind": one.kind,
            "class_names": list(one.class_names),
            "low": one.low,
            "high": one.high,
            "mean": one.mean,
            "required": one.name in conditioning.required,
        }
        for one in conditioning.columns
    ]


def _map(config: ModelConfig) -> dict[str, Any] | None:
    conditioning = config.conditioning
    if not conditioning.num_map_classes:
        return None
    return {
        "names": list(conditioning.map_class_names),
        "palette": [list(colour) for colour in conditioning.map_palette],
        "unlabelled": list(UNLABELLED_COLOUR),
    }
