from collections import Counter

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from latentflow.data.painting.mask_rules import MIXTURE, REACH, HoleKind, MaskRules
from latentflow.data.painting.masks import _kind, _packed, _random, check_masks, draw_mask, mask_files
from latentflow.errors import ConfigError, DataError

POLICIES = ["mixed", *MIXTURE]


def masks(policy: str, num: int, height: int = 64, width: int = 64, **options) -> list[np.ndarray]:
    rules = MaskRules(policy=policy, **options)
    return [draw_mask(rules, height, width, seed) for seed in range(num)]


def hole_kind(rules: MaskRules, seed: int) -> HoleKind:
    """The kind of hole that `draw_mask` draws for a seed; it does not depend on the size."""
    return _kind(rules, _random(seed))


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
        ConfigError, match=f"'{policy}' cover {low:.3g} to {high:.3g} .* never {least} to {most}; widen"
    ):
        MaskRules(policy=policy, least_share=least, most_share=most)


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
    with pytest.raises(DataError, match=r"9\.png is darker than half white, 77 to 77 of 255"):
        check_masks(MaskRules(folder=str(mask_folder)), 8, 8)


def test_a_given_mask_that_keeps_nothing_at_that_size_is_refused(tmp_path):
    mask = np.full((64, 64), 255, np.uint8)
    mask[::2] = 0
    Image.fromarray(mask).save(tmp_path / "stripes.png")
    with pytest.raises(DataError, match=r"stripes\.png covers the whole image at 8 x 8 pixels"):
        check_masks(MaskRules(folder=str(tmp_path)), 8, 8)


def test_what_a_mac_and_others_leave_next_to_masks_is_skipped(mask_folder):
    (mask_folder / "._0.png").write_bytes(b"\0\5\26\7")
    (mask_folder / ".DS_Store").write_bytes(b"\0")
    (mask_folder / "notes.txt").write_text("three lines")
    check_masks(MaskRules(folder=str(mask_folder)), 8, 8)
    assert [file.name for file in mask_files(mask_folder)] == ["0.png", "1.png", "2.png"]


def test_pictures_that_are_not_read_are_named(mask_folder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("latentflow.console._printed", set())
    (mask_folder / "a.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (mask_folder / "0.png").rename(mask_folder / "0")
    assert len(mask_files(mask_folder)) == 2
    (said,) = [record.message for record in caplog.records]
    assert said.startswith(f"{mask_folder}: some files are skipped: ")
    assert "1 .heic (" in said and "1 without suffix (rename them to end in .png)" in said
    only = tmp_path / "only"
    only.mkdir()
    (mask_folder / "a.heic").rename(only / "a.heic")
    with pytest.raises(DataError, match=r"no mask files in .*only, but 1 .heic \(.*\); put PNG masks there"):
        mask_files(only)


def test_masks_whose_names_a_mac_wrote(tmp_path):
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(tmp_path / "cafe\u0301.png")
    assert draw_mask(MaskRules(folder=str(tmp_path)), 8, 8, 0).sum() == 8


@pytest.mark.parametrize("suffix", ["jpg", "webp", "bmp", "TIF", "gif", "pgm", "jp2"])
def test_every_format_of_images_is_read_for_masks(tmp_path, suffix):
    (tmp_path / "below").mkdir()
    mask = np.zeros((64, 64), np.uint8)
    mask[16:32, 16:48] = 255
    Image.fromarray(mask).save(tmp_path / "below" / f"mask.{suffix}")
    assert np.array_equal(draw_mask(MaskRules(folder=str(tmp_path)), 64, 64, 0), mask > 0)


def test_many_large_masks_are_not_all_kept_in_memory(tmp_path):
    mask = np.zeros((1024, 1024), np.uint8)
    mask[:512] = 255
    Image.fromarray(mask).save(tmp_path / "0.png")
    kept = _packed(mask_files(tmp_path)[0], 1024, 1024)
    assert kept.nbytes * _packed.cache_info().maxsize <= 1 << 26
