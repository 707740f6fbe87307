"""Published data sets of images and semantic maps, converted to the layout that `open_images` reads.

The result has one folder per split, each with images/, masks/ and classes.json. Files are copied, never re-encoded;
only the maps of CelebAMask-HQ, which are published as one file per part of the face, are composed. Nothing is read from
outside the data set, wherever its links lead, and none of its files is changed.
"""

from __future__ import annotations

import posixpath
import re
import shlex
import shutil
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from latentflow.artifacts import atomic_folder, contents
from latentflow.console import notice
from latentflow.data.painting.semantic_maps import MapClasses
from latentflow.data.pictures.decode import BrokenImage, open_image, reason
from latentflow.data.prefetch import in_threads
from latentflow.data.sources.maps import pair_files, read_classes
from latentflow.data.stores.files import StoredFile, ZipStore, is_image, open_store, wrapper
from latentflow.errors import DataError, nearest

CAMVID = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign_symbol": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
    "unlabelled": (0, 0, 0),
}
"""The classes of CamVid in the 12-class form of the SegNet tutorial, with their customary colours."""

CELEBAMASK_HQ = ("background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear")
CELEBAMASK_HQ += ("mouth", "u_lip", "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth")
"""The parts of a face in the order in which they are drawn: later ones cover earlier ones."""

_CELEBAMASK_HQ_TRAIN = 27000  # images; the other 3,000 are for validation
_ADE20K_CLASSES = 150
_FICLONE = 0x40049409  # ioctl_ficlone(2) of Linux
_COCO_STUFF_CLASSES = 182


@dataclass(frozen=True)
class Pair:
    """One image and its map, to be placed in a prepared folder.

    Attributes:
        image: path below images/, for example "a/x.jpg".
        semantic_map: path below masks/, for example "a/x.png".
        place_image, place_map: write the file to the given path.
    """

    image: str
    semantic_map: str
    place_image: Callable[[Path], None]
    place_map: Callable[[Path], None]


@dataclass(frozen=True)
class PublishedData:
    """A published data set, found complete; nothing is written yet.

    Attributes:
        classes: the classes of the maps.
        splits: the pairs of each split, by the name of its folder: train, val, ...
    """

    classes: MapClasses
    splits: dict[str, list[Pair]]

    def __len__(self) -> int:
        return sum(map(len, self.splits.values()))

    def write(self, out: str | Path, on_images: Callable[[int], None] = lambda num_images: None) -> None:
        """Write out/SPLIT/{images, masks, classes.json} for every split, complete or not at all.

        Args:
            out: a new or empty folder.
            on_images: called with the number of images just finished.

        Raises:
            DataError: `out` is not empty, or a file of the data set cannot be read.
            ArtifactError: `out` cannot be written.
        """
        out = Path(out)
        if out.is_dir() and contents(out):
            raise DataError(f"{out} exists already; choose another place, or delete it to prepare the data again")
        with atomic_folder(out) as folder:
            for split, pairs in self.splits.items():
                (folder / split).mkdir()
                self.classes.write(folder / split / "classes.json")
                with closing(in_threads(partial(_write_pair, folder / split), pairs)) as written:
                    for _ in written:
                        on_images(1)


def find_dataset(kind: str, path: str | Path, *, link: bool = False) -> PublishedData:
    """Find the pairs of a published data set as downloaded: a folder or a .zip file.

    Args:
        kind: one of `KINDS`.
        path: the folder that holds what `_LAYOUTS` lists, or one that contains it.
        link: hard links instead of copies, where the file system supports them. Editing one file then edits the
            other.

    Raises:
        DataError: there is no such kind, the layout is another one, an image or its map is missing, or a file is a link
            that leads out of `path`.
    """
    if kind not in KINDS:
        raise DataError(f"unknown data set {kind!r}; {nearest(kind, KINDS)}")
    source = _Source(Path(path), link)
    classes, splits = KINDS[kind](source)
    splits = {split: pairs for split, pairs in splits.items() if pairs}
    if not splits:
        raise DataError(f"{path} does not hold {kind}, which has {_LAYOUTS[kind]}")
    return PublishedData(classes, splits)


