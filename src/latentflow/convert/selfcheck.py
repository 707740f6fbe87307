"""Check by its outputs that a converted network flows from noise to images; no reference implementation is needed.

At t = 1 a velocity network sees pure noise x. On the linear path the velocity is noise - data, and its expectation
given x is v(x, 1) = x - mean(data): its slope along x is +1, or -1 if the sign is flipped. Integrated from t = 1 to
t = 0, the velocity leads to latents like those of images, whose neighbours are correlated; with time reversed it does
not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentflow.errors import ArtifactError
from latentflow.flow.guidance import ConditionedVelocity
from latentflow.flow.solvers import integrate
from latentflow.flow.times import sampling_times
from latentflow.model.flow_model import FlowModel
from latentflow.shapes import Condition

_STEPS = 8
_MOST_SIDE = 32  # larger latents are probed at this size, which every network accepts


@dataclass(frozen=True)
class SelfCheck:
    """Results of the probes.

    Attributes:
        slope: of the velocity along pure noise at t = 1, +1 for a trained network; None if the path is not linear.
        smoothness: correlation of neighbouring latents at t = 0; 0 for noise.
        deviation: standard deviation of the latents at t = 0; about 1.
        ignored: the inputs, of latents, time and label, that do not change the output.
    """

    slope: float | None
    smoothness: float
    deviation: float
    ignored: list[str]

    @property
    def flows(self) -> bool:
        """Whether the network seems trained, and flows from noise to images."""
        straight = self.slope is None or abs(self.slope - 1) < 0.3
        return straight and self.smoothness > 0.1 and 0.2 < self.deviation < 5 and not self.ignored

    @property
    def verdict(self) -> str:
        """One line for the user."""
        slope = "" if self.slope is None else f"slope {self.slope:+.2f} at noise (+1 expected), "
        figures = f"{slope}neighbours correlate {self.smoothness:.2f}, deviation {self.deviation:.2f}"
        ignored = f"; the output does not depend on {', '.join(self.ignored)}" if self.ignored else ""
        return f"{'flows from noise to images' if self.flows else 'does not look trained'}: {figures}{ignored}"


@torch.inference_mode()
def check_flow(model: FlowModel, labels: Sequence[int] | None = None) -> SelfCheck:
    """Probe a model with two images.

    Args:
        labels: two different labels, for a class-conditional model; else None.

    Raises:
        ArtifactError: the output is not finite, or sign or time are certainly reversed.
    """
    config = model.config
    channels, *sides = config.latent_shape
    multiple = config.network.size_multiple
    sides = [max(multiple, min(side, _MOST_SIDE) // multiple * multiple) for side in sides]
    x = torch.randn(2, channels, *sides, generator=torch.Generator().manual_seed(0)).to(model.device)
    condition = _condition(model, x, labels)
    ones = torch.ones(2, device=model.device)
    at_noise = model.velocity(x, ones, condition)
    if not at_noise.isfinite().all():
        raise ArtifactError("the converted network's output is not finite; its weights are damaged")

    others = {
        "latents": model.velocity(x.flip(0), ones, condition),
        "time": model.velocity(x, ones / 2, condition),
    }
    if labels is not None and labels[0] != labels[1]:
        others["label"] = model.velocity(x, ones, _condition(model, x, labels[::-1]))
    ignored = [name for name, other in others.items() if torch.equal(at_noise, other)]

    slope = None
    if config.path.kind == "linear":
        slope = ((at_noise * x).sum() / x.square().sum()).item()
        remainder = (at_noise - slope * x).std().item()
        if abs(slope + 1) < 0.3 and remainder < 1:
            raise ArtifactError(
                f"at t = 1 the velocity points against the noise (slope {slope:+.2f}): its sign or its time is "
                "reversed; the file comes from a program of another family"
            )
    data = integrate(ConditionedVelocity(model.velocity, condition), x, sampling_times(_STEPS), solver="euler").x
    return SelfCheck(slope, _smoothness(data), data.std().item(), ignored)


def _condition(model: FlowModel, x: Tensor, labels: Sequence[int] | None) -> Condition:
    given = None if labels is None else torch.tensor(labels)
    return model.config.conditioning.build(x.shape, model.device, Condition(labels=given))


def _smoothness(x: Tensor) -> float:
    """Correlation of horizontal and vertical neighbours within channels, after subtracting the channels' means."""
    x = x - x.mean((2, 3), keepdim=True)
    products = torch.cat([(x[..., 1:] * x[..., :-1]).flatten(), (x[..., 1:, :] * x[..., :-1, :]).flatten()])
    return (products.mean() / x.square().mean().clamp(min=1e-12)).item()
