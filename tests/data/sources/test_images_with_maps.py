"""Images with semantic maps beside them."""

import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from latentflow.data.items import UNLABELLED, ImageSource
from latentflow.data.painting.semantic_maps import MapClasses, colour_map, default_palette
from latentflow.data.pictures.crop import center_crop, crop_map
from latentflow.data.pictures.decode import BrokenImage
from latentflow.data.pictures.orientation import turned
from latentflow.data.sources.images import open_images
from latentflow.data.sources.readable import readable
from latentflow.errors import DataError
from tests.data.sources.pictured import TOWN, names, pack, picture, save, semantic_map


def test_images_and_maps_are_paired_by_path(mapped):
    source = open_images(mapped, 16, strict=True)
    assert isinstance(source, ImageSource)
    assert names(source) == ["town/a.jpg", "town/b.png", "wood/deep/c.PNG"]
    assert source.class_names == ("town", "wood") and [item.label for item in source] == [0, 0, 1]
    assert source.map_class_names == TOWN.names and source.map_palette == TOWN.palette
    assert source.description == f"3 images in 2 classes with semantic maps of 3 classes from {mapped.name}"
    for i, item in enumerate(source):
        assert item.semantic_map.dtype == np.uint8
        assert np.array_equal(item.semantic_map, crop_map(semantic_map(i), 16))
        assert (item.semantic_map == UNLABELLED).sum() == 12
    assert np.array_equal(source[1].pixels, center_crop(picture(1), 16))


@pytest.mark.parametrize("wrapper", ["", "data/town/"])
def test_zip_of_maps_equals_folder(mapped, tmp_path, wrapper):
    folder, archive = open_images(mapped, 12), open_images(pack(mapped, tmp_path / "a.zip", wrapper), 12)
    assert archive.fingerprint() == folder.fingerprint()
    for a, b in zip(archive, folder, strict=True):
        assert (a.name, a.label) == (b.name, b.label)
        assert np.array_equal(a.pixels, b.pixels) and np.array_equal(a.semantic_map, b.semantic_map)
    copy = pickle.loads(pickle.dumps(archive))
    assert np.array_equal(copy[0].semantic_map, folder[0].semantic_map)


@pytest.mark.parametrize("inner", ["", "only/one/"])
def test_maps_without_labels(tmp_path, inner):
    for i in range(2):
        save(tmp_path / "images" / f"{inner}{i}.png", picture(i))
        save(tmp_path / "masks" / f"{inner}{i}.png", Image.fromarray(semantic_map(i)))
    (tmp_path / "classes.json").write_text('["sky", "road", "tree"]')
    source = open_images(tmp_path, 16)
    assert source.class_names == () and names(source) == ["0.png", "1.png"] and source[0].label is None
    assert source.map_palette == default_palette(3)
    assert source.description == f"2 images with semantic maps of 3 classes from {tmp_path.name}"
    assert np.array_equal(source[1].semantic_map, crop_map(semantic_map(1), 16))


def test_map_that_is_the_painted_image_is_aligned_with_it(tmp_path):
    painted = Image.fromarray(colour_map(np.kron(np.eye(3, dtype=np.uint8), np.ones((31, 43), np.uint8)), TOWN.palette))
    save(tmp_path / "images/a.png", painted)
    save(tmp_path / "masks/a.png", painted)
    TOWN.write(tmp_path / "classes.json")
    item = open_images(tmp_path, 24)[0]
    wrong = np.abs(item.pixels.astype(int) - colour_map(item.semantic_map, TOWN.palette)).max(-1) > 20
    inner = np.ones_like(wrong)
    edges = [tuple(np.argwhere(np.diff(item.semantic_map.astype(int), axis=axis))) for axis in (0, 1)]
    for row, column in (edge for both in edges for edge in both):
        inner[max(row - 1, 0) : row + 3, max(column - 1, 0) : column + 3] = False
    assert inner.mean() > 0.5 and not wrong[inner].any()


def test_maps_without_classes_are_refused_with_an_example(mapped):
    (mapped / "classes.json").unlink()
    with pytest.raises(DataError, match=r"images/ and masks/ but no classes.json, .* for example \["):
        open_images(mapped, 16)
    (mapped / "classes.json").write_text("[]")
    with pytest.raises(DataError, match=r"mapped: classes.json: 0 classes of semantic maps; there must be 1 to 255"):
        open_images(mapped, 16)


def test_images_without_map_and_maps_without_image_are_named(mapped):
    for i in range(4):
        save(mapped / f"images/town/new{i}.png")
    with pytest.raises(
        DataError,
        match=r"mapped: 4 images have no map \(town/new0.png, town/new1.png, town/new2.png, ...\); an image a/x.jpg",
    ):
        open_images(mapped, 16)
    for i in range(1, 4):
        (mapped / f"images/town/new{i}.png").unlink()
    (mapped / "images/town/a.jpg").unlink()
    with pytest.raises(
        DataError, match=r"1 images have no map \(town/new0.png\); 1 maps have no image \(town/a.png\); an image"
    ):
        open_images(mapped, 16)


@pytest.mark.parametrize("top, kind", [("images", "images"), ("masks", "maps")])
def test_two_files_for_one_place_are_refused(mapped, top, kind):
    save(mapped / top / "town" / "a.bmp")
    with pytest.raises(DataError, match=rf"mapped: {kind} town/a.\w+ and town/a.\w+ differ in their suffix only; re"):
        open_images(mapped, 16)


