import io
import json
import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentflow.data.crop import center_crop
from latentflow.data.semantic_maps import (
    UNLABELLED,
    UNLABELLED_COLOUR,
    MapClasses,
    check_map,
    colour_map,
    crop_map,
    default_palette,
    read_map,
)
from latentflow.errors import DataError

TOWN = MapClasses(("sky", "road", "tree", "car"), ((128, 128, 128), (128, 64, 128), (128, 128, 0), (64, 0, 128)))


def a_map(height: int = 9, width: int = 7, seed: int = 0, unlabelled: bool = True) -> np.ndarray:
    semantic_map = np.random.default_rng(seed).integers(0, len(TOWN), (height, width), np.uint8)
    if unlabelled:
        semantic_map[2, 3] = UNLABELLED
    return semantic_map


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refused(message: str):
    return pytest.raises(DataError, match=f"^{re.escape(message)}$")


# Classes and palettes


def test_default_palette_is_that_of_pascal_voc():
    voc = default_palette(22)
    assert voc[:5] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))
    assert voc[8] == (64, 0, 0) and voc[15] == (192, 128, 128) and voc[20] == (0, 64, 128)
    assert voc[21] == (128, 64, 128)


def test_default_palette_has_255_colours_and_none_is_the_unlabelled_one():
    palette = default_palette(255)
    assert len(set(palette)) == 255 and UNLABELLED_COLOUR not in palette
    assert default_palette(12) == palette[:12]
    assert min(map(min, palette)) == 0 and max(map(max, palette)) == 224


def test_classes_without_a_palette_get_the_default_one():
    assert MapClasses(("a", "b", "c")).palette == default_palette(3)
    assert len(MapClasses(("a", "b", "c"))) == 3
    assert len(MapClasses(tuple(map(str, range(255))))) == 255


@pytest.mark.parametrize(
    "content, names, palette",
    [
        (["sky", "road"], ("sky", "road"), default_palette(2)),
        ({"names": ["sky", "Straße"]}, ("sky", "Straße"), default_palette(2)),
        ({"names": ["sky", "road"], "palette": [[1, 2, 3], [0, 255, 0]]}, ("sky", "road"), ((1, 2, 3), (0, 255, 0))),
    ],
)
def test_classes_json_in_every_form(tmp_path, content, names, palette):
    file = tmp_path / "classes.json"
    file.write_text(json.dumps(content), encoding="utf-8-sig")
    assert MapClasses.read(file) == MapClasses(names, palette)


def test_classes_are_read_back_as_written(tmp_path):
    for classes in (TOWN, MapClasses(('an "odd" one', "Straße", "道"))):
        classes.write(tmp_path / "classes.json")
        assert MapClasses.read(tmp_path / "classes.json") == classes
    assert set(json.loads((tmp_path / "classes.json").read_bytes())) == {"names", "palette"}


@pytest.mark.parametrize(
    "names, palette, message",
    [
        ((), (), "0 classes of semantic maps; there must be 1 to 255"),
        (tuple(map(str, range(256))), (), "256 classes of semantic maps; there must be 1 to 255"),
        (("a", "b", "a"), (), "two classes of the semantic maps are called 'a'; give each its own name"),
        (("a", "b"), ((0, 0, 0),), "the palette has 1 colours for 2 classes; give one each"),
        (
            ("a", "b", "c"),
            ((9, 0, 0), (1, 1, 1), (9, 0, 0)),
            "the classes a, c have the same colour (9, 0, 0); give each its own",
        ),
    ],
)
def test_classes_that_cannot_be(names, palette, message):
    with refused(message):
        MapClasses(names, palette)


