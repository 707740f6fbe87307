"""Images from a folder, a zip archive or the built-in dataset, as square RGB pixels with labels and semantic maps.

What every source does to a picture, in this order: the EXIF rotation is applied, transparent parts are
laid on white, every mode becomes 8-bit RGB (16-bit grey is scaled from its full range), and `center_crop`
makes it square. FID depends on these rules, so they are the same for training images and references.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from latentflow.data.crop import center_crop, crop_map
from latentflow.data.items import ImageItem, ImageSource
from latentflow.data.map_files import MapFiles
from latentflow.data.stores import SUFFIXES, FolderStore, StoredFile, ZipStore, is_image, open_store, wrapper
from latentflow.data.synthetic import SyntheticShapes
from latentflow.errors import DataError

__all__ = [
    "BrokenImage",
    "ImageFiles",
    "ImageItem",
    "ImageSource",
    "center_crop",
    "open_images",
    "readable",
    "to_rgb",
]

SPLITS = frozenset(["train", "training", "val", "valid", "validation", "test", "testing", "eval"])


class BrokenImage(DataError):
    """One file of a source cannot be read as an image; the others may be fine.

    Attributes:
        name: the item's path inside the source.
        reason: what is wrong with it.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"cannot read the image {self.name}: {self.reason}"


def open_images(path: str | Path, image_size: int, *, strict: bool = False) -> ImageSource:
    """Open a set of images; only the listing is read, pictures are decoded when asked for.

    A folder with sub-folders is labelled: each sub-folder that holds images, at any depth below it, is a
    class, and the classes are sorted by name. A folder of images alone is unlabelled. A single sub-folder
    with nothing beside it is a wrapper, not a class, and is descended into. A .zip archive follows the
    same rules. Hidden files, `__MACOSX` and files that are not images are passed over.

    A folder of `images/`, `masks/` and `classes.json` has semantic maps: images/a/x.jpg goes with
    masks/a/x.png, of the same size, and classes.json names the classes (see `MapClasses.read`); the rules
    above hold below `images/`. An image whose map cannot be used counts as broken.

    Args:
        path: a folder, a .zip file, or "synthetic[:COUNT[:SEED]]" for the built-in shapes (6000 images of
            seed 0 unless told otherwise). Write "./synthetic" for a folder of that name.
        image_size: height and width of every item in pixels, >= 1.
        strict: decode every image now, and refuse the source if any is broken.

    Raises:
        DataError: there are no images at `path`, they are not laid out as above, or `image_size` < 1;
            with `strict`, also when a file is broken.
    """
    if image_size < 1:
        raise DataError(f"image_size must be at least 1 pixel, got {image_size}; 64 or 256 are usual")
    if str(path) == "synthetic" or str(path).startswith("synthetic:"):
        return _open_synthetic(str(path), image_size)
    source = ImageFiles(open_store(Path(path)), image_size)
    if strict:
        _, broken = readable(source)
        if broken:
            more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
            raise DataError(f"{path}: {broken[0]}{more}; repair or remove it, or read without strict")
    return source


def readable(source: ImageSource, workers: int = 8) -> tuple[list[int], list[BrokenImage]]:
    """Decode every image once, in threads: the indices that can be read, and what is wrong with the others."""

    def problem(index: int) -> BrokenImage | None:
        try:
            source[index]
        except BrokenImage as error:
            return error
        return None

    with ThreadPoolExecutor(workers) as pool:
        problems = list(pool.map(problem, range(len(source))))
    kept = [index for index, found in enumerate(problems) if found is None]
    return kept, [found for found in problems if found is not None]


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as upright 8-bit RGB.

    The EXIF rotation is applied. Transparency is composited on white. 16-bit grey is scaled so that 65535
    is white.

    Raises:
        ValueError: the pixels are floating-point or 32-bit numbers, whose white is not defined.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixels of mode {image.mode} have no defined white; save it as 8 or 16 bits a channel")
        return Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


