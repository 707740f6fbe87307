"""Semantic maps, which give every pixel a class: their classes, and how to show them in colours.

A map is [H, W] uint8; a value is the index of a class, or `UNLABELLED` (255) where the class is unknown.

Legend: K number of classes; H, W height and width in pixels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentflow.artifacts import write_text
from latentflow.data.items import UNLABELLED
from latentflow.errors import DataError

Colour = tuple[int, int, int]

UNLABELLED_COLOUR: Colour = (224, 224, 192)
"""The colour of unlabelled pixels, after Pascal VOC; no default palette contains it."""

EXAMPLE = '["sky", "road", "tree"] or {"names": ["sky", "road"], "palette": [[128, 128, 128], [128, 64, 128]]}'


@dataclass(frozen=True)
class MapClasses:
    """The classes of semantic maps, in order of their index.

    Args:
        names: K different names, 1 <= K <= 255.
        palette: K different RGB colours in 0..255; none given: `default_palette`.

    Raises:
        DataError: the above does not hold.
    """

    names: tuple[str, ...]
    palette: tuple[Colour, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= len(self.names) <= UNLABELLED:
            raise DataError(f"{len(self.names)} classes of semantic maps; there must be 1 to {UNLABELLED}")
        if twice := _repeated(self.names):
            raise DataError(f"two classes of the semantic maps are called {twice!r}; give each its own name")
        if not self.palette:
            object.__setattr__(self, "palette", default_palette(len(self.names)))
        if len(self.palette) != len(self.names):
            raise DataError(f"the palette has {len(self.palette)} colours for {len(self.names)} classes; give one each")
        if twice := _repeated(self.palette):
            shared = [name for name, colour in zip(self.names, self.palette, strict=True) if colour == twice]
            raise DataError(f"the classes {', '.join(shared)} have the same colour {twice}; give each its own")

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def read(cls, file: str | Path) -> MapClasses:
        """Read classes.json: a list of names, or an object of "names" and optionally "palette".

        Raises:
            DataError: the file is missing, not JSON, or of another form.
        """
        try:
            text = Path(file).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror}; it should hold {EXAMPLE}") from error
        return cls.parse(text, str(file))

    @classmethod
    def parse(cls, text: str | bytes, name: str) -> MapClasses:
        """Parse the content of a classes.json called `name`; see `read`."""
        try:
            names, palette = _names_and_palette(json.loads(text))
            return cls(names, palette)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name} is not valid JSON ({error}); it should hold {EXAMPLE}") from error

    def write(self, file: str | Path) -> None:
        """Write a classes.json that `read` reads back."""
        names, palette = json.dumps(self.names, ensure_ascii=False), json.dumps(self.palette)
        write_text(file, f'{{\n  "names": {names},\n  "palette": {palette}\n}}\n')


def default_palette(num_classes: int) -> tuple[Colour, ...]:
    """Up to 255 distinct RGB colours: the colour map of Pascal VOC, black first.

    Bits 0, 1, 2 of the index become the highest bits of red, green, blue; bits 3, 4, 5 the next ones, and so on.
    """
    colours = []
    for index in range(num_classes):
        bits = [(index >> (3 * place + channel) & 1) << (7 - place) for channel in range(3) for place in range(3)]
        colours.append((sum(bits[0:3]), sum(bits[3:6]), sum(bits[6:9])))
    return tuple(colours)


def check_map(semantic_map: np.ndarray, classes: MapClasses, name: str) -> None:
    """Require that a map is [H, W] of integers, each the index of a class or `UNLABELLED`.

    Raises:
        DataError: it is not; the message calls it `name`.
    """
    if semantic_map.ndim != 2 or semantic_map.dtype.kind not in "iu":
        form = f"{list(semantic_map.shape)} {semantic_map.dtype}"
        raise DataError(f"{name}: a semantic map is an array [height, width] of integers, not {form}")
    unknown = (semantic_map != UNLABELLED) & ((semantic_map < 0) | (semantic_map >= len(classes)))
    if unknown.any():
        indices, counts = np.unique(semantic_map[unknown], return_counts=True)
        more = f" (and {len(indices) - 1} more unknown classes)" if len(indices) > 1 else ""
        raise DataError(
            f"{name}: class {indices[0]} in {_pixels(counts[0])}{more}, but there are {len(classes)} classes, "
            f"0 to {len(classes) - 1}; {UNLABELLED} means unlabelled{_other_numbering(semantic_map, len(classes))}"
        )


def colour_map(semantic_map: np.ndarray, palette: tuple[Colour, ...]) -> np.ndarray:
    """Paint a map [H, W] uint8 in the colours of its classes: [H, W, 3] uint8.

    `UNLABELLED` and any other index without a colour become `UNLABELLED_COLOUR`; `map_reader.read_map` reads it back.
    """
    table = np.full((256, 3), UNLABELLED_COLOUR, np.uint8)
    table[: len(palette)] = palette
    return table[semantic_map]


def _other_numbering(semantic_map: np.ndarray, num_classes: int) -> str:
    """A remedy if a map counts its classes from 1, or in steps; "" otherwise."""
    used = np.unique(semantic_map)
    step = int(np.gcd.reduce(used))
    if used[-1] == num_classes:
        return "; if it counts from 1, in Pillow Image.fromarray(numpy.asarray(map).astype(numpy.uint8) - 1)"
    if len(used) > 1 and used[0] >= 0 and step > 1 and used[-1] // step < num_classes:
        return f"; if it counts in steps of {step}, in Pillow Image.fromarray(numpy.asarray(map) // {step})"
    return ""


def _names_and_palette(content: Any) -> tuple[tuple[str, ...], tuple[Colour, ...]]:
    """Check the form of a parsed classes.json; what the values mean is checked by `MapClasses`."""
    if isinstance(content, list):
        content = {"names": content}
    if not isinstance(content, dict) or not {"names"} <= content.keys() <= {"names", "palette"}:
        raise DataError(f"neither a list of names nor an object of names and palette; write for example {EXAMPLE}")
    names, palette = content["names"], content.get("palette", [])
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise DataError(f"the names must be a list of non-empty texts; write for example {EXAMPLE}")
    if not isinstance(palette, list):
        raise DataError(f"the palette must be a list of colours; write for example {EXAMPLE}")
    for colour in palette:
        in_range = isinstance(colour, list) and all(type(value) is int and 0 <= value <= 255 for value in colour)
        if not in_range or len(colour) != 3:
            raise DataError(f"{json.dumps(colour)} is not a colour; write [red, green, blue], each from 0 to 255")
    return tuple(names), tuple(map(tuple, palette))


def _pixels(count: int) -> str:
    return f"{count} pixel" if count == 1 else f"{count} pixels"


def _repeated(values: tuple) -> Any | None:
    """The first value that is repeated, if any."""
    return next((value for place, value in enumerate(values) if value in values[:place]), None)
