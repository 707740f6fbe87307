"""Which images are held out: by names alone, as many as asked for, and never the last one of a class."""

import numpy as np
import pytest

from latentflow.data.hold_out import HeldOut, count_held_out, hold_out
from latentflow.errors import DataError

NAMES = [f"cat/{number}.png" for number in range(1000)]


@pytest.mark.parametrize(
    ("num_images", "share", "number"),
    [
        *((0, "auto", 0), (79, "auto", 0), (80, "auto", 8), (100, "auto", 10), (639, "auto", 63)),
        *((640, "auto", 64), (1280, "auto", 64), (2000, "auto", 100), (10**6, "auto", 10_000)),
        *((100, 0.0, 0), (100, 0.2, 20), (18, 0.25, 4), (3, 0.01, 1), (1, 0.5, 0), (0, 0.5, 0)),
    ],
)
def test_how_many(num_images, share, number):
    assert count_held_out(num_images, share) == number


def test_the_choice_is_that_of_the_names():
    rule = hold_out(NAMES, 0.1)
    chosen = [NAMES[place] for place in rule.rows(NAMES)]
    assert len(chosen) == rule.num_images == 100
    backwards = NAMES[::-1]
    assert hold_out(backwards, 0.1) == rule
    assert {backwards[place] for place in rule.rows(backwards)} == set(chosen)
    assert rule.rows(chosen) == list(range(100))
    assert rule.rows([]) == []
    assert HeldOut.model_validate_json(rule.model_dump_json()) == rule


def test_more_images_change_it_little():
    """Of twice as many, those that were held out before still are, but for chance."""
    more = NAMES + [f"dog/{number}.png" for number in range(1000)]
    before, after = set(hold_out(NAMES, 0.1).rows(NAMES)), set(hold_out(more, 0.1).rows(more))
    assert len(before & after) > 90


def test_they_are_spread_over_the_names():
    """Hashes are uniform: each tenth of a list has about a tenth of them (a deviation is 3)."""
    places = np.array(hold_out(NAMES, 0.1).rows(NAMES))
    counts = np.histogram(places, 10, (0, 1000))[0]
    assert counts.max() < 25 and counts.min() > 1


def test_each_class_keeps_an_image():
    """Half of pairs: in a quarter of the classes both hashes are among the smaller half."""
    labels = [number // 2 for number in range(1000)]
    rule = hold_out(NAMES, 0.5, labels)
    held_out = set(rule.rows(NAMES))
    assert len(held_out) == rule.num_images == 500
    assert {label for number, label in enumerate(labels) if number not in held_out} == set(range(500))
    assert rule.spared
    assert len(hold_out(NAMES, 0.5).rows(NAMES)) == 500


def test_without_a_second_image_of_any_class():
    assert hold_out(NAMES, "auto", range(1000)) is None
    with pytest.raises(DataError, match=r"data.held_out = 0.1, but each of the 1000 images is the only one"):
        hold_out(NAMES, 0.1, range(1000))


def test_all_but_one():
    assert hold_out(NAMES[:2], 0.5).rows(NAMES[:2]) in ([0], [1])
    assert hold_out(NAMES[:1], 0.5) is None


def test_a_known_hash():
    """The same on every machine and in every version: a run must find its held-out images again."""
    names = ["a.png", "b.png", "c.png", "d.png"]
    assert hold_out(names, 0.5).rows(names) == [1, 3]
