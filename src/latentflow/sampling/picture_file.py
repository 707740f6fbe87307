"""The metadata of a drawn picture, read back: where it comes from, and whether two pictures belong to one set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from PIL import Image

from latentflow.data.pictures.decode import open_image

# of each picture of a set
_OWN = ("seeds", "labels", "conditions", "blends", "class_name", "to_class_name", "evaluations")
WHICH = ("seeds", "labels", "conditions", "blends", "inputs")
"""The facts that distinguish a picture from the others of its set."""
_OF_INPUT = ("inputs", "image_size")  # of each picture that is drawn from another one
_GIVEN = ("inpaint", "mask-to-image", "translate", "image-to-image")


def read_facts(file: bytes | str, name: str | None = None) -> dict[str, Any] | None:
    """The metadata of a PNG that this program drew; None: it was not drawn by this program.

    Args:
        file: its path or its content.
        name: how errors call it.

    Raises:
        BrokenImage: it is not an image.
    """
    with open_image(file, name) as image:
        return facts_in(image)


def facts_in(image: Image.Image) -> dict[str, Any] | None:
    """The same for an open picture, without decoding its pixels."""
    text = image.info.get("latentflow")
    try:
        facts = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return None
    return facts if isinstance(facts, dict) and isinstance(facts.get("drawn_by"), dict) else None


def whose(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What all pictures of one set have in common: the model's weights and the sampling settings, flattened.

    The names of the folders of model and guide do not count, nor do the inputs of pictures that are drawn from other
    pictures.
    """
    apart = {*_OWN, *(_OF_INPUT if facts.get("task") in _GIVEN else ())}
    common = {name: value for name, value in facts.items() if name not in apart}
    drawn_by = {name: value for name, value in common.pop("drawn_by").items() if name != "model"}
    sampling = common.pop("sampling", None) or {}
    sampling = dict(sampling) if isinstance(sampling, dict) else {}
    if isinstance(guide := sampling.get("guide"), dict):
        sampling["guide"] = guide.get("weights")
    return {**drawn_by, **common, **sampling}


def which(facts: Mapping[str, Any]) -> str:
    """What distinguishes a picture from the others of its set, as text to compare."""
    return json.dumps([facts.get(name) for name in WHICH], sort_keys=True)


def unlike(facts: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The first difference between the sets of two pictures, for people; "" if they are of the same set."""
    ours, theirs = whose(facts), whose(other)
    for name in dict.fromkeys([*ours, *theirs]):
        if ours.get(name) != theirs.get(name):
            return f"{name.replace('_', ' ')} {theirs.get(name)}, not {ours.get(name)}"
    return ""