class ImageFiles:
    """The images of a folder or an archive; see `open_images` for the layout and `ImageSource` for the attributes.

    Reading is safe from several threads, and from processes that are forked or spawned.

    Raises:
        DataError: no images, or a layout whose labels or maps would be nonsense.
    """

    def __init__(self, store: FolderStore | ZipStore, image_size: int):
        self.image_size = image_size
        self._store = store
        files = store.files()
        images = {name: file for name, file in files.items() if is_image(name)}
        if not images:
            some = f"; it has {len(files)} other files, such as {min(files)}" if files else ""
            raise DataError(f"no images in {store.path}{some}; latentflow reads {', '.join(SUFFIXES)}")

        top = wrapper(images)
        has_maps = _has_maps(_below(top, images), store.path)
        if not has_maps and any(name.rpartition("/")[2] == "classes.json" for name in files):
            raise DataError(
                f"{store.path} has a classes.json, but not images/ and masks/ with images in both; add what is "
                "missing, or take classes.json away"
            )
        folder = f"{top}images/" if has_maps else top
        prefix = folder + wrapper(_below(folder, images))
        self._names = sorted(_below(prefix, images))
        self._files = [images[prefix + name] for name in self._names]
        self.class_names = _class_names(self._names, store.path, has_maps)
        self._label_of = {name: label for label, name in enumerate(self.class_names)}
        self._maps = None
        if has_maps:
            below_images = [prefix.removeprefix(folder) + name for name in self._names]
            self._maps = MapFiles(store, files.get(f"{top}classes.json"), _below(f"{top}masks/", images), below_images)

    @property
    def map_class_names(self) -> tuple[str, ...]:
        return self._maps.classes.names if self._maps else ()

    @property
    def map_palette(self) -> tuple[tuple[int, int, int], ...]:
        return self._maps.classes.palette if self._maps else ()

    @property
    def description(self) -> str:
        classes = f" in {len(self.class_names)} classes" if self.class_names else ""
        maps = f" with semantic maps of {len(self.map_class_names)} classes" if self._maps else ""
        return f"{len(self)} images{classes}{maps} from {self._store.path}"

    def fingerprint(self) -> str:
        """A hash of names and file sizes, and of the maps' classes; the same for a folder and for its zip archive."""
        digest = hashlib.sha256()
        for name, file in zip(self._names, self._files, strict=True):
            digest.update(f"{name}\0{file.num_bytes}\0".encode("utf-8", "surrogateescape"))
        if self._maps:
            digest.update(self._maps.fingerprint().encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """The path of image `index` below the class folders' folder, without decoding it."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a source of {len(self)}")
        return self._names[index]

    def __getitem__(self, index: int) -> ImageItem:
        """Decode image `index` and its map.

        Raises:
            BrokenImage: a file has vanished, is damaged, or is not an image; or the map does not fit.
            IndexError: `index` is not in [0, len).
        """
        name, semantic_map = self.name(index), None
        try:
            with Image.open(io.BytesIO(self._store.read(self._files[index].path))) as image:
                upright = to_rgb(image)
            pixels = center_crop(upright, self.image_size)
            if self._maps:
                semantic_map = crop_map(self._maps.read(index, upright.size), self.image_size)
        except Image.UnidentifiedImageError:
            raise BrokenImage(name, "its content is no image that Pillow can read") from None
        except Exception as error:  # decoders of damaged files raise nearly anything
            raise BrokenImage(name, str(error) or type(error).__name__) from error
        label = self._label_of[name.partition("/")[0]] if self.class_names else None
        return ImageItem(pixels, label, name, semantic_map)


def _below(prefix: str, files: dict[str, StoredFile]) -> dict[str, StoredFile]:
    return {name[len(prefix) :]: file for name, file in files.items() if name.startswith(prefix)}


def _open_synthetic(text: str, image_size: int) -> SyntheticShapes:
    try:
        count, seed = (*map(int, text.split(":")[1:]), *(6000, 0)[text.count(":") :])
    except ValueError:
        raise DataError(
            f"cannot understand {text!r}; write synthetic, synthetic:COUNT or synthetic:COUNT:SEED"
        ) from None
    return SyntheticShapes(count, image_size, seed)


def _has_maps(names: Iterable[str], path: Path) -> bool:
    """Whether the files are laid out as images/ and masks/."""
    tops = {name.partition("/")[0] for name in names}
    if not tops >= {"images", "masks"}:
        return False
    if others := sorted(tops - {"images", "masks"}):
        raise DataError(
            f"{path} has images/ and masks/, and more images beside them ({', '.join(others[:5])}): "
            "move those elsewhere, or rename masks/ if it is a class like the others"
        )
    return True


def _class_names(names: list[str], path: Path, has_maps: bool) -> tuple[str, ...]:
    """The sorted class folders of `names`; none when they all lie at the top."""
    tops = sorted({name.partition("/")[0] for name in names if "/" in name})
    loose = sum("/" not in name for name in names)
    if tops and loose:
        raise DataError(
            f"{path} has {loose} images beside {len(tops)} sub-folders with images ({', '.join(tops[:5])}): "
            "put every image into a class folder, or all of them into one folder without labels"
        )
    if tops and SPLITS.issuperset(top.lower() for top in tops):
        remedy = "give one of them, unpacked if need be"
        if has_maps:
            remedy = f"run `latentflow prepare camvid {path} --out DST` and give DST/{tops[0]}"
        raise DataError(f"{path} holds the splits {', '.join(tops)}, not classes: {remedy}")
    return tuple(tops)
