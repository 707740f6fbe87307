"""Randomness that belongs to an image, never to a batch or a process.

Each image has its own generator, seeded from who it is: (run seed, purpose, position in the endless
stream of training images) or the seed a user asked for. So a picture does not change with the batch
it is made in, and a resumed run draws what the uninterrupted one would have drawn, with no generator
state to store. Generators live on the CPU: the same seed means the same numbers on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any tuple of names and numbers; other tuples give unrelated seeds."""
    text = "/".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class ImageRandom:
    """One random stream per image, drawn from in step.

    Args:
        seeds: one seed per image; equal seeds give equal streams.
    """

    def __init__(self, seeds: Iterable[int]):
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    @classmethod
    def at(cls, seed: int, purpose: str, positions: Sequence[int] | Tensor) -> ImageRandom:
        """The streams of training images at `positions` ([B]) of the endless stream, for one `purpose`."""
        return cls(derive_seed(seed, purpose, int(position)) for position in positions)

    def normal(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Standard normal numbers, float32: [B, *shape]."""
        return self._stack(torch.randn, shape, device, torch.float32)

    def uniform(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Uniform numbers in [0, 1), float64: [B, *shape]; [B] when no shape is given."""
        return self._stack(torch.rand, shape, device, torch.float64)

    def _stack(self, draw, shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype) -> Tensor:
        rows = torch.empty(len(self.generators), *shape, dtype=dtype)
        for row, generator in zip(rows, self.generators, strict=True):
            draw(shape, generator=generator, dtype=dtype, out=row)
        return rows.to(device, non_blocking=True)
