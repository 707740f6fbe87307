"""Numbers that are not finite stop a run before they reach the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from latentflow.data.batches import TrainingImages
from latentflow.errors import NonFiniteError
from latentflow.runtime import Runtime
from latentflow.training.step import StepResult


class FiniteGuard:
    """Stops the update before a gradient that is not finite can reach the weights.

    The check costs no synchronisation with the device: the fused optimizer itself skips its update while
    `found_inf` is set, and the flag stays set from the first bad step on. It is read when the log is
    written; then the images of the bad step are read and computed again to say where it went wrong.

    All processes find the same step and raise the same error, so that none is left waiting for another: gradients have
    been summed over them, and where losses are looked at, what each found is gathered.

    Args:
        scaled: under the loss scaling of fp16, which meets infinite gradients in its normal course and skips them
            itself: then losses are looked at in place of the gradient.
        remedy: the end of the message.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, runtime: Runtime, *, scaled: bool, remedy: str):
        self.optimizer, self.runtime, self.scaled, self.remedy = optimizer, runtime, scaled, remedy
        self.every_step = runtime.device.type == "cpu"
        self.bad = torch.zeros((), device=runtime.device)
        self.num_bad = torch.zeros((), device=runtime.device)  # steps since the first bad one, and it
        self.positions: dict[int, list[Tensor]] = {}

    def watch(self, norm: Tensor, losses: Sequence[Tensor], step: int, positions: Sequence[Tensor]) -> None:
        """Look at step `step` (the first is 0) before the optimizer does.

        Args:
            norm: of the gradient, a scalar.
            losses: [B] of each micro-batch of this process.
            positions: [B] of each, on the CPU, to read the images again if need be.
        """
        seen = torch.stack([loss.detach().sum() for loss in losses]).sum() if self.scaled else norm
        self.bad = torch.maximum(self.bad, (seen - seen != 0).to(self.bad.dtype))  # inf - inf and NaN - NaN are NaN
        self.num_bad += self.bad
        if not self.scaled:
            self.optimizer.found_inf, self.optimizer.grad_scale = self.bad, None
        self.positions[step] = list(positions)

    def is_due(self, step: int, log_every: int) -> bool:
        """Whether the flag is to be read now: with the log, or at once where reading costs nothing."""
        return self.every_step or step % log_every == 0

    def raise_if_bad(
        self, compare: Callable[..., StepResult], network: nn.Module, images: TrainingImages, saved_at: int
    ) -> None:
        """Read the flag; all processes do so at the same step.

        Args:
            compare: computes a batch, with the `network` that is given.

        Raises:
            NonFiniteError: it is set; the message names the step and the images or the parameter.
        """
        num_bad = int(self.runtime.gather(self.num_bad[None]).max() if self.scaled else self.num_bad)
        if not num_bad:
            self.positions.clear()
            return
        step = list(self.positions)[-num_bad]
        raise NonFiniteError(
            f"step {step + 1}: a number that is not finite appeared {self._where(step, compare, network, images)}. The "
            f"step was not taken; the newest checkpoint is step {saved_at}. Look at the images, or {self.remedy}"
        )

    def _where(self, step: int, compare: Callable[..., StepResult], network: nn.Module, images: TrainingImages) -> str:
        """Compute a step again, in every process its own share, and join what they find."""
        broken: list[Tensor] = []
        network.zero_grad()
        try:
            for positions in self.positions[step]:
                result = compare(network, images.at(positions))
                broken.append(positions[~torch.isfinite(result.loss.detach()).cpu()])
                result.loss.mean().backward()
        except torch.OutOfMemoryError:  # nothing is compiled here, nothing recomputed; then the message says less
            pass
        names = [name for name, _ in network.named_parameters()]
        bad = [n for n, p in enumerate(network.parameters()) if p.grad is not None and not p.grad.isfinite().all()]
        found = self.runtime.gather(torch.cat([*broken, torch.zeros(0, dtype=torch.int64)])).tolist()
        parameters = sorted(set(self.runtime.gather(torch.tensor(bad, dtype=torch.int64)).tolist()))
        if found:
            num_images = self.runtime.world * sum(map(len, self.positions[step]))
            return f"in the loss of {len(found)} of {num_images} images, for example {images.names_at(found)[0]}"
        if parameters:
            return f"in the gradient of {names[parameters[0]]} and {len(parameters) - 1} other parameters"
        return "in the gradient"
