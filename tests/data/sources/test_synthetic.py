import math
from collections import Counter

import numpy as np
import pytest

from latentflow.data.items import ImageSource
from latentflow.data.painting.semantic_maps import UNLABELLED_COLOUR, MapClasses, check_map
from latentflow.data.sources.images import open_images
from latentflow.data.sources.synthetic import (
    CLASS_NAMES,
    COLOURS,
    COLUMNS,
    MAP_CLASS_NAMES,
    SHAPES,
    SyntheticShapes,
    reach,
    signed_distance,
    unit_area,
)
from latentflow.errors import DataError


def equal(a, b) -> bool:
    same = a.label == b.label and a.name == b.name
    return same and np.array_equal(a.pixels, b.pixels) and np.array_equal(a.semantic_map, b.semantic_map)


def test_item_is_independent_of_count_and_of_the_order_of_access():
    forwards = list(SyntheticShapes(40))
    other = SyntheticShapes(1000)
    assert all(equal(other[i], forwards[i]) for i in reversed(range(40)))


def test_another_seed_draws_other_images():
    a, b = SyntheticShapes(24, seed=0), SyntheticShapes(24, seed=1)
    assert not any(np.array_equal(a[i].pixels, b[i].pixels) for i in range(24))
    assert [a.label(i) for i in range(24)] != [b.label(i) for i in range(24)]


@pytest.mark.parametrize("size", [8, 33, 64, 100])
def test_record_has_the_promised_shapes_and_ranges(size):
    source = SyntheticShapes(3, size)
    assert isinstance(source, ImageSource)
    assert len(source) == 3 and source.image_size == (size, size) and source.class_names == CLASS_NAMES
    item = source[2]
    assert item.pixels.shape == (size, size, 3) and item.pixels.dtype == np.uint8
    assert item.semantic_map.shape == (size, size) and item.semantic_map.dtype == np.uint8
    assert item.name == "synthetic/000002"


def test_name_needs_no_drawing():
    source = SyntheticShapes(30)
    assert [source.name(i) for i in range(30)] == [item.name for item in source]
    for index in (-1, 30):
        with pytest.raises(IndexError):
            source.name(index)


def test_maps_have_a_colour_for_each_class():
    source = SyntheticShapes(1)
    classes = MapClasses(source.map_class_names, source.map_palette)
    assert classes.names == MAP_CLASS_NAMES and UNLABELLED_COLOUR not in classes.palette
    item = source[0]
    check_map(item.semantic_map, classes, item.name)
    colours = np.array([*classes.palette, UNLABELLED_COLOUR])
    distances = np.abs(colours[:, None] - colours).sum(-1)
    assert distances[~np.eye(len(colours), dtype=bool)].min() > 100  # easy to distinguish


def test_every_run_of_twelve_holds_every_class_once_in_changing_order():
    source = SyntheticShapes(1200)
    blocks = [[source.label(i) for i in range(start, start + 12)] for start in range(0, 1200, 12)]
    assert all(sorted(block) == list(range(12)) for block in blocks)
    assert len({tuple(block) for block in blocks}) == 100
    counts = Counter(source.label(i) for i in range(1003))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_map_names_the_shape_of_the_label():
    source = SyntheticShapes(24)
    for item in source:
        shape = CLASS_NAMES[item.label].split()[1]
        assert set(np.unique(item.semantic_map)) == {0, MAP_CLASS_NAMES.index(shape)}
    assert len(CLASS_NAMES) == len(SHAPES) * len(COLOURS) == 12


def test_colour_of_the_shape_is_the_colour_of_the_label():
    channel = {"red": 0, "green": 1, "blue": 2}
    for item in SyntheticShapes(48):
        colour = CLASS_NAMES[item.label].split()[0]
        assert item.pixels[item.semantic_map > 0].mean(0).argmax() == channel[colour]


def test_shapes_are_large_and_stay_clear_of_the_border():
    for item in SyntheticShapes(120):
        inside = item.semantic_map > 0
        assert 0.05 < inside.mean() < 0.45
        assert not (inside[0].any() or inside[-1].any() or inside[:, 0].any() or inside[:, -1].any())


def test_another_image_size_draws_the_same_scene():
    small, large = SyntheticShapes(12, 32), SyntheticShapes(12, 128)
    for i in range(12):
        averaged = large[i].pixels.reshape(32, 4, 32, 4, 3).mean((1, 3))
        assert small[i].label == large[i].label
        assert np.abs(averaged - small[i].pixels).mean() < 2


def test_a_wide_image_has_more_ground_and_whole_shapes():
    """The shape is as large as in a square of the shorter side, and strays further along the longer one."""
    wide, square, middles = SyntheticShapes(24, "96x32"), SyntheticShapes(24, 32), []
    for item, other in zip(wide, square, strict=True):
        inside = item.semantic_map > 0
        assert item.pixels.shape == (32, 96, 3) and inside.shape == (32, 96)
        assert (item.label, set(np.unique(item.semantic_map))) == (other.label, set(np.unique(other.semantic_map)))
        assert inside.sum() == pytest.approx((other.semantic_map > 0).sum(), rel=0.1)
        assert not (inside[0].any() or inside[-1].any() or inside[:, 0].any() or inside[:, -1].any())
        middles.append(np.nonzero(inside)[1].mean())
    assert min(middles) < 32 < 64 < max(middles)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("angle", [0.0, 0.7])