class _Source:
    """The files of a published data set, below a single folder that may wrap its images."""

    def __init__(self, path: Path, link: bool):
        self.store = open_store(path)
        self.path = path
        self._link = link
        self._checked: dict[str, Path] = {}
        files = self.store.files()
        top = wrapper([name for name in files if is_image(name)] or [""])
        self.files = {name.removeprefix(top): file for name, file in files.items() if name.startswith(top)}
        for name in ("classes.json", "objectInfo150.txt", "labels.txt"):
            if name in self.files:
                self._require_own(self.files[name])

    def images(self, folder: str) -> dict[str, StoredFile]:
        """Every image at any depth below a folder, by its path there, sorted."""
        found = {name[len(folder) + 1 :]: f for name, f in self.files.items() if name.startswith(f"{folder}/")}
        images = {name: found[name] for name in sorted(found) if is_image(name)}
        for file in images.values():
            self._require_own(file)
        return images

    def first_with_images(self, folders: Sequence[str]) -> str:
        """The first of some folders that holds images, or else the last."""
        return next((folder for folder in folders if self.images(folder)), folders[-1])

    def pairs(self, images: str, maps: str) -> list[Pair]:
        """The images below one folder paired with the maps below another, all copied unchanged."""
        image_files, map_files = self.images(images), self.images(maps)
        map_of = pair_files(image_files, map_files, f"{self.path}: {images} and {maps}", "map")
        return [
            Pair(image, map_of[image], partial(self.place, file), partial(self.place, map_files[map_of[image]]))
            for image, file in image_files.items()
        ]

    def place(self, file: StoredFile, destination: Path) -> None:
        """Copy or link a file to `destination`."""
        if isinstance(self.store, ZipStore):
            destination.write_bytes(self.read(file))
            return
        with self._named(file):
            original = (self.path / file.path).resolve(strict=True)
            original.open("rb").close()  # errors from here on are the copy's
        if self._link:
            try:
                destination.hardlink_to(original)
                return
            except OSError as error:
                notice(f"files are copied, since they cannot be linked here ({error.strerror})")
        if not _cloned(original, destination):
            shutil.copyfile(original, destination)

    def _require_own(self, file: StoredFile) -> None:
        """Refuse anything but a regular file inside the data set.

        Raises:
            DataError: it is a link that leads outside, or not a regular file.
        """
        if isinstance(self.store, ZipStore):
            return
        folder, name = posixpath.split(file.path)
        with self._named(file):
            if folder not in self._checked:
                self._checked[folder] = (self.path / folder).resolve(strict=True)
            path = self._checked[folder] / name
            if path.is_symlink():
                path = path.resolve(strict=True)
            if not path.is_relative_to(self._checked.setdefault("", self.path.resolve())):
                raise DataError(
                    f"{self.path}: {file.path} links to {path}, outside this folder, and is not followed. If you "
                    f"trust its links, copy it with their targets: cp -rL {shlex.quote(str(self.path))} COPY"
                )
            if not stat.S_ISREG(path.lstat().st_mode):
                raise DataError(f"{self.path}: {file.path} is not a regular file; remove it")

    def read(self, file: StoredFile) -> bytes:
        with self._named(file):
            return self.store.read(file.path)

    def lines(self, name: str) -> list[str]:
        with self._named(self.files[name]):
            return self.read(self.files[name]).decode("utf-8-sig").splitlines()

    def mask(self, file: StoredFile) -> np.ndarray:
        """A black and white picture as [H, W] bool, true where it is white."""
        with self._named(file), open_image(self.read(file), file.path) as image:
            return np.asarray(image.convert("L")) > 127

    def image_size(self, file: StoredFile) -> tuple[int, int]:
        """Width and height of an image, without decoding it."""
        with self._named(file), open_image(self.read(file), file.path) as image:
            return image.size

    @contextmanager
    def _named(self, file: StoredFile) -> Iterator[None]:
        """Turn any exception into a `DataError` that names the file."""
        try:
            yield
        except Exception as error:  # decoders and damaged archives raise nearly anything
            if isinstance(error, DataError) and not isinstance(error, BrokenImage):
                raise
            why = f"{self.path}: cannot read {file.path} ({reason(error)})"
            raise DataError(f"{why}; download or unpack it again") from error


