"""Muon: orthogonalised momentum for the matrices of a network's blocks.

With G the gradient of a matrix of m x n, B its momentum, mu = 0.95 and p the quintic polynomial of Newton-Schulz
(K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024),

    B <- mu B + (1 - mu) G,    U = mu B + (1 - mu) G                      momentum, Nesterov
    X <- U / |U|,  five times  X <- p(X) = a X + b (X X^T) X + c (X X^T)^2 X
    W <- W - rate * 0.2 sqrt(max(m, n)) X                                 arXiv 2502.16982, section 2.2

Each p moves the singular values of X towards 1 and leaves the singular vectors. The root mean square of an orthogonal X
is 1 / sqrt(max(m, n)), and that of AdamW's updates about 0.2: one learning rate serves both.

`torch.optim.Muon` computes the same for one matrix in bf16, and is the reference of the tests. It cannot be the base:
it knows no matrices within a weight, no convolutions, no batches of matrices, no float32, and no step that is skipped
without waiting for the device.

Between two orthogonalisations (`every` > 1) the last X is used again, at the rate of the step, and the momentum takes
in each gradient. It has a memory of twenty steps, so an X of one or two steps ago still points downhill: in a small
transformer at batch 64 its cosine with the X that it stands for was 0.75 and 0.69. That of the momentum itself was
0.44, and that of the new momentum times the last polynomial of X X^T, as Shampoo would use it (arXiv 1802.09568), 0.49:
the polynomial enlarges up to 485 times what was not in the momentum before. X belongs to the state, so runs resume
exactly. With it Muon takes as much memory as AdamW, without it half as much.

Legend: N matrices, m their smaller and n their larger side; those with more rows than columns are transposed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentflow.networks.graphs import Capture, Graph, Inputs, cuda_graph

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b and c of p: steep at zero, so that five steps are enough. Values above 0.002 end between 0.68 and 1.21."""
ITERATIONS = 5
RMS = 0.2
"""The root mean square of AdamW's updates, in units of the learning rate (arXiv 2502.16982, section 2.2)."""

_EPS = 1e-7  # of the norm: a gradient of zero gives an update of zero
_NUMBERS_TOGETHER = 2**25  # in a batch of matrices, which bounds the memory for it
_NUMBERS_CAPTURED = 2**26  # in all matrices; with more, computing takes longer than launching
_CALLS_BEFORE = 3  # of an update, until it is captured


@dataclass(frozen=True, eq=False)
class HiddenMatrix:
    """A weight that maps hidden features to hidden features.

    Attributes:
        weight: of a linear layer, or of a convolution: [out, in, ...] as a matrix of [out, in * ...].
        parts: matrices of equal size of which its rows consist, such as those of queries, keys and values.
    """

    weight: nn.Parameter
    parts: int = 1

    @property
    def rows(self) -> int:
        """Of each part."""
        return self.weight.shape[0] // self.parts

    @property
    def shape(self) -> tuple[int, int]:
        """m and n of each part."""
        columns = self.weight.numel() // self.weight.shape[0]
        return min(self.rows, columns), max(self.rows, columns)

    def to_wide(self, tensor: Tensor) -> Tensor:
        """A tensor with the shape of the weight => its parts [parts, m, n]."""
        matrices = tensor.reshape(self.parts, self.rows, -1)
        return matrices.mT if self.rows > matrices.shape[2] else matrices

    def from_wide(self, wide: Tensor) -> Tensor:
        """The inverse of `to_wide`."""
        return (wide if self.rows == wide.shape[1] else wide.mT).reshape(self.weight.shape)