def test_area_reach_and_centre_of_gravity_agree_with_the_distance_function(shape, angle):
    step = 0.005
    grid = np.arange(-2 + step / 2, 2, step)
    x, y = grid[None, :], grid[:, None]
    inside = signed_distance(shape, x, y, 1.0, angle) < 0
    assert inside.sum() * step**2 == pytest.approx(unit_area(shape), rel=5e-3)
    assert np.hypot(x, y)[inside].max() == pytest.approx(reach(shape), abs=2 * step)
    assert (inside * x).sum() / inside.sum() == pytest.approx(0, abs=step)
    assert (inside * y).sum() / inside.sum() == pytest.approx(0, abs=step)


def test_signed_distance_is_exact_across_an_edge():
    y = np.array([0.1, -0.02, 0.0, 0.03])
    assert signed_distance("circle", 1.0 + y, 0 * y, 1.0, 0.0) == pytest.approx(y)
    half = signed_distance("square", np.zeros(1), np.zeros(1), 1.0, 0.0)[0]
    turned = signed_distance("square", math.cos(0.4) * (y - half), math.sin(0.4) * (y - half), 1.0, 0.4)
    assert turned == pytest.approx(y)
    base = signed_distance("triangle", np.zeros(1), np.zeros(1), 1.0, 0.0)[0]
    assert signed_distance("triangle", 0 * y, y - base, 1.0, 0.0) == pytest.approx(y)


def test_fingerprint_depends_on_every_parameter():
    prints = {SyntheticShapes(*args).fingerprint() for args in [(5, 64, 0), (6, 64, 0), (5, 32, 0), (5, 64, 1)]}
    assert len(prints) == 4
    assert SyntheticShapes(5).fingerprint() == SyntheticShapes(5).fingerprint()


def test_bad_parameters_are_refused():
    with pytest.raises(DataError, match="at least 1 image, got count = 0"):
        SyntheticShapes(0)
    with pytest.raises(DataError, match="at least 8, got 4"):
        SyntheticShapes(1, 4)
    for index in (-1, 3):
        with pytest.raises(IndexError):
            SyntheticShapes(3)[index]


def test_columns_do_not_change_the_images():
    plain, named = SyntheticShapes(12, 32), SyntheticShapes(12, 32, columns=COLUMNS)
    for one, other in zip(plain, named, strict=True):
        assert np.array_equal(one.pixels, other.pixels)
    assert plain.fingerprint() != named.fingerprint()
    assert plain.description == "12 synthetic shapes at 32 x 32 (seed 0)"
    assert named.description == "12 synthetic shapes with shape, colour, traits, size, angle at 32 x 32 (seed 0)"


def test_columns_are_what_the_image_shows():
    """Area and centre of gravity of the drawn shape, measured on its map, follow from size and traits."""
    source = SyntheticShapes(48, 256, columns=COLUMNS)
    for index, item in enumerate(source):
        shape, colour, traits, size, angle = source.values(index)
        assert f"{list(COLOURS)[colour]} {SHAPES[shape]}" == CLASS_NAMES[item.label]
        rows, columns = np.nonzero(item.semantic_map)
        measured = math.sqrt(len(rows) / 256**2 / unit_area(SHAPES[shape]))
        assert 100 * measured == pytest.approx(size, abs=0.3)
        x, y = (columns.mean() + 0.5) / 256, (rows.mean() + 0.5) / 256
        for trait, holds, margin in ((0, x < 0.5, x - 0.5), (1, y < 0.5, y - 0.5), (2, measured > 0.3, measured - 0.3)):
            assert (trait in traits) == holds or abs(margin) < 0.005
        assert abs(angle) <= math.degrees(0.2)


def test_angles_are_those_of_the_edges():
    """The upper edge of a square, from its left to its right part, rises by the angle."""
    source, measured = SyntheticShapes(120, 256, columns=COLUMNS), []
    for index, item in enumerate(source):
        shape, _, _, size, angle = source.values(index)
        if SHAPES[shape] != "square":
            continue
        columns = np.nonzero(item.semantic_map.any(0))[0]
        middle, half = int(columns.mean()), int(size / 100 * 0.9 * 256 * 0.5)
        left, right = (int(np.argmax(item.semantic_map[:, middle + side * half] > 0)) for side in (-1, 1))
        measured.append((angle, math.degrees(math.atan2(right - left, 2 * half))))
    assert len(measured) == 30
    for angle, found in measured:
        assert found == pytest.approx(angle, abs=1.5)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("synthetic:5:0:all", ["shape", "colour", "traits", "size", "angle"]),
        ("synthetic:5:2:angle, size", ["angle", "size"]),
        ("synthetic:5", []),
    ],
)
def test_columns_are_chosen_in_the_name(text, names):
    source = open_images(text, 16)
    assert [column.name for column in source.columns] == names
    assert len(source.values(0)) == len(names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("synthetic:5:0:sise", "the synthetic shapes have no column 'sise'; did you mean 'size'?"),
        ("synthetic:5:0:size,size", "two columns are called 'size'"),
        ("synthetic:5:size", "write synthetic, synthetic:COUNT, synthetic:COUNT:SEED or synthetic:COUNT:SEED:size"),
        ("synthetic:5:0:size:0", "cannot understand 'synthetic:5:0:size:0'"),
    ],
)
def test_columns_that_there_are_not(text, message):
    with pytest.raises(DataError) as error:
        open_images(text, 16)
    assert message in str(error.value)
