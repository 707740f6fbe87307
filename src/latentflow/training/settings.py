"""Checked settings from YAML: unknown keys are refused with the nearest valid one named.

`key=value` overrides reach any depth (`training.batch_size=64`).
"""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, Union

import yaml
from pydantic import BaseModel, ValidationError

from latentflow.errors import ConfigError, nearest

Schema = TypeVar("Schema", bound=BaseModel)


def load_settings(schema: type[Schema], file: Path, overrides: Sequence[str] = ()) -> Schema:
    """Read a YAML file, apply `key=value` overrides, and check the result against `schema`.

    Raises:
        ConfigError: one line with the key, the value and the remedy.
    """
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold a mapping of keys, not a {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise _explained(error, schema, file.stem) from error


def to_yaml(settings: BaseModel) -> str:
    """Settings as YAML that `load_settings` reads back to equal ones."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differences(old: BaseModel, new: BaseModel, *, free: Sequence[str] = ()) -> list[str]:
    """The keys in which two settings differ, as "key: old, now new"; keys and sections in `free` do not count."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    keys = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    fixed = [key for key in keys if not any(key == name or key.startswith(f"{name}.") for name in free)]
    return [f"{key}: {before.get(key)!r}, now {after.get(key)!r}" for key in sorted(fixed)]


def _explained(error: ValidationError, schema: type[BaseModel], origin: str) -> ConfigError:
    """The first complaint of pydantic as one line for the user."""
    first = error.errors()[0]
    *path, last = (str(part) for part in first["loc"])
    shown, section = _section_at(schema, path)
    key = ".".join([*shown, last])
    if first["type"] == "extra_forbidden":
        return ConfigError(f"{origin}: unknown key {key!r}; {nearest(last, section.model_fields)}")
    message = first["msg"].removeprefix("Value error, ")
    return ConfigError(f"{origin}: {key} = {first['input']!r}: {message}")


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one `a.b.c=value` in nested mappings; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value, for example training.batch_size=64")
    *path, last = key.strip().split(".")
    for part in path:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override {override!r}: {part!r} is a value and has no keys of its own")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from error


def _section_at(schema: type[BaseModel], path: Sequence[str]) -> tuple[list[str], Any]:
    """Follow pydantic's `path` into nested sections: the keys a user writes, and the class of the last section.

    Where a section may be of several kinds, pydantic's path also names the kind, which is not a key.
    """
    shown: list[str] = []
    section: Any = schema
    for part in path:
        if isinstance(section, tuple):
            section = next(kind for kind in section if kind.model_fields["kind"].default == part)
        else:
            shown.append(part)
            field = getattr(section, "model_fields", {}).get(part)
            section = _section_types(field.annotation) if field else section
    return shown, section


def _section_types(annotation: Any) -> Any:
    """The model class of an annotation, or the classes of a union of them."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return tuple(_section_types(kind) for kind in typing.get_args(annotation))
    return annotation


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
