"""Folders that a later run continues: `plan.json` says what is being done there, and another plan is refused.

A killed command is repeated, several processes share one folder, a search is extended: each reads the plan first.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from latentflow.artifacts import contents, read_json, write_json
from latentflow.errors import ArtifactError

PLAN_FILE = "plan.json"

_NAMED = 3  # settings in a message


def claim_folder(folder: str | Path, plan: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Write `plan` into an empty folder, or return the plan that is already there; see `require_same_plan`.

    Args:
        plan: everything that makes two pieces of work the same, as JSON.
        what: what the folder is for, in messages: "a latent cache".

    Raises:
        ArtifactError: the folder holds something else, or its plan is damaged.
    """
    file = Path(folder) / PLAN_FILE
    # Listed before looking for the plan: files that another process adds in between must not be taken for strangers.
    strangers = contents(folder) if Path(folder).is_dir() else []
    if not file.exists():
        if strangers:
            raise ArtifactError(
                f"{folder} is not empty ({strangers[0].name}, ...) and does not hold {what}; choose another --out"
            )
        write_json(file, plan)
    found = read_json(file)
    if not isinstance(found, dict):
        raise ArtifactError(f"{file} is damaged; delete {folder}, or choose another --out")
    return found


def require_same_plan(
    folder: str | Path, found: Mapping[str, Any], wanted: Mapping[str, Any], what: str, *, free: Collection[str] = ()
) -> None:
    """Refuse to continue a folder with another plan.

    Args:
        found: the plan of the folder, from `claim_folder`.
        free: keys that may differ, "section.key" for nested ones.

    Raises:
        ArtifactError: naming the first settings that differ, with both values.
    """
    changed = {key: values for key, values in changed_values(found, wanted).items() if key not in free}
    if changed:
        more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
        raise ArtifactError(
            f"{folder} holds {what} with other settings ({spelled_out(dict(list(changed.items())[:_NAMED]))}{more}); "
            "choose another --out, or delete the folder"
        )


def changed_values(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings in which two records differ, {"section.key": (old, new)}, sorted; a missing key counts as None."""
    before, after = flat(old), flat(new)
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return {key: (before.get(key), after.get(key)) for key in keys}


def spelled_out(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """What `changed_values` found, for messages: "training.batch_size: 64, now 32; ..."."""
    lines = (
        f"{key}: {json.dumps(old, ensure_ascii=False)}, now {json.dumps(new, ensure_ascii=False)}"
        for key, (old, new) in changed.items()
    )
    return "; ".join(lines)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their full name: {"a": {"b": 1}} => {"a.b": 1}."""
    flattened: dict[str, Any] = {}
    for key, value in values.items():
        flattened |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flattened
