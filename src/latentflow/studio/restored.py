"""The request of a picture, from its metadata: what draws it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentflow.errors import DataError
from latentflow.model.guide_reference import NO_GUIDE
from latentflow.sampling.edits import variation_seed

_MOST_VARIATIONS = 1000  # among which that of a picture is looked for
_TASKS = ("sample", "vary", "interpolate", "inpaint", "mask-to-image", "translate", "image-to-image", "invert")


def restored_request(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The task and the fields of the request that draw a picture again.

    Args:
        facts: its metadata, as `latentflow.sampling.picture_file.read_facts` reads it.

    Returns:
        `task`, `request` (fields of the request of the task, classes by index), `inputs` (the files that have to be
        given again, by name), and `frame`: of a picture between two ends, its place among the frames.

    Raises:
        DataError: the metadata is of a picture that no request draws, or it is damaged.
    """
    task = facts.get("task")
    if task not in _TASKS:
        raise DataError(f"a picture of the task {task!r} has no request to restore; give one of {', '.join(_TASKS)}")
    try:
        request = _common(facts)
        request |= _OF_TASK.get(task, lambda facts, common: {})(facts, request)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError("the request in the picture's metadata is damaged; its pixels may still be used") from error
    given = {name: text for name, text in (facts.get("inputs") or {}).items() if name in ("image", "mask", "map")}
    return {"task": task, "request": {name: v for name, v in request.items() if v is not None}, "inputs": given}


def _common(facts: Mapping[str, Any]) -> dict[str, Any]:
    sampling = {name: value for name, value in facts["sampling"].items() if value is not None}
    sampling.setdefault("guide", NO_GUIDE)  # although the preset of the model may name one
    named = {name: values[0] for name, values in (facts.get("conditions") or {}).items()}
    return {
        "num": 1,
        "seed": int(facts["seeds"][0]),
        "classes": [int(label) for label in facts.get("labels") or []],
        "conditions": {name: [value] if isinstance(value, list) else value for name, value in named.items()} or None,
        "image_size": _size(facts.get("image_size")) if facts.get("task") == "sample" else None,
        **sampling,
    }


def _size(size: Any) -> str | None:
    return None if size is None else f"{int(size[1])}x{int(size[0])}"


def _vary(facts: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """Enough variations that this one, whose other seed is derived from its number, is the last."""
    blend = facts["blends"][0]
    numbers = (n for n in range(_MOST_VARIATIONS) if variation_seed(common["seed"], n) == blend["seed"])
    return {"amount": float(blend["weight"]), "num": next(numbers, 7) + 1}


def _interpolate(facts: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """The two ends; the number of frames is the least that has one at this picture's weight."""
    blend = facts["blends"][0]
    weight, other = float(blend["weight"]), blend.get("label")
    gaps = next((n for n in range(1, 100) if abs(weight * n - round(weight * n)) < 1e-6), 8)
    towards = blend.get("conditions") or {}
    between = {name: [one, towards[name]] for name, one in (common["conditions"] or {}).items() if name in towards}
    return {
        "seeds": [common["seed"], int(blend["seed"])],
        "seed": None,
        "num": max(gaps, 8) + 1 if gaps < 8 and 8 % gaps == 0 else gaps + 1,
        "classes": [*common["classes"], *([int(other)] if other is not None else [])],
        "conditions": {**(common["conditions"] or {}), **between} or None,
    }


def _inpaint(facts: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    inputs = facts["inputs"]
    return {"method": inputs.get("method"), "feather": int(inputs.get("feather", 0))}


def _image_to_image(facts: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    return {"strength": float(facts["start"])}


def _invert(facts: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    return {"num": None, "seed": None}


_OF_TASK = {
    "vary": _vary,
    "interpolate": _interpolate,
    "inpaint": _inpaint,
    "image-to-image": _image_to_image,
    "invert": _invert,
}
