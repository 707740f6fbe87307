"""Images from a folder, a zip, a table, an LMDB environment or the built-in data set, as RGB pixels of one size.

A folder, a zip archive, a table and the built-in data set may have labels and semantic maps.

Every source treats a picture alike: `open_image` says which files are read, `to_rgb` makes upright 8-bit sRGB of it, by
its colour profile and on white, and `center_crop` gives it its size. FID depends on these rules, so they are the same
for training images and references.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from latentflow.columns import Column, check_columns
from latentflow.data.items import ImageSource
from latentflow.data.painting.input_rules import FILES, NO_INPUTS, InputRules
from latentflow.data.paired_choice import PairedChoice
from latentflow.data.pictures.decode import most_pixels
from latentflow.data.pixel_choice import PixelChoice
from latentflow.data.sources.derived_inputs import DerivedInputs
from latentflow.data.sources.pixel_survey import choose_format
from latentflow.data.sources.places import list_images
from latentflow.data.sources.readable import readable
from latentflow.data.sources.stored import ImageFiles, LmdbImages
from latentflow.data.sources.synthetic import COLUMNS, SyntheticShapes
from latentflow.data.stores.first import check_first
from latentflow.data.stores.lmdb import LmdbStore, environment_file
from latentflow.data.table_options import TableOfModel, TableOptions
from latentflow.errors import DataError, nearest
from latentflow.pixel_format import PixelFormat
from latentflow.sizes import Size

_OPTIONS = re.compile(r"--(pixels|depth|value-range)")  # in messages, which those of inputs are to name


def open_images(
    path: str | Path,
    image_size: Size | int | str,
    *,
    first: int | None = None,
    strict: bool = False,
    table: TableOptions | None = None,
    pixels: PixelFormat | PixelChoice | None = None,
    known: PixelFormat | None = None,
    inputs: PairedChoice | str = FILES,
) -> ImageSource:
    """Open a set of images. Only the listing is read; pictures are decoded on access.

    A folder with sub-folders is labelled: each sub-folder that holds images, at any depth below it, is a class, and the
    classes are sorted by name. A folder that only holds images is unlabelled. A single sub-folder with nothing next to
    it is a wrapper, not a class, and is descended into. Folders named like splits (train, val2017, test_set) are not
    classes. A .zip archive follows the same rules. Hidden files, files that systems leave behind (`@eaDir`, `__MACOSX`,
    `Thumbs.db`) and files that are not images are skipped; for pictures in formats or under names that are not read a
    notice is printed.

    A folder of `images/`, `masks/` and `classes.json` has semantic maps: images/a/x.jpg goes with
    masks/a/x.png, of the same size, and classes.json names the classes (see `MapClasses.read`); the rules
    above hold below `images/`. An image whose map cannot be used counts as broken. A folder of `images/` and `inputs/`,
    with or without masks, has paired inputs in the same way, of the same aspect ratio and of any size.

    Tables, rows with images and .tar archives are described in `places`. An LMDB environment (`stores.lmdb`), a folder
    with data.mdb or a .mdb or .lmdb file, has neither labels nor maps.

    Args:
        path: a folder, a .zip file, a table, rows with images, an LMDB environment, or built-in shapes, by
            "synthetic[:COUNT[:SEED[:COLUMNS]]]" (6000 images of seed 0). Write "./synthetic" for a folder of that name.
        image_size: of every item, as `Size.of` takes it; sides of 1 pixel or more.
        first: only take this many images: of class folders evenly (the first of each, then the second of each,
            and so on), otherwise in the source's order; None: all of them.
        strict: decode every image now, and refuse the source if any is broken.
        table: which columns of a table are used; None: its classes, if a column is called so.
        pixels: what the pixels are read as, or what is said of it, see `choose_format`; None: 8-bit RGB.
        known: the format that an earlier call chose; its range is kept, if everything else is the same.
        inputs: paired inputs, or only their origin; `NO_INPUTS` leaves out those in files.

    Raises:
        DataError: there are no images at `path`, they are not laid out as above, there are fewer than `first`,
            or a number is below 1; a table and its files do not pair up; with `strict`, also when a file is broken.
    """
    size = Size.of(image_size)
    if min(size) < 1:
        raise DataError(f"image_size must be at least 1 pixel, got {image_size}; 64 or 256 are usual")
    most_pixels()  # refuse an invalid limit now, not for each image
    choice = PairedChoice(inputs) if isinstance(inputs, str) else inputs
    source = _opened(path, size, first, table or TableOptions(), choice.origin)
    wanted = choose_format(source, pixels, known) if isinstance(pixels, PixelChoice) else pixels
    paired = _with_inputs(source if wanted is None else source.with_format(wanted), choice)
    if strict:
        _refuse_broken(paired, path)
    return paired


def _opened(
    path: str | Path, image_size: Size, first: int | None, table: TableOptions, inputs: str
) -> ImageFiles | LmdbImages | SyntheticShapes:
    """A set of images in 8-bit RGB, with the paired inputs that lie beside them where these are wanted."""
    is_synthetic = _is_synthetic(path)
    if is_synthetic or environment_file(Path(path)):
        _refuse_table(table, path)
    if is_synthetic:
        return _open_synthetic(str(path), image_size, first)
    if environment_file(Path(path)):
        return LmdbImages(LmdbStore(Path(path), first), image_size)
    listed = list_images(path, table)
    return ImageFiles(listed if inputs == FILES else replace(listed, inputs=None), image_size, first)


def _with_inputs(source: ImageSource, choice: PairedChoice) -> ImageSource:
    """The same images with inputs that are made from them, or whose inputs in files are read as they are to be."""
    if choice.origin not in (FILES, NO_INPUTS):
        return DerivedInputs(source, InputRules(origin=choice.origin))
    if not isinstance(source, ImageFiles) or source.input_format is None or choice.pixels is None:
        return source
    pixels = choice.pixels
    if isinstance(pixels, PixelChoice):
        try:
            pixels = choose_format(source.inputs_alone, pixels, choice.known)
        except DataError as error:
            raise DataError(_OPTIONS.sub(r"--input-\1", str(error))) from error
    return source.with_input_format(pixels)


def table_with(
    path: str | Path,
    columns: Sequence[Column],
    label_column: str | None = None,
    class_names: Sequence[str] = (),
    *,
    partly: bool = False,
) -> TableOptions:
    """How a table at `path` is read for these named columns; images without a table have their own columns.

    Args:
        label_column: of the table; None: the one that holds no other classes than `class_names`, or see `TableOptions`.
        class_names: those of the model.
        partly: some of the columns, but not all of them, may be missing.
    """
    has_own = _is_synthetic(path) or environment_file(Path(path))
    wanted = [] if has_own else [f"{column.name}:{column.kind}" for column in columns]
    names = tuple(class_names)
    return TableOfModel(columns=wanted or None, label_column=label_column, class_names=names, partly=partly)


def _is_synthetic(path: str | Path) -> bool:
    return str(path) == "synthetic" or str(path).startswith("synthetic:")


def _refuse_table(table: TableOptions | None, path: str | Path) -> None:
    if table is not None and table.asks_for_table:
        raise DataError(
            f"{path} has no table, which --label-column, --columns and --file-column are about; leave them out"
        )


def _refuse_broken(source: ImageSource, path: str | Path) -> None:
    _, broken = readable(source)
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise DataError(f"{path}: {broken[0]}{more}; repair or remove it, or read without strict")


def _open_synthetic(text: str, image_size: Size, first: int | None) -> SyntheticShapes:
    numbers, named = text.split(":")[1:3], text.split(":")[3:]
    try:
        count, seed = (*map(int, numbers), *(6000, 0)[len(numbers) :])
        (chosen,) = named or ("",)
    except ValueError:
        raise DataError(
            f"cannot understand {text!r}; write synthetic, synthetic:COUNT, synthetic:COUNT:SEED or "
            "synthetic:COUNT:SEED:size,angle"
        ) from None
    source = SyntheticShapes(count, image_size, seed, columns=_columns_of_shapes(chosen))
    check_first(first, count, text)
    return source if first is None else replace(source, count=first)


def _columns_of_shapes(text: str) -> tuple[Column, ...]:
    """The named columns in the name of the built-in shapes: "all" or a list like "size,angle"; none if it is empty."""
    own = {column.name: column for column in COLUMNS}
    names = list(own) if text == "all" else [name.strip() for name in text.split(",")] if text else []
    for name in names:
        if name not in own:
            raise DataError(f"the synthetic shapes have no column {name!r}; {nearest(name, own)}")
    check_columns([own[name] for name in names])
    return tuple(own[name] for name in names)
