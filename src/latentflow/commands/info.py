"""`latentflow info`: the facts of a model, an adapter or a latent cache."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from latentflow.columns import Column
from latentflow.data.buckets import named_sizes
from latentflow.data.cache.reader import LatentCache, is_cache
from latentflow.model.adapter import ADAPTER_FOLDER, ADAPTER_WEIGHTS, is_adapter
from latentflow.model.flow_model import CONFIG_FILE, WEIGHTS_FILE, find_model, open_adapter, read_config
from latentflow.model.snapshots import BEST, snapshot_steps
from latentflow.weights import tensor_shapes


def describe(model: str | Path) -> dict[str, Any]:
    """Facts of a model, an adapter or a cache, name => value, for a table or JSON.

    Raises:
        ArtifactError: the folder holds none of them.
    """
    if is_adapter(Path(model)):
        return _describe_adapter(model)
    return _describe_cache(model) if is_cache(model) else _describe_model(model)


def _describe_adapter(folder: str | Path) -> dict[str, Any]:
    adapter = open_adapter(folder)
    record, config = adapter.record, adapter.config
    return {
        "adapter": str(folder),
        "base": record.base_model_name_or_path,
        "base weights": record.base_weights[:12],
        "network": config.network.title,
        "rank": record.r,
        "scale": record.scale,
        "parameters": adapter.num_parameters,
        "bytes": (adapter.folder / ADAPTER_WEIGHTS).stat().st_size,
        "layers": len(record.target_modules),
        "whole tensors": record.whole_tensors,
        "image size": config.image_size.written,
        "classes": config.conditioning.class_names,
        "columns": [f"{one.name} ({one.describe()})" for one in config.conditioning.columns],
        "trained on": config.training.data,
        "training images": config.training.num_images,
        "held-out loss": config.training.held_out_loss,
        "steps": config.training.step,
    }


def _describe_model(model: str | Path) -> dict[str, Any]:
    folder = find_model(model)
    config = read_config(folder)
    num_parameters = sum(math.prod(shape) for shape in tensor_shapes(folder / WEIGHTS_FILE).values())
    conditioning = config.conditioning
    return {
        "model": str(folder),
        "network": config.network.title,
        "parameters": num_parameters,
        "image size": config.image_size.written,
        **named_sizes(config.buckets),
        "pixels": config.pixel_format.title,
        "latents": list(config.latent_shape),
        "autoencoder": config.autoencoder.reference,
        "path": config.path.kind,
        "output": config.prediction.kind,
        "told": list(conditioning.dropout),
        "classes": conditioning.class_names,
        "map classes": conditioning.map_class_names,
        "columns": [f"{one.name} ({one.describe()})" for one in conditioning.columns],
        "holes": config.masks.policy if config.masks else "none",
        "inputs": config.inputs.title if config.inputs else "none",
        "guidance": f"by {', '.join(conditioning.can_guide)}" if conditioning.can_guide else "not available",
        "sampling preset": config.sampling.in_words,
        "student of": config.student.title if config.student else "nobody",
        "finetuned from": config.training.source or "nothing",
        "trained on": config.training.data,
        "training images": config.training.num_images,
        "held-out images": config.training.held_out.num_images if config.training.held_out else 0,
        "held-out loss": config.training.held_out_loss,
        "variants": config.training.variants,
        "steps": config.training.step,
        "images seen": config.training.images_seen,
        "average of the weights": _average(config.training.ema_length),
        "models of steps": snapshot_steps(model),
        "best model": _best_step(model),
        "adapter": str(folder / ADAPTER_FOLDER) if is_adapter(folder / ADAPTER_FOLDER) else "none",
    }


def _best_step(model: str | Path) -> str:
    """The snapshot of a run with the lowest held-out loss."""
    if not (Path(model) / BEST / CONFIG_FILE).is_file():
        return "none"
    training = read_config(Path(model) / BEST).training
    return f"@{BEST}, of step {training.step}, held-out loss {training.held_out_loss:.4f}"


def _average(length: float | None) -> str:
    """How the weights were averaged in training."""
    return "exponential" if length is None else f"power function of length {length:g}"


def _described(column: Column) -> str:
    return column.kind + (f" of {column.num_classes} classes" if column.class_names else "")


def _describe_cache(folder: str | Path) -> dict[str, Any]:
    index = LatentCache(folder).index
    plan = index.plan
    return {
        "latent cache": str(folder),
        "source": plan.source,
        "images": index.num_images,
        "classes": plan.class_names,
        "image size": plan.image_size.written,
        **named_sizes(plan.buckets),
        "pixels": plan.pixel_format.title,
        "moments": list(plan.moments_shape),
        "map classes": plan.map_class_names,
        "columns": [f"{one.name} ({_described(one)})" for one in plan.columns],
        "inputs": plan.inputs.title if plan.inputs else "none",
        "mask variants": plan.mask_variants,
        "variants": plan.variants,
        "flips": plan.flips,
        "precision": plan.precision,
        "autoencoder": plan.autoencoder,
        "autoencoder hash": plan.autoencoder_hash,
        "channel mean": [round(value, 4) for value in index.channel_mean],
        "channel std": [round(value, 4) for value in index.channel_std],
        "broken": index.broken,
        "bytes": sum(shard.num_bytes for shard in index.shards),
    }
