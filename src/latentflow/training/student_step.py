"""The mathematics of a step that teaches a student, from a batch to losses; see `latentflow.flow.flow_map`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from latentflow.data.batches import Batch
from latentflow.flow.flow_map import JumpTimes, average_loss, average_target
from latentflow.flow.guidance import guided_velocity
from latentflow.model.conditioning import ConditionName
from latentflow.model.flow_model import FlowModel
from latentflow.model.student_record import StudentRecord
from latentflow.randomness import ImageRandom, on_device
from latentflow.shapes import MOST_GUIDANCE, Condition
from latentflow.training.step import batch_condition, repeatable_dropout


@dataclass(frozen=True)
class StudentLosses:
    """The result of one forward pass.

    Attributes:
        loss: [B] float32, with its graph; see `average_loss`.
        error: [B] float32, mean |(u - u*) / a|^2, without weights.
        jumps: [B] bool, which images teach jumps.
    """

    loss: Tensor
    error: Tensor
    jumps: Tensor


def student_step(
    student: FlowModel,
    teacher: FlowModel,
    network: Callable[[Tensor, Tensor, Condition], Tensor],
    batch: Batch,
    *,
    times: JumpTimes,
    steps: int,
    batch_size: int,
    seed: int,
) -> StudentLosses:
    """Draw times, latents, noise, dropped conditions and a guidance scale for each image, and compare velocities.

    Every number is drawn from the image's own stream (seed, position), and how far the run has come follows from the
    position as well. Nothing synchronises with the device.

    Args:
        student: whose conditions and path are those of the teacher.
        teacher: frozen; it is guided as its student's record says.
        network: the student's network, possibly compiled and distributed; called under `runtime.autocast`.
        batch: from the data loader; its tensors go to the student's device. Positions may lie there already.
        steps: of the whole run.
        batch_size: images per optimizer step over all processes.
    """
    device, path = student.device, student.config.path
    positions = on_device(batch.positions, device)
    random = ImageRandom.at(seed, "step", positions, device).ahead(32 + 2 * math.prod(student.config.latent_shape))
    uniforms = random.uniform(3)
    batch = batch.to(device)
    moments = student.moments(batch.pixels) if batch.moments is None else batch.moments
    data = student.latents(moments, random)
    noise = random.normal(*data.shape[1:])
    dropped = student.config.conditioning.draw_dropped(random)
    condition = batch_condition(student, batch, data, dropped)

    rows = times.rows(len(data), device)
    jumps = torch.zeros(len(data), dtype=torch.bool, device=device).index_fill(0, rows, True)
    time, end = times.draw(uniforms[:, 0], uniforms[:, 1], jumps)
    shares = times.shares(positions.div(batch_size, rounding_mode="floor") / max(steps - 1, 1), time, end)
    scale = draw_scale(student, uniforms[:, 2], dropped)
    x = path.interpolate(data, noise, time)
    with torch.no_grad():
        target = teacher_velocity(student, teacher, x, time, condition, scale)
    inputs = replace(condition, span=time - end, guidance=scale if student.config.student.guided else None)

    # Each call has an autocast of its own: copies of the weights that it made without gradients would have none later.
    def call(called: Callable[..., Tensor], *given: Any) -> Tensor:
        with student.runtime.autocast(), repeatable_dropout(student.network, seed, batch.positions):
            return called(*given)

    def average(x: Tensor, time: Tensor, end: Tensor) -> Tensor:
        return call(student.network, x, time, replace(inputs.select(rows), span=time - end))

    ahead = average_target(average, *(one[rows] for one in (target, x, time, end, shares)))
    target = target.index_copy(0, rows, ahead)
    return StudentLosses(*average_loss(call(network, x, time, inputs), target, shares), jumps)


def draw_scale(student: FlowModel, uniform: Tensor, dropped: dict[ConditionName, Tensor]) -> Tensor:
    """The guidance scale of each image, [B] float32: log-uniform on [1, `MOST_GUIDANCE`], 1 where nothing is guided.

    Args:
        uniform: [B] in [0, 1).
        dropped: the images without each condition, [B] bool.
    """
    scale = (uniform * math.log(MOST_GUIDANCE)).exp().float()
    given = torch.zeros_like(scale, dtype=torch.bool)
    for name in guided_conditions(student):
        given = given | ~dropped[name]
    return torch.where(given, scale, 1.0)


def step_cost(record: StudentRecord, every: int) -> float:
    """The computation of a step in those of training the teacher: three forward passes, as its backward pass takes two.

    Args:
        record: of the student.
        every: one image in so many teaches jumps.
    """
    return 1 + calls_without_gradient(record, every) / 3


def calls_without_gradient(record: StudentRecord, every: int) -> float:
    """Forward passes of a step that need no gradient: two of the teacher where it is guided, and for 1 image in `every`
    one of the student."""
    return (2 if record.guided else 1) + 1 / every


def guided_conditions(student: FlowModel) -> list[ConditionName]:
    """The conditions by which a student's teacher is guided; none: it is not guided."""
    can_guide, chosen = student.config.conditioning.can_guide, student.config.sampling.guided_by
    return [name for name in can_guide if chosen is None or name in chosen]


def teacher_velocity(
    student: FlowModel, teacher: FlowModel, x: Tensor, time: Tensor, condition: Condition, scale: Tensor
) -> Tensor:
    """The velocity of the teacher, guided in the interval of its preset: [B, C, H, W].

    Args:
        x: [B, C, H, W].
        time, scale: [B].
    """
    record = student.config.student
    if not record.guided:
        return teacher.velocity(x, time, condition).to(x.dtype)
    low, high = record.guidance_interval
    scale = torch.where((time >= low) & (time <= high), scale, 1.0)
    null = student.config.conditioning.without(condition, guided_conditions(student))
    return guided_velocity(teacher.velocity, x, time, condition, null, scale, record.guided_channels)


class StudentMeter:
    """The losses of a run, summed on the device and read once per log line."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(5, device=device)

    def add(self, result: StudentLosses) -> None:
        """Take in a micro-batch."""
        jumps, loss = result.jumps.float(), result.loss.detach()
        terms = (loss, (1 - jumps) * result.error, jumps * result.error, 1 - jumps, jumps)
        self.sums += torch.stack([one.sum() for one in terms])

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The mean `loss`, and the mean errors of the velocity and of jumps, |u - v|^2 and |(u - u*) / a|^2.

        Args:
            reduce: sums a tensor over all processes.
        """
        loss, velocity, jump, num_velocities, num_jumps = reduce(self.sums).tolist()
        means = {"loss": loss / (num_velocities + num_jumps), "velocity_error": velocity / max(num_velocities, 1)}
        return {**means, "jump_error": jump / max(num_jumps, 1)}
