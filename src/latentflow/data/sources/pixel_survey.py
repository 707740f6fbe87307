"""The pixel format of a data set: what its files hold, and which values become -1 and 1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from latentflow.autoencoder import BUILT_IN
from latentflow.autoencoder_files import trained_format
from latentflow.data.items import ImageSource
from latentflow.data.pictures.decode import BrokenImage
from latentflow.data.pixel_choice import DEPTHS, ChoiceForAutoencoder, PixelChoice
from latentflow.data.prefetch import Reading, in_threads, prefetch
from latentflow.errors import DataError
from latentflow.pixel_format import FULL_RANGE, PixelDtype, PixelFormat, PixelMode
from latentflow.progress import image_progress

_MOST_LOOKED_AT, _MOST_MEASURED = 4096, 2048  # images, spread evenly over the data set
_VALUES_OF_AN_IMAGE = 4096  # at most, of each channel, for percentiles
_READ_TOGETHER = 16
_WITHOUT_ALPHA: dict[PixelMode, PixelMode] = {"gray-alpha": "gray", "rgba": "rgb"}
_BITS = {"uint8": "8 bits", "uint16": "16 bits", "float32": "floating-point numbers"}
_WORDS = {dtype: word for word, dtype in DEPTHS.items()}


Found = list[tuple[PixelFormat, str]]
"""The formats of files, each once, with the name of the first that has it."""


class SurveyedSource(ImageSource, Protocol):
    """Images whose files can be looked at before they are read."""

    def with_format(self, pixel_format: PixelFormat) -> SurveyedSource:
        """The same images, read in another format."""
        ...

    def uncropped(self, index: int) -> np.ndarray:
        """The stored values of image `index` before its crop, [H, W, C].

        Raises:
            BrokenImage: the file cannot be read.
        """
        ...

    def stored_format(self, index: int) -> PixelFormat:
        """What the header of image `index` says of its numbers.

        Raises:
            BrokenImage: the file cannot be read.
        """
        ...


def choose_format(source: SurveyedSource, choice: PixelChoice, known: PixelFormat | None = None) -> PixelFormat:
    """The pixel format of a data set: what is asked for, and where that leaves something open, what the files hold.

    The headers of at most 4,096 images are looked at, and the values of at most 2,048 are measured, both spread evenly
    over the data set.

    Args:
        known: a format that was chosen before: its range is kept, if everything else is the same.

    Raises:
        DataError: files differ in what is left open, or all values of a channel are equal; naming files and options.
    """
    found = _looked_at(source)
    usual = choice.trained_on if isinstance(choice, ChoiceForAutoencoder) else None
    if usual is not None and {stored.dtype for stored, _ in found} == {usual.dtype}:
        choice, known = choice.followed(usual), known or usual
    chosen = _chosen(source, found, choice, known)
    return known if known is not None and alike(chosen, known) else chosen


def choice_for(choice: PixelChoice, autoencoder: str) -> ChoiceForAutoencoder:
    """A choice that follows what an autoencoder in a folder was trained on, where it leaves something open.

    Raises:
        ArtifactError: see `trained_format`.
    """
    own = choice.model_dump(include={*PixelChoice.model_fields})
    return ChoiceForAutoencoder(**own, trained_on=trained_format(autoencoder, BUILT_IN))


def alike(one: PixelFormat, other: PixelFormat) -> bool:
    """Whether two formats are the same, wherever their ranges come from."""
    return one.model_copy(update={"rule": other.rule}) == other


def _chosen(source: SurveyedSource, found: Found, choice: PixelChoice, known: PixelFormat | None) -> PixelFormat:
    dtype = _depth(found, choice)
    chosen = _channels(found, choice, dtype)
    if dtype == "uint16" and any(stored.dtype == "uint8" for stored, _ in found) and choice.value_range != "full":
        if choice.value_range != "auto":
            raise DataError(
                f"--value-range {choice.value_range}: {_some(found, dtype='uint8')} has 8 bits and "
                f"{_some(found, dtype='uint16')} 16, whose common white is 65535; leave it out, or read them apart"
            )
        return chosen
    return _with_range(source, choice, chosen, known)


def _looked_at(source: SurveyedSource) -> Found:
    rows = evenly_spread(len(source), _MOST_LOOKED_AT)

    def look(row: int) -> PixelFormat | BrokenImage:
        try:
            return source.stored_format(row)
        except BrokenImage as error:
            return error

    found: Found = []
    problem: BrokenImage | None = None
    with image_progress("looking at", len(rows)) as on_images:
        for row, stored in zip(rows, in_threads(look, rows), strict=True):
            on_images(1)
            if isinstance(stored, BrokenImage):
                problem = problem or stored
            elif all(stored != other for other, _ in found):
                found.append((stored, source.name(row)))
    if problem and not found:  # broken images among others are reported where they are read
        raise DataError(f"{source.description}: no image can be read, for example {problem.name}: {problem.reason}")
    return found


def _depth(found: Found, choice: PixelChoice) -> PixelDtype:
    dtypes = sorted({stored.dtype for stored, _ in found}, key=list(FULL_RANGE).index)
    if choice.depth != "auto":
        return DEPTHS[choice.depth]
    if len(dtypes) > 1:
        first, *_, last = dtypes
        remedies = {
            "uint16": "--depth 16 takes 255 and 65535 for the same white, --depth 8 rounds to 8 bits",
            "float32": "--depth float keeps every number, whatever it means",
        }
        raise DataError(
            f"{_some(found, dtype=first)} has {_BITS[first]} and {_some(found, dtype=last)} {_BITS[last]}; "
            f"{remedies[last]}, or read them apart"
        )
    return dtypes[0]


def _channels(found: Found, choice: PixelChoice, dtype: PixelDtype) -> PixelFormat:
    """A format of the full range."""
    modes = sorted({_WITHOUT_ALPHA.get(stored.mode, stored.mode) for stored, _ in found})
    if choice.pixels not in ("auto", "bands"):
        return PixelFormat(mode=choice.pixels, dtype=dtype)
    if choice.pixels == "auto" and "bands" not in modes:
        if dtype == "uint8":
            return PixelFormat()
        if len(modes) == 1:
            return PixelFormat(mode=modes[0], dtype=dtype)
        raise DataError(
            f"{_some(found, mode='gray')} is gray and {_some(found, mode='rgb')} has colours; --pixels rgb repeats "
            "gray, --pixels gray takes the brightness of colours"
        )
    counts = sorted({stored.channels for stored, _ in found})
    if len(counts) > 1:
        raise DataError(
            f"{_some(found, channels=counts[0])} has {counts[0]} channels and {_some(found, channels=counts[-1])} "
            f"{counts[-1]}; give images of one kind, or read the colours of all with --pixels rgb"
        )
    return PixelFormat(mode="bands", channels=counts[0], dtype=dtype)


def _some(found: Found, **facts: object) -> str:
    """The name of a file that was found to have some facts; an alpha channel does not make a mode."""

    def of(stored: PixelFormat, fact: str) -> object:
        value = getattr(stored, fact)
        return _WITHOUT_ALPHA.get(value, value) if fact == "mode" else value

    return next(name for stored, name in found if all(of(stored, key) == facts[key] for key in facts))


def _with_range(
    source: SurveyedSource, choice: PixelChoice, chosen: PixelFormat, known: PixelFormat | None
) -> PixelFormat:
    """A format with the range that is asked for."""
    if choice.value_range == "full" or (choice.value_range == "auto" and chosen.dtype == "uint8"):
        return chosen
    if given := choice.given_range:
        low, high = given
        if len(low) not in (1, chosen.channels):
            raise DataError(
                f"--value-range {choice.value_range} has {len(low)} ranges for {chosen.channels} channels; give one, "
                "or as many"
            )
        return _ranged(chosen, low, high, "given")
    rows = evenly_spread(len(source), _MOST_MEASURED)
    least, most = choice.percentiles
    what = "least and greatest" if (least, most) == (0, 100) else f"percentiles {least:g} and {most:g}"
    rule = f"{what} of {len(rows)} images"
    if known is not None and known == _ranged(chosen, known.low, known.high, rule):
        return known
    return _ranged(chosen, *_measured(source, chosen, rows, (least, most)), rule)


def _ranged(chosen: PixelFormat, low: Sequence[float], high: Sequence[float], rule: str) -> PixelFormat:
    return PixelFormat.model_validate({**chosen.model_dump(), "low": [*low], "high": [*high], "rule": rule})


def _measured(
    source: SurveyedSource, chosen: PixelFormat, rows: Sequence[int], percentiles: tuple[float, float]
) -> tuple[list[float], list[float]]:
    """Low and high of each channel, or of all colours together; opacity always has its full range."""
    measuring = _Measuring(source.with_format(chosen), extremes=percentiles == (0, 100))
    parts = [rows[start : start + _READ_TOGETHER] for start in range(0, len(rows), _READ_TOGETHER)]
    with image_progress("measuring", len(rows)) as on_images, prefetch(measuring, parts, Reading()) as read:
        measured = list(_counted(read, parts, on_images))
    values = np.concatenate(measured, axis=0) if measured else np.zeros((0, chosen.channels), np.float32)
    if not len(values):
        raise DataError(f"{source.description}: no image can be read, for example {_problem(source, chosen, rows[0])}")
    alpha = values[:, -1:] if chosen.has_alpha else None
    if alpha is not None:
        values = values[:, :-1]
    if chosen.mode != "bands":
        values = values.reshape(-1, 1)
    low, high = (np.percentile(values, at, axis=0).astype(np.float64).tolist() for at in percentiles)
    for channel, (least, most) in enumerate(zip(low, high, strict=True)):
        if least >= most:
            where = f" of band {channel + 1}" if len(low) > 1 else ""
            raise DataError(
                f"{source.description}: the values{where} are all {least:g}, which no model can learn from; check the "
                "files, or give --value-range LOW,HIGH"
            )
    if alpha is not None:
        least, most = FULL_RANGE[chosen.dtype]
        colours = chosen.channels - 1
        low, high = [*low * colours, least], [*high * colours, most]
    return low, high


class _Measuring:
    """Reads the values of images, in any thread or process: of each part [n, C].

    Args:
        extremes: the least and the greatest value of each channel; otherwise values that are evenly spread.
    """

    def __init__(self, source: SurveyedSource, extremes: bool):
        self.source, self.extremes = source, extremes

    def __getitems__(self, rows: Sequence[int]) -> np.ndarray:
        return np.concatenate([self._values(row) for row in rows])

    def _values(self, row: int) -> np.ndarray:
        channels = self.source.pixel_format.channels
        try:
            values = self.source.uncropped(row).reshape(-1, channels)
        except BrokenImage:
            return np.zeros((0, channels), np.float32)
        if self.extremes:
            return np.stack([values.min(0), values.max(0)])
        return values[evenly_spread(len(values), _VALUES_OF_AN_IMAGE)]


def _problem(source: SurveyedSource, chosen: PixelFormat, row: int) -> str:
    try:
        source.with_format(chosen).uncropped(row)
    except BrokenImage as error:
        return f"{error.name}: {error.reason}"
    return source.name(row)


def _counted(read: Iterator[np.ndarray], parts: Sequence[Sequence[int]], on_images) -> Iterator[np.ndarray]:
    for part, values in zip(parts, read, strict=True):
        on_images(len(part))
        yield values


def evenly_spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, evenly spread, the first among them."""
    return np.linspace(0, count, min(most, count), endpoint=False).astype(int).tolist()
