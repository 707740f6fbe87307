"""How pages write numbers."""

from __future__ import annotations

import math


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits: 0.0123, 12.3, 12,346, 1.2e-04; "" for None and NaN.

    Whole thousands keep all their digits. What is below 0.001, or has more than two digits beyond the significant ones,
    is written with an exponent.
    """
    if value is None or math.isnan(value):
        return ""
    if math.isinf(value):
        return "beyond 1e308"
    if value and not 1e-3 <= abs(value) < 10 ** (digits + 2):
        return f"{value:.{max(digits - 2, 1)}e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def percent(share: float) -> str:
    """A share in [0, 1] as a percentage with one decimal, which is left out where it is 0."""
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def whole(value: float) -> str:
    """A whole number, rounded if need be, with its thousands separated."""
    return f"{value:,.0f}"
