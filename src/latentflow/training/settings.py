"""Checked settings from YAML files and `key=value` overrides, read by the types of their fields.

A value is read by the type of its field, never by how it looks. Files and overrides follow the same rules.

    text             verbatim: #, =, @, no, 2024 and 007 have no special meaning (files have YAML's quotes and comments)
    whole numbers    decimal: 10, 010 (which is 10), 100_000, 1e5
    numbers          decimal: 0.1, 1e-4; neither nan nor inf
    switches         true or false
    lists            [0.9, 0.99] or 0.9,0.99
    sections         nested keys; in an override network.depth=3, or network={name: DiT-S/2} for the whole section
    null, ~          no value, if the field is optional (text in quotes)

An override reaches any depth (`training.batch_size=64`). One that changes a section's `kind` resets the section, unless
all kinds have the same keys.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from latentflow.errors import ConfigError, nearest
from latentflow.plans import flat
from latentflow.records import alternatives, annotation_of, default_kind, explain, sections_of
from latentflow.training.plain_yaml import Node, Scalar, read_text, read_yaml

Schema = TypeVar("Schema", bound=BaseModel)

_NULL = ("null", "~", "")
_NUMBER = re.compile(r"[+-]?(\d+(_\d{3})*(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_MOST_DIGITS = 18
_LONGEST_TEXT = 4096


def load_settings(schema: type[Schema], file: Path, overrides: Sequence[str] = ()) -> Schema:
    """Read a YAML file, apply `key=value` overrides, and check the result against `schema`.

    Raises:
        ConfigError: one line with the key, the value and the remedy.
    """
    values = read_yaml(file)
    pairs = [_split(override) for override in overrides]
    _refuse_twice(pairs)
    for key, value in sorted(pairs, key=lambda pair: pair[0][-1] != "kind"):
        _apply(schema, values, key, value)
    try:
        return schema.model_validate(_read_section((schema,), values, ""))
    except ValidationError as error:
        raise ConfigError(f"{file.stem}: {explain(error, schema)}") from error


def to_yaml(settings: BaseModel) -> str:
    """Settings as YAML that `load_settings` reads back to equal ones."""
    return yaml.dump(settings.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Escapes line separators and other unprintable characters, which YAML would not read back otherwise."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _text)


def is_within(key: str, names: Sequence[str]) -> bool:
    """Whether `key` is one of `names`, or is in a section that is."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def keys_of(settings: BaseModel) -> list[str]:
    """Every key, sections included, as an override names it."""
    parts = (key.split(".") for key in flat(settings.model_dump(mode="json")))
    return list(dict.fromkeys(".".join(part[: n + 1]) for part in parts for n in range(len(part))))