_Found = tuple[MapClasses, dict[str, list[Pair]]]


def _camvid(source: _Source) -> _Found:
    if "classes.json" not in source.files:
        raise DataError(f"{source.path} does not hold camvid, which has {_LAYOUTS['camvid']}")
    classes = read_classes(source.store, source.files["classes.json"])
    if classes == MapClasses(tuple(CAMVID)):  # names without colours
        classes = MapClasses(tuple(CAMVID), tuple(CAMVID.values()))
    splits = sorted({name.split("/")[0] for top in ("images", "masks") for name in source.images(top) if "/" in name})
    return classes, {split: source.pairs(f"images/{split}", f"masks/{split}") for split in splits}


def _ade20k(source: _Source) -> _Found:
    splits = {"train": "training", "val": "validation"}
    found = {
        split: source.pairs(f"images/{folder}", f"annotations/{folder}")
        for split, folder in splits.items()
        if source.images(f"images/{folder}")
    }
    return MapClasses(("other", *_ade20k_names(source))), found


def _ade20k_names(source: _Source) -> list[str]:
    """The names of classes 1 to 150; value 0 of a map stands for anything else."""
    file = "objectInfo150.txt"
    if file not in source.files:
        raise DataError(f"{source.path} has no {file}, which names the classes; it comes with ADEChallengeData2016")
    rows = [[cell.strip() for cell in line.split("\t")] for line in source.lines(file) if line.strip()]
    if not rows or "Name" not in rows[0]:
        raise DataError(f"{source.path}: {file} has no tab-separated column Name; restore the published file")
    column = rows[0].index("Name")
    names = [row[column] for row in rows[1:] if len(row) > column]
    if len(names) != _ADE20K_CLASSES:
        raise DataError(f"{source.path}: {file} names {len(names)} classes, not {_ADE20K_CLASSES}")
    return names


def _coco_stuff(source: _Source) -> _Found:
    found = {}
    for split in ("train", "val"):
        images = source.first_with_images([f"images/{split}2017", f"{split}2017"])
        maps = source.first_with_images([f"stuffthingmaps/{split}2017", f"annotations/{split}2017"])
        if source.images(images):
            found[split] = source.pairs(images, maps)
    return MapClasses(_coco_stuff_names(source)), found


def _coco_stuff_names(source: _Source) -> tuple[str, ...]:
    """The names of values 0 to 181 of the maps.

    labels.txt counts from 1, as 0 is "unlabeled" there; maps count from 0, and 255 is unlabelled.
    """
    if "labels.txt" not in source.files:
        return tuple(f"class_{index:03d}" for index in range(_COCO_STUFF_CLASSES))
    lines = (line.partition(":") for line in source.lines("labels.txt"))
    name_of = {int(number): name.strip() for number, _, name in lines if number.strip().isdigit()}
    first = 1 if name_of.get(0) == "unlabeled" else 0
    wanted = range(first, first + _COCO_STUFF_CLASSES)
    if missing := [number for number in wanted if not name_of.get(number)]:
        raise DataError(
            f'{source.path}: labels.txt has no line "{missing[0]}: NAME"; use the file of the cocostuff repository, '
            "or remove it to do without names"
        )
    return tuple(name_of[number] for number in wanted)


