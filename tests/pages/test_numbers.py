import math

import pytest

from latentflow.pages.numbers import number, percent, whole


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0, 3, "0"),
        (1.5, 3, "1.5"),
        (3.14159, 3, "3.14"),
        (-0.05, 3, "-0.05"),
        (0.001, 3, "0.001"),
        (1e-4, 3, "1.0e-04"),
        (5.2e-4, 2, "5.2e-04"),
        (1234.5, 3, "1,234"),
        (99999, 3, "99,999"),
        (1e6, 3, "1.0e+06"),
        (300_000, 4, "300,000"),
        (0.12345, 4, "0.1235"),
        (math.inf, 3, "beyond 1e308"),
        (math.nan, 3, ""),
        (None, 3, ""),
    ],
)
def test_numbers_have_significant_digits(value, digits, text):
    assert number(value, digits) == text


@pytest.mark.parametrize(("share", "text"), [(0, "0 %"), (1, "100 %"), (0.915, "91.5 %"), (1 / 3, "33.3 %")])
def test_percentages_have_one_decimal(share, text):
    assert percent(share) == text


def test_whole_numbers_have_separated_thousands():
    assert (whole(256_000), whole(12.6), whole(0)) == ("256,000", "13", "0")