def _split(override: str) -> tuple[list[str], Scalar]:
    """The path of keys and the text of one `a.b.c=value`."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"override {override!r} is not of the form key=value, for example training.batch_size=64")
    return path, Scalar(text, quoted=False, where=f"override {override!r}")


def _refuse_twice(pairs: Iterable[tuple[list[str], Scalar]]) -> None:
    """Refuse an override that is given twice, or overlaps with another one."""
    before: list[tuple[list[str], Scalar]] = []
    for path, value in pairs:
        for other, first in before:
            common = min(len(path), len(other))
            if path[:common] == other[:common]:
                raise ConfigError(f"{first.where} and {value.where} set the same key; keep one of them")
        before.append((path, value))


def _apply(schema: type[BaseModel], values: dict[str, Node], path: list[str], value: Scalar) -> None:
    """Set one override in nested mappings."""
    sections: tuple[type[BaseModel], ...] = (schema,)
    for number, part in enumerate(path[:-1], start=1):
        annotation = annotation_of(_one_of(sections, values), part)
        sections = sections_of(annotation)
        inner = values.setdefault(part, {})
        if isinstance(inner, Scalar) and not inner.quoted and not inner.text:
            inner = values[part] = {}
        if not isinstance(inner, dict) or (annotation is not None and not sections):
            raise ConfigError(f"{value.where}: {'.'.join(path[:number])} is a value, not a section with keys")
        if annotation is None:
            return  # an unknown key, which validation will name
        values = inner
    given = values.get("kind")
    before = given.text if isinstance(given, Scalar) else default_kind(sections[0])
    if path[-1] == "kind" and len(sections) > 1 and before != value.text:
        values.clear()
    values[path[-1]] = value


def _read(annotation: Any, node: Node, key: str) -> Any:
    """The value of `node` for the field `key`, read by the type of the field."""
    kinds = alternatives(annotation)
    empty = isinstance(node, Scalar) and not node.quoted and node.text.strip() in _NULL
    if type(None) in kinds and empty:
        return None
    kinds = [kind for kind in kinds if kind is not type(None)]
    if sections_of(annotation):
        return _read_section(sections_of(annotation), node, key)
    kind = kinds[0] if len(kinds) == 1 else str
    if typing.get_origin(kind) in (list, tuple):
        return _read_list(kind, node, key)
    if not isinstance(node, Scalar):
        found = "a list" if isinstance(node, list) else "a section"
        raise ConfigError(f"{_first_place(node)}{key} is {found}; write one value")
    if kind in (int, float):
        return _read_number(kind, node, key)
    if kind is bool:
        if node.text.strip().lower() not in ("true", "false"):
            raise ConfigError(f"{node.where}: {key} = {node.text!r} is not true or false; write one of them")
        return node.text.strip().lower() == "true"
    return _read_word(kind, node, key)


def _read_section(schemas: Sequence[type[BaseModel]], node: Node, key: str) -> dict[str, Any]:
    """A section of one of `schemas`; unknown keys are left for the validation of the whole."""
    if isinstance(node, Scalar) and not node.quoted and node.text.strip().startswith("{"):
        node = read_text(node.text, node.where)
    if isinstance(node, Scalar) and not node.text:
        node = {}
    schema = _one_of(schemas, node)
    if not isinstance(node, dict):
        found, example = _plain(node), next(iter(schema.model_fields))
        raise ConfigError(f"{_first_place(node)}{key} = {found!r} is a section; set its keys, such as {key}.{example}")
    kinds, given = [default_kind(one) for one in schemas], node.get("kind")
    if len(schemas) > 1 and isinstance(given, Scalar) and given.text not in kinds:
        raise ConfigError(f"{given.where}: {key}: unknown kind {given.text!r}; {nearest(given.text, kinds)}")
    return {
        name: _plain(value)
        if (annotation := annotation_of(schema, name)) is None
        else _read(annotation, value, f"{key}.{name}".lstrip("."))
        for name, value in node.items()
    }


def _read_list(kind: Any, node: Node, key: str) -> list[Any]:
    if isinstance(node, Scalar):
        if not node.quoted and node.text.strip().startswith("["):
            node = read_text(node.text, node.where)
        else:
            parts = node.text.split(",") if node.text.strip() else []
            node = [Scalar(part.strip(), node.quoted, node.where) for part in parts]
    if not isinstance(node, list):
        raise ConfigError(f"{_first_place(node)}{key} is a section; write a list like [0.9, 0.99]")
    types_of = [one for one in typing.get_args(kind) if one is not Ellipsis]
    if typing.get_origin(kind) is tuple and Ellipsis not in typing.get_args(kind) and len(node) != len(types_of):
        shape = ", ".join(["..."] * len(types_of))
        raise ConfigError(
            f"{_first_place(node)}{key} needs {len(types_of)} values, not {len(node)}; write them as [{shape}]"
        )
    return [_read(types_of[min(n, len(types_of) - 1)], entry, key) for n, entry in enumerate(node)]


def _read_number(kind: type, node: Scalar, key: str) -> int | float:
    text = node.text.strip()
    what, example = ("a whole number", "10, 100_000 or 1e5") if kind is int else ("a number", "10, 0.1 or 1e-4")
    if not _NUMBER.fullmatch(text):
        raise ConfigError(f"{node.where}: {key} = {node.text!r} is not {what}; write it like {example}")
    number = Decimal(text.replace("_", ""))
    if number and abs(number.adjusted()) > (_MOST_DIGITS if kind is int else 300):
        raise ConfigError(f"{node.where}: {key} = {node.text!r} is too large or too small")
    if kind is int and number != number.to_integral_value():
        raise ConfigError(f"{node.where}: {key} = {node.text!r} is not a whole number")
    return kind(number)


def _read_word(kind: Any, node: Scalar, key: str) -> str:
    if len(node.text) > _LONGEST_TEXT:
        start = node.text[:20]
        raise ConfigError(f"{key} = {start!r}... has {len(node.text):,} characters; the limit is {_LONGEST_TEXT:,}")
    if "\0" in node.text:
        raise ConfigError(f"{node.where}: {key} = {node.text!r} holds a zero byte, which no name may have")
    if any("\ud800" <= character <= "\udfff" for character in node.text):
        raise ConfigError(
            f"{node.where}: {key} = {node.text!r} is not text in UTF-8; rename it, or give a symbolic link to it"
        )
    if typing.get_origin(kind) is Literal:
        options = typing.get_args(kind)
        text = node.text.strip()
        if text not in options:
            raise ConfigError(f"{node.where}: {key} = {text!r} is unknown; {nearest(text, options)}")
        return text
    return node.text


def _one_of(schemas: Sequence[type[BaseModel]], node: Node) -> type[BaseModel]:
    """The kind of section that `node` names; the first one if it names none."""
    given = node.get("kind") if isinstance(node, dict) else None
    named = [schema for schema in schemas if isinstance(given, Scalar) and default_kind(schema) == given.text]
    return [*named, *schemas][0]


def _first_place(node: Node) -> str:
    """Where a node begins, as a prefix for a message."""
    while not isinstance(node, Scalar):
        inner = list(node.values()) if isinstance(node, dict) else node
        if not inner:
            return ""
        node = inner[0]
    return f"{node.where}: "


def _plain(node: Node) -> Any:
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    return [_plain(entry) for entry in node] if isinstance(node, list) else node.text
