"""Randomness is a function of (seed, purpose, position of the image), without any generator state.

Numbers come from a counter-based generator, Philox 4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3,
2011), computed for a whole batch at once by integer arithmetic on the device. So a picture does not depend on its
batch, the number of processes or the device, up to the rounding of logarithm and cosine, and a resumed run draws the
same numbers as an uninterrupted one.

Legend: B images, W words (32 bits each) of an image.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from latentflow.shapes import send

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # of the golden ratio and of the square root of 3
_LOW = 0xFFFFFFFF
_ROUNDS = 10
_WORDS_AT_A_TIME = 1 << 18  # on the CPU, so that the working set stays in its caches


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any tuple of names and numbers; different tuples give unrelated seeds."""
    encoded = ("str:" + part.replace("/", "//") if isinstance(part, str) else f"int:{int(part)}" for part in parts)
    text = "/".join(encoded).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox 4x32-10: four 32-bit words from a counter of four and a key of two.

    Args:
        counter: four int64 tensors of shapes that broadcast together, each value in [0, 2^32).
        key: two numbers in [0, 2^32).

    Returns:
        Four int64 tensors of the common shape, each value in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    shape = torch.broadcast_shapes(*(word.shape for word in counter))
    for _ in range(_ROUNDS):
        # The product of two words has 64 bits, which int64 holds; the sign is one of them.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = _mixed(p1 >> 32, c1, k0, shape), p1.bitwise_and_(_LOW)
        c2, c3 = _mixed(p0 >> 32, c3, k1, shape), p0.bitwise_and_(_LOW)
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return [word.expand(shape) for word in (c0, c1, c2, c3)]


def _mixed(high: Tensor, other: Tensor, key: int, shape: torch.Size) -> Tensor:
    """high xor other xor key, low 32 bits only; `high` may be overwritten if its shape allows."""
    mixed = high.bitwise_xor_(other) if high.shape == shape else high ^ other
    return mixed.bitwise_xor_(key).bitwise_and_(_LOW)


class ImageRandom:
    """One random stream per image; all advance together.

    Args:
        key: the purpose, a seed from `derive_seed`. Streams of different keys are independent.
        positions: [B] int64 in [0, 2^63), on the device of the result; equal positions give equal streams.
    """

    def __init__(self, key: int, positions: Tensor):
        self._key = (key & _LOW, key >> 32)
        self._device = positions.device
        positions = positions[:, None].to("cpu" if self._device.type == "mps" else self._device)
        self._low, self._high = positions & _LOW, positions >> 32
        self._drawn = 0  # words used of each stream
        self._ahead: Tensor | None = None

    @classmethod
    def at(
        cls, seed: int, purpose: str, positions: Sequence[int] | Tensor, device: torch.device | str = "cpu"
    ) -> ImageRandom:
        """The streams of images at `positions` ([B]) of the endless stream of training images, for one `purpose`."""
        return cls(derive_seed(seed, purpose), on_device(positions, device))

    @classmethod
    def of_seeds(cls, purpose: str, seeds: Sequence[int], device: torch.device | str = "cpu") -> ImageRandom:
        """The streams of pictures by their seeds, for one `purpose`."""
        return cls(derive_seed(purpose), on_device(seeds, device))

    def __len__(self) -> int:
        return len(self._low)

    def ahead(self, num_words: int) -> ImageRandom:
        """Compute the next `num_words` words of each stream at once, for the draws that follow; returns itself.

        A normal number takes one word, a uniform one two; each draw takes a multiple of four.
        """
        self._ahead = self._compute(self._drawn, -(-num_words // 4))
        return self

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, float32: [B, *shape]. Box and Muller: sqrt(-2 ln u) cos(2 pi v), and with sin."""
        number = math.prod(shape)
        half = -(-number // 4) * 2
        words = self._words(2 * half)
        # Half a unit keeps u above 0; the least of 2^-33 makes the largest number 6.76.
        u = words[:, :half].float().mul_(2.0**-32).add_(2.0**-33)
        angle = words[:, half:].float().mul_(2 * math.pi * 2.0**-32)
        radius = u.log_().mul_(-2).sqrt_()
        normal = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return normal[:, :number].reshape(len(self), *shape).to(self._device)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), multiples of 2^-53, float64: [B, *shape]; [B] when no shape is given."""
        number = math.prod(shape)
        half = -(-number // 2) * 2
        words = self._words(2 * half)
        bits = (words[:, :half] >> 5 << 26) + (words[:, half:] >> 6)
        uniform = bits[:, :number].double().mul_(2.0**-53)
        return uniform.reshape(len(self), *shape).to(self._device, _widest(self._device))

    def _words(self, number: int) -> Tensor:
        """The next words of each stream, a multiple of four: [B, number] int64."""
        if self._ahead is None or self._ahead.shape[1] < number:
            self._ahead = None
            words = self._compute(self._drawn, number // 4)
        else:
            words, self._ahead = self._ahead[:, :number], self._ahead[:, number:]
        self._drawn += number
        return words

    def _compute(self, first_word: int, num_blocks: int) -> Tensor:
        """`num_blocks` times four words of each stream: [B, 4 * num_blocks] int64."""
        first = first_word // 4
        blocks = torch.arange(first, first + num_blocks, device=self._low.device)[None]
        zero = torch.zeros(1, 1, dtype=torch.int64, device=self._low.device)
        rows = len(self)
        if self._low.device.type == "cpu":
            rows = max(_WORDS_AT_A_TIME // max(4 * num_blocks, 1), 1)
        parts = zip(self._low.split(rows), self._high.split(rows), strict=True)
        words = [torch.stack(philox([blocks, zero, low, high], self._key), dim=2).flatten(1) for low, high in parts]
        return words[0] if len(words) == 1 else torch.cat(words)


def on_device(positions: Sequence[int] | Tensor, device: torch.device | str) -> Tensor:
    """Positions [B] as int64 on `device`. Consecutive ones, as in training, are generated there without a copy."""
    if isinstance(positions, Tensor) and positions.device == torch.device(device):
        return positions
    numbers = positions.tolist() if isinstance(positions, Tensor) else [int(position) for position in positions]
    if numbers and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return torch.arange(len(numbers), device=device) + numbers[0]  # whose end may be 2^63, no int64
    return send(torch.tensor(numbers, dtype=torch.int64), device)


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
