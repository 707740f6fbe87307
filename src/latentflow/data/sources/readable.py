"""Which images of a source can be read: each is decoded once, and the result is remembered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import PIL

from latentflow.data.items import ImageSource
from latentflow.data.pictures.colour import PIXEL_RULES
from latentflow.data.pictures.decode import BrokenImage, most_pixels
from latentflow.data.prefetch import Reading, prefetch
from latentflow.ledger import Ledger, one_at_a_time
from latentflow.pixel_format import PixelFormat
from latentflow.progress import image_progress

_CHECKED_TOGETHER, _SAVED_TOGETHER = 32, 200  # images; batches of these


def readable(source: ImageSource, *, processes: bool = True) -> tuple[list[int], list[BrokenImage]]:
    """Decode every image once; returns the indices of those that can be read, and the errors of the others.

    Results are remembered by content, so that repeating a command decodes nothing. Of several processes of a launch
    only one decodes.

    Args:
        processes: whether worker processes may be started where this takes long; otherwise threads are used.
    """
    place = getattr(source, "place", source.description)  # nothing is remembered of images without a place on disk
    maps = f"{source.map_class_names} {source.map_palette}"
    rules = f"{PIL.__version__} {PIXEL_RULES} {source.image_size} {most_pixels()} {maps}"
    if source.pixel_format != PixelFormat():
        rules += f" {source.pixel_format.model_dump_json()}"
    contents = source.contents()
    with one_at_a_time(place), Ledger(f"decodes {rules}", place) as ledger:
        found = [ledger.get(source.name(index), contents[index]) for index in range(len(source))]
        unknown = [index for index, known in enumerate(found) if known is None]
        with image_progress("checking", len(unknown)) as on_images:
            for number, (rows, problems) in enumerate(_problems(source, unknown, processes), start=1):
                for index, why in zip(rows, problems, strict=True):
                    found[index] = why
                    if contents[index] not in ("", "unreadable"):
                        ledger.put(source.name(index), contents[index], why)
                on_images(len(rows))
                if number % _SAVED_TOGETHER == 0:
                    ledger.save()
    kept = [index for index, why in enumerate(found) if not why]
    return kept, [BrokenImage(source.name(index), why) for index, why in enumerate(found) if why]


class _Checking:
    """Tries to decode images; the reason why one cannot be read, or ""."""

    def __init__(self, source: ImageSource):
        self.source = source

    def __getitems__(self, rows: Sequence[int]) -> list[str]:
        return [self._problem(row) for row in rows]

    def _problem(self, row: int) -> str:
        try:
            self.source[row]
        except BrokenImage as error:
            return error.reason
        return ""


def _problems(
    source: ImageSource, rows: Sequence[int], processes: bool
) -> Iterator[tuple[Sequence[int], Sequence[str]]]:
    """Parts of `rows`, each with the reasons that `_Checking` gives."""
    parts = [rows[start : start + _CHECKED_TOGETHER] for start in range(0, len(rows), _CHECKED_TOGETHER)]
    with prefetch(_Checking(source), parts, Reading(None if processes else 0, option="data.num_workers")) as checked:
        yield from zip(parts, checked, strict=True)
