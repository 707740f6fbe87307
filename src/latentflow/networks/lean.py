"""Layers that save little for the backward pass: cheap intermediate results are recomputed there.

Each is a plain function of tensors. `torch.compile` and the transforms of `torch.func` see this function; a compiler
decides what to save. Elsewhere a `torch.autograd.Function` computes the derivative from the arguments only. It can be
differentiated again.

Legend: B images, N tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.functional import linear

NORM_EPS = 1e-6


def scaled_norm(
    x: Tensor, scale: Tensor, shift: Tensor | None = None, *, centred: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """scale * (x - mean) / deviation + shift over the last axis, in float32 at least. Only `x` is saved for backward.

    Args:
        x: [..., D].
        scale, shift: broadcast to the shape of x.
        centred: LayerNorm (arXiv 1607.06450). Else the mean is taken as 0: RMSNorm (arXiv 1910.07467).
        dtype: of the result; None: that of x.
    """
    given = (x, scale, shift, centred, dtype or x.dtype)
    return _scaled_norm(*given) if _derived_elsewhere() else _ScaledNorm.apply(*given)


def linear_of(function: Callable[[Tensor], Tensor], x: Tensor, layer: nn.Linear) -> Tensor:
    """layer(function(x)); only `x` is saved for backward. For a function that is cheap compared with the layer.

    Args:
        function: elementwise or nearly so, with the dtype of `x`.
        x: [..., D], under autocast in half precision already.
    """
    if _derived_elsewhere():
        return layer(function(x))
    y = _LinearOf.apply(function, x, layer.weight, layer.bias)
    return layer.plus(y, linear_of(function, x, layer.lora_A)) if isinstance(layer, LowRankLinear) else y


class LowRankLinear(nn.Linear):
    """A linear layer of frozen weights, plus one of low rank: W x + b + scale B (A x). [..., in] => [..., out].

    See `latentflow.networks.low_rank`; it stands here because `linear_of` takes it apart.

    Args:
        layer: whose parameters it takes over.
        rank: rows of A and columns of B.
        scale: of their product.
    """

    def __init__(self, layer: nn.Linear, rank: int, scale: float):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        place: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        self.scale = scale
        self.lora_A = nn.utils.skip_init(nn.Linear, layer.in_features, rank, bias=False, **place)
        self.lora_B = nn.utils.skip_init(nn.Linear, rank, layer.out_features, bias=False, **place)

    def forward(self, x: Tensor) -> Tensor:
        return self.plus(super().forward(x), self.lora_A(x))

    def plus(self, y: Tensor, low: Tensor) -> Tensor:
        """y = W x + b [..., out] and low = A x [..., rank] => [..., out]."""
        return torch.add(y, self.lora_B(low), alpha=self.scale)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast multiplies on a device; None where it is off."""
    kind = device.type
    if kind == "meta":  # no autocast there; to ask torch which devices have it breaks the graphs of torch 2.11
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _derived_elsewhere() -> bool:
    """Whether derivatives are taken by something other than autograd, or not at all."""
    return (
        torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()  # they do not support a Function with only a backward pass
    )


def _scaled_norm(x: Tensor, scale: Tensor, shift: Tensor | None, centred: bool, dtype: torch.dtype) -> Tensor:
    normed, _ = _normed(x, centred)
    scale = scale.to(normed.dtype)
    y = normed * scale if shift is None else torch.addcmul(shift.to(normed.dtype), normed, scale)
    return y.to(dtype)


def _normed(x: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """(x - mean) / deviation, and 1 / deviation: [..., D] and [..., 1] in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if centred:
        x = x - x.mean(-1, keepdim=True)
    inverse = torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + NORM_EPS)
    return x * inverse, inverse


class _ScaledNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, scale: Tensor, shift: Tensor | None, centred: bool, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.centred, ctx.shift = centred, None if shift is None else (shift.shape, shift.dtype)
        return _scaled_norm(x, scale, shift, centred, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With n = (x - mean) / deviation and g = scale * grad: dx = (g - mean(g) - n * mean(n * g)) / deviation."""
        x, scale = ctx.saved_tensors
        n, inverse = _normed(x, ctx.centred)
        grad = grad.to(n.dtype)
        dx = dscale = dshift = None
        if ctx.needs_input_grad[0]:
            g = scale.to(n.dtype) * grad
            dx = torch.addcmul(g, n, (n * g).mean(-1, keepdim=True), value=-1)
            if ctx.centred:
                dx = dx - g.mean(-1, keepdim=True)
            dx = (dx * inverse).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dscale = (n * grad).sum_to_size(scale.shape).to(scale.dtype)
        if ctx.needs_input_grad[2]:
            shape, dtype = ctx.shift
            dshift = grad.sum_to_size(shape).to(dtype)
        return dx, dscale, dshift, None, None


class _LinearOf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, function: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.function, ctx.bias_dtype = function, None if bias is None else bias.dtype
        h = function(x)
        return linear(h, weight.to(h.dtype), None if bias is None else bias.to(h.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With h = function(x): dh = grad W, dW = grad^T h, and dx by the derivative of the function."""
        x, weight = ctx.saved_tensors
        twice = torch.is_grad_enabled()  # the derivative will be differentiated
        with torch.enable_grad():
            source = x if twice else x.detach().requires_grad_()
            h = ctx.function(source)
        dx = dweight = dbias = None
        if ctx.needs_input_grad[1]:
            (dx,) = torch.autograd.grad(h, source, grad @ weight.to(grad.dtype), create_graph=twice)
        rows = grad.flatten(0, -2)
        if ctx.needs_input_grad[2]:
            dweight = (rows.mT @ h.flatten(0, -2)).to(weight.dtype)
        if ctx.needs_input_grad[3]:
            dbias = rows.sum(0, dtype=ctx.bias_dtype)
        return None, dx, dweight, dbias
