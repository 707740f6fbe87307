"""How a network runs its blocks: what it keeps of them for the backward pass, and whether they are compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from latentflow.errors import ConfigError, nearest

MemoryMode = Literal["none", "recompute-cheap", "checkpoint"]
MEMORY_MODES: tuple[MemoryMode, ...] = get_args(MemoryMode)
"""From the fastest to the one that needs least memory."""

# A compiler looks a block's graph up among all that one function has, and gives up above this number. Of the U-Nets
# each level has blocks of its own.
_MOST_GRAPHS = 128

_ATEN = torch.ops.aten
_PRODUCTS = [
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN.baddbmm.default,
    _ATEN.convolution.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
]
"""What "recompute-cheap" keeps of a block; the rest takes little time beside it."""


def run_block(block: Callable[..., Tensor], memory: MemoryMode, draws: bool, *inputs: Any) -> Tensor:
    """block(*inputs), of which the backward pass computes again what `memory` says.

    Args:
        draws: whether the block draws random numbers, which must be the same again.
    """
    if memory == "none" or not torch.is_grad_enabled():
        return block(*inputs)
    kept = {"context_fn": partial(create_selective_checkpoint_contexts, _PRODUCTS)} if memory != "checkpoint" else {}
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=draws, **kept)


class BlockNetwork(nn.Module):
    """A network that hands each of its blocks to `run`.

    Attributes:
        memory: set by `set_memory`.
        draws: whether blocks draw random numbers in training.
    """

    memory: MemoryMode = "none"
    draws: bool = False

    def __init__(self) -> None:
        super().__init__()
        self._run_block: Callable[..., Tensor] = run_block

    def run(self, block: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """block(*inputs), compiled where `compile_blocks` was called."""
        return self._run_block(block, self.memory, self.draws, *inputs)

    def run_once(self, part: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """The same for what is no block, and small: nothing of it is computed again."""
        return self._run_block(part, "none", self.draws, *inputs)


def set_memory(network: nn.Module, mode: MemoryMode) -> None:
    """Say what the backward pass computes again, from now on; numbers stay the same.

    Args:
        network: as it was built, or wrapped (`NoisePredictor`, distributed).
        mode: "none": nothing but what is cheap anyway (see `lean`). "recompute-cheap": of every block the results of
            products, convolutions and attention are kept, and the rest is computed again: about a third less memory and
            less than a tenth more time. "checkpoint": every block is computed again from what came in: least memory, a
            third more time.

    Raises:
        ConfigError: no such mode.
    """
    if mode not in MEMORY_MODES:
        raise ConfigError(f"unknown memory mode {mode!r}; {nearest(mode, MEMORY_MODES)}")
    for part in _block_networks(network):
        part.memory = mode


def compile_blocks(network: nn.Module, *, backend: str = "inductor") -> None:
    """Have the blocks of a network compiled when they are first called, for the shapes they are called with.

    Blocks of the same sizes share one compilation; so do networks. Every other shape or batch size is a new one.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
    compiled = torch.compile(run_block, fullgraph=True, dynamic=False, backend=backend)
    for part in _block_networks(network):
        part._run_block = compiled


def is_compiled(network: nn.Module) -> bool:
    """Whether `compile_blocks` was called."""
    return any(part._run_block is not run_block for part in _block_networks(network))


def restore_blocks(network: nn.Module) -> None:
    """Run blocks as they are written, and keep all that their backward pass needs: as a network is built."""
    for part in _block_networks(network):
        part._run_block = run_block
    set_memory(network, "none")


@contextmanager
def uncompiled(network: nn.Module) -> Iterator[None]:
    """Inside, blocks run as they are written: for other shapes and batch sizes, and for second derivatives."""
    parts = _block_networks(network)
    before = [part._run_block for part in parts]
    for part in parts:
        part._run_block = run_block
    try:
        yield
    finally:
        for part, run in zip(parts, before, strict=True):
            part._run_block = run


def _block_networks(network: nn.Module) -> list[BlockNetwork]:
    return [module for module in network.modules() if isinstance(module, BlockNetwork)]