def hidden_matrices(network: nn.Module) -> list[HiddenMatrix]:
    """The matrices of a network's blocks, as its layers declare them in `hidden_matrices`, in the order of layers.

    Frozen ones are not among them. Nor are factors of low rank: what is to be of orthogonal size is the change of their
    product, of which each factor sees a projection.
    """
    declared = (
        (getattr(module, name), parts)
        for module in network.modules()
        for name, parts in getattr(module, "hidden_matrices", {}).items()
    )
    layers = [(layer, parts) for layer, parts in declared if layer is not None]
    return [HiddenMatrix(layer.weight, parts) for layer, parts in layers if layer.weight.requires_grad]


def newton_schulz(x: Tensor) -> Tensor:
    """Five steps of Newton-Schulz on each of N matrices.

    Args:
        x: [N, m, n] with m <= n, each of a Frobenius norm of at most 1.

    Returns:
        [N, m, n], with the singular vectors of x; its singular values above 0.002 are now between 0.68 and 1.21.
    """
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        bent = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b X X^T + c (X X^T)^2
        x = torch.baddbmm(x, bent, x, beta=a)  # p(X) = (a + b X X^T + c (X X^T)^2) X
    return x


def orthogonalisation_flops(matrices: Sequence[HiddenMatrix], every: int = 1) -> float:
    """Floating-point operations of orthogonalisation per step on average: 2 for each multiply-add."""
    total = 0
    for matrix in matrices:
        m, n = matrix.shape
        total += matrix.parts * ITERATIONS * (2 * 2 * m * m * n + 2 * m**3)  # X X^T, its product with X, its square
    return total / every


