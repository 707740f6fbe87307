"""The README.md of a model folder: what people read, headed by the metadata that the hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from latentflow.hub import CARD_NAME

_MOST_NAMES = 50


def model_card(facts: Mapping[str, str], *, labels: bool, inpainting: bool, maps: bool) -> str:
    """Markdown with a table of those `facts` that are not empty.

    Args:
        labels, inpainting, maps: what the model can be told besides the time.
    """
    tags = {"class-conditional": labels, "inpainting": inpainting, "semantic-image-synthesis": maps}
    usage = [f"latentflow sample {CARD_NAME} --num 16 --out samples"]
    if inpainting:
        usage.append(f"latentflow inpaint {CARD_NAME} IMAGE HOLE --out filled.png")
    if maps:
        usage.append(f"latentflow mask-to-image {CARD_NAME} MAP --out painted.png")
    commands = "\n".join(f"    {line}" for line in usage)
    rows = "\n".join(f"| {name} | {_cell(fact)} |" for name, fact in facts.items() if fact)
    return f"""---
library_name: latentflow
pipeline_tag: {"image-to-image" if inpainting or maps else "unconditional-image-generation"}
tags: [{", ".join(["flow-matching", "image-generation", *(tag for tag, can in tags.items() if can)])}]
---
# A latent flow-matching model

| | |
|---|---|
{rows}

{commands}

or from Python:

    from latentflow import LatentFlow
    images = LatentFlow.from_pretrained("{CARD_NAME}").sample(num=16, seed=0).images

## Limits

It draws only what its training images show, at about their size, with no finer detail than its autoencoder keeps.
Nothing filters what it draws, and it may repeat training images and whatever is one-sided in them.
"""


def listed(names: Sequence[str]) -> str:
    """The names, or the first of many."""
    more = f", ... ({len(names)} in all)" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
