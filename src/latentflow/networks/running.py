"""How a network runs its blocks: what is saved for the backward pass, and whether they are compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from latentflow.errors import ConfigError, nearest

Result = TypeVar("Result")  # of a block: a tensor, or several

MemoryMode = Literal["none", "recompute-cheap", "checkpoint"]
MEMORY_MODES: tuple[MemoryMode, ...] = get_args(MemoryMode)
"""From the fastest to the one that needs the least memory."""

# torch._dynamo gives up on a function with more graphs than this. In a U-Net every level needs several.
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
"""Results that "recompute-cheap" saves; everything else is cheap in comparison."""


def run_block(block: Callable[..., Result], memory: MemoryMode, draws: bool, *inputs: Any) -> Result:
    """block(*inputs), with the recomputation in the backward pass that `memory` asks for.

    Args:
        draws: whether the block draws random numbers, which recomputation must repeat.
    """
    if memory == "none" or not torch.is_grad_enabled():
        return block(*inputs)
    kept = {"context_fn": partial(create_selective_checkpoint_contexts, _PRODUCTS)} if memory != "checkpoint" else {}
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=draws, **kept)


class BlockNetwork(nn.Module):
    """A network that hands each of its blocks to `run`.

    The layers of its blocks declare which of their weights map hidden features to hidden features, in a class attribute
    `hidden_matrices`: the name of each sublayer, and of how many matrices of equal size the rows of its weight consist
    (3 for queries, keys and values in one). An optimizer for matrices, such as Muon, updates these, and AdamW all else:
    embeddings, modulation, output, vectors.

    Attributes:
        memory: set by `set_memory`.
        draws: whether blocks draw random numbers in training.
    """

    memory: MemoryMode = "none"
    draws: bool = False

    def __init__(self) -> None:
        super().__init__()
        self._run_block: Callable[..., Any] = run_block

    def run(self, block: Callable[..., Result], *inputs: Any) -> Result:
        """block(*inputs), compiled where `compile_blocks` was called."""
        return self._run_block(block, self.memory, self.draws, *inputs)

    def run_once(self, part: Callable[..., Result], *inputs: Any) -> Result:
        """The same for a small part that is not a block: nothing of it is recomputed."""
        return self._run_block(part, "none", self.draws, *inputs)


def set_memory(network: nn.Module, mode: MemoryMode) -> None:
    """Choose what the backward pass recomputes from now on; results stay the same.

    Args:
        network: as it was built, or wrapped (`NoisePredictor`, distributed).
        mode: "none": only what is cheap anyway (see `lean`). "recompute-cheap": the results of products, convolutions
            and attention are saved, and everything else is recomputed: about a third less memory for less than a tenth
            more time. "checkpoint": every block is recomputed from its inputs: the least memory, a third more time.

    Raises:
        ConfigError: no such mode.
    """
    if mode not in MEMORY_MODES:
        raise ConfigError(f"unknown memory mode {mode!r}; {nearest(mode, MEMORY_MODES)}")
    for part in _block_networks(network):
        part.memory = mode


def compile_blocks(network: nn.Module, *, backend: str = "inductor") -> None:
    """Compile the blocks of a network when they are first called, for the shapes of that call.

    Blocks of the same sizes share a compilation, also across networks. A new shape or batch size is compiled again.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
    compiled = torch.compile(run_block, fullgraph=True, dynamic=False, backend=backend)
    for part in _block_networks(network):
        part._run_block = compiled


def is_compiled(network: nn.Module) -> bool:
    """Whether `compile_blocks` was called."""
    return any(part._run_block is not run_block for part in _block_networks(network))


def restore_blocks(network: nn.Module) -> None:
    """Undo `compile_blocks` and `set_memory`."""
    for part in _block_networks(network):
        part._run_block = run_block
    set_memory(network, "none")


@contextmanager
def uncompiled(network: nn.Module) -> Iterator[None]:
    """A context without compiled blocks, for other shapes and batch sizes and for second derivatives."""
    parts = _block_networks(network)
    before = [part._run_block for part in parts]
    for part in parts:
        part._run_block = run_block
    try:
        yield
    finally:
        for part, run in zip(parts, before, strict=True):
            part._run_block = run


@contextmanager
def borrowed_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the network has other weights and is in eval mode; afterwards its own are restored, bit for bit.

    Its compiled blocks are not called: they would be compiled again for another shape of batch.
    """
    own = network.state_dict(keep_vars=True)
    differing = [name for name, tensor in own.items() if weights[name].data_ptr() != tensor.data_ptr()]  # not frozen
    tensors, others = [own[name] for name in differing], [weights[name] for name in differing]
    kept, modes = [tensor.detach().clone() for tensor in tensors], [(m, m.training) for m in network.modules()]
    try:
        _copy(tensors, others)
        network.eval()
        with uncompiled(network):
            yield
    finally:
        _copy(tensors, kept)
        for module, training in modes:
            module.training = training


@torch.no_grad()
def _copy(tensors: list[Tensor], values: list[Tensor]) -> None:
    if tensors:
        torch._foreach_copy_(tensors, values)


def _block_networks(network: nn.Module) -> list[BlockNetwork]:
    return [module for module in network.modules() if isinstance(module, BlockNetwork)]
