"""The name of a model with an adapter: MODEL+ADAPTER, or MODEL+ADAPTER:0.7 at a strength.

It stands wherever a model is named, and `--adapter` and `--adapter-strength` make it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

from latentflow.model.snapshots import split_snapshot
from latentflow.requests import RequestError

MOST_STRENGTH = 10.0


@dataclass(frozen=True)
class AdaptedName:
    """A model and an adapter of it.

    Attributes:
        model: a model folder, a run folder, a snapshot or a hub id.
        adapter: a folder of an adapter, or of a run or a model that holds one, a snapshot or a hub id.
        strength: what its differences are multiplied by; 0: the model that it was trained from, 1: as trained.
    """

    model: str
    adapter: str
    strength: float = 1.0

    def __str__(self) -> str:
        return f"{self.model}+{self.adapter}" + ("" if self.strength == 1 else f":{self.strength:.12g}")


def adapted_name(model: str | Path, adapter: str | Path | None, strength: float | None = None) -> AdaptedName | None:
    """The name of a model with an adapter, however they are given; None: there is no adapter.

    Args:
        model: may name an adapter itself.
        strength: None: 1, or what the name says.

    Raises:
        RequestError: two adapters, a strength without one, or one out of range.
    """
    named = split_adapted(model)
    if adapter is None:
        if strength is not None and named is None:
            raise RequestError("adapter_strength", f" {strength} has no effect without an adapter; remove it")
    elif named is not None:
        raise RequestError("adapter", f" {adapter}: {model} names an adapter already; give one")
    elif not str(adapter):
        raise RequestError("adapter", " '': give the folder of an adapter")
    else:
        named = AdaptedName(str(model), str(adapter))
    if named is None or strength is None:
        return named
    return AdaptedName(named.model, named.adapter, checked_strength(strength))


def checked_strength(strength: object) -> float:
    """A strength, if it is one.

    Raises:
        RequestError: it is no number from 0 to `MOST_STRENGTH`.
    """
    if (
        isinstance(strength, bool)
        or not isinstance(strength, Real)
        or not 0 <= (number := float(strength)) <= MOST_STRENGTH
    ):
        shown = f"{strength:g}" if isinstance(strength, float) else str(strength)
        raise RequestError(
            "adapter_strength",
            f" {shown}: give a number from 0 to {MOST_STRENGTH:g}; 0 is the base, 1 the adapter as it was trained",
        )
    return number


def split_adapted(model: str | Path) -> AdaptedName | None:
    """Model, adapter and strength from MODEL+ADAPTER:STRENGTH; None: it is something else.

    What exists under the whole name comes first. Of several places to part it, the first with a model before it.

    Raises:
        RequestError: the strength is out of range.
    """
    name = str(model)
    if "+" not in name or Path(name).exists():
        return None
    places = [place for place, letter in enumerate(name) if letter == "+" and 0 < place < len(name) - 1]
    there = [place for place in places if _exists(name[:place])]
    if not places:
        return None
    place = (there or places)[0]
    adapter, colon, ending = name[place + 1 :].rpartition(":")
    try:
        strength = float(ending) if colon else math.nan
    except ValueError:
        strength = math.nan
    if not adapter or math.isnan(strength) or Path(name[place + 1 :]).exists():
        return AdaptedName(name[:place], name[place + 1 :])
    return AdaptedName(name[:place], adapter, checked_strength(strength))


def _exists(model: str) -> bool:
    return Path(model).exists() or split_snapshot(model) is not None
