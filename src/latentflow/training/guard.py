"""Numbers that are not finite stop a run before they reach the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from latentflow.data.batches import Batch, TrainingImages
from latentflow.errors import NonFiniteError
from latentflow.training.step import StepResult


class FiniteGuard:
    """Stops the update before a gradient that is not finite can reach the weights.

    The check costs no synchronisation with the device: the fused optimizer itself skips its update while
    `found_inf` is set, and the flag stays set from the first bad step on. It is read when the log is
    written; then the bad step is computed again to say where it went wrong.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, *, scaled: bool, remedy: str):
        self.optimizer = optimizer
        self.remedy = remedy
        self.every_step = device.type == "cpu"
        # fp16 loss scaling meets infinite gradients in its normal course and skips them itself, but not a bad loss.
        self.scaled = scaled
        self.bad = torch.zeros((), device=device)
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self.batches: dict[int, list[Batch]] = {}

    def watch(self, norm: Tensor, losses: Tensor, step: int, batches: list[Batch]) -> None:
        """Look at step `step` (the first is 0) before the optimizer does.

        Args:
            norm: of the gradient, a scalar; under loss scaling the `losses` [B] are looked at instead.
            batches: what the step was computed from, to compute it again if need be.
        """
        is_bad = ~(torch.isfinite(losses.detach()).all() if self.scaled else torch.isfinite(norm))
        self.first_bad_step = torch.where((self.bad == 0) & is_bad, step, self.first_bad_step)
        self.bad = torch.maximum(self.bad, is_bad.to(self.bad.dtype))
        if not self.scaled:
            self.optimizer.found_inf, self.optimizer.grad_scale = self.bad, None
        self.batches[step] = batches

    def is_due(self, step: int, log_every: int) -> bool:
        """Whether the flag is to be read now: with the log, or at once where reading costs nothing."""
        return self.every_step or step % log_every == 0

    def raise_if_bad(
        self, compare: Callable[..., StepResult], network: nn.Module, images: TrainingImages, saved_at: int
    ) -> None:
        """Read the flag.

        Raises:
            NonFiniteError: it is set; the message names the step and the images or the parameter.
        """
        bad_step = int(self.first_bad_step)
        if bad_step < 0:
            self.batches.clear()
            return
        where = "in the gradient"
        network.zero_grad()
        for batch in self.batches[bad_step]:
            result = compare(network, batch)
            broken = ~torch.isfinite(result.loss.detach()).cpu()
            if broken.any():
                names = images.names_at(batch.positions[broken].tolist())
                where = f"in the loss of {len(names)} of {len(broken)} images, for example {names[0]}"
                break
            result.loss.mean().backward()
        else:
            bad = [n for n, p in network.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
            where = f"in the gradient of {bad[0]} and {len(bad) - 1} other parameters" if bad else where
        raise NonFiniteError(
            f"step {bad_step + 1}: a number that is not finite appeared {where}. The step was not taken; the newest "
            f"checkpoint is step {saved_at}. Look at the images, or {self.remedy}"
        )
