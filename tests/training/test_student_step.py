"""A step that teaches a student, against hand computation with the networks of two tiny models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from latentflow.api import LatentFlow
from latentflow.data.batches import Batch, SpatialData, TrainingImages
from latentflow.data.cache.reader import LatentCache
from latentflow.flow.flow_map import JumpTimes
from latentflow.runtime import Runtime
from latentflow.shapes import MOST_GUIDANCE
from latentflow.training.student_step import StudentMeter, draw_scale, guided_conditions, student_step, teacher_velocity
from tests import tiny

HOW = {"times": JumpTimes(), "steps": 100, "batch_size": 8, "seed": 0}


@pytest.fixture(scope="module")
def teacher(kl) -> LatentFlow:
    return tiny.model(kl, time_scale=20.0, guidance=2.0)


@pytest.fixture
def student(teacher) -> LatentFlow:
    made = tiny.student(teacher, seed=1)
    made.network.train().requires_grad_()
    return made


@pytest.fixture
def batch(cache) -> Batch:
    return TrainingImages(LatentCache(cache), seed=0, flip=False).at(range(8))


def test_every_second_image_jumps_and_the_rest_follow_the_teacher(teacher, student, batch):
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def network(x, time, condition):
        seen.append((time, condition.span, condition.guidance))
        return student.network(x, time, condition)

    result = student_step(student, teacher, network, batch, **HOW)
    assert result.jumps.tolist() == [False, True] * 4
    ((time, span, scale),) = seen
    assert ((span > 0) == result.jumps).all()
    assert (span <= time).all()
    assert (scale >= 1).all() and (scale <= MOST_GUIDANCE).all()
    assert result.loss.dtype == torch.float32 and (result.loss > 0).all()


def test_a_student_that_is_its_teacher_has_no_error_without_guidance(teacher, batch):
    fresh = tiny.student(teacher)
    record = fresh.config.student.model_copy(update={"guided": False})
    fresh.config = fresh.config.model_copy(update={"student": record})
    result = student_step(fresh, teacher, fresh.network, batch, **HOW)
    assert result.error[~result.jumps].max() < 1e-10
    assert result.error[result.jumps].max() > 1e-3  # a velocity is not its own average


def test_the_gradient_is_that_of_the_prediction_alone(teacher, student, batch):
    """Neither the target nor the weight has one: what the network returned is all that the loss depends on."""
    calls = []

    def network(x, time, condition):
        calls.append(student.network(x, time, condition))
        return calls[0]

    student_step(student, teacher, network, batch, **HOW).loss.sum().backward()
    assert all(parameter.grad is not None for parameter in student.network.parameters())
    assert all(parameter.grad is None for parameter in teacher.network.parameters())
    assert len(calls) == 1


def test_under_autocast_the_gradients_reach_every_weight(cache, kl, batch):
    """The student is called without gradients first; copies of weights in bf16 from then must not be used again."""
    runtime = Runtime(torch.device("cpu")).with_precision("bf16")
    teacher = tiny.model(kl, time_scale=20.0, guidance=2.0).to(runtime)
    student = tiny.student(teacher, seed=1).to(runtime)
    student.network.train().requires_grad_()
    result = student_step(student, teacher, student.network, batch, **HOW)
    result.loss.mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in student.network.parameters())


def test_numbers_follow_from_the_positions(teacher, student, cache):
    images = TrainingImages(LatentCache(cache), seed=0, flip=False)
    whole = student_step(student, teacher, student.network, images.at(range(8)), **HOW)
    halves = [student_step(student, teacher, student.network, images.at(r), **HOW) for r in (range(4), range(4, 8))]
    torch.testing.assert_close(whole.loss, torch.cat([half.loss for half in halves]))
    other = student_step(student, teacher, student.network, images.at(range(8)), **{**HOW, "seed": 1})
    assert not torch.allclose(whole.loss, other.loss)


def test_the_share_of_the_teacher_falls_with_the_position(teacher, student, cache):
    """Late in a run a jump's first part is shorter, so its error weighs the same difference more."""
    shares = []

    class Seen(JumpTimes):
        def shares(self, progress: Tensor, time: Tensor, end: Tensor) -> Tensor:
            shares.append(progress)
            return super().shares(progress, time, end)

    images = TrainingImages(LatentCache(cache), seed=0, flip=False)
    for first in (0, 8 * 99):
        student_step(student, teacher, student.network, images.at(range(first, first + 8)), **{**HOW, "times": Seen()})
    assert [one.tolist() for one in shares] == [[0.0] * 8, [1.0] * 8]


def test_scale_is_one_where_nothing_is_guided(student):
    uniform = torch.linspace(0, 0.999, 1000, dtype=torch.float64)
    dropped = torch.arange(1000) % 2 == 0
    scale = draw_scale(student, uniform, {"label": dropped})
    assert (scale[dropped] == 1).all()
    assert scale.log()[~dropped].mean().item() == pytest.approx(torch.tensor(MOST_GUIDANCE).log().item() / 2, abs=0.01)


def test_guided_velocity_in_the_interval_of_the_teacher(teacher, student):
    record = student.config.student.model_copy(update={"guidance_interval": (0.3, 0.8), "guided_channels": 2})
    student.config = student.config.model_copy(update={"student": record})
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    time, scale = torch.tensor([0.1, 0.5, 0.7, 0.9]), torch.tensor([4.0, 4.0, 1.0, 4.0])
    condition = student.config.conditioning.build(x.shape, "cpu")
    condition = replace(condition, labels=torch.tensor([0, 1, 2, 0]))
    found = teacher_velocity(student, teacher, x, time, condition, scale)
    plain = teacher.network(x, time, condition)
    null = teacher.network(x, time, replace(condition, labels=torch.full((4,), 3)))
    torch.testing.assert_close(found[[0, 2, 3]], plain[[0, 2, 3]])
    torch.testing.assert_close(found[1, :2], (null + 4 * (plain - null))[1, :2])
    torch.testing.assert_close(found[1, 2:], plain[1, 2:])


def test_all_conditions(kl, segmented):
    """Maps, holes and labels, each dropped as the teacher was trained; guidance by all of them."""
    from latentflow.data.sources.images import open_images

    teacher = tiny.model(kl, conditioning=tiny.SPATIAL, time_scale=20.0, guidance=2.0)
    student = tiny.student(teacher, seed=1)
    assert guided_conditions(student) == ["label", "inpainting", "semantic_map"]
    spatial = SpatialData(tiny.FACTOR, holes=teacher.config.masks, maps=True)
    images = TrainingImages(open_images(segmented, tiny.IMAGE_SIZE), seed=0, flip=False, spatial=spatial)
    assert student_step(student, teacher, student.network, images.at(range(8)), **HOW).loss.isfinite().all()


def test_meter(teacher, student, batch):
    result, meter = student_step(student, teacher, student.network, batch, **HOW), StudentMeter(torch.device("cpu"))
    meter.add(result)
    means = meter.means(lambda sums: sums)
    assert means["loss"] == pytest.approx(result.loss.mean().item())
    assert means["velocity_error"] == pytest.approx(result.error[~result.jumps].mean().item())
    assert means["jump_error"] == pytest.approx(result.error[result.jumps].mean().item())