class Muon(torch.optim.Optimizer):
    """Muon for some weights of a network and AdamW for all others, as one optimizer.

    Its groups are those of both, so that a learning rate set in each group serves both, and its state is by parameter:
    `momentum_buffer` and, with `every` > 1, `direction`, both like the weight; the moments of AdamW elsewhere. As with
    the fused AdamW, a step with `found_inf` set to one changes nothing, and the host does not wait for it.

    Products are computed in bf16 on CUDA and in float32 elsewhere: on a CPU they are slower in bf16. On CUDA the update
    of the matrices of a small network is one CUDA graph.

    Args:
        matrices: whose weights Muon updates.
        others: of all other parameters.
        learning_rate, weight_decay: of the matrices.
        momentum: mu.
        every: steps from one orthogonalisation to the next; `orthogonalises` says whether it is due.
    """

    _step_supports_amp_scaling = True  # GradScaler then sets `found_inf` and does not wait

    def __init__(
        self,
        matrices: Sequence[HiddenMatrix],
        others: torch.optim.AdamW,
        *,
        learning_rate: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        every: int = 1,
    ):
        own = {"lr": learning_rate, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([matrix.weight for matrix in matrices], own)
        self.others, self.every, self.orthogonalises = others, every, True
        self.batches = list(_batches(matrices))
        is_cuda = matrices[0].weight.device.type == "cuda"
        self.dtype = torch.bfloat16 if is_cuda else torch.float32
        is_small = sum(matrix.weight.numel() for matrix in matrices) <= _NUMBERS_CAPTURED
        self.capture: Capture | None = cuda_graph if is_cuda and is_small else None
        self._graphs: dict[object, Graph[None]] = {}
        self.state = others.state
        for matrix in matrices:
            entries = ("momentum_buffer", "direction") if every > 1 else ("momentum_buffer",)
            self.state[matrix.weight] = {entry: torch.zeros_like(matrix.weight) for entry in entries}
        self.param_groups += others.param_groups

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all weights by their gradients."""
        skips: Tensor | None = getattr(self, "found_inf", None)
        self.others.grad_scale, self.others.found_inf = None, skips
        self.others.step()
        gradients = {
            f"{number}.{place}": matrix.weight.grad
            for number, batch in enumerate(self.batches)
            for place, matrix in enumerate(batch)
            if matrix.weight.grad is not None
        }
        if not gradients:
            return
        device = next(iter(gradients.values())).device
        inputs = {**gradients, "rate": torch.full((), self.param_groups[0]["lr"], device=device)}
        if skips is not None:
            inputs["skips"] = skips
        self._updating(inputs)(inputs)

    def _updating(self, inputs: Inputs) -> Callable[[Inputs], None]:
        """`_update`, or a graph of it."""
        if self.capture is None:
            return self._update
        key = (*inputs, self.orthogonalises)
        if key not in self._graphs:
            self._graphs[key] = Graph(
                self._update, calls_before=_CALLS_BEFORE, what="Muon's update", capture=self.capture, clones=False
            )
        return self._graphs[key]

    def _update(self, inputs: Inputs) -> None:
        """Update the weights of all matrices.

        Args:
            inputs: the gradients by batch and place in it, `rate`, and `skips` if steps may be skipped.
        """
        for number, batch in enumerate(self.batches):
            pairs = ((matrix, inputs.get(f"{number}.{place}")) for place, matrix in enumerate(batch))
            if there := [(matrix, gradient) for matrix, gradient in pairs if gradient is not None]:
                self._update_batch(*zip(*there, strict=True), inputs["rate"], inputs.get("skips"))

    def _update_batch(
        self, batch: Sequence[HiddenMatrix], gradients: Sequence[Tensor], rate: Tensor, skips: Tensor | None
    ) -> None:
        """Update the weights of matrices of one shape."""
        weights, momentum = [matrix.weight for matrix in batch], self.param_groups[0]["momentum"]
        momenta = [self.state[weight]["momentum_buffer"] for weight in weights]
        if skips is not None:  # the momentum in place of the gradient: it stays, and all that follows is finite
            pairs = zip(momenta, gradients, strict=True)
            gradients = [torch.where(skips > 0, old, new) for old, new in pairs]
            rate = rate * (1 - skips)
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)  # B <- mu B + (1 - mu) G
        directions = self._directions(batch, gradients, momenta, momentum, skips)
        if decay := self.param_groups[0]["weight_decay"]:
            torch._foreach_mul_(weights, 1 - rate * decay)
        # W <- W - rate * 0.2 sqrt(max(m, n)) X
        torch._foreach_sub_(weights, torch._foreach_mul(directions, rate * RMS * math.sqrt(batch[0].shape[1])))

    def _directions(
        self,
        batch: Sequence[HiddenMatrix],
        gradients: Sequence[Tensor],
        momenta: Sequence[Tensor],
        momentum: float,
        skips: Tensor | None,
    ) -> Sequence[Tensor]:
        """X for each weight, in its shape."""
        kept = [self.state[matrix.weight]["direction"] for matrix in batch] if self.every > 1 else []
        if kept and not self.orthogonalises:
            return kept
        updates = torch._foreach_lerp(gradients, momenta, momentum)  # U = mu B + (1 - mu) G
        x = torch.cat([matrix.to_wide(update) for matrix, update in zip(batch, updates, strict=True)])
        x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=_EPS)
        parts = newton_schulz(x.to(self.dtype)).to(x.dtype).split([matrix.parts for matrix in batch])
        directions = [matrix.from_wide(part) for matrix, part in zip(batch, parts, strict=True)]
        for old, new in zip(kept, directions, strict=False):
            old.copy_(new if skips is None else torch.where(skips > 0, old, new))
        return directions


def _batches(matrices: Sequence[HiddenMatrix]) -> Iterator[list[HiddenMatrix]]:
    """The matrices of each shape, in batches of limited size."""
    shapes: dict[tuple[int, int], list[HiddenMatrix]] = {}
    for matrix in matrices:
        shapes.setdefault(matrix.shape, []).append(matrix)
    for (m, n), alike in shapes.items():
        most = max(_NUMBERS_TOGETHER // (m * n), 1)
        batch: list[HiddenMatrix] = []
        for matrix in alike:
            if batch and sum(one.parts for one in batch) + matrix.parts > most:
                yield batch
                batch = []
            batch.append(matrix)
        yield batch
