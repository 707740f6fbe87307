import json
import re

import numpy as np
import pytest
from PIL import Image

from latentflow.data.items import UNLABELLED
from latentflow.data.painting.semantic_maps import UNLABELLED_COLOUR, MapClasses, check_map, colour_map, default_palette
from latentflow.data.pictures.crop import center_crop, crop_map
from latentflow.errors import DataError

TOWN = MapClasses(("sky", "road", "tree", "car"), ((128, 128, 128), (128, 64, 128), (128, 128, 0), (64, 0, 128)))


def a_map(height: int = 9, width: int = 7, seed: int = 0, unlabelled: bool = True) -> np.ndarray:
    semantic_map = np.random.default_rng(seed).integers(0, len(TOWN), (height, width), np.uint8)
    if unlabelled:
        semantic_map[2, 3] = UNLABELLED
    return semantic_map


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
            r"classes.json: \[1, 2\] is not a colour; write \[red, gr",
        ),
        ('{"names": ["a"], "palette": [[1, 2, 256]]}', r"\[1, 2, 256\] is not a colour"),
        ('{"names": ["a"], "palette": [[1, 2, true]]}', r"\[1, 2, true\] is not a colour"),
        ('{"names": ["a"], "palette": ["red"]}', r'"red" is not a colour'),
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
    """An image whose colour is its own coordinate, in percent of its extent, shows where each pixel comes from."""
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
    """Where the painted map's crop is nearly pure, the colour is that of the map's crop there or one pixel away."""
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
