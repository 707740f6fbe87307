"""Images from a folder, a zip archive or the built-in dataset, as square RGB pixels with labels.

What every source does to a picture, in this order: the EXIF rotation is applied, transparent parts are
laid on white, every mode becomes 8-bit RGB (16-bit grey is scaled from its full range), and `center_crop`
makes it square. FID depends on these rules, so they are the same for training images and references.
"""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import stat
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from latentflow.data.items import ImageItem, ImageSource
from latentflow.data.synthetic import SyntheticShapes
from latentflow.errors import DataError

__all__ = ["BrokenImage", "ImageFiles", "ImageItem", "ImageSource", "center_crop", "open_images", "readable", "to_rgb"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SUFFIXES += (".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".avif")
SPLITS = frozenset(["train", "training", "val", "valid", "validation", "test", "testing", "eval"])

_MOST_RESIZED_PIXELS = 1 << 26  # a long, thin strip grows beyond this before it is cropped
_MOST_UNPACKED_BYTES = 1 << 30  # a zip member that claims more is no photograph


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
    source = ImageFiles(_open_store(Path(path)), image_size)
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


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The square middle of an image: [size, size, 3] uint8.

    The rule of ADM (Dhariwal & Nichol, arXiv 2105.05233), which published FID figures assume: halve with a
    box filter while the shorter side is at least twice `size`, make it exactly `size` with a bicubic
    filter, and cut out the middle. Smaller images are enlarged.

    Args:
        image: RGB.
        size: height and width of the result in pixels.

    Raises:
        ValueError: the image is so long and thin that it cannot be enlarged before the cut.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > _MOST_RESIZED_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too long and thin for a {size} x {size} square")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


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
        DataError: no images, or a layout whose labels would be nonsense.
    """

    def __init__(self, store: _Folder | _Zip, image_size: int):
        self.image_size = image_size
        self._store = store
        files = {_tidy(name): (name, num_bytes) for name, num_bytes in store.files()}
        images = {name: file for name, file in files.items() if _is_image(name)}
        if not images:
            some = f"; it has {len(files)} other files, such as {min(files)}" if files else ""
            raise DataError(f"no images in {store.path}{some}; latentflow reads {', '.join(SUFFIXES)}")

        prefix = _wrapper(list(images))
        self._names = sorted(name[len(prefix) :] for name in images)
        self._files = [images[prefix + name][0] for name in self._names]
        self._num_bytes = [images[prefix + name][1] for name in self._names]
        self.class_names = _class_names(self._names, store.path)
        self._label_of = {name: label for label, name in enumerate(self.class_names)}

    @property
    def description(self) -> str:
        classes = f" in {len(self.class_names)} classes" if self.class_names else ""
        return f"{len(self)} images{classes} from {self._store.path}"

    def fingerprint(self) -> str:
        """A hash of names and file sizes; the same for a folder and for its zip archive."""
        digest = hashlib.sha256()
        for name, num_bytes in zip(self._names, self._num_bytes, strict=True):
            digest.update(f"{name}\0{num_bytes}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> ImageItem:
        """Decode image `index`.

        Raises:
            BrokenImage: the file has vanished, is damaged, or is not an image.
            IndexError: `index` is not in [0, len).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a source of {len(self)}")
        name = self._names[index]
        try:
            with Image.open(io.BytesIO(self._store.read(self._files[index]))) as image:
                pixels = center_crop(to_rgb(image), self.image_size)
        except Image.UnidentifiedImageError:
            raise BrokenImage(name, "its content is no image that Pillow can read") from None
        except Exception as error:  # decoders of damaged files raise nearly anything
            raise BrokenImage(name, str(error) or type(error).__name__) from error
        return ImageItem(pixels, self._label_of[name.partition("/")[0]] if self.class_names else None, name)


class _Folder:
    """Files below a folder."""

    def __init__(self, path: Path):
        self.path = path

    def files(self) -> Iterator[tuple[str, int]]:
        """Path inside the folder and size in bytes of every file that is not hidden."""
        yield from self._walk(self.path, "", frozenset([self.path.resolve()]))

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def _walk(self, folder: Path, prefix: str, parents: frozenset[Path]) -> Iterator[tuple[str, int]]:
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise DataError(f"cannot list {folder}: {error.strerror}") from error
        for entry in entries:
            if _is_hidden(entry.name):
                continue
            if entry.is_dir():
                real = Path(entry.path).resolve()
                if real not in parents:  # a link to a folder above would never end
                    yield from self._walk(Path(entry.path), f"{prefix}{entry.name}/", parents | {real})
            elif not _is_image(entry.name):
                yield prefix + entry.name, 0
            else:
                yield prefix + entry.name, _file_size(entry)


class _Zip:
    """Members of a zip archive. Every process opens its own handle: a fork would share the file position."""

    def __init__(self, path: Path):
        self.path = path
        self._opened: tuple[int, zipfile.ZipFile, threading.Lock] | None = None

    def files(self) -> Iterator[tuple[str, int]]:
        """Path inside the archive and unpacked size in bytes of every file that is not hidden."""
        for member in self._archive()[0].infolist():
            if not member.is_dir() and not any(map(_is_hidden, _tidy(member.filename).split("/"))):
                yield member.filename, member.file_size

    def read(self, name: str) -> bytes:
        archive, lock = self._archive()
        if archive.getinfo(name).file_size > _MOST_UNPACKED_BYTES:
            raise ValueError(f"it claims to unpack to {archive.getinfo(name).file_size} bytes")
        with lock:
            return archive.read(name)

    def _archive(self) -> tuple[zipfile.ZipFile, threading.Lock]:
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            try:
                self._opened = opened = (os.getpid(), zipfile.ZipFile(self.path), threading.Lock())
            except (OSError, zipfile.BadZipFile) as error:
                raise DataError(f"{self.path} is not a readable zip archive ({error}); pack or copy it anew") from error
        return opened[1:]

    def __getstate__(self) -> dict:
        return {"path": self.path, "_opened": None}


def _open_store(path: Path) -> _Folder | _Zip:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise DataError(
            f"cannot open {path}: {error.strerror}; give a folder of images, a .zip file, or 'synthetic'"
        ) from error
    if stat.S_ISDIR(mode):
        return _Folder(path)
    if path.suffix.lower() == ".zip":
        return _Zip(path)
    raise DataError(f"{path} is a single file; give the folder it lies in, or a .zip file, or 'synthetic'")


def _open_synthetic(text: str, image_size: int) -> SyntheticShapes:
    try:
        count, seed = (*map(int, text.split(":")[1:]), *(6000, 0)[text.count(":") :])
    except ValueError:
        raise DataError(
            f"cannot understand {text!r}; write synthetic, synthetic:COUNT or synthetic:COUNT:SEED"
        ) from None
    return SyntheticShapes(count, image_size, seed)


def _file_size(entry: os.DirEntry) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a dangling link is listed, and reported as broken when it is read
        return 0


def _tidy(name: str) -> str:
    """Forward slashes only, and no "./" in front, whatever program packed the archive."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122 - ten times as fast as Path


def _wrapper(names: list[str]) -> str:
    """The path that all names have in front, where a single folder wraps everything, with its last slash."""
    folder = posixpath.commonpath([posixpath.dirname(name) for name in names])
    return f"{folder}/" if folder else ""


def _class_names(names: list[str], path: Path) -> tuple[str, ...]:
    """The sorted class folders of `names`; none when they all lie at the top."""
    tops = sorted({name.partition("/")[0] for name in names if "/" in name})
    loose = sum("/" not in name for name in names)
    if tops and loose:
        raise DataError(
            f"{path} has {loose} images beside {len(tops)} sub-folders with images ({', '.join(tops[:5])}): "
            "put every image into a class folder, or all of them into one folder without labels"
        )
    if tops and SPLITS.issuperset(top.lower() for top in tops):
        raise DataError(
            f"{path} holds the splits {', '.join(tops)}, not classes: give one of them, unpacked if need be"
        )
    return tuple(tops)
