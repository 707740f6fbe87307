"""Lists and pairs as they are written on the command line."""

from __future__ import annotations

from typing import Any

from latentflow.errors import ConfigError


def names(text: str | None) -> list[str] | None:
    """What a list with commas names; None where it was left out."""
    return None if text is None else [name.strip() for name in text.split(",")]


def numbers(text: str | None, option: str, kind: type = float) -> list[Any] | None:
    """The numbers of a list with commas; None where it was left out."""
    try:
        return None if text is None else [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        example = "4,8,16" if kind is int else "1,1.5,2"
        raise ConfigError(f"{option} {text!r} is not a list of numbers like {example}") from None


def pair(text: str | None, option: str, separator: str = ",") -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(separator))
    except ValueError:
        raise ConfigError(f"{option} {text!r} is not two numbers like 0.1{separator}0.8") from None
    return low, high
