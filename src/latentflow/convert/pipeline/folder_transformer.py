"""The velocity network of a latentflow model: a diffusion transformer (arXiv 2212.09748) for latent flow matching.

This file needs torch and diffusers alone. `DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)` runs it
with the weights next to it.

Legend: B images, C latent channels, H and W latent height and width, p patch size, N tokens, D hidden channels, K
heads, E channels of a head.
"""

import math

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

_EPS = 1e-6


def _sinusoids(values, channels=256):
    """Sinusoids of `values` [B]: [B, channels], cosines first, then sines."""
    half = channels // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float()[:, None] * torch.exp(-math.log(10_000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _angles(height, width, count, max_period, device):
    """Angles of the column and of the row of every token: two of [N, count]."""
    frequencies = torch.exp(-math.log(max_period) / count * torch.arange(count, dtype=torch.float32, device=device))
    rows = torch.arange(height, dtype=torch.float32, device=device)[:, None, None] * frequencies
    columns = torch.arange(width, dtype=torch.float32, device=device)[None, :, None] * frequencies
    return columns.expand(height, -1, -1).flatten(0, 1), rows.expand(-1, width, -1).flatten(0, 1)


def _norm(x, scale, shift=None, centred=False):
    """scale * (x - mean) / deviation + shift over the channels; without `centred`, the mean is taken as 0."""
    wide = x.float()
    if centred:
        wide = wide - wide.mean(-1, keepdim=True)
    inverse = torch.rsqrt(torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1] + _EPS)
    normed, scale = wide * inverse, scale.float()
    return (normed * scale if shift is None else torch.addcmul(shift.float(), normed, scale)).to(x.dtype)