@pytest.mark.parametrize(
    "content, message",
    [
        ("sky, road", r"classes.json is not valid JSON \(Expecting value: .*\); it should hold \[\"sky\", \"road\""),
        ('"sky"', r"classes.json: neither a list of names nor an object of names and palette; write for example \["),
        ('{"palette": []}', "classes.json: neither a list of names nor"),
        ('{"names": ["a"], "colors": []}', "classes.json: neither a list of names nor"),
        ('["sky", 3]', r"classes.json: the names must be a list of non-empty texts; write for example \["),
        ('["sky", " "]', "classes.json: the names must be a list of non-empty texts"),
        ('{"names": "sky"}', "classes.json: the names must be a list of non-empty texts"),
        ('{"names": ["a"], "palette": {}}', "classes.json: the palette must be a list of colours"),
        (
            '{"names": ["a"], "palette": [[1, 2]]}',
            r"classes.json: \[1, 2\] is no colour; write \[red, gr",
        ),
        ('{"names": ["a"], "palette": [[1, 2, 256]]}', r"\[1, 2, 256\] is no colour"),
        ('{"names": ["a"], "palette": [[1, 2, true]]}', r"\[1, 2, true\] is no colour"),
        ('{"names": ["a"], "palette": ["red"]}', r'"red" is no colour'),
        ('["a", "a"]', "classes.json: two classes of the semantic maps are called 'a'"),
        ("[]", "classes.json: 0 classes of semantic maps"),
    ],
)
def test_classes_json_that_cannot_be_understood(tmp_path, content, message):
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        MapClasses.read(tmp_path / "classes.json")
    assert "\n" not in str(caught.value)


