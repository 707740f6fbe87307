"""The diffusion transformer (DiT, arXiv 2212.09748) as a velocity network.

Legend: B images, C latent channels, H and W latent height and width, p patch size, h = H / p and w = W / p the grid
of tokens, N = h * w tokens (row after row), D hidden channels.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import silu

from latentflow.errors import ConfigError, nearest
from latentflow.networks.base import FORMER_OPTIONS, VelocityNetwork
from latentflow.networks.column_embedding import ColumnEmbedding
from latentflow.networks.layers import (
    AugmentationEmbedding,
    GeluMLP,
    JumpEmbedding,
    JumpInputs,
    SelfAttention,
    SwigluMLP,
    TimeEmbedding,
    add_gated,
    kept_table,
    modulated_norm,
    rotary_positions,
    sincos_positions,
)
from latentflow.records import Record
from latentflow.shapes import Condition

# Table 1 of the paper.
SIZES = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
PATCH_SIZES = (1, 2, 4, 8)
NAMES = {
    f"DiT-{size}/{patch}": {**shape, "patch_size": patch} for size, shape in SIZES.items() for patch in PATCH_SIZES
}
VARIANTS = {
    "classic": {"position": "sincos", "mlp": "gelu", "norm": "layernorm", "qk_norm": False},
    "modern": {"position": "rope", "mlp": "swiglu", "norm": "rmsnorm", "qk_norm": True},
}


class DiTConfig(Record):
    """A diffusion transformer. Give a `name`, or the four sizes, or a name and the sizes that differ from it.

    A config is resolved when it is created: every size and option has a value, so a saved config needs no defaults.
    Channels and classes follow from the data and are arguments of `DiT`.

    Raises:
        ConfigError: unknown option, name or variant, a size missing, or sizes that do not fit together.
    """

    kind: Literal["dit"] = "dit"
    name: str | None = Field(None, description="published size, DiT-{S,B,L,XL}/{1,2,4,8}; null: give the sizes below")
    depth: int = Field(gt=0, le=512, description="number of blocks")
    hidden_size: int = Field(gt=0, le=65_536, description="channels of a token, a multiple of num_heads")
    num_heads: int = Field(gt=0, le=4096, description="attention heads")
    patch_size: int = Field(
        gt=0, le=256, description="side of a patch in latent pixels; halving it makes 4 times the tokens"
    )
    mlp_ratio: float = Field(4.0, gt=0, le=64, description="inner size of the MLP as a multiple of hidden_size")
    time_scale: float = Field(
        1000.0,
        gt=0,
        le=1e6,
        description="the time in [0, 1] is multiplied by this; published LFM and SiT weights need 1.0",
    )
    variant: Literal["classic", "modern"] = Field(
        "classic",
        description="default of the four options below: classic = sincos, gelu, layernorm, no qk_norm (the paper); "
        "modern = rope, swiglu, rmsnorm, qk_norm",
    )
    position: Literal["sincos", "rope"] = Field(
        description="sincos = frozen 2-D positions added to the tokens; rope = 2-D rotation of queries and keys"
    )
    mlp: Literal["gelu", "swiglu"] = Field(description="gelu (tanh), or swiglu with nearly as many parameters")
    norm: Literal["layernorm", "rmsnorm"] = Field(description="norm before attention, MLP and output")
    qk_norm: bool = Field(description="normalise queries and keys of every head: steadier at high learning rates")
    value_residual: bool = Field(
        False,
        description="add the values of the first block's attention to those of every later block, with two learned "
        "weights per block (arXiv 2410.17897)",
    )

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        explicit = {key: value for key, value in given.items() if value is not None and key not in FORMER_OPTIONS}
        for key in explicit:
            if key not in cls.model_fields:
                raise ConfigError(f"unknown network option {key!r}: {nearest(key, cls.model_fields)}")
        name, variant = (str(explicit.get(key, default)) for key, default in (("name", ""), ("variant", "classic")))
        if name and name not in NAMES:
            raise ConfigError(f"unknown network name {name!r}: {nearest(name, NAMES)}")
        if variant not in VARIANTS:
            raise ConfigError(f"unknown network variant {variant!r}: {nearest(variant, VARIANTS)}")
        resolved = {**NAMES.get(name, {}), **VARIANTS[variant], **explicit}
        missing = [size for size in ("depth", "hidden_size", "num_heads", "patch_size") if size not in resolved]
        if missing:
            raise ConfigError(f"network without {', '.join(missing)}: give them, or a name such as 'DiT-B/2'")
        return resolved

    @model_validator(mode="after")
    def _check(self) -> DiTConfig:
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.position == "sincos" and self.hidden_size % 4:
            raise ConfigError(f"position 'sincos' needs a hidden_size divisible by 4, got {self.hidden_size}")
        if self.position == "rope" and self.hidden_size // self.num_heads % 4:
            raise ConfigError(
                "position 'rope' needs hidden_size / num_heads divisible by 4, "
                f"got {self.hidden_size} / {self.num_heads} = {self.hidden_size // self.num_heads}"
            )
        if self.value_residual and self.depth < 2:
            raise ConfigError(
                f"value_residual mixes the values of later blocks with those of the first, and depth is {self.depth}; "
                "use a depth of 2 or more, or value_residual=false"
            )
        return self

    @property
    def title(self) -> str:
        """Name for messages and reports."""
        return self.name or f"DiT of {self.depth} blocks, {self.hidden_size} channels"

    @property
    def size_multiple(self) -> int:
        """What height and width of the latents must be multiples of."""
        return self.patch_size


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the embedding of time and label (adaLN-Zero).

    Args:
        mixes_values: its attention also gets the values of the first block; see `SelfAttention`.
    """

    def __init__(self, config: DiTConfig, *, mixes_values: bool = False):
        super().__init__()
        size = config.hidden_size
        self.norm = config.norm
        self.modulation = nn.Linear(size, 6 * size)
        self.attention = SelfAttention(size, config.num_heads, config.qk_norm, mixes_values)
        self.mlp = (SwigluMLP if config.mlp == "swiglu" else GeluMLP)(size, config.mlp_ratio)

    def forward(
        self, x: Tensor, c: Tensor, rotary: tuple[Tensor, Tensor] | None, first_values: Tensor | None = None
    ) -> Tensor:
        """One block: tokens `x` [B, N, D] and `c` = silu(time + label) [B, D] => [B, N, D].

        Args:
            first_values: [B, N, K, E] of the first block, for a block that mixes them with its own.
        """
        return self._with_values(x, c, rotary, first_values)[0]

    def as_first(self, x: Tensor, c: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """The same for the first block, with the values of its attention: [B, N, D] and [B, N, K, E]."""
        x, values = self._with_values(x, c, rotary)
        return x, values.contiguous()  # copied, since a view would keep queries and keys in memory

    def _with_values(
        self, x: Tensor, c: Tensor, rotary: tuple[Tensor, Tensor] | None, first_values: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c).chunk(6, dim=1)  # 6 of [B, D]
        normed = modulated_norm(x, shift_a, scale_a, self.norm)
        attended, values = self.attention.with_values(normed, rotary, first_values)
        x = add_gated(x, gate_a, attended)
        return add_gated(x, gate_m, self.mlp(modulated_norm(x, shift_m, scale_m, self.norm))), values


class DiT(VelocityNetwork):
    """Velocity network of transformer blocks over patches of the latents (arXiv 2212.09748, adaLN-Zero).

    Untrained, it returns exactly zero. Latents may have any height and width that the patch size divides; positions
    are computed for the grid at hand.

    Args:
        config: sizes and options.
        inputs: channels and conditions; see `VelocityNetwork`.
    """

    def __init__(self, config: DiTConfig, **inputs: Any):
        super().__init__(config, **inputs)
        size, patch, vectors = config.hidden_size, config.patch_size, self.vectors
        self.patch_embedding = nn.Conv2d(self.spatial.num_channels, size, kernel_size=patch, stride=patch)
        self.time_embedding = TimeEmbedding(size, config.time_scale)
        self.label_embedding = nn.Embedding(vectors.num_classes + 1, size) if vectors.num_classes else None
        self.column_embedding = ColumnEmbedding(vectors.columns, size) if vectors.columns else None
        self.constant_embedding = nn.Parameter(torch.zeros(size)) if vectors.constant_embedding else None
        numbers = vectors.num_augmentations
        self.augmentation_embedding = AugmentationEmbedding(numbers, size) if numbers else None
        self.jump_embedding = JumpInputs(size, guided=vectors.guided) if vectors.jumps else None
        self.blocks = nn.ModuleList(
            DiTBlock(config, mixes_values=config.value_residual and number > 0) for number in range(config.depth)
        )
        self.final_modulation = nn.Linear(size, 2 * size)
        self.final_linear = nn.Linear(size, patch * patch * self.out_channels)
        self.reset_parameters()

    @property
    def input_layers(self) -> list[nn.Conv2d]:
        return [self.patch_embedding]

    @property
    def condition_layers(self) -> dict[str, nn.Module | nn.Parameter | None]:
        return {
            "label": self.label_embedding,
            "columns": self.column_embedding,
            "augmentation": self.augmentation_embedding,
            "constant": self.constant_embedding,
        }

    def reset_parameters(self) -> None:
        """Draw new weights as in the paper: every block starts as the identity, and the output is zero."""
        for module in self.modules():
            if isinstance(module, AugmentationEmbedding):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, JumpEmbedding):
                module.reset_parameters()
        nn.init.xavier_uniform_(self.patch_embedding.weight.view(self.config.hidden_size, -1))
        nn.init.zeros_(self.patch_embedding.bias)
        nn.init.normal_(self.time_embedding.mlp[0].weight, std=0.02)
        nn.init.normal_(self.time_embedding.mlp[2].weight, std=0.02)
        if self.label_embedding is not None:
            nn.init.normal_(self.label_embedding.weight, std=0.02)
        if self.column_embedding is not None:
            self.column_embedding.reset_parameters()
        if self.constant_embedding is not None:
            nn.init.zeros_(self.constant_embedding)
        if self.spatial.map_encoder is not None:
            self.spatial.map_encoder.reset_parameters()
        for linear in (*(block.modulation for block in self.blocks), self.final_modulation, self.final_linear):
            nn.init.zeros_(linear.weight)
        for block in self.blocks:
            block.attention.reset_mix()

    def forward(self, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """The velocity at `latents` and `time`.

        Args:
            latents: [B, in_channels, H, W], H and W multiples of the patch size.
            time: [B] in [0, 1], 0 at data and 1 at noise.
            condition: labels [B] in [0, num_classes] if the network has labels, else None; the spatial fields as
                `SpatialInputs` wants them; augmentation [B, num_augmentations] and columns [B, W], else None; span and
                guidance [B] for a student.

        Returns:
            [B, out_channels, H, W], dtype of `latents`.

        Raises:
            ValueError: see `joined`.
        """
        return self.with_tokens(latents, time, condition, self.config.depth)[0]

    def with_tokens(self, latents: Tensor, time: Tensor, condition: Condition, block: int) -> tuple[Tensor, Tensor]:
        """The velocity as of `forward`, and the tokens [B, N, D] after block number `block`; the first is 1."""
        patch, size = self.config.patch_size, self.config.hidden_size
        h, w = latents.shape[2] // patch, latents.shape[3] // patch

        x = self.joined(latents, time, condition)
        x = self.patch_embedding(x).flatten(2).transpose(1, 2)  # [B, C, H, W] => [B, D, h, w] => [B, N, D]
        # The sum over the blocks has the precision of the latents also under autocast; a token's channels lie together.
        x = x.to(latents.dtype).contiguous()
        rotary = None
        if self.config.position == "sincos":
            x = x + kept_table(sincos_positions, h, w, size, latents.device).to(x.dtype)
        else:
            rotary = kept_table(rotary_positions, h, w, size // self.config.num_heads, latents.device)

        c = self.time_embedding(time)  # [B, D]
        if self.label_embedding is not None:
            c = c + self.label_embedding(condition.labels)
        if self.constant_embedding is not None:
            c = c + self.constant_embedding
        if self.column_embedding is not None:
            c = c + self.column_embedding(condition.columns)
        if self.augmentation_embedding is not None:
            c = c + self.augmentation_embedding(condition.augmentation.to(c.dtype))
        if self.jump_embedding is not None:
            c = c + self.jump_embedding(time, condition)
        c = silu(c)

        tokens = first_values = None
        for number, one in enumerate(self.blocks, start=1):
            if self.config.value_residual and number == 1:
                x, first_values = self.run(one.as_first, x, c, rotary)
            else:
                x = self.run(one, x, c, rotary, first_values)
            if number == block:
                tokens = x

        return self.as_latents(self.run_once(self._last, x, c), latents), tokens

    def as_latents(self, patches: Tensor, latents: Tensor) -> Tensor:
        """Patches in place of their tokens: [B, N, p * p * C] => [B, C, H, W], size and dtype of `latents`."""
        patch = self.config.patch_size
        h, w = latents.shape[2] // patch, latents.shape[3] // patch
        x = patches.unflatten(2, (patch, patch, -1)).unflatten(1, (h, w))
        x = x.permute(0, 5, 1, 3, 2, 4)  # [B, h, w, p, p, C] => [B, C, h, p, w, p]
        return x.reshape(*x.shape[:2], h * patch, w * patch).to(latents.dtype)

    def _last(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.final_modulation(c).chunk(2, dim=1)
        return self.final_linear(modulated_norm(x, shift, scale, self.config.norm))
