"""Layers that velocity networks share: time embedding, frozen and rotary positions, attention, MLPs, modulation.

Legend: B images, N tokens (h * w, row after row), D hidden channels, K heads, E channels of a head (D = K * E),
h and w the grid of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentflow.networks.lean import NORM_EPS, autocast_dtype, linear_of, scaled_norm
from latentflow.shapes import MOST_GUIDANCE, Condition


def time_frequencies(
    channels: int = 256, max_period: float = 10_000.0, *, endpoint: bool = False, device: torch.device | str = "cpu"
) -> Tensor:
    """Frequencies from 1 to 1 / max_period in a geometric series, the last one left out unless `endpoint`.

    [channels / 2] float32.
    """
    half = channels // 2
    exponents = torch.arange(half, dtype=torch.float32, device=device) / (half - 1 if endpoint else half)
    return torch.exp(-math.log(max_period) * exponents)


def sinusoids(time: Tensor, frequencies: Tensor) -> Tensor:
    """Sinusoids of `time` ([B]) with `frequencies` [n]: [B, 2n] float32, cosines first, then sines.

    Always in float32: in half precision neighbouring times in 0..1000 would be the same number.
    """
    angles = time.float()[:, None] * frequencies  # [B, n]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def time_sinusoid(time: Tensor, channels: int = 256, max_period: float = 10_000.0, *, endpoint: bool = False) -> Tensor:
    """`sinusoids` of `time` ([B], any unit) with the frequencies of `time_frequencies`: [B, channels] float32."""
    return sinusoids(time, time_frequencies(channels, max_period, endpoint=endpoint, device=time.device))


class TimeEmbedding(nn.Module):
    """Time to one vector per image: sinusoid of 256 numbers, then Linear-SiLU-Linear. [B] => [B, D].

    Args:
        hidden_size: D.
        scale: what the time in [0, 1] is multiplied by before the sinusoid.
    """

    def __init__(self, hidden_size: int, scale: float):
        super().__init__()
        self.scale = scale
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, time: Tensor) -> Tensor:
        return self.mlp(time_sinusoid(time * self.scale).to(self.mlp[0].weight.dtype))


_JUMP_SCALE = 1000.0  # as that of the time, in whatever unit the network takes it


class JumpEmbedding(TimeEmbedding):
    """What the average velocity of a student takes besides its time, as one vector per image; see `JumpInputs`.

    Its last layer is zero before training, so that a student begins exactly as the network that it was made from.
    """

    def __init__(self, size: int):
        super().__init__(size, _JUMP_SCALE)

    def reset_parameters(self) -> None:
        """Draw the first layer, and set the last one to zero."""
        nn.init.normal_(self.mlp[0].weight, std=0.02)
        nn.init.zeros_(self.mlp[0].bias)
        nn.init.zeros_(self.mlp[2].weight)
        nn.init.zeros_(self.mlp[2].bias)


class JumpInputs(nn.Module):
    """The span of a jump, and the guidance scale, as one vector per image: [B] and [B] => [B, D].

    The scale enters by its logarithm; without guidance this is 0.

    Args:
        size: D.
        guided: whether the guidance scale is an input.
    """

    def __init__(self, size: int, *, guided: bool):
        super().__init__()
        self.span = JumpEmbedding(size)
        self.guidance = JumpEmbedding(size) if guided else None

    def forward(self, time: Tensor, condition: Condition) -> Tensor:
        """Where the condition has no span or no guidance, they are 0 and 1, as many as the times [B]."""
        span = torch.zeros_like(time) if condition.span is None else condition.span
        c = self.span(span)
        if self.guidance is not None:
            scale = torch.ones_like(time) if condition.guidance is None else condition.guidance
            c = c + self.guidance(scale.float().log() / math.log(MOST_GUIDANCE))
        return c


class AugmentationEmbedding(nn.Linear):
    """The numbers of an augmented variant as one vector per image: [B, P] => [B, D]; exactly zero where they are zero.

    Linear without a bias (EDM, arXiv 2206.00364, appendix F.2), and zero before training, so that a new network ignores
    the numbers.

    Args:
        num_augmentations: P.
        size: D.
    """

    def __init__(self, num_augmentations: int, size: int):
        super().__init__(num_augmentations, size, bias=False)

    def reset_parameters(self) -> None:
        """Set the weights to zero; nothing is drawn."""
        nn.init.zeros_(self.weight)


def axis_angles(
    height: int, width: int, count: int, max_period: float, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Angles of the column and of the row of every token: two of [height * width, count], float32."""
    steps = torch.arange(count, dtype=torch.float32, device=device)
    frequencies = torch.exp(-math.log(max_period) / count * steps)
    rows = torch.arange(height, dtype=torch.float32, device=device)[:, None, None] * frequencies
    columns = torch.arange(width, dtype=torch.float32, device=device)[None, :, None] * frequencies
    return columns.expand(height, -1, -1).flatten(0, 1), rows.expand(-1, width, -1).flatten(0, 1)


def sincos_positions(height: int, width: int, channels: int, device: torch.device | str = "cpu") -> Tensor:
    """Frozen 2-D positions to be added to the tokens: [height * width, channels] float32 (arXiv 2212.09748).

    The first half of the channels encodes the column, the second half the row, each as [sin | cos].
    `channels` is a multiple of 4.
    """
    column, row = axis_angles(height, width, channels // 4, 10_000.0, device)
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)


