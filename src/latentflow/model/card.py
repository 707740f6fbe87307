"""The README.md of a model folder: what people read, below the metadata that the hub reads."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from latentflow.hub import CARD_NAME
from latentflow.model.config import ModelConfig

_MOST_NAMES = 50
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_MARKS = re.compile(r"[&<>\[\]!\\`]")


def model_card(config: ModelConfig) -> str:
    """Markdown that says what a model is, how to use it, and what its limits are.

    `CARD_NAME` stands for the path of the model, until `latentflow push` puts the hub id there.
    """
    values = {"facts": _facts(config), "model": CARD_NAME}
    return render_card("latentflow.model", "README.md.j2", config, "latentflow", **values)


def render_card(package: str, template: str, config: ModelConfig, library: str, **values: object) -> str:
    """A page with its metadata, from a Jinja2 template in the folder `templates` of a package.

    Args:
        library: the library that loads the folder, as the hub calls it.
        values: what the template uses besides `config` and `conditioning`.
    """
    conditioning = config.conditioning
    tags = {
        "class-conditional": bool(conditioning.class_names),
        "inpainting": conditioning.inpainting,
        "semantic-image-synthesis": bool(conditioning.map_class_names),
        "image-translation": config.inputs is not None,
    }
    edits = conditioning.inpainting or conditioning.map_class_names or config.inputs
    metadata = ModelCardData(
        library_name=library,
        pipeline_tag="image-to-image" if edits else "unconditional-image-generation",
        tags=["flow-matching", "image-generation", *(tag for tag, applies in tags.items() if applies)],
    )
    environment = Environment(
        loader=PackageLoader(package),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"cell": _cell, "shell": _shell, "plain": as_plain, "code": as_code}
    environment.filters["number"] = lambda value: f"{value:g}"
    text = environment.get_template(template).render(config=config, conditioning=conditioning, **values)
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n{text}"))


def _facts(config: ModelConfig) -> dict[str, str]:
    """The rows of the table; those without a value are left out."""
    conditioning, training = config.conditioning, config.training
    guided = ", ".join(map(as_plain, conditioning.can_guide))
    seen = f"{training.step:,} steps, {training.images_seen:,} images seen"
    facts = {
        "image size": " or ".join(size.words for size in config.sizes),
        "network": config.network.title,
        "latents": f"{' x '.join(map(str, config.latent_shape))}, autoencoder {as_code(config.autoencoder.reference)}",
        "conditions": ", ".join(map(as_plain, conditioning.kinds)) or "none (unconditional)",
        "classes": _listed(conditioning.class_names),
        "map classes": _listed(conditioning.map_class_names),
        "named conditions": "; ".join(as_plain(f"{one.name} ({one.describe()})") for one in conditioning.columns),
        "mask policy": config.masks.policy if config.masks else "",
        "inputs": as_plain(config.inputs.title) if config.inputs else "",
        "guidance": f"on {guided}" if guided else "not available: no condition was dropped in training",
        "sampling preset": as_plain(config.sampling.in_words),
        "student of": as_plain(config.student.title) if config.student else "",
        "trained on": as_plain(training.data) or "not known",
        "held out": f"{training.held_out.num_images:,} images, never trained on" if training.held_out else "",
        "held-out loss": "" if training.held_out_loss is None else f"{training.held_out_loss:.4f}",
        "finetuned from": f"`{training.source}`, weights {training.source_weights}" if training.source else "",
        "variants": f"{training.variants} of each image, for training alone" if training.variants else "",
        "training": seen if training.step else "not recorded",
        "average": "" if training.ema_length is None else f"power function of length {training.ema_length:g}",
    }
    return {name: fact for name, fact in facts.items() if fact}


def _listed(names: Sequence[str]) -> str:
    """All the names, or the first of many and their number."""
    more = f", ... ({len(names)} in all)" if len(names) > _MOST_NAMES else ""
    return ", ".join(map(as_plain, names[:_MOST_NAMES])) + more


def _cell(text: str) -> str:
    """Text that cannot end a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def as_plain(text: str) -> str:
    """A name that Markdown shows as it is: names of others, such as of classes, are no HTML."""
    return _MARKS.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), " ".join(text.split()))


def as_code(text: str) -> str:
    """A name as code of Markdown, in which nothing is marked up."""
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"


def _shell(text: str) -> str:
    """A word of a command, on one line."""
    return shlex.quote(" ".join(text.split()))
