"""The README.md of a model folder: what people read, headed by the metadata that the hub reads."""

from __future__ import annotations

from collections.abc import Sequence

from latentflow.hub import CARD_NAME
from latentflow.model.config import ModelConfig

_MOST_NAMES = 50


def model_card(config: ModelConfig) -> str:
    """Markdown of what a model is, how it is used, and what it is not."""
    told = config.conditioning
    tags = {
        "class-conditional": bool(told.class_names),
        "inpainting": told.inpainting,
        "semantic-image-synthesis": bool(told.map_class_names),
    }
    usage = [f"latentflow sample {CARD_NAME} --num 16 --out samples"]
    if told.inpainting:
        usage.append(f"latentflow inpaint {CARD_NAME} IMAGE HOLE --out filled.png")
    if told.map_class_names:
        usage.append(f"latentflow mask-to-image {CARD_NAME} MAP --out painted.png")
    commands = "\n".join(f"    {line}" for line in usage)
    rows = "\n".join(f"| {name} | {_cell(fact)} |" for name, fact in _facts(config).items() if fact)
    paints = told.inpainting or told.map_class_names
    return f"""---
library_name: latentflow
pipeline_tag: {"image-to-image" if paints else "unconditional-image-generation"}
tags: [{", ".join(["flow-matching", "image-generation", *(tag for tag, can in tags.items() if can)])}]
---
# A latent flow-matching model

| | |
|---|---|
{rows}

{commands}

or from Python:

    from latentflow import FlowModel
    images = LatentFlow.from_pretrained("{CARD_NAME}").sample(num=16, seed=0).images

## Limits

It draws only what its training images show, at about their size, with no finer detail than its autoencoder keeps.
Nothing filters what it draws, and it may repeat training images and whatever is one-sided in them.
"""


def _facts(config: ModelConfig) -> dict[str, str]:
    told, training, sampling = config.conditioning, config.training, config.sampling
    guided = ", ".join(told.can_guide)
    seen = f"{training.step:,} steps, {training.images_seen:,} images seen"
    return {
        "image size": f"{config.image_size} x {config.image_size}",
        "network": config.network.title,
        "latents": f"{' x '.join(map(str, config.latent_shape))}, autoencoder `{config.autoencoder.reference}`",
        "told": ", ".join(told.dropout) or "nothing (unconditional)",
        "classes": _listed(told.class_names) or "none (unconditional)",
        "map classes": _listed(told.map_class_names),
        "holes": config.masks.policy if config.masks else "",
        "guidance": f"trained for it, by {guided}" if guided else "not available: no null condition was trained",
        "sampling preset": f"{sampling.solver}, {sampling.steps} steps, guidance {sampling.guidance:g}",
        "trained on": training.data or "not known",
        "training": seen if training.step else "elsewhere",
    }


def _listed(names: Sequence[str]) -> str:
    """The names, or the first of many."""
    more = f", ... ({len(names)} in all)" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
