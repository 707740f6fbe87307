"""Exact statements about counts, against textbook values and brute force."""

from __future__ import annotations

import itertools

import pytest

from latentflow.analysis.counts import chance_of_before, share_bounds


def test_bounds_are_those_of_clopper_and_pearson():
    # one-sided 97.5 % bounds are the two-sided 95 % interval: 8 of 20 give 0.1912 to 0.6395
    assert share_bounds(8, 20, 0.975) == pytest.approx((0.1912, 0.6395), abs=1e-4)
    assert share_bounds(0, 59) == pytest.approx((0.0, 1 - 0.05 ** (1 / 59)), abs=1e-9)
    assert share_bounds(59, 59) == pytest.approx((0.05 ** (1 / 59), 1.0), abs=1e-9)
    assert share_bounds(50, 5000)[1] == pytest.approx(0.0127, abs=2e-4)


@pytest.mark.parametrize(("count", "num", "rank", "others"), [(0, 3, 1, 4), (2, 3, 1, 4), (3, 3, 2, 4), (2, 4, 3, 3)])
def test_the_chance_is_the_share_of_orders(count, num, rank, others):
    def below(places: tuple[int, ...]) -> int:
        limit = [place for place in range(num + others) if place not in places][rank - 1]
        return sum(place < limit for place in places)

    orders = list(itertools.combinations(range(num + others), num))
    expected = sum(below(places) >= count for places in orders) / len(orders)
    assert chance_of_before(count, num, rank, others) == pytest.approx(expected)


def test_more_than_there_are_is_impossible():
    assert chance_of_before(4, 3, 1, 10) == 0.0
