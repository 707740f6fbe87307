"""YAML without type guessing: mappings, lists and text, every value with its place in the file.

The field that a value is for decides what it means (a number, a switch, a path). References (*name), tags (!name) and
duplicate keys are refused, and size and depth are bounded, so that a small file stays small when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import yaml

from latentflow.errors import ConfigError

_MOST_BYTES = 100_000
_DEEPEST = 16
_QUOTES = "text with special signs needs quotes: 'like this'"


@dataclass(frozen=True)
class Scalar:
    """One value as it was written.

    Attributes:
        text: without quotes, comments and the space around it.
        quoted: whether it is in quotes; a quoted null is text.
        where: its place, for messages.
    """

    text: str
    quoted: bool
    where: str


Node = Union[Scalar, list["Node"], dict[str, "Node"]]  # noqa: UP007 - a union with names of later types
"""A value, a list of nodes, or keys and nodes."""


def read_yaml(file: Path) -> dict[str, Node]:
    """The mapping in a YAML file; an empty file has none of its keys.

    Raises:
        ConfigError: one line with the file, the line in it, and the remedy.
    """
    try:
        if not file.is_file():
            raise ConfigError(f"{file} is not a file; give a YAML file")
        with file.open("rb") as stream:
            data = stream.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    if len(data) > _MOST_BYTES:
        raise ConfigError(f"{file} is longer than {_MOST_BYTES:,} bytes; it is not a recipe")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not text in UTF-8 (byte {error.start}); save it as UTF-8") from error
    node = _read(text, lambda line: f"{file}, line {line + 1}", str(file))
    if not isinstance(node, dict):
        found = "a list" if isinstance(node, list) else f"{node.text[:40]!r}"
        raise ConfigError(f"{file} must hold keys and values, not {found}")
    return node


def read_text(text: str, where: str) -> Node:
    """The YAML value in a text at `where`.

    Raises:
        ConfigError: it is not YAML, or uses more of YAML than is supported.
    """
    return _read(text, lambda line: where, where)


def _read(text: str, place: Callable[[int], str], whole: str) -> Node:
    """The one YAML value in `text`, of which line `n` stands at `place(n)`; empty text is an empty mapping."""
    try:
        events = iter(_events(text))
        event = next(events)
        if isinstance(event, yaml.StreamEndEvent):
            return {}
        node = _node(event, events, place, depth=0)
        if not isinstance(next(events), yaml.StreamEndEvent):
            raise ConfigError(f"{whole} holds more than one YAML document (---); keep one")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = _problem(error)
        remedy = "indent with spaces" if r"'\t'" in problem else _QUOTES
        raise ConfigError(f"{place(mark.line) if mark else whole}: {problem}; {remedy}") from error
    return node


def _events(text: str) -> Iterator[Any]:
    """The events of parsing, without those of streams and documents but the last."""
    skipped = (yaml.StreamStartEvent, yaml.DocumentStartEvent, yaml.DocumentEndEvent)
    return (event for event in yaml.parse(text, Loader=yaml.SafeLoader) if not isinstance(event, skipped))


def _node(event: Any, events: Iterator[Any], place: Callable[[int], str], depth: int) -> Node:
    where = place(event.start_mark.line)
    if isinstance(event, yaml.AliasEvent):
        raise ConfigError(f"{where}: *{event.anchor} is a reference, which is not supported; {_QUOTES}")
    if event.tag is not None:
        raise ConfigError(f"{where}: {event.tag!r} is a tag, which is not supported; {_QUOTES}")
    if isinstance(event, yaml.ScalarEvent):
        return Scalar(event.value, event.style is not None, where)
    if depth == _DEEPEST:
        raise ConfigError(f"{where}: values are nested more than {_DEEPEST} deep; no recipe needs that")
    if isinstance(event, yaml.SequenceStartEvent):
        entries = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            entries.append(_node(event, events, place, depth + 1))
        return entries
    mapping: dict[str, Node] = {}
    lines: dict[str, int] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        line, key = event.start_mark.line, _node(event, events, place, depth + 1)
        if not isinstance(key, Scalar):
            raise ConfigError(f"{place(line)}: a key must be a word, not a list or a mapping")
        if key.text in mapping:
            before = f"line {lines[key.text] + 1}" if lines[key.text] != line else "the same line"
            raise ConfigError(f"{place(line)}: {key.text!r} is set again, after {before}; keep one of them")
        mapping[key.text], lines[key.text] = _node(next(events), events, place, depth + 1), line
    return mapping


def _problem(error: yaml.YAMLError) -> str:
    return " ".join(str(getattr(error, "problem", None) or getattr(error, "reason", None) or error).split())
