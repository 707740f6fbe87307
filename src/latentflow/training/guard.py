"""A run stops before a gradient that is not finite reaches the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from latentflow.data.batches import TrainingImages
from latentflow.errors import NonFiniteError
from latentflow.runtime import Runtime
from latentflow.training.step import StepLosses


class FiniteGuard:
    """Skips updates from the first gradient that is not finite, and raises an error that names the cause.

    The check does not synchronise with the device: the fused optimizer skips its update while `found_inf` is set, and
    the flag stays set from the first bad step on. It is read when the log is written; then the images of the bad step
    are read and computed again to find the cause.

    All processes find the same step and raise the same error, so none waits for another: gradients are summed over
    processes, and with loss scaling the flags are gathered.

    Args:
        scaled: with the loss scaling of fp16, which regularly sees infinite gradients and skips them itself; the losses
            are checked instead of the gradient.
        remedy: the end of the message.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, runtime: Runtime, *, scaled: bool, remedy: str):
        self.optimizer, self.runtime, self.scaled, self.remedy = optimizer, runtime, scaled, remedy
        self.every_step = runtime.device.type == "cpu"
        self.bad = torch.zeros((), device=runtime.device)
        self.num_bad = torch.zeros((), device=runtime.device)  # steps since the first bad one, and it
        self.positions: dict[int, list[Tensor]] = {}

    def watch(self, norm: Tensor, losses: Sequence[Tensor], step: int, positions: Sequence[Tensor]) -> None:
        """Check step `step` (the first is 0) before the optimizer runs.

        Args:
            norm: of the gradient, a scalar.
            losses: [B] of each micro-batch of this process.
            positions: [B] of each, on the CPU, to read the images again if necessary.
        """
        seen = torch.stack([loss.detach().sum() for loss in losses]).sum() if self.scaled else norm
        self.bad = torch.maximum(self.bad, (seen - seen != 0).to(self.bad.dtype))  # inf - inf and NaN - NaN are NaN
        self.num_bad += self.bad
        if not self.scaled:
            self.optimizer.found_inf, self.optimizer.grad_scale = self.bad, None
        self.positions[step] = list(positions)

    def is_due(self, step: int, log_every: int) -> bool:
        """Whether the flag is to be read now: with the log, or in every step on a CPU, where reading is free."""
        return self.every_step or step % log_every == 0

    def raise_if_bad(
        self, compare: Callable[..., StepLosses], network: nn.Module, images: TrainingImages, saved_at: int
    ) -> None:
        """Read the flag; all processes do this at the same step.

        Args:
            compare: (network, batch) => the losses of the batch.

        Raises:
            NonFiniteError: it is set; the message names the step, and the images or the parameter.
        """
        num_bad = int(self.runtime.gather(self.num_bad[None]).max() if self.scaled else self.num_bad)
        if not num_bad:
            self.positions.clear()
            return
        step = list(self.positions)[-num_bad]
        raise NonFiniteError(
            f"step {step + 1}: non-finite values {self._where(step, compare, network, images)}. The step was skipped; "
            f"the newest checkpoint is step {saved_at}. Check the images, or {self.remedy}"
        )

    def _where(self, step: int, compare: Callable[..., StepLosses], network: nn.Module, images: TrainingImages) -> str:
        """Compute a step again, each process its own share, and combine what they find."""
        broken: list[Tensor] = []
        network.zero_grad()
        try:
            for positions in self.positions[step]:
                result = compare(network, images.at(positions))
                broken.append(positions[~torch.isfinite(result.loss.detach()).cpu()])
                result.loss.mean().backward()
        except torch.OutOfMemoryError:  # compute is neither compiled nor recomputed here; the message then says less
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
