"""Semantic maps from image files: what a pixel means does not depend on how the picture is compressed.

A map is drawn in one of two ways: its pixels have the colours of the classes, or they are the indices of the classes.
Programs that optimise files turn the former into palette entries, in any order, and the latter into anything that shows
the same grays. So colours decide wherever they are those of the classes; otherwise numbers do.

    picture                          its pixels are read as
    RGB                              colours of classes; if all are gray and not all of classes, as gray
    palette                          colours of classes, if all that are used are; otherwise palette indices
    gray palette                     as above, but gray numbers before palette indices
    gray of 1, 2, 4, 8 bits          numbers; colours of classes where numbers make no sense
    gray of 16 and more bits         numbers

If two readings are possible and differ, the map is refused, with a remedy for each.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from latentflow.console import notice
from latentflow.data.items import UNLABELLED
from latentflow.data.painting.semantic_maps import UNLABELLED_COLOUR, Colour, MapClasses, check_map, default_palette
from latentflow.data.pictures.decode import BrokenImage, open_image, read_file, reason, stored_mode
from latentflow.data.pictures.orientation import Photo, own_turn, turned, upright_as
from latentflow.errors import DataError

_LOSSY = ("JPEG", "MPO", "JPEG2000", "AVIF")
_GRAY_STEPS = {"1": 255, "L;2": 85, "L;4": 17}  # Pillow stretches gray of few bits to 0..255
_OPAQUE_TWINS = {"LA": "L", "PA": "P", "RGBA": "RGB"}
_VOC = np.array(default_palette(UNLABELLED), np.int32)
_LEAST_VOC = 16  # this many colours of Pascal VOC in order are its palette, not a coincidence

Meaning = dict[int, int]
"""The class of each value that a map uses."""


def read_map(
    file: str | Path | bytes | Image.Image, classes: MapClasses, *, name: str | None = None, photo: Photo | None = None
) -> np.ndarray:
    """Read a semantic map: [H, W] uint8 class indices.

    The table above says how. Transparency is refused, except with palette indices, and so are lossy formats. The EXIF
    rotation is applied, as to images.

    Args:
        file: a path, the content of a file, or a Pillow image.
        name: for messages; default: the path.
        photo: the photograph that it must fit; None: any.

    Raises:
        DataError: the file cannot be read, an index is not one of `classes`, a colour is of no class, the map may mean
            two things, or does not fit the photograph.
    """
    name = name or (str(file) if isinstance(file, str | Path) else "the semantic map")
    try:
        content = read_file(file) if isinstance(file, str | Path) else file
        _refuse_lossy_webp(content, name)
        with open_image(content, name) as image:
            stored = stored_mode(image)
            turn = own_turn(image)
            drawn = _drawn(image, stored, name)
    except (OSError, ValueError, BrokenImage) as error:
        raise DataError(f"{name}: it cannot be read ({reason(error)}); save the map again, as a PNG") from error
    semantic_map = drawn.classes(classes, name)
    if photo is None:
        return turned(semantic_map, turn or 1)
    return upright_as(semantic_map, turn, photo, name, "map")


@dataclass(frozen=True)
class _Colours:
    """A map of colours: [H, W, 3] uint8."""

    pixels: np.ndarray
    deep: bool

    def classes(self, classes: MapClasses, name: str) -> np.ndarray:
        table = _table(classes)
        known = np.array(sorted(table))
        packed = _packed(self.pixels)
        places = np.searchsorted(known, packed).clip(max=len(known) - 1)
        strange = known[places] != packed
        if not strange.any():
            return np.array([table[key] for key in known.tolist()], np.uint8)[places]
        gray = self.pixels[..., 0]
        if self.deep or (self.pixels != gray[..., None]).any() or not _by_index(_used(gray), classes):
            _refuse_colour(packed, strange, classes, name)
        return _Numbers(gray).classes(classes, name)


@dataclass(frozen=True)
class _Numbers:
    """A gray map: [H, W] integers. `step` is what one of them is shown as, of 255; 0 if they are no such grays."""

    values: np.ndarray
    step: int = 0

    def classes(self, classes: MapClasses, name: str) -> np.ndarray:
        if self.values.dtype != np.uint8:
            _check_depth(self.values, classes, name)
        used = _used(self.values)
        by_index, by_colour = _by_number(used, classes), None
        if self.step and _own_colours(classes):
            by_colour = _by_colour({value: (value * self.step,) * 3 for value in used}, classes)
        if by_index and by_colour and by_index != by_colour:
            if self.step == 1 and max(used) < len(classes):
                _refuse_two_readings(by_colour, by_index, classes, name)
            by_index = None
        if self.step == 255 and by_index and 1 in used and len(classes) > 2:
            raise DataError(
                f"{name}: in 1 bit, white may be class 1 {classes.names[1]!r}, or 255, which means unlabelled; save it "
                'in 8 bits, in Pillow map.convert("L").point(lambda v: v // 255) for class 1, map.convert("L") for 255'
            )
        meaning = by_colour if by_index is None else by_index
        if meaning is None:
            _refuse_black_and_white(used, classes, name)
            check_map(self.values, classes, name)
        return _apply(self.values, meaning)


@dataclass(frozen=True)
class _Places:
    """A map with a palette: [H, W] uint8 places, the colours [N, 3] of the palette, and the share of clear pixels."""

    values: np.ndarray
    palette: np.ndarray
    clear: int

    def classes(self, classes: MapClasses, name: str) -> np.ndarray:
        used = _used(self.values)
        colours = {place: tuple(self.palette[place].tolist()) for place in used if place < len(self.palette)}
        meaning = self._by_look(used, colours, classes, name) if len(colours) == len(used) else None
        if meaning is not None:
            _refuse_clear(self.clear, name)
        elif (meaning := _by_index(used, classes)) is None:
            check_map(self.values, classes, name)
        return _apply(self.values, meaning)

    def _by_look(self, used: list[int], colours: dict[int, Colour], classes: MapClasses, name: str) -> Meaning | None:
        """The classes by colour; None where colours say nothing and the palette indices count."""
        by_place, by_colour, own = _by_index(used, classes), _by_colour(colours, classes), _own_colours(classes)
        if own and by_place and self._is_voc():
            _say_by_place(name)
            return None
        gray = all(len(set(colour)) == 1 for colour in colours.values())
        if by_colour and (own or not gray):
            if not own and by_place and by_colour != by_place:
                notice(
                    f"{name}: its palette has the colours of the classes in another order, so it is read by colour, "
                    "like other such maps; they are the colours of Pascal VOC, as classes.json gives no others",
                    kind="map by colour",
                )
            return by_colour
        if gray and (by_gray := self._by_gray(colours, by_place, classes, name)):
            return by_gray
        if own:
            self._refuse_mixture(colours, by_place, classes, name)
            _say_by_place(name)
        return None

    def _is_voc(self) -> bool:
        num = min(len(self.palette), len(_VOC))
        return num >= _LEAST_VOC and np.array_equal(self.palette[:num], _VOC[:num])

    def _by_gray(
        self, colours: dict[int, Colour], by_place: Meaning | None, classes: MapClasses, name: str
    ) -> Meaning | None:
        """The classes if the grays of a palette are numbers, as after a gray map was optimised."""
        by_number = _by_number(sorted({colour[0] for colour in colours.values()}), classes)
        if by_number is None:
            return None
        by_gray = {place: by_number[colour[0]] for place, colour in colours.items()}
        if by_place and by_gray != by_place and UNLABELLED in by_gray.values():
            raise DataError(
                f"{name}: white in its palette may be class {by_place[_white(colours)]} by its place, or 255, which "
                "means unlabelled; save the places as gray, in Pillow Image.fromarray(numpy.asarray(map)), or the "
                'grays, map.convert("L")'
            )
        return by_gray

    def _refuse_mixture(
        self, colours: dict[int, Colour], by_place: Meaning | None, classes: MapClasses, name: str
    ) -> None:
        """Refuse a palette in which some colours are of classes, but not at their places, and others of none."""
        table = _table(classes)
        meant = {place: table[key] for place, colour in colours.items() if (key := _packed_one(colour)) in table}
        displaced = {place: index for place, index in meant.items() if index != place}
        if not (displaced if by_place else meant):
            return
        if by_place is None:
            packed = _packed(self.palette[self.values])
            _refuse_colour(packed, ~np.isin(packed, list(table)), classes, name)
        place, index = next(iter(displaced.items()))
        stranger = next(colour for place, colour in colours.items() if place not in meant)
        raise DataError(
            f"{name}: its palette has {colours[place]} at place {place}, the colour of {_called(index, classes)}, but "
            f"also {stranger}, the colour of no class; if the places are the classes, save them as gray, in Pillow "
            'Image.fromarray(numpy.asarray(map)); if the colours are, save map.convert("RGB") and correct those of no '
            "class"
        )


def _drawn(image: Image.Image, stored: str, name: str) -> _Colours | _Numbers | _Places:
    """The pixels of a map, stored in its file in the mode `stored`."""
    if image.format in _LOSSY:
        raise DataError(f"{name}: {image.format} compression blurs class boundaries; save the map as a PNG")
    mode = _OPAQUE_TWINS.get(image.mode, image.mode)
    if mode not in ("1", "L", "P", "RGB") and not mode.startswith("I"):
        remedy = "Image.fromarray(numpy.asarray(map).astype(numpy.uint8))" if mode == "F" else 'map.convert("RGB")'
        what = f"pixels of mode {mode} are neither class indices nor colours"
        raise DataError(f"{name}: {what}; save it with 8 bits, in Pillow {remedy}")
    image.load()
    clear = 0
    if image.has_transparency_data:
        clear = int((np.asarray(image.convert("RGBA").getchannel("A")) < 255).sum())
    if mode == "P":
        palette = np.array(image.getpalette("RGB"), np.int32).reshape(-1, 3)
        return _Places(np.asarray(image if image.mode == "P" else image.getchannel(0)), palette, clear)
    _refuse_clear(clear, name)
    deep = ";16" in stored and not mode.startswith("I")
    if mode == "RGB":
        return _Colours(np.asarray(image.convert("RGB")), deep)
    if deep:
        raise DataError(f"{name}: gray of 16 bits with alpha is read in 8 bits only; save it without alpha")
    if mode.startswith("I"):
        return _Numbers(np.asarray(image))
    values = np.asarray(image if image.mode == mode else image.getchannel(0)).astype(np.uint8)
    step = _GRAY_STEPS.get(image.mode if mode == "1" else stored, 1)
    return _Numbers(values if mode == "1" else values // step, step)


def _refuse_lossy_webp(content: object, name: str) -> None:
    """WebP is lossy or lossless; its chunks say which, and Pillow does not."""
    if not isinstance(content, bytes) or content[:4] != b"RIFF" or content[8:12] != b"WEBP":
        return
    start = 12
    while start + 8 <= len(content):
        if content[start : start + 4] in (b"VP8 ", b"ANMF"):
            raise DataError(f"{name}: lossy WebP compression blurs class boundaries; save the map as a PNG")
        start += 8 + (int.from_bytes(content[start + 4 : start + 8], "little") + 1) // 2 * 2


def _own_colours(classes: MapClasses) -> bool:
    """Whether the classes have colours of their own, not the default palette."""
    return classes.palette != default_palette(len(classes))


def _table(classes: MapClasses) -> dict[int, int]:
    """The class of each colour, packed."""
    table = {_packed_one(UNLABELLED_COLOUR): UNLABELLED}
    return table | {_packed_one(colour): index for index, colour in enumerate(classes.palette)}


def _used(values: np.ndarray) -> list[int]:
    """The values [H, W] uint8 that a map uses."""
    return np.flatnonzero(np.bincount(values.reshape(-1), minlength=256)).tolist()


def _by_colour(colours: dict[int, Colour], classes: MapClasses) -> Meaning | None:
    """What values mean by their colours; None if one is of no class."""
    table = _table(classes)
    meaning = {value: table.get(_packed_one(colour)) for value, colour in colours.items()}
    return None if None in meaning.values() else meaning


def _by_index(used: list[int], classes: MapClasses) -> Meaning | None:
    """Values that are classes themselves; None if one is not."""
    return None if any(len(classes) <= value != UNLABELLED for value in used) else {value: value for value in used}


def _by_number(used: list[int], classes: MapClasses) -> Meaning | None:
    """As `_by_index`, of grays: None also where white is likelier to mean class 1 of two than unlabelled."""
    return None if _is_black_and_white(used, classes) else _by_index(used, classes)


def _is_black_and_white(used: list[int], classes: MapClasses) -> bool:
    return len(classes) == 2 and UNLABELLED in used and set(used) <= {0, UNLABELLED}


def _apply(values: np.ndarray, meaning: Meaning) -> np.ndarray:
    table = np.zeros(256, np.uint8)
    table[list(meaning)] = list(meaning.values())
    return table[values]


def _check_depth(values: np.ndarray, classes: MapClasses, name: str) -> None:
    """Refuse numbers beyond a byte; if they are bytes spread over 16 bits, with what to do."""
    if values.size and values.max() > UNLABELLED and not (values % 257).any() and values.max() <= 65535:
        raise DataError(
            f"{name}: its values are multiples of 257, up to {values.max()}, as where 8 bits were spread over 16; undo "
            "it, in Pillow Image.fromarray((numpy.asarray(map) // 257).astype(numpy.uint8))"
        )
    check_map(values, classes, name)


def _refuse_black_and_white(used: list[int], classes: MapClasses, name: str) -> None:
    if _is_black_and_white(used, classes):
        raise DataError(
            f"{name}: 255 means unlabelled, and of the classes it has no other than 0; if white is class 1 "
            f"{classes.names[1]!r}, divide it, in Pillow map.point(lambda v: v // 255); if it is unlabelled, paint the "
            f"map in colours, unlabelled {UNLABELLED_COLOUR}"
        )


def _refuse_two_readings(by_colour: Meaning, by_index: Meaning, classes: MapClasses, name: str) -> None:
    value = next(value for value, index in by_colour.items() if by_index[value] != index)
    colours = f"numpy.array({[list(colour) for colour in classes.palette[: max(by_index) + 1]]}, numpy.uint8)"
    raise DataError(
        f"{name}: gray {value} may be {_called(value, classes)} by its number or "
        f"{_called(by_colour[value], classes)} by its colour; save it in colours: if the colours count, in Pillow "
        f'map.convert("RGB"); if the numbers do, Image.fromarray({colours}[numpy.asarray(map)])'
    )


def _refuse_colour(packed: np.ndarray, strange: np.ndarray, classes: MapClasses, name: str) -> None:
    colours, counts = np.unique(packed[strange], return_counts=True)
    key = int(colours[counts.argmax()])
    colour = (key >> 16, key >> 8 & 255, key & 255)
    row, column = np.argwhere(packed == key)[0]
    index = int(((np.array(classes.palette) - colour) ** 2).sum(1).argmin())
    smeared = f"; {len(colours)} such colours: was it resized or compressed lossily?" if len(colours) > 1 else ""
    raise DataError(
        f"{name}: the colour {colour} at column {column}, row {row} belongs to no class; "
        f"the nearest is {classes.palette[index]}, class {index} {classes.names[index]!r}{smeared}"
    )


def _refuse_clear(clear: int, name: str) -> None:
    if clear:
        pixels = f"{clear} pixel" if clear == 1 else f"{clear} pixels"
        opaque = 'map.convert("RGBA").convert("RGB")'
        raise DataError(f"{name}: {pixels} not opaque; save the map without alpha, in Pillow {opaque}")


def _say_by_place(name: str) -> None:
    notice(
        f"{name}: its palette has other colours than the classes, so it is read by place, like other such maps: "
        "place 0 of the palette is class 0, and so on",
        kind="map by place",
    )


def _called(index: int, classes: MapClasses) -> str:
    return "unlabelled" if index == UNLABELLED else f"class {index} {classes.names[index]!r}"


def _white(colours: dict[int, Colour]) -> int:
    return next(place for place, colour in colours.items() if colour[0] == UNLABELLED)


def _packed(colours: np.ndarray) -> np.ndarray:
    """RGB [..., 3] in 0..255 => one number of 24 bits each, int32."""
    red, green, blue = (colours[..., channel].astype(np.int32) for channel in range(3))
    return red << 16 | green << 8 | blue


def _packed_one(colour: Colour) -> int:
    return colour[0] << 16 | colour[1] << 8 | colour[2]
