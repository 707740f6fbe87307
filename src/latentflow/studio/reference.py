"""The server's own documentation: OpenAPI, made from the records that check requests, and a page of it.

The page has no script and asks nothing of other machines.
"""

from __future__ import annotations

from typing import Any

from latentflow.pages.page import render
from latentflow.studio.tasks import FORMATS, Task

_STATUS = {
    401: "the token is missing or wrong",
    403: "another host, or a page of another site",
    408: "the request did not arrive in time",
    413: "the body or an image is too large",
    415: "no image, or neither JSON nor a form",
    422: "a field is wrong, or the model cannot do it",
    429: "the queue is full; see Retry-After",
    503: "the server is closing, or its device failed",
    504: "it took too long",
}
_SIZE = {"anyOf": [{"type": "integer"}, {"type": "string"}, {"type": "null"}], "default": None}
_IMAGE = {"type": "string", "format": "byte", "description": "The content of an image file, in base64."}


def body_schema(task: Task) -> dict[str, Any]:
    """The JSON schema of a request."""
    schema = task.request.model_json_schema()
    properties = {name: schema["properties"][name] for name in schema["properties"] if name in task.fields}
    if "image_size" in properties:
        properties["image_size"] = {**_SIZE, "description": properties["image_size"]["description"]}
    properties["num"] = {**properties["num"], "default": 1}
    images = dict.fromkeys((*task.images, *task.optional), _IMAGE)
    kind = {"type": "string", "enum": list(FORMATS), "description": "Default: png for one image, json for several."}
    return {
        "type": "object",
        "properties": {**images, **properties, "format": kind},
        "required": list(task.images),
        "additionalProperties": False,
    }


def operation(task: Task) -> dict[str, Any]:
    """What OpenAPI says of a task besides its path."""
    content: dict[str, Any] = {"application/json": {"schema": body_schema(task)}}
    if task.images:
        parts = {name: {"type": "string", "format": "binary"} for name in (*task.images, *task.optional)}
        parts["request"] = {"type": "string", "description": "The other fields, as JSON."}
        form = {"type": "object", "properties": parts, "required": list(task.images)}
        content["multipart/form-data"] = {"schema": form}
    picture = {"schema": {"type": "string", "format": "binary"}}
    answers = {"200": {"description": "the picture", "content": {"image/png": picture, "application/json": {}}}}
    answers |= {str(status): {"description": reason} for status, reason in _STATUS.items()}
    return {"requestBody": {"required": True, "content": content}, "responses": answers}


def reference_page(tasks: tuple[Task, ...], others: dict[str, str]) -> str:
    """The page at /docs.

    Args:
        others: the paths that take no request, each with what it answers.
    """
    described = []
    for task in tasks:
        schema = body_schema(task)
        fields = [
            (name, "needed" if name in schema["required"] else _default(field), field.get("description", ""))
            for name, field in schema["properties"].items()
        ]
        described.append((task, fields))
    return render("server.html", tasks=described, others=others, statuses=_STATUS)


def _default(field: dict[str, Any]) -> str:
    return "" if field.get("default") is None else str(field["default"])