def _celebamask_hq(source: _Source) -> _Found:
    parts: dict[int, dict[int, StoredFile]] = defaultdict(dict)
    for name, file in source.images("CelebAMask-HQ-mask-anno").items():
        index, part = _celebamask_hq_part(name, source)
        parts[index][part] = file
    images = {_celebamask_hq_index(name, source): (name, file) for name, file in source.images("CelebA-HQ-img").items()}
    if unpaired := sorted(images.keys() ^ parts.keys()):
        index, others = unpaired[0], f" (and {len(unpaired) - 1} more)" if len(unpaired) > 1 else ""
        problem = "no part masks" if index in images else "part masks and no image"
        raise DataError(f"{source.path}: there are {problem} for image {index}{others}; unpack the data set again")
    splits: dict[str, list[Pair]] = {"train": [], "val": []}
    for index in sorted(images):
        name, file = images[index]
        compose = partial(_compose_parts, source, file, sorted(parts[index].items()))
        image = f"{index:05d}{posixpath.splitext(name)[1]}"
        split = splits["train" if index < _CELEBAMASK_HQ_TRAIN else "val"]
        split.append(Pair(image, f"{index:05d}.png", partial(source.place, file), compose))
    return MapClasses(CELEBAMASK_HQ), splits


def _celebamask_hq_index(name: str, source: _Source) -> int:
    if match := re.fullmatch(r"(\d+)\.\w+", name):
        return int(match[1])
    raise DataError(f"{source.path}: CelebA-HQ-img/{name} should be called NUMBER.jpg; rename or remove it")


def _celebamask_hq_part(name: str, source: _Source) -> tuple[int, int]:
    """The image and the class that a file like 0/00017_l_brow.png belongs to."""
    match = re.fullmatch(r"(\d+)_(\w+)\.\w+", posixpath.basename(name))
    if match and match[2] in CELEBAMASK_HQ[1:]:
        return int(match[1]), CELEBAMASK_HQ.index(match[2])
    hint = nearest(match[2], CELEBAMASK_HQ[1:]) if match else "it should be called NUMBER_PART.png"
    raise DataError(f"{source.path}: CelebAMask-HQ-mask-anno/{name} is not a part of a face; {hint}")


def _compose_parts(source: _Source, image: StoredFile, parts: list[tuple[int, StoredFile]], destination: Path) -> None:
    """Draw part masks over each other and enlarge the map to the size of its image, 512 => 1024 as published."""
    semantic_map = None
    for part, file in parts:
        mask = source.mask(file)
        if semantic_map is None:
            semantic_map = np.zeros(mask.shape, np.uint8)
        if mask.shape != semantic_map.shape:
            raise DataError(f"{source.path}: {file.path} has another size than the other parts; unpack it again")
        semantic_map[mask] = part
    enlarged = Image.fromarray(semantic_map).resize(source.image_size(image), Image.Resampling.NEAREST)
    enlarged.save(destination, "PNG")


def _cloned(original: Path, destination: Path) -> bool:
    """Clone a file, sharing its blocks until one of the two is written to, where the file system supports it."""
    try:
        import fcntl

        with original.open("rb") as source, destination.open("wb") as target:
            fcntl.ioctl(target, _FICLONE, source.fileno())
    except (ImportError, OSError):
        return False
    return True


def _write_pair(folder: Path, pair: Pair) -> None:
    for place, destination in (
        (pair.place_image, folder / "images" / pair.image),
        (pair.place_map, folder / "masks" / pair.semantic_map),
    ):
        destination.parent.mkdir(parents=True, exist_ok=True)
        place(destination)


KINDS: dict[str, Callable[[_Source], _Found]] = {
    "camvid": _camvid,
    "celebamask-hq": _celebamask_hq,
    "ade20k": _ade20k,
    "coco-stuff": _coco_stuff,
}
"""What can be prepared; each function finds classes and pairs in the published files."""

_LAYOUTS = {
    "camvid": "images/{train,val}, masks/{train,val} and classes.json",
    "celebamask-hq": "CelebA-HQ-img/0.jpg ... and CelebAMask-HQ-mask-anno/0/00000_skin.png ...",
    "ade20k": "images/{training,validation}, annotations/{training,validation} and objectInfo150.txt",
    "coco-stuff": "images/{train2017,val2017} and stuffthingmaps/{train2017,val2017}",
}
