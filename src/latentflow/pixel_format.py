"""What the stored values of pixels are, and how they become [-1, 1] and back.

A value v of a channel with the range low to high, and its place u in [-1, 1]:

    u = (v - low) / ((high - low) / 2) - 1            v = (u + 1) * (high - low) / 2 + low

Values outside the range are clipped. Integers come back rounded: exactly what went in, where their range has at most
2^22 levels.

Arrays have their channels last ([H, W, C] or [n, H, W, C]), tensors before height and width ([C, H, W] or
[B, C, H, W]).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field, model_validator

from latentflow.records import Record

if TYPE_CHECKING:  # neither numpy nor torch is imported for `latentflow --help`
    import numpy as np
    from torch import Tensor

    Values = TypeVar("Values", np.ndarray, Tensor)

PixelDtype = Literal["uint8", "uint16", "float32"]
PixelMode = Literal["gray", "gray-alpha", "rgb", "rgba", "bands"]

FULL_RANGE: dict[str, tuple[float, float]] = {"uint8": (0, 255), "uint16": (0, 65535), "float32": (0, 1)}
"""Lowest and highest value of each dtype: of floating-point numbers, black and white by convention."""

_CHANNELS = {"gray": 1, "gray-alpha": 2, "rgb": 3, "rgba": 4}
_BYTES = {"uint8": 1, "uint16": 2, "float32": 4}
_DEPTHS = {"uint8": "8-bit", "uint16": "16-bit", "float32": "floating-point"}
MOST_CHANNELS = 256


class PixelFormat(Record):
    """The stored values of a set of pictures. The default is 8-bit RGB, of which 0 is black and 255 white.

    Raises:
        ValueError: mode and channels contradict each other, or a range is empty.
    """

    channels: int = Field(default=3, ge=1, le=MOST_CHANNELS)
    dtype: PixelDtype = "uint8"
    low: list[float] = Field(default=[], description="What becomes -1: a number for each channel, or one for all.")
    high: list[float] = Field(default=[], description="What becomes 1: a number for each channel, or one for all.")
    rule: str = Field(default="full range", max_length=200, description="How low and high were chosen.")
    mode: PixelMode = Field(
        default="rgb", description="What the channels are: colours are sRGB; bands are numbers without a colour."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        filled = dict(given)
        if "mode" not in filled:
            filled["mode"] = {1: "gray", 3: "rgb"}.get(filled.get("channels", 3), "bands")
        filled.setdefault("channels", _CHANNELS.get(filled["mode"], 3))
        for name, value in zip(("low", "high"), FULL_RANGE.get(filled.get("dtype", "uint8"), (0, 1)), strict=True):
            if not filled.get(name):
                filled[name] = [value]
        return filled

    @model_validator(mode="after")
    def _check(self) -> PixelFormat:
        wanted = _CHANNELS.get(self.mode, self.channels)
        if self.channels != wanted:
            raise ValueError(f"mode {self.mode} has {wanted} channels, not {self.channels}")
        for name, values in (("low", self.low), ("high", self.high)):
            if len(values) not in (1, self.channels):
                raise ValueError(f"{name} has {len(values)} numbers for {self.channels} channels; give 1 or as many")
        if len(self.low) != len(self.high):
            raise ValueError(f"low has {len(self.low)} numbers and high {len(self.high)}; give as many of each")
        if any(high <= low for low, high in zip(self.low, self.high, strict=True)):
            raise ValueError(f"low {self.low} is not below high {self.high}")
        return self

    @property
    def is_full_range(self) -> bool:
        """Whether no integer of the dtype lies outside low to high."""
        low, high = FULL_RANGE[self.dtype]
        return self.dtype != "float32" and max(self.low) <= low and min(self.high) >= high

    @property
    def has_alpha(self) -> bool:
        """Whether the last channel is opacity."""
        return self.mode in ("gray-alpha", "rgba")

    @property
    def bytes_per_pixel(self) -> int:
        """Memory of one pixel."""
        return self.channels * _BYTES[self.dtype]

    @property
    def title(self) -> str:
        """For people: "8-bit rgb", "16-bit gray, 0 to 4095 (given)"."""
        what = f"{self.channels} bands" if self.mode == "bands" else self.mode
        name = f"{_DEPTHS[self.dtype]} {what}"
        if self.is_full_range:
            return name
        spans = [f"{low:.6g} to {high:.6g}" for low, high in zip(self.low, self.high, strict=True)]
        return f"{name}, {'; '.join(spans)} ({self.rule})"

    def to_unit(self, values: Values) -> Values:
        """Stored values, array or tensor => float32 in [-1, 1], clipped; see the module for where the channels are."""
        low, half = self._spans(values)
        unit = (_as_float(values) - low) / half - 1.0
        return unit if self.is_full_range else unit.clip(-1, 1)

    def from_unit(self, unit: Values) -> Values:
        """The inverse of `to_unit`: float in [-1, 1] => values of `dtype`; integers are rounded and clipped."""
        low, half = self._spans(unit)
        values = (unit + 1.0) * half + low
        if self.dtype == "float32":
            return _as_float(values)
        return _as_type(values.round().clip(*FULL_RANGE[self.dtype]), self.dtype)

    def stored(self, numbers: np.ndarray) -> np.ndarray:
        """Numbers that were computed from stored values, as stored values again: integers are rounded and clipped."""
        if self.dtype != "float32":
            numbers = numbers.clip(*FULL_RANGE[self.dtype]).round()
        return _as_type(numbers, self.dtype)

    def share_outside(self, values: np.ndarray) -> float:
        """Share of stored values [..., C] that `to_unit` clips, in [0, 1]."""
        if self.is_full_range:
            return 0.0
        return float(((values < self.low) | (values > self.high)).mean())

    def _spans(self, values: Any) -> tuple[Any, Any]:
        """Low, and half the distance to high: numbers if they are the same for all channels, else a row for each."""
        halves = [(high - low) / 2 for low, high in zip(self.low, self.high, strict=True)]
        if len(halves) == 1:
            return self.low[0], halves[0]
        if _is_array(values):
            import numpy as np

            return np.float32(self.low), np.float32(halves)
        from latentflow.shapes import constant_channels

        return constant_channels(self.low, values.device), constant_channels(halves, values.device)


RGB = PixelFormat()
"""8-bit RGB, the format of what is shown."""


def _is_array(values: Any) -> bool:
    return type(values).__module__ == "numpy"


def _as_float(values: Values) -> Values:
    return values.astype("float32", copy=False) if _is_array(values) else values.float()


def _as_type(values: Values, dtype: PixelDtype) -> Values:
    if _is_array(values):
        return values.astype(dtype)
    import torch

    return values.to(getattr(torch, dtype))