def test_names_are_paired_however_their_accents_are_written(tmp_path):
    for one, other in (("caf\xe9", "cafe\u0301"), ("\u304b\u3099", "\u304c"), ("plain", "plain")):
        save(tmp_path / f"images/{one}.png", picture(0))
        save(tmp_path / f"masks/{other}.png", Image.fromarray(semantic_map(0)))
    TOWN.write(tmp_path / "classes.json")
    assert len(readable(open_images(tmp_path, 16))[0]) == 3
    save(tmp_path / "masks/caf\xe9.png", Image.fromarray(semantic_map(1)))
    with pytest.raises(DataError, match=r"holds masks/café.png in two ways of writing the same letters; rename"):
        open_images(tmp_path, 16)


def test_images_next_to_images_and_maps_are_refused(mapped):
    save(mapped / "previews" / "a.png")
    with pytest.raises(DataError, match=r"images/ and masks/, and other images as well \(previews\): move those"):
        open_images(mapped, 16)


def test_splits_of_maps_are_sent_to_prepare(tmp_path):
    for split in ("train", "val"):
        save(tmp_path / "images" / split / "a.png")
        save(tmp_path / "masks" / split / "a.png")
    with pytest.raises(DataError) as caught:
        open_images(tmp_path, 8)
    remedy = f"run `latentflow prepare camvid {tmp_path} --out DST` and give DST/train"
    assert str(caught.value) == f"{tmp_path} holds the splits train, val, not classes: {remedy}"


def test_broken_maps_make_broken_images(mapped):
    values = semantic_map(0)
    values[0, :3] = 3
    save(mapped / "masks/town/a.png", Image.fromarray(values))
    save(mapped / "masks/town/b.png", Image.fromarray(semantic_map(1, 10, 8)))
    (mapped / "masks/wood/deep/c.png").write_bytes(b"no image")
    save(mapped / "images/town/d.png", picture(4))
    save(mapped / "masks/town/d.png", Image.fromarray(semantic_map(4)))
    source = open_images(mapped, 16)
    kept, broken = readable(source)
    assert [source.name(i) for i in kept] == ["town/d.png"]
    assert [str(error) for error in broken] == [
        "cannot read the image town/a.jpg: its map masks/town/a.png: class 3 in 3 pixels, "
        "but there are 3 classes, 0 to 2; 255 means unlabelled",
        "cannot read the image town/b.png: its map masks/town/b.png has 10 x 8 pixels (width x height), "
        "its image 20 x 16: resize the map with nearest neighbour, in Pillow map.resize((20, 16), "
        "Image.Resampling.NEAREST)",
        "cannot read the image wood/deep/c.PNG: its map masks/wood/deep/c.png: it cannot be read (its content is no "
        "image that Pillow can read); save the map again, as a PNG",
    ]
    with pytest.raises(DataError, match=r"mapped: cannot read the image town/a.jpg: its map .* \(and 2 more\); repair"):
        open_images(mapped, 16, strict=True)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_maps_of_turned_images_may_be_of_the_stored_pixels_or_of_the_upright_ones(tmp_path, suffix, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {"tiffinfo": {0x0112: turn}} if suffix == "tif" else {"exif": exif}
    stored = semantic_map(0)
    save(tmp_path / f"images/a.{suffix}", picture(0), **options)
    TOWN.write(tmp_path / "classes.json")
    exif[0x0112] = 1
    for pixels, own in ((stored, {}), (turned(stored, turn), {}), (turned(stored, turn), {"exif": exif})):
        save(tmp_path / "masks/a.png", Image.fromarray(pixels), **own)
        source = open_images(tmp_path, 16)
        if turn in (2, 3, 4) and not own:
            with pytest.raises(BrokenImage, match=rf"may match its image as shown .* orientation {turn}\)"):
                source[0]
        else:
            assert np.array_equal(source[0].semantic_map, crop_map(turned(stored, turn), 16))


def test_fingerprint_follows_maps_and_classes(mapped):
    prints = [open_images(mapped, 16).fingerprint(), open_images(mapped / "images", 16).fingerprint()]
    with (mapped / "masks/town/a.png").open("ab") as file:
        file.write(b"x")
    prints.append(open_images(mapped, 16).fingerprint())
    (mapped / "masks/town/b.png").rename(mapped / "masks/town/b.PNG")
    prints.append(open_images(mapped, 16).fingerprint())
    MapClasses(TOWN.names).write(mapped / "classes.json")
    prints.append(open_images(mapped, 16).fingerprint())
    MapClasses(("sky", "road", "bush")).write(mapped / "classes.json")
    prints.append(open_images(mapped, 16).fingerprint())
    assert len(set(prints)) == 6
    (mapped / "classes.json").write_text('["sky","road","bush"]')  # the same classes, written otherwise
    assert open_images(mapped, 16).fingerprint() == prints[-1]


@pytest.mark.parametrize("damage", ["member", "encrypted"])
def test_damaged_classes_in_a_zip_are_named(mapped, tmp_path, damage):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(pack(mapped, tmp_path / "whole.zip")) as whole, zipfile.ZipFile(archive, "w") as file:
        for member in whole.namelist():
            file.writestr(member, whole.read(member))
    data = bytearray(archive.read_bytes())
    if damage == "member":
        data[data.index(b'"names"') + 2] ^= 0xFF
    else:
        data[data.rindex(b"classes.json") - 46 + 8] |= 1  # the flag in the central directory
    archive.write_bytes(data)
    said = r"classes.json cannot be read \(.*\); it should hold \[" if damage == "member" else "is encrypted"
    with pytest.raises(DataError, match=rf"a.zip:? {said}"):
        open_images(archive, 16)
