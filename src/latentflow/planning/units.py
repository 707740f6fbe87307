"""Bytes and seconds in the unit that suits them."""

from __future__ import annotations

from latentflow.progress import duration


def gib(num_bytes: float) -> str:
    """Bytes, up to GiB: "3 KiB", "6.0 GiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} GiB"


def duration_of(seconds: float) -> str:
    """A length of time from milliseconds to days; see `duration`."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s" if seconds < 90 else duration(seconds)
