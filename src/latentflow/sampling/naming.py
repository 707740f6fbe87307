"""The file name and the metadata of a picture; both depend only on its drawing."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from latentflow.sampling.drawing import Drawing

_UNSAFE = frozenset('<>:"/\\|?*')
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)  # device names of Windows
_MOST_BYTES = 72  # of a class in a file name; two of them, two seeds and a weight stay below 255


def picture_name(drawing: Drawing, class_names: Sequence[str], suffix: str = ".png") -> str:
    """The file name of a drawing of one image: "cat_seed-00000017.png"."""
    names = file_names(tuple(class_names)) if drawing.labels else ()
    parts = [names[label] for label in drawing.labels] + [f"seed-{seed:08d}" for seed in drawing.seeds]
    for blend in drawing.blends:
        parts += [f"to-{names[blend.label]}"] if blend.label is not None else []
        parts += [f"to-seed-{blend.seed:08d}"] if [blend.seed] != drawing.seeds else []
        parts += [f"at-{blend.weight:.3f}"]
    return "_".join(parts) + suffix


def picture_caption(drawing: Drawing, class_names: Sequence[str]) -> str:
    """What a drawing of one image shows: "cat, age 63, view lateral, findings edema + nodule"; "" for no condition.

    Between two classes it is "cat to dog at 0.25".
    """
    parts = [class_names[label] for label in drawing.labels]
    if parts and drawing.blends and drawing.blends[0].label is not None:
        blend = drawing.blends[0]
        parts = [f"{parts[0]} to {class_names[blend.label]} at {blend.weight:.3g}"]
    for name, (value,) in drawing.conditions.items():
        if value is not None:
            text = f"{value:g}" if isinstance(value, float) else value
            parts.append(f"{name} {' + '.join(text) or 'empty'}" if isinstance(text, list) else f"{name} {text}")
    return ", ".join(parts)


def seed_caption(drawing: Drawing) -> str:
    """The seed of a drawing of one image: "seed 3", or "seed 3 to 8 at 0.25" between two."""
    (seed,) = drawing.seeds
    other = [blend for blend in drawing.blends if blend.seed != seed]
    return f"seed {seed} to {other[0].seed} at {other[0].weight:.3g}" if other else f"seed {seed}"


def picture_facts(drawing: Drawing, class_names: Sequence[str], drawn_by: dict[str, Any]) -> dict[str, Any]:
    """The metadata of a drawing of one image, as JSON holds it, but for the evaluations.

    Args:
        drawn_by: the origin of the picture, see `latentflow.sampling.pipeline.drawn_by`.
    """
    facts = drawing.model_dump(mode="json") | {"drawn_by": drawn_by}
    if drawing.labels:
        facts["class_name"] = class_names[drawing.labels[0]]
    if drawing.blends and drawing.blends[0].label is not None:
        facts["to_class_name"] = class_names[drawing.blends[0].label]
    return facts


@lru_cache(maxsize=8)
def file_names(class_names: tuple[str, ...]) -> tuple[str, ...]:
    """Class names as valid file names on every system, distinct even if case is ignored.

    A name that had to change, or that collides with another, ends in its index: "and/or" becomes "and_or~3".
    """
    safe = [_safe(name) for name in class_names]
    taken = Counter(name.casefold() for name in safe)
    return tuple(
        name if name == own and taken[name.casefold()] == 1 and not re.search(r"~\d+$", name) else f"{name}~{index}"
        for index, (name, own) in enumerate(zip(safe, class_names, strict=True))
    )


def _safe(name: str) -> str:
    text = "".join(
        "_" if letter in _UNSAFE or not letter.isprintable() else letter
        for letter in unicodedata.normalize("NFC", name)
    )
    text = re.sub(r"^[.\-\s]+", "_", text.rstrip(". ")) or "_"
    text = f"_{text}" if _RESERVED.match(text) else text
    return text.encode()[:_MOST_BYTES].decode(errors="ignore")