class _TimeEmbedding(nn.Module):
    """Time in [0, 1] to one vector per image: [B] => [B, D]."""

    def __init__(self, size, scale):
        super().__init__()
        self.scale = scale
        self.mlp = nn.Sequential(nn.Linear(256, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, time):
        return self.mlp(_sinusoids(time * self.scale).to(self.mlp[0].weight.dtype))


class _ClassesEmbedding(nn.Module):
    """The index of a class, or a set of them, as a sum of learned vectors: [B, width] => [B, D]."""

    def __init__(self, num_classes, size, is_set):
        super().__init__()
        self.is_set = is_set
        self.table = nn.Parameter(torch.empty(num_classes + 1, size))

    def forward(self, values):
        return values.to(self.table.dtype) @ self.table if self.is_set else F.embedding(values[:, 0].long(), self.table)


class _NumberEmbedding(nn.Module):
    """A number, and whether it is unknown: [B, 2] => [B, D]."""

    def __init__(self, mean, deviation, size):
        super().__init__()
        self.mean, self.deviation = mean, deviation
        self.linear1, self.linear2 = nn.Linear(256, size), nn.Linear(size, size)
        self.unknown = nn.Parameter(torch.empty(size))

    def forward(self, values):
        number, is_unknown = values.float().unbind(1)
        features = _sinusoids((number - self.mean) * (8.0 / self.deviation)).to(self.linear1.weight.dtype)
        known = self.linear2(F.silu(self.linear1(features)))
        return torch.where(is_unknown[:, None] > 0.5, self.unknown.to(known.dtype), known)


class _ColumnEmbedding(nn.Module):
    """The named conditions of an image as one vector: [B, W] => [B, D]."""

    def __init__(self, columns, size):
        super().__init__()
        self.widths = [{"number": 2, "label": 1}.get(c["kind"], c["num_classes"] + 1) for c in columns]
        self.parts = nn.ModuleList(
            _NumberEmbedding(c["mean"], c["deviation"], size)
            if c["kind"] == "number"
            else _ClassesEmbedding(c["num_classes"], size, c["kind"] == "labels")
            for c in columns
        )

    def forward(self, columns):
        places = columns.split(self.widths, dim=1)
        return sum(part(values) for part, values in zip(self.parts, places, strict=True))


class _MapEncoder(nn.Module):
    """The fractions of K map classes in each latent pixel: [B, K, H, W] => [B, C, H, W]."""

    def __init__(self, num_classes, channels):
        super().__init__()
        self.mix = nn.Conv2d(num_classes, channels, kernel_size=1, bias=False)

    def forward(self, fractions):
        return self.mix(fractions)


class _Attention(nn.Module):
    """Multi-head self-attention: [B, N, D] => [B, N, D]."""

    def __init__(self, size, num_heads, qk_norm, mixes_values):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(size, 3 * size)
        self.query_norm = nn.RMSNorm(size // num_heads, eps=_EPS) if qk_norm else None
        self.key_norm = nn.RMSNorm(size // num_heads, eps=_EPS) if qk_norm else None
        self.out = nn.Linear(size, size)
        self.value_mix = nn.Parameter(torch.empty(2)) if mixes_values else None

    def forward(self, x, rotary, first_values):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # [B, N, 3, K, E]
        both, value = qkv.split((2, 1), dim=2)
        if self.query_norm is not None:
            both = _norm(both.float(), torch.stack([self.query_norm.weight, self.key_norm.weight])[:, None])
        if rotary is not None:
            cosine, sine = (table[:, None, None] for table in rotary)
            a, b = both.chunk(2, dim=-1)
            both = torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)
        query, key = both.to(value.dtype).unbind(2)
        value = value.squeeze(2)
        if self.value_mix is not None:
            value = self.value_mix[0] * first_values + self.value_mix[1] * value
        attended = F.scaled_dot_product_attention(*(tokens.transpose(1, 2) for tokens in (query, key, value)))
        return self.out(attended.transpose(1, 2).flatten(2)), value


class _MLP(nn.Module):
    """GELU or SwiGLU: [B, N, D] => [B, N, D]."""

    def __init__(self, size, ratio, kind):
        super().__init__()
        self.kind = kind
        inner = max(8, 8 * round(size * ratio * 2 / 3 / 8)) if kind == "swiglu" else int(size * ratio)
        self.up = nn.Linear(size, 2 * inner if kind == "swiglu" else inner)
        self.down = nn.Linear(inner, size)

    def forward(self, x):
        x = self.up(x)
        if self.kind == "gelu":
            return self.down(F.gelu(x, approximate="tanh"))
        gate, value = x.chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class _Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the embedding of time and conditions."""

    def __init__(self, config, mixes_values):
        super().__init__()
        size = config["hidden_size"]
        self.centred = config["norm"] == "layernorm"
        self.modulation = nn.Linear(size, 6 * size)
        self.attention = _Attention(size, config["num_heads"], config["qk_norm"], mixes_values)
        self.mlp = _MLP(size, config["mlp_ratio"], config["mlp"])

    def forward(self, x, c, rotary, first_values):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c).chunk(6, dim=1)
        normed = _norm(x, 1 + scale_a[:, None], shift_a[:, None], self.centred)
        attended, values = self.attention(normed, rotary, first_values)
        x = torch.addcmul(x, gate_a[:, None], attended)
        normed = _norm(x, 1 + scale_m[:, None], shift_m[:, None], self.centred)
        return torch.addcmul(x, gate_m[:, None], self.mlp(normed)), values


class VelocityTransformer(ModelMixin, ConfigMixin):
    """The velocity dx/dt of a latent flow, as a transformer over patches of the latents.

    Args:
        in_channels: C.
        position: "sincos" or "rope"; mlp: "gelu" or "swiglu"; norm: "layernorm" or "rmsnorm".
        num_classes: number of labels; label `num_classes` means none. 0: a model without labels.
        inpainting: whether masked latents and a mask are given.
        num_map_classes: classes of the semantic map; 0: none.
        input_channels: channels of the paired input; 0: none.
        columns: the named conditions, each with kind, num_classes, mean and deviation.
        constant: whether a learned vector is added where that of a label would be.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int,
        depth: int,
        hidden_size: int,
        num_heads: int,
        patch_size: int,
        mlp_ratio: float,
        time_scale: float,
        position: str,
        mlp: str,
        norm: str,
        qk_norm: bool,
        value_residual: bool,
        num_classes: int = 0,
        inpainting: bool = False,
        num_map_classes: int = 0,
        input_channels: int = 0,
        columns: list | None = None,
        constant: bool = False,
    ):
        super().__init__()
        joined = in_channels * (2 if num_map_classes else 1) + input_channels
        joined += in_channels + 1 if inpainting else 0
        # The names of the parts are those of the weights.
        self.spatial = nn.Module()
        self.spatial.map_encoder = _MapEncoder(num_map_classes, in_channels) if num_map_classes else None
        self.patch_embedding = nn.Conv2d(joined, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.time_embedding = _TimeEmbedding(hidden_size, time_scale)
        self.label_embedding = nn.Embedding(num_classes + 1, hidden_size) if num_classes else None
        self.constant_embedding = nn.Parameter(torch.zeros(hidden_size)) if constant else None
        self.column_embedding = _ColumnEmbedding(columns, hidden_size) if columns else None
        self.blocks = nn.ModuleList(_Block(self.config, value_residual and number > 0) for number in range(depth))
        self.final_modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.final_linear = nn.Linear(hidden_size, patch_size * patch_size * in_channels)

    def forward(self, latents, time, conditions=None):
        """The velocity at `latents` and `time`.

        Args:
            latents: [B, C, H, W], H and W multiples of the patch size.
            time: [B], 1 at noise and 0 at data.
            conditions: what the model takes, by name: labels [B], masked_latents [B, C, H, W], mask [B, 1, H, W],
                class_fractions [B, K, H, W], input [B, I, H, W], columns [B, W].

        Returns:
            [B, C, H, W].
        """
        given, config, patch = conditions or {}, self.config, self.config.patch_size
        height, width = latents.shape[2] // patch, latents.shape[3] // patch
        x = self.patch_embedding(self._joined(latents, given)).flatten(2).transpose(1, 2).contiguous()
        rotary = None
        if config.position == "sincos":
            column, row = _angles(height, width, config.hidden_size // 4, 10_000.0, x.device)
            x = x + torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1).to(x.dtype)
        else:
            count = config.hidden_size // config.num_heads // 4
            angles = torch.cat(_angles(height, width, count, 100.0, x.device), dim=1)
            rotary = angles.cos(), angles.sin()
        c = self.time_embedding(time)
        if self.label_embedding is not None:
            c = c + self.label_embedding(given["labels"])
        if self.constant_embedding is not None:
            c = c + self.constant_embedding
        if self.column_embedding is not None:
            c = c + self.column_embedding(given["columns"])
        c, first_values = F.silu(c), None
        for block in self.blocks:
            x, values = block(x, c, rotary, first_values)
            if config.value_residual and first_values is None:
                first_values = values.contiguous()
        shift, scale = self.final_modulation(c).chunk(2, dim=1)
        x = self.final_linear(_norm(x, 1 + scale[:, None], shift[:, None], config.norm == "layernorm"))
        x = x.unflatten(2, (patch, patch, -1)).unflatten(1, (height, width)).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(*x.shape[:2], height * patch, width * patch).to(latents.dtype)

    def _joined(self, latents, given):
        """Latents and spatial conditions, joined along channels."""
        parts = [latents]
        if self.config.inpainting:
            parts += [given["masked_latents"], given["mask"]]
        if self.spatial.map_encoder is not None:
            parts.append(self.spatial.map_encoder(given["class_fractions"].to(latents.dtype)))
        if self.config.input_channels:
            parts.append(given["input"])
        return torch.cat([part.to(latents.dtype) for part in parts], dim=1) if len(parts) > 1 else latents
