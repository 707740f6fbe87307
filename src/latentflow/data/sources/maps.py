"""Semantic maps in files, paired with the images they belong to."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence

import numpy as np

from latentflow.data.packed import PackedText
from latentflow.data.painting.map_reader import read_map
from latentflow.data.painting.semantic_maps import EXAMPLE, MapClasses
from latentflow.data.pictures.orientation import Photo
from latentflow.data.stores.files import FileStore, StoredFile
from latentflow.errors import DataError


class MapFiles:
    """The semantic maps of a set of images: map i belongs to image i.

    Args:
        store: what holds the files.
        classes: the file classes.json, if there is one.
        maps: every map by its path below masks/.
        images: path of each image below images/.

    Raises:
        DataError: there is no classes.json, it cannot be parsed, or images and maps do not pair up.
    """

    def __init__(
        self,
        store: FileStore,
        classes: StoredFile | None,
        maps: dict[str, StoredFile],
        images: list[str],
    ):
        if classes is None:
            raise DataError(
                f"{store.path} has images/ and masks/ but no classes.json, which names the classes of "
                f"the maps in order of their index, for example {EXAMPLE}"
            )
        self.classes = read_classes(store, classes)
        self._store = store
        pairs = pair_files(images, maps, str(store.path), "map")
        self._names = PackedText(pairs[image] for image in images)
        self._paths = PackedText(maps[name].path for name in self._names)

    def read(self, index: int, photo: Photo) -> np.ndarray:
        """Map `index`, [H, W] uint8, turned like its image `photo`.

        Raises:
            DataError: the map cannot be read, knows other classes, or does not fit the image.
        """
        name = f"its map masks/{self._names[index]}"
        return read_map(self._store.read(self._paths[index]), self.classes, name=name, photo=photo)

    def contents(self, indices: Sequence[int]) -> list[str]:
        """Name, size and CRC-32 of each of some maps."""
        contents = self._store.contents([self._paths[index] for index in indices])
        return [f"{self._names[index]} {content}" for index, content in zip(indices, contents, strict=True)]


def read_classes(store: FileStore, file: StoredFile) -> MapClasses:
    """Read the classes.json of a folder or an archive.

    Raises:
        DataError: it cannot be read or understood.
    """
    name = f"{store.path}: classes.json"
    try:
        text = store.read(file.path)
    except Exception as error:  # damaged archives raise nearly anything
        raise DataError(f"{name} cannot be read ({error}); it should hold {EXAMPLE}") from error
    return MapClasses.parse(text, name)


def pair_files(images: Iterable[str], others: Iterable[str], where: str, what: str) -> dict[str, str]:
    """Find the map or input of each image: the one whose path only differs in its suffix.

    Args:
        images: paths below images/.
        others: paths below masks/ or inputs/.
        where: the data set, for messages.
        what: "map" or "input".

    Raises:
        DataError: an image or one of the others is alone, or two files claim one place.
    """
    image_of, other_of = _by_stem(images, f"{where}: images"), _by_stem(others, f"{where}: {what}s")
    lonely = _listed(f"images have no {what}", [image_of[stem] for stem in image_of.keys() - other_of.keys()])
    lonely += _listed(f"{what}s have no image", [other_of[stem] for stem in other_of.keys() - image_of.keys()])
    if lonely:
        article = "an" if what == "input" else "a"
        raise DataError(f"{where}: {'; '.join(lonely)}; an image a/x.jpg goes with {article} {what} a/x.png")
    return {image: other_of[stem] for stem, image in image_of.items()}


def _by_stem(names: Iterable[str], where: str) -> dict[str, str]:
    stems: dict[str, str] = {}
    for name in names:
        other = stems.setdefault(posixpath.splitext(name)[0], name)
        if other != name:
            raise DataError(f"{where} {other} and {name} differ in their suffix only; rename or remove one")
    return stems


def _listed(what: str, names: list[str]) -> list[str]:
    """For example ["3 maps have no image (a.png, b.png, c.png)"]; empty for no names."""
    some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    return [f"{len(names)} {what} ({some})"] if names else []
