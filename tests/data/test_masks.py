import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from latentflow.data.masks import MIXTURE, REACH, MaskRules, check_masks, draw_mask, hole_kind, read_mask
from latentflow.errors import ConfigError, DataError

POLICIES = ["mixed", *MIXTURE]


def masks(policy: str, num: int, height: int = 64, width: int = 64, **options) -> list[np.ndarray]:
    rules = MaskRules(policy=policy, **options)
    return [draw_mask(rules, height, width, seed) for seed in range(num)]


def rectangle(part: np.ndarray) -> tuple[int, int, int, int] | None:
    """Top, bottom, left and right of the ones in `part`, if they fill a rectangle."""
    rows, columns = np.nonzero(part.any(1))[0], np.nonzero(part.any(0))[0]
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    return (top, bottom, left, right) if part[top:bottom, left:right].all() else None


def open_with(element: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The union of all places of `element` that lie in `mask`: a morphological opening, by brute force."""
    rows, columns = element.shape
    windows = np.lib.stride_tricks.sliding_window_view(mask, element.shape)
    opened = np.zeros_like(mask)
    for top, left in np.argwhere((windows >= element).all((-1, -2))):
        opened[top : top + rows, left : left + columns] |= element
    return opened


# Drawing


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 100), (100, 31), (8, 8)])
def test_masks_are_binary_and_within_the_shares(policy, height, width):
    for mask in masks(policy, 60, height, width):
        assert mask.shape == (height, width) and mask.dtype == np.uint8
        assert set(np.unique(mask)) == {0, 1}
        assert 0.05 <= mask.mean() <= 0.75


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("least", "most"), [(0.34, 0.4), (0.55, 0.65), (0.3, 0.7)])
def test_other_shares_are_met(policy, least, most):
    kinds = set()
    for seed, mask in enumerate(masks(policy, 25, least_share=least, most_share=most)):
        assert least <= mask.mean() <= most
        kinds.add(hole_kind(MaskRules(policy=policy, least_share=least, most_share=most), seed))
    assert kinds == ({policy} if policy != "mixed" else set(MIXTURE))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("height", "width"), [(2, 2), (2, 3), (3, 2), (2, 64), (5, 4)])
def test_tiny_masks_are_neither_empty_nor_full(policy, height, width):
    for mask in masks(policy, 20, height, width) + masks(policy, 20, height, width, least_share=0, most_share=1):
        assert mask.shape == (height, width) and set(np.unique(mask)) == {0, 1}


@pytest.mark.parametrize("policy", ["strokes", "boxes"])
@pytest.mark.parametrize(
    ("least", "most", "expected"), [(0.2501, 0.2502, 0.25), (0.8001, 0.8002, 0.8), (0, 1e-9, 1 / 1024)]
)
def test_shares_that_no_drawing_meets_give_a_box_in_the_middle(policy, least, most, expected):
    for mask in masks(policy, 3, 32, 32, least_share=least, most_share=most):
        top, bottom, left, right = rectangle(mask)
        assert abs(mask.mean() - expected) <= 0.5 / 32
        assert abs(top - (32 - bottom)) <= 1 and abs(left - (32 - right)) <= 1


def test_unreachable_fullness_still_leaves_a_pixel():
    for mask in masks("strokes", 3, 4, 4, least_share=0.98, most_share=1):
        assert mask.sum() == 12  # three of four columns


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 64), (64, 1), (0, 5), (-3, 5)])
def test_sides_below_two_pixels_are_refused(height, width):
    with pytest.raises(DataError, match=rf"a mask of {width} x {height} pixels .* at least 2 x 2"):
        draw_mask(MaskRules(), height, width, 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_one_seed_one_mask(policy):
    assert all(map(np.array_equal, masks(policy, 10), masks(policy, 10)))
    mask = draw_mask(MaskRules(policy=policy), 64, 64, 3)
    mask[:] = 7  # belongs to the caller
    assert np.array_equal(draw_mask(MaskRules(policy=policy), 64, 64, 3), masks(policy, 4)[3])
    assert draw_mask(MaskRules(policy=policy), 64, 64, 2**63 - 1).any()


@pytest.mark.parametrize(
    ("policy", "least_different"), [("mixed", 80), ("strokes", 100), ("boxes", 100), ("borders", 90)]
)
def test_other_seeds_other_masks(policy, least_different):
    assert len({mask.tobytes() for mask in masks(policy, 100)}) >= least_different


@pytest.mark.parametrize("policy", POLICIES)
def test_another_size_shows_the_same_scene(policy):
    differences = []
    for large, small in zip(masks(policy, 60, 128, 192), masks(policy, 60, 32, 48), strict=True):
        differences.append(np.abs(large.reshape(32, 4, 48, 4).mean((1, 3)) - small).mean())
    assert np.median(differences) < 0.05  # unrelated masks differ by 0.3 and more


# Kinds of holes


def test_halves_are_one_straight_cut():
    sides, exact = Counter(), 0
    for mask in masks("halves", 400, 60, 90):
        top, bottom, left, right = rectangle(mask)
        sides[(top > 0, bottom < 60, left > 0, right < 90)] += 1
        assert 1 / 3 - 0.01 <= mask.mean() <= 2 / 3 + 0.01
        exact += mask.mean() == 0.5
    assert set(sides) == {tuple(i == cut for i in range(4)) for cut in range(4)}
    assert min(sides.values()) > 60  # 100 each are expected, with a deviation of 9
    assert 180 < exact < 250  # every other one, and 1 in 20 or 30 of the others by chance


def test_borders_leave_a_rectangle_known():
    num_sides = Counter()
    sides_seen = set()
    for mask in masks("borders", 400):
        top, bottom, left, right = rectangle(1 - mask)
        sides = (top > 0, bottom < 64, left > 0, right < 64)
        sides_seen.add(sides)
        num_sides[sum(sides)] += 1
        assert 1 / 8 - 0.02 <= mask.mean() <= 3 / 4
    assert len(sides_seen) == 15  # every set of sides but the empty one
    assert 170 < num_sides[4] < 260  # 1/2 + 1/30 of 400 are 213, with a deviation of 10


def test_boxes_are_unions_of_rectangles_off_the_edge():
    smallest = np.ones((6, 6), np.uint8)  # 30 of 256 pixels are 7.5 of 64, less what rounding takes
    single = 0
    for mask in masks("boxes", 60):
        assert not mask[[0, 1, -1, -2]].any() and not mask[:, [0, 1, -1, -2]].any()  # 10 of 256 pixels are 2.5 of 64
        assert np.array_equal(open_with(smallest, mask), mask)
        box = rectangle(mask)
        single += box is not None
        if box is not None and mask.sum() <= 38 * 38:
            assert box[1] - box[0] >= 6 and box[3] - box[2] >= 6
    assert 5 < single < 50


def test_boxes_obey_their_longest_side():
    for mask in masks("boxes", 30, 100, 200, least_share=0, largest_box=0.1):
        assert 0.0004 <= mask.mean() <= 4 * 0.1**2 + 0.002
    assert max(mask.mean() for mask in masks("boxes", 30, largest_box=0.9)) > 0.6


def test_strokes_are_thick_lines():
    y, x = np.mgrid[-2:3, -2:3]
    brush = (np.hypot(x, y) < 2.5).astype(np.uint8)  # a disc of 5 pixels
    kept = [open_with(brush, mask).sum() / mask.sum() for mask in masks("strokes", 40)]
    assert np.mean(kept) > 0.9 and np.median(kept) > 0.97  # confetti of less than 5 pixels would not be kept

    # They are no boxes: only what runs along an edge can be a rectangle.
    assert sum(rectangle(mask) is not None for mask in masks("strokes", 100)) < 5


def test_strokes_obey_their_width():
    brush = np.ones((8, 8), np.uint8)
    thin = masks("strokes", 20, widest_stroke=0.05, least_share=0, most_share=0.15)  # 3.2 pixels
    assert sum(open_with(brush, mask).sum() for mask in thin) < 0.1 * sum(mask.sum() for mask in thin)
    assert np.mean([mask.mean() for mask in thin]) < np.mean([mask.mean() for mask in masks("strokes", 20)]) / 2


@pytest.mark.parametrize(
    ("policy", "options"), [("boxes", {"largest_box": 0.05}), ("strokes", {"widest_stroke": 0.02})]
)
def test_small_pieces_are_added_until_the_least_share(policy, options):
    for mask in masks(policy, 30, 128, 128, least_share=0.1, **options):
        assert 0.1 <= mask.mean() < 0.2
        assert rectangle(mask) is None  # not the box in the middle


def test_mixture_has_its_weights():
    num, rules = 20_000, MaskRules()
    counts = Counter(hole_kind(rules, seed) for seed in range(num))
    assert sum(MIXTURE.values()) == pytest.approx(1) and set(counts) == set(MIXTURE)
    chi_square = sum((counts[kind] - num * share) ** 2 / (num * share) for kind, share in MIXTURE.items())
    assert chi_square < 16.3  # 3 degrees of freedom: exceeded once in a thousand sets of seeds


def test_mixed_mask_is_the_mask_of_its_kind():
    kinds = Counter()
    for seed, mask in enumerate(masks("mixed", 60)):
        kind = hole_kind(MaskRules(), seed)
        assert np.array_equal(mask, draw_mask(MaskRules(policy=kind), 64, 64, seed))
        kinds[kind] += 1
    assert set(kinds) == set(MIXTURE)


def test_mixture_leaves_out_what_the_shares_rule_out():
    num = 4000
    counts = Counter(hole_kind(MaskRules(most_share=0.3), seed) for seed in range(num))
    assert set(counts) == {"strokes", "boxes", "borders"}
    assert abs(counts["borders"] / num - 0.1 / 0.9) < 0.02
    assert {hole_kind(MaskRules(least_share=0.9, most_share=1), seed) for seed in range(50)} == {"strokes"}


# Rules


def test_rules_survive_json_and_are_frozen():
    rules = MaskRules(policy="boxes", most_share=0.5)
    assert MaskRules.model_validate_json(rules.model_dump_json()) == rules
    with pytest.raises(ValidationError, match="frozen"):
        rules.policy = "strokes"


def test_every_option_is_described():
    descriptions = {name: field.description for name, field in MaskRules.model_fields.items()}
    assert all(descriptions.values())
    assert all(f"{kind}: " in descriptions["policy"] for kind in POLICIES)
    assert "40% strokes, 40% boxes, 10% halves, 10% borders" in descriptions["policy"]


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "stroke"},
        {"shares": 0.5},
        {"least_share": -0.1},
        {"most_share": 1.1},
        {"most_share": float("nan")},
        {"widest_stroke": 0.0},
        {"largest_box": 0.99},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        MaskRules(**options)


@pytest.mark.parametrize(("least", "most"), [(0.5, 0.5), (0.6, 0.3)])
def test_least_share_must_be_below_most_share(least, most):
    with pytest.raises(ConfigError, match=f"least_share {least} is not below most_share {most}"):
        MaskRules(least_share=least, most_share=most)


@pytest.mark.parametrize(
    ("policy", "least", "most"), [("halves", 0.05, 0.3), ("borders", 0.8, 0.9), ("boxes", 0.86, 0.9)]
)
def test_shares_out_of_reach_of_a_policy_are_refused(policy, least, most):
    low, high = REACH[policy]
    with pytest.raises(
        ConfigError, match=f"'{policy}' paint {low:.3g} to {high:.3g} .* never {least} to {most}; widen"
    ):
        MaskRules(policy=policy, least_share=least, most_share=most)


# Files

HOLE = np.zeros((6, 10), np.uint8)
HOLE[1:4, 2:9] = 1


def save(path: Path, image: Image.Image | np.ndarray, **options) -> Path:
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def palette(colours: list[int], **info) -> Image.Image:
    image = Image.fromarray(HOLE).convert("P")
    image.putdata(HOLE.ravel().tolist())
    image.putpalette(colours)
    image.info.update(info)
    return image


ACCEPTED = {
    "1 bit": Image.fromarray(HOLE.astype(bool)),
    "gray": Image.fromarray(HOLE * 255),
    "gray 0 and 1": Image.fromarray(HOLE),
    "16 bits": Image.fromarray(HOLE.astype(np.uint16) * 65535),
    "16 bits, 0 and 255": Image.fromarray(HOLE.astype(np.uint16) * 255),
    "16 bits, 0 and 1": Image.fromarray(HOLE.astype(np.uint16)),
    "palette": palette([0, 0, 0, 255, 255, 255]),
    "palette, white first": palette([255, 255, 255, 0, 0, 0]),
    "palette with an opaque entry": palette([0, 0, 0, 255, 255, 255], transparency=b"\xff\xff"),
    "RGB": Image.fromarray(HOLE * 255).convert("RGB"),
    "RGB 0 and 1": Image.fromarray(HOLE).convert("RGB"),
    "RGBA": Image.fromarray(HOLE * 255).convert("RGBA"),
    "gray with alpha": Image.fromarray(HOLE * 255).convert("LA"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_black_and_white_is_read_in_any_mode(tmp_path, name):
    expected = 1 - HOLE if "white first" in name else HOLE
    path = save(tmp_path / "mask.png", ACCEPTED[name])
    for file in (path, str(path), ACCEPTED[name], Image.open(path)):
        mask = read_mask(file, (6, 10))
        assert mask.dtype == np.uint8 and np.array_equal(mask, expected)
    mask[:] = 0  # writable


@pytest.mark.parametrize("values", [HOLE.astype(np.float32), HOLE * np.float32(255), HOLE.astype(np.int32) * 65535])
def test_deep_tiffs_are_read(tmp_path, values):
    assert np.array_equal(read_mask(save(tmp_path / "mask.tiff", values)), HOLE)


def test_drawn_masks_survive_a_file(tmp_path):
    for seed, mask in enumerate(masks("mixed", 5, 40, 24)):
        path = save(tmp_path / f"{seed}.png", mask * 255)
        assert np.array_equal(read_mask(path, mask.shape), mask)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    path = save(tmp_path / "mask.png", HOLE * 255, exif=exif)
    assert np.array_equal(read_mask(path, (10, 6)), np.rot90(HOLE, -1))


def refusal(file, size: tuple[int, int] | None = None) -> str:
    """The message with which a mask is refused, on one line."""
    with pytest.raises(DataError) as caught:
        read_mask(file, size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_files_and_folders_are_named(tmp_path):
    path = tmp_path / "none.png"
    assert refusal(path) == f"cannot read the mask {path}: No such file or directory; give a whole PNG file"
    assert refusal(tmp_path).startswith(f"cannot read the mask {tmp_path}: ")


def test_files_that_are_no_images_are_refused(tmp_path):
    path = tmp_path / "mask.png"
    path.write_text("no image")
    reason = "its content is no image that Pillow can read"
    assert refusal(path) == f"cannot read the mask {path}: {reason}; give a whole PNG file"
    path.write_bytes(b"")
    assert refusal(path) == f"cannot read the mask {path}: it is empty (0 bytes); give a whole PNG file"


def test_truncated_files_are_refused(tmp_path):
    path = save(tmp_path / "mask.png", np.random.default_rng(0).integers(0, 2, (64, 64), np.uint8) * 255)
    path.write_bytes(path.read_bytes()[: os.path.getsize(path) // 2])  # noqa: PTH202
    assert re.fullmatch(rf"cannot read the mask {path}: .*truncated.*; give a whole PNG file", refusal(path))


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    path = save(tmp_path / "mask.png", HOLE * 255)
    monkeypatch.setenv("LATENTFLOW_MAX_PIXELS", "59")
    assert "its 60 pixels are more than 59; make it smaller, or allow more with LATENTFLOW" in refusal(path)


def test_images_without_pixels_are_refused():
    assert refusal(Image.new("L", (0, 4))) == "cannot read the mask in memory: it has no pixels; give a whole PNG file"


def test_other_sizes_are_refused_with_a_remedy_that_works(tmp_path):
    path = save(tmp_path / "mask.png", HOLE * 255)
    message = refusal(path, (12, 20))
    assert message.startswith(f"the mask {path} is 10 x 6 pixels (width x height), its image 20 x 12: resize")
    remedy = re.search(r"in Pillow (mask\..*\))$", message)[1]
    resized = eval(remedy, {"mask": Image.open(path), "Image": Image})
    assert np.array_equal(read_mask(resized, (12, 20)), HOLE.repeat(2, 0).repeat(2, 1))
    assert "is 10 x 6 pixels" in refusal(path, (10, 6))  # height and width swapped


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_gray_pixels_are_refused_with_a_remedy_that_works(tmp_path, mode):
    values = HOLE * 255
    values[0, 0], values[1, 2] = 37, 254
    path = save(tmp_path / "mask.png", Image.fromarray(values).convert(mode))
    message = refusal(path)
    assert message.startswith(
        f"the mask {path} has 2 gray pixels, such as 37, but a mask is black (0, known) and white"
    )
    assert "white (255, painted anew): threshold it at 128" in message and "save it as PNG" in message
    remedy = re.search(r"in Pillow (mask\..*\)\)), and", message)[1]
    assert np.array_equal(read_mask(eval(remedy, {"mask": Image.open(path)})), HOLE)


def test_jpeg_masks_are_pointed_to_png(tmp_path):
    path = save(tmp_path / "mask.jpg", HOLE * 255)
    assert re.search(r"has \d+ gray pixels, such as \d+, .* save it as PNG, since JPEG", refusal(path))


@pytest.mark.parametrize(
    ("values", "num", "example"),
    [
        (HOLE * 255 + (1 - HOLE), 39, "1"),  # 1 and 255: neither is black
        (HOLE * 2, 21, "2"),
        (HOLE.astype(np.uint16) * 40000, 21, "40000"),
        (HOLE.astype(np.float32) * 0.5, 21, "0.5"),
        (np.where(HOLE, np.float32("nan"), np.float32(0)), 21, "nan"),
        (HOLE.astype(np.int32) * 2 - 1, 39, "-1"),
    ],
)
def test_gray_is_what_is_neither_black_nor_white(values, num, example):
    assert f"the mask in memory has {num} gray pixels, such as {example}, but" in refusal(Image.fromarray(values))


def test_deep_gray_has_its_own_threshold():
    assert "white (65535, painted anew): threshold it at 32768" in refusal(
        Image.fromarray(HOLE.astype(np.uint16) * 300)
    )


def test_coloured_masks_are_refused(tmp_path):
    path = save(tmp_path / "mask.png", palette([0, 0, 0, 128, 0, 0]))
    message = refusal(path)
    assert message.startswith(f"the mask {path} has 21 coloured pixels, such as RGB (128, 0, 0), but a mask is black")
    assert "threshold it at 128" in message


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("alpha", [0, 254])
def test_transparency_is_ambiguous(tmp_path, mode, alpha):
    image = Image.fromarray(HOLE * 255).convert(mode)
    opacity = Image.new("L", image.size, 255)
    opacity.putpixel((0, 0), alpha)
    image.putalpha(opacity)
    path = save(tmp_path / "mask.png", image)
    assert refusal(path).startswith(
        f"the mask {path} has transparent pixels, which may mean known or painted anew: save"
    )


@pytest.mark.parametrize("image", [palette([0, 0, 0, 255, 255, 255]), ACCEPTED["gray"], ACCEPTED["16 bits"]])
def test_a_transparent_colour_is_ambiguous(tmp_path, image):
    path = save(tmp_path / "mask.png", image, transparency=0)
    assert "has transparent pixels" in refusal(path)


def test_masks_with_nothing_to_paint_are_refused(tmp_path):
    path = save(tmp_path / "mask.png", HOLE * 0)
    assert refusal(path) == (
        f"the mask {path} is all black, nothing is painted anew: make white what is to be painted anew"
    )


@pytest.mark.parametrize("white", [1, 255])
def test_masks_that_keep_nothing_are_refused(tmp_path, white):
    path = save(tmp_path / "mask.png", np.full((6, 10), white, np.uint8))
    message = refusal(path)
    assert message.startswith(f"the mask {path} is all white, nothing of the image is kept: make black")
    assert message.endswith("latentflow sample")


# Given holes


@pytest.fixture
def mask_folder(tmp_path):
    folder = tmp_path / "holes"
    folder.mkdir()
    for number in range(3):
        mask = np.zeros((20, 30), np.uint8)
        mask[number * 5, :] = 255  # one thin line each
        Image.fromarray(mask).save(folder / f"{number}.png")
    return folder


def test_given_masks_are_chosen_by_seed_and_stretched_without_losing_a_line(mask_folder):
    rules = MaskRules(folder=str(mask_folder))
    check_masks(rules, 8, 8)
    drawn = [draw_mask(rules, 8, 8, seed) for seed in range(30)]
    rows = [tuple(np.flatnonzero(mask.any(1)).tolist()) for mask in drawn]
    assert set(rows) == {(0,), (2,), (4,)}  # pixels 0, 5 and 10 of 20 rows, each within one of 8
    assert all(mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 1} for mask in drawn)
    assert all(np.array_equal(mask, draw_mask(rules, 8, 8, seed)) for seed, mask in enumerate(drawn))


def test_a_folder_without_masks_or_with_a_bad_one_is_refused_before_it_is_used(mask_folder, tmp_path):
    with pytest.raises(DataError, match=r"no mask files in .*nowhere"):
        check_masks(MaskRules(folder=str(tmp_path / "nowhere")), 8, 8)
    Image.fromarray(np.full((20, 30), 77, np.uint8)).save(mask_folder / "9.png")
    with pytest.raises(DataError, match=r"9\.png has 600 gray pixels"):
        check_masks(MaskRules(folder=str(mask_folder)), 8, 8)


def test_a_given_mask_that_keeps_nothing_at_that_size_is_refused(tmp_path):
    mask = np.full((64, 64), 255, np.uint8)
    mask[::2] = 0
    Image.fromarray(mask).save(tmp_path / "stripes.png")
    with pytest.raises(DataError, match=r"stripes\.png keeps nothing of an image of 8 x 8 pixels"):
        check_masks(MaskRules(folder=str(tmp_path)), 8, 8)
