"""WebDataset: tar archives in which files of one stem are one sample, an image and what is known of it.

The stem is the path up to the first dot of the file name, as in the library `webdataset`: dogs/07.jpg, dogs/07.cls and
dogs/07.json are one sample.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from latentflow.console import notice
from latentflow.data.sources.listed import ListedImages
from latentflow.data.sources.tabled import chosen
from latentflow.data.stores.files import Listing, pictures_among
from latentflow.data.stores.tar import TarStore
from latentflow.data.table_options import TableOptions
from latentflow.data.tables.table import ImageTable, LazyCells, first_few
from latentflow.errors import DataError, nearest

_TEXTS, _RECORDS = ("cls", "txt"), "json"
_LOOKED_AT = 100  # records that tell the names of the columns


class TarSamples:
    """The samples of a listing.

    Attributes:
        images: the image files of each sample that has some, by their extension.
        facts: the other files that are read, in the same way.
    """

    def __init__(self, store: TarStore, listing: Listing):
        self._store, self._listing = store, listing
        self.images: dict[str, dict[str, str]] = defaultdict(dict)
        self.facts: dict[str, dict[str, str]] = defaultdict(dict)
        pictures = set(pictures_among(listing.files))
        for name in sorted(listing.files):
            stem, extension = stem_and_extension(name)
            if name in pictures:
                self.images[stem][extension] = name
            elif extension.rpartition(".")[2] in (*_TEXTS, _RECORDS):
                self.facts[stem][extension] = name

    def __bool__(self) -> bool:
        """Whether something is known of an image."""
        return not self.images.keys().isdisjoint(self.facts)

    def table(self, stems: Sequence[str]) -> ImageTable:
        """What is known of some samples: a column for each extension, and one for each field of their records."""
        records = sorted({ext for stem in stems for ext in self.facts[stem] if ext.endswith(_RECORDS)})
        texts = sorted({ext for stem in stems for ext in self.facts[stem] if not ext.endswith(_RECORDS)})
        parsed: dict[str, list[dict[str, Any]]] = {}

        def fields(extension: str, some: Sequence[str]) -> list[dict[str, Any]]:
            return [self._record(stem, extension) for stem in some]

        place_of = {
            field: extension
            for extension in reversed(records)
            for record in fields(extension, stems[:_LOOKED_AT])
            for field, cell in record.items()
            if not isinstance(cell, dict)
        }

        def read(column: str) -> list[Any]:
            if column in texts:
                return [self._text(stem, column) for stem in stems]
            extension = place_of[column]
            if extension not in parsed:
                parsed[extension] = fields(extension, stems)
            return [record.get(column) for record in parsed[extension]]

        names = [*texts, *(name for name in place_of if name not in texts)]
        return ImageTable(str(self._store.path), LazyCells(names, read), lambda row: f"sample {stems[row]}")

    def _text(self, stem: str, extension: str) -> str | None:
        name = self.facts[stem].get(extension)
        if name is None:
            return None
        try:
            return self._store.read(self._listing.files[name].path).decode("utf-8-sig")
        except (OSError, ValueError) as error:
            raise DataError(f"{self._store.path}: {name} cannot be read ({error}); pack it again") from error

    def _record(self, stem: str, extension: str) -> dict[str, Any]:
        text = self._text(stem, extension)
        if text is None:
            return {}
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            name = self.facts[stem][extension]
            raise DataError(f"{self._store.path}: {name} is not JSON ({error}); pack it again") from None
        return record if isinstance(record, dict) else {}


def list_samples(store: TarStore, samples: TarSamples, listing: Listing, options: TableOptions) -> ListedImages | None:
    """The images of samples, with the columns that `options` choose, in the order of their names.

    Args:
        options: `file_column` is the extension of the image, if samples have several.

    Returns:
        None if neither class nor column is used: the archives are as a folder of images.

    Raises:
        DataError: samples have no image or several, or what `options` ask for is not there.
    """
    if options.file_column is None and any(len(images) > 1 for images in samples.images.values()):
        stem, several = next((stem, images) for stem, images in samples.images.items() if len(images) > 1)
        raise DataError(
            f"{store.path}: the sample {stem} has several images ({first_few(several)}); name the extension of the one "
            "to learn from with --file-column"
        )
    names = {stem: _image(images, options.file_column) for stem, images in samples.images.items()}
    if not any(names.values()):
        known = sorted({extension for images in samples.images.values() for extension in images})
        raise DataError(
            f"{store.path}: no image has the extension {options.file_column!r}; {nearest(options.file_column, known)}"
        )
    named = {stem: name for stem, name in names.items() if name}
    stems = sorted(named, key=named.__getitem__)
    _check_lonely(store, samples.facts.keys() - named.keys(), options.allow_missing)
    found = chosen(samples.table(stems), options, "")
    if found.labels is None and not found.columns and options.file_column is None:
        return None
    images = [named[stem] for stem in stems]
    return found.listed(store, images, [listing.files[name].path for name in images], range(len(stems)))


def stem_and_extension(name: str) -> tuple[str, str]:
    """The sample that a file belongs to, and what it is of it, in lower case.

    >>> stem_and_extension("a.b/07.seg.PNG")
    ("a.b/07", "seg.png")
    """
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _image(images: dict[str, str], asked: str | None) -> str | None:
    if asked is not None:
        return images.get(asked.lower())
    return next(iter(images.values()))


def _check_lonely(store: TarStore, stems: Iterable[str], allow_missing: bool) -> None:
    lonely = sorted(stems)
    said = f"{store.path}: {len(lonely)} samples have no image ({first_few(lonely)})"
    if lonely and not allow_missing:
        raise DataError(f"{said}; leave them out with --allow-missing")
    if lonely:
        notice(f"{said} and are left out")