def test_missing_classes_json(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*classes.json: No such file or directory; it should hold \["):
        MapClasses.read(tmp_path / "classes.json")


# Reading what is right


def test_grey_values_are_classes(tmp_path):
    semantic_map = a_map()
    Image.fromarray(semantic_map).save(tmp_path / "map.png")
    for file in (tmp_path / "map.png", str(tmp_path / "map.png"), (tmp_path / "map.png").read_bytes()):
        read = read_map(file, TOWN)
        assert read.dtype == np.uint8 and np.array_equal(read, semantic_map)
    assert np.array_equal(read_map(Image.fromarray(semantic_map), TOWN), semantic_map)


@pytest.mark.parametrize("dtype, kind", [(np.uint16, "PNG"), (np.uint16, "TIFF"), (np.int32, "TIFF")])
def test_sixteen_and_more_bits(dtype, kind):
    semantic_map = a_map()
    assert np.array_equal(read_map(encoded(Image.fromarray(semantic_map.astype(dtype)), kind), TOWN), semantic_map)


def grey_png(values: np.ndarray, bits: int) -> bytes:
    """A grey PNG of 1, 2 or 4 bits, as programs that make files small write it; Pillow cannot."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    planes = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    rows = [b"\0" + np.packbits(row.reshape(-1)).tobytes() for row in planes]
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("bits, most", [(1, 2), (2, 4), (4, 16)])
def test_few_bits_are_not_stretched(bits, most):
    values = np.arange(5 * 7).reshape(5, 7) % most
    classes = MapClasses(tuple(map(str, range(most))))
    assert read_map(grey_png(values, bits), classes).tolist() == values.tolist()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_places_in_a_palette_are_classes_whatever_the_colours(bits):
    semantic_map = a_map(unlabelled=False)
    image = Image.new("P", (7, 9))
    image.putdata(semantic_map.reshape(-1).tolist())
    image.putpalette([7, 7, 7] * 3 + [9, 9, 9])
    assert np.array_equal(read_map(encoded(image, bits=bits), TOWN), semantic_map)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_of_the_palette_are_classes(mode):
    semantic_map = a_map()
    image = Image.fromarray(colour_map(semantic_map, TOWN.palette)).convert(mode)
    assert np.array_equal(read_map(encoded(image), TOWN), semantic_map)
    assert np.array_equal(read_map(encoded(image, "WEBP", lossless=True), TOWN), semantic_map)


def test_every_colour_of_a_full_palette_is_found():
    classes = MapClasses(tuple(map(str, range(255))))
    semantic_map = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(read_map(Image.fromarray(colour_map(semantic_map, classes.palette)), classes), semantic_map)


def test_class_of_the_unlabelled_colour_is_a_class():
    classes = MapClasses(("a", "b"), ((0, 0, 0), UNLABELLED_COLOUR))
    assert read_map(Image.new("RGB", (2, 1), UNLABELLED_COLOUR), classes).tolist() == [[1, 1]]


def test_opaque_alpha_beside_classes():
    semantic_map = a_map()
    assert np.array_equal(read_map(encoded(Image.fromarray(semantic_map).convert("LA")), TOWN), semantic_map)


def test_exif_rotation_is_applied_as_to_images(tmp_path):
    semantic_map = a_map()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    assert np.array_equal(read_map(encoded(Image.fromarray(semantic_map), exif=exif), TOWN), np.rot90(semantic_map, -1))


# Refusing what is wrong


@pytest.mark.parametrize("content", [b"", b"no image", encoded(Image.fromarray(a_map(64, 64)))[:100]])
def test_file_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "map.png").write_bytes(content)
    with pytest.raises(DataError, match=r"map.png: .*; save (the map as a PNG|or copy the map anew)$") as caught:
        read_map(tmp_path / "map.png", TOWN)
    assert "\n" not in str(caught.value)


def test_file_that_is_missing_is_named(tmp_path):
    file = tmp_path / "map.png"
    with refused(f"{file}: it cannot be read (No such file or directory); save or copy the map anew"):
        read_map(file, TOWN)
    with pytest.raises(DataError, match=r"^the semantic map: it cannot be read \(its content is no image"):
        read_map(b"no image", TOWN)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_unknown_class_is_refused(dtype):
    semantic_map = a_map().astype(dtype)
    semantic_map[4, :5] = 37
    with refused("m.png: class 37 in 5 pixels, but there are 4 classes, 0 to 3; 255 means unlabelled"):
        read_map(encoded(Image.fromarray(semantic_map)), TOWN, name="m.png")
    semantic_map[5, 5] = 4
    message = "class 4 in 1 pixel (and 1 more unknown classes), but there are 4 classes, 0 to 3; 255 means unlabelled"
    with refused(f"m.png: {message}"):
        read_map(encoded(Image.fromarray(semantic_map)), TOWN, name="m.png")


def test_class_beyond_a_byte_does_not_wrap_around():
    with refused("the semantic map: class 257 in 6 pixels, but there are 4 classes, 0 to 3; 255 means unlabelled"):
        read_map(Image.fromarray(np.full((2, 3), 257, np.uint16)), TOWN)


def test_unknown_colour_is_refused_with_the_nearest_class():
    pixels = colour_map(a_map(unlabelled=False), TOWN.palette)
    pixels[6, 2] = (126, 66, 130)
    message = (
        "the colour (126, 66, 130) at column 2, row 6 is of no class; the nearest is (128, 64, 128), class 1 'road'"
    )
    with refused(f"m.png: {message}"):
        read_map(encoded(Image.fromarray(pixels)), TOWN, name="m.png")


def test_smeared_colours_are_refused():
    painted = Image.fromarray(colour_map(a_map(32, 32), TOWN.palette))
    for smeared in (encoded(painted, "JPEG"), encoded(painted.resize((50, 50), Image.Resampling.BICUBIC))):
        with pytest.raises(DataError, match=r"\d+ such colours: was it resized or compressed with loss\?$"):
            read_map(smeared, TOWN)


def test_smeared_indices_are_refused():
    with refused("m.jpg: JPEG smears class indices into their neighbours'; save the map as a PNG"):
        read_map(encoded(Image.fromarray(a_map()), "JPEG"), TOWN, name="m.jpg")


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_refused(mode):
    image = Image.fromarray(colour_map(a_map(unlabelled=False), TOWN.palette)).convert(mode)
    image.putalpha(Image.fromarray(np.where(np.arange(63).reshape(9, 7) < 3, 254, 255).astype(np.uint8)))
    with refused("m.png: 3 pixels not opaque; save the map without alpha"):
        read_map(encoded(image), TOWN, name="m.png")


@pytest.mark.parametrize("mode", ["F", "CMYK", "YCbCr"])
def test_other_modes_are_refused(mode):
    with refused(f"m: pixels of mode {mode} are neither class indices nor colours; save it as an 8-bit PNG"):
        read_map(Image.new(mode, (3, 3)), TOWN, name="m")


@pytest.mark.parametrize(
    "semantic_map, form",
    [
        (np.zeros((2, 3), np.float32), "[2, 3] float32"),
        (np.zeros((2, 3), bool), "[2, 3] bool"),
        (np.zeros((1, 2, 3), np.uint8), "[1, 2, 3] uint8"),
    ],
)
def test_array_of_another_form_is_refused(semantic_map, form):
    with refused(f"mine: a semantic map is an array [height, width] of integers, not {form}"):
        check_map(semantic_map, TOWN, "mine")


def test_check_of_an_array():
    check_map(a_map(), TOWN, "mine")
    check_map(a_map().astype(np.int64), TOWN, "mine")
    with refused("mine: class -1 in 1 pixel, but there are 4 classes, 0 to 3; 255 means unlabelled"):
        check_map(np.array([[0, -1]]), TOWN, "mine")


# Colours


def test_colours_of_a_map():
    painted = colour_map(np.array([[0, 3], [UNLABELLED, 1]], np.uint8), TOWN.palette)
    assert painted.dtype == np.uint8
    assert painted.tolist() == [[[128, 128, 128], [64, 0, 128]], [list(UNLABELLED_COLOUR), [128, 64, 128]]]


# The crop

SIZES = [(32, 32), (64, 64), (128, 96), (151, 67), (67, 151), (480, 360), (500, 333), (40, 33), (20, 31), (7, 5)]


def test_crop_of_the_right_size_is_the_map_itself():
    semantic_map = a_map(32, 32)
    assert np.array_equal(crop_map(semantic_map, 32), semantic_map)
    assert crop_map(semantic_map, 32).dtype == np.uint8


def test_crop_cuts_the_middle():
    wide, tall = a_map(8, 13), a_map(12, 8)
    assert np.array_equal(crop_map(wide, 8), wide[:, 2:10])
    assert np.array_equal(crop_map(tall, 8), tall[2:10])


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_crop_undoes_an_enlargement_and_enlarges(factor):
    small = a_map(8, 8)
    large = small.repeat(factor, 0).repeat(factor, 1)
    assert np.array_equal(crop_map(large, 8), small)
    assert np.array_equal(crop_map(small, 8 * factor), large)


@pytest.mark.parametrize("width, height", SIZES)
def test_crop_makes_up_no_class(width, height):
    semantic_map = np.where(a_map(height, width, unlabelled=False) > 1, 3, 0).astype(np.uint8)
    assert set(np.unique(crop_map(semantic_map, 32))) <= {0, 3}


@pytest.mark.parametrize("width, height", SIZES)
@pytest.mark.parametrize("axis", [0, 1])
def test_crop_looks_where_the_crop_of_the_image_looks(width, height, axis):
    """An image whose colour is its own coordinate, in percent of its extent, tells where each pixel comes from."""
    extent = (height, width)[axis]
    coordinate = (np.indices((height, width))[axis] + 0.5) / extent
    pixels = center_crop(Image.fromarray(np.rint(coordinate * 250).astype(np.uint8)).convert("RGB"), 32)
    seen = pixels[..., 0] / 250
    taken = crop_map(coordinate, 32)
    pixel = max(1 / extent, min(width, height) / 32 / extent)  # the larger one of a source and a result pixel
    inner = (slice(2, -2), slice(2, -2))  # the bicubic filter bends at the border
    assert np.abs(seen - taken)[inner].max() <= 0.75 * pixel + 1 / 250
    assert abs((seen - taken)[inner].mean()) <= 0.3 * pixel + 1 / 250


@pytest.mark.parametrize("width, height", SIZES[:-1])
def test_crop_is_the_crop_of_the_painted_map_within_a_pixel(width, height):
    """Where the painted map's crop is nearly pure, the colour is that of the map's crop there or one pixel beside."""
    blocks = a_map(6, 6, seed=3, unlabelled=False)
    rows, columns = np.arange(height) * 6 // height, np.arange(width) * 6 // width
    semantic_map = blocks[rows[:, None], columns]
    pixels = center_crop(Image.fromarray(colour_map(semantic_map, TOWN.palette)), 32).astype(int)
    distances = np.abs(pixels[:, :, None] - np.array(TOWN.palette)).sum(-1)
    seen, pure = distances.argmin(-1), distances.min(-1) < 12
    taken = np.pad(crop_map(semantic_map, 32), 1, mode="edge")
    near = [taken[1 + y : 33 + y, 1 + x : 33 + x] == seen for y in (-1, 0, 1) for x in (-1, 0, 1)]
    assert pure.mean() > 0.3
    assert np.logical_or.reduce(near)[pure].all()
    assert (taken[1:-1, 1:-1] == seen)[pure].mean() > 0.98


CAMVID = Path(__file__).parents[3] / "shared" / "data" / "camvid.zip"


@pytest.mark.skipif(not CAMVID.is_file(), reason="the CamVid pack is not there")
def test_a_map_of_camvid():
    with zipfile.ZipFile(CAMVID) as archive:
        classes = MapClasses.parse(archive.read("classes.json"), "classes.json")
        semantic_map = read_map(archive.read("masks/train/0001TP_006690.png"), classes)
    assert len(classes) == 12 and classes.names[3] == "road"
    assert semantic_map.shape == (360, 480)
    assert np.unique(semantic_map).tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 11]