def rotary_positions(
    height: int, width: int, head_channels: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the 2-D rotation of queries and keys: two of [height * width, head_channels / 2] float32.

    Half of the channel pairs rotate with the column, half with the row. The longest period is 100, as in
    arXiv 2403.13298 for images; for text it is 10000. `head_channels` is a multiple of 4.
    """
    angles = torch.cat(axis_angles(height, width, head_channels // 4, 100.0, device), dim=1)
    return angles.cos(), angles.sin()


@lru_cache(maxsize=64)
def _kept(make: Callable[..., Any], *args: Any) -> Any:
    with torch.inference_mode(False):  # a table made while sampling must also serve training
        return make(*args)


def kept_table(make: Callable[..., Any], *args: Any) -> Any:
    """make(*args), kept for the next call with the same arguments: do not write to the result.

    torch.compile traces `make` in place, so that new grid sizes need no new graph.
    """
    return make(*args) if torch.compiler.is_compiling() else _kept(make, *args)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + E/2) of `x` [..., E] by angles [..., E/2]; in float32 at least.

    The backward pass needs only the tables: it rotates back.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, norm: str) -> Tensor:
    """norm(x) * (1 + scale) + shift, with one shift and one scale per image: [B, N, D] and two of [B, D] => [B, N, D].

    Args:
        norm: over the channels of a token: "layernorm" or "rmsnorm".
    """
    scale = 1 + scale[:, None].to(x.dtype)
    return scaled_norm(x, scale, shift[:, None], centred=norm == "layernorm", dtype=autocast_dtype(x.device))


def add_gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch, with one gate per image: [B, N, D], [B, D] and [B, N, D] => [B, N, D]."""
    # Autocast would cast gate and branch to float32 and save them so.
    with torch.autocast(x.device.type, enabled=False) if autocast_dtype(x.device) else nullcontext():
        return torch.addcmul(x, gate[:, None], branch)


class SelfAttention(nn.Module):
    """Multi-head self-attention over the tokens of an image. [B, N, D] => [B, N, D].

    Args:
        hidden_size: D, a multiple of `num_heads`.
        num_heads: K.
        qk_norm: normalise queries and keys of every head (RMS norm with a learned weight), which bounds the logits.
        mixes_values: add the values of the first block to those of this one, with learned weights (arXiv 2410.17897).
    """

    hidden_matrices: ClassVar[Mapping[str, int]] = {"qkv": 3, "out": 1}

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool = False, mixes_values: bool = False):
        super().__init__()
        head_channels = hidden_size // num_heads
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.query_norm = nn.RMSNorm(head_channels, eps=NORM_EPS) if qk_norm else None
        self.key_norm = nn.RMSNorm(head_channels, eps=NORM_EPS) if qk_norm else None
        self.out = nn.Linear(hidden_size, hidden_size)
        self.value_mix = nn.Parameter(torch.empty(2)) if mixes_values else None
        self.reset_mix()

    def reset_mix(self) -> None:
        """Begin with the mean of the values of the first block and of this one, as in the paper."""
        if self.value_mix is not None:
            nn.init.constant_(self.value_mix, 0.5)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Attend; `rotary` is the (cosine, sine) of `rotary_positions`, None for no rotation."""
        return self.with_values(x, rotary)[0]

    def with_values(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None, first_values: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend as `forward` does; returns the values [B, N, K, E] as well.

        Args:
            first_values: those of the first block, where `mixes_values` is set. The values here become

                V' = mix_1 V_first + mix_2 V    (arXiv 2410.17897, with both weights learned for each block).
        """
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # [B, N, 3D] => [B, N, 3, K, E]
        both, value = qkv.split((2, 1), dim=2)  # queries and keys together
        if self.query_norm is not None:
            weight = torch.stack([self.query_norm.weight, self.key_norm.weight])[:, None]  # [2, 1, E]
            both = scaled_norm(both, weight, dtype=torch.promote_types(both.dtype, torch.float32))
        if rotary is not None:
            both = rotate(both, *(table[:, None, None] for table in rotary))
        query, key = both.to(value.dtype).unbind(2)  # norm and rotation may have widened them
        value = value.squeeze(2)
        if self.value_mix is not None:
            value = self.value_mix[0] * first_values + self.value_mix[1] * value
        heads = (tokens.transpose(1, 2) for tokens in (query, key, value))  # 3 of [B, K, N, E]
        attended = F.scaled_dot_product_attention(*heads)
        return self.out(attended.transpose(1, 2).flatten(2)), value  # [B, K, N, E] => [B, N, D]


class GeluMLP(nn.Module):
    """Linear, tanh GELU, Linear. [B, N, D] => [B, N, D]."""

    hidden_matrices: ClassVar[Mapping[str, int]] = {"up": 1, "down": 1}

    def __init__(self, hidden_size: int, ratio: float):
        super().__init__()
        inner = int(hidden_size * ratio)
        self.up = nn.Linear(hidden_size, inner)
        self.down = nn.Linear(inner, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * value of the two halves [gate | value] of the channels: [..., 2D] => [..., D]."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


class SwigluMLP(nn.Module):
    """down(silu(gate(x)) * value(x)) (arXiv 2002.05202), with about as many parameters as `GeluMLP` of the same ratio.

    The inner size is 2/3 of that of `GeluMLP`, for three matrices instead of two, rounded to a multiple of 8.
    [B, N, D] => [B, N, D].
    """

    hidden_matrices: ClassVar[Mapping[str, int]] = {"up": 2, "down": 1}

    def __init__(self, hidden_size: int, ratio: float):
        super().__init__()
        inner = max(8, 8 * round(hidden_size * ratio * 2 / 3 / 8))
        self.up = nn.Linear(hidden_size, 2 * inner)
        self.down = nn.Linear(inner, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return linear_of(swiglu, self.up(x), self.down)
