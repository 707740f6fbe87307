"""What one network call costs, in multiplications; and the calls of a guide, in calls of the model that it guides.

The rule: NFE counts calls of the model. A call of a guide counts as the ratio of the two networks' multiply-adds for
one image of the model's size: an earlier snapshot of the same run counts 1, a network with half of them 0.5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from latentflow.model.config import ModelConfig
from latentflow.weights import without_memory


class _Unfused(TorchFunctionMode):
    """Attention by matrix products, in the thread that enters it: not every device counts fused attention.

    `sdpa_kernel` would do the same to threads that draw meanwhile.
    """

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_attention_math(*args, **(kwargs or {}))[0]
        return function(*args, **(kwargs or {}))


def multiply_adds(config: ModelConfig) -> int | None:
    """Multiplications with an addition in one network call for one image of the model's size, by torch's own count.

    The count is of matrix products and convolutions, on the meta device: nothing is computed. None: torch cannot count
    them.
    """
    try:
        with without_memory():
            network = config.build_network().eval()
            latents = torch.zeros(1, *config.latent_shape)
            condition = config.conditioning.build(latents.shape, "meta")
            with torch.no_grad(), _Unfused(), FlopCounterMode(display=False) as counter:
                network(latents, torch.ones(1), condition)
    except Exception:  # a count is not worth failing for, and a dispatch mode may meet anything
        return None
    return counter.get_total_flops() // 2 or None


def relative_cost(guide: ModelConfig, config: ModelConfig) -> float:
    """A call of the network of `guide`, in calls of that of `config`; 1 where torch cannot count their products."""
    ours, theirs = multiply_adds(config), multiply_adds(guide)
    return 1 if None in (ours, theirs) or ours == theirs else theirs / ours


def call_count(calls: Tensor) -> int | float:
    """The network calls of one image (one number) for a record: whole, or to three decimals."""
    count = float(calls)
    return int(count) if count.is_integer() else round(count, 3)
