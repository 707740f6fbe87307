"""Numbers that are not finite: found in any micro-batch of any process, by all of them, and nobody waits."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from latentflow.errors import NonFiniteError
from latentflow.runtime import Runtime
from latentflow.training.guard import FiniteGuard
from latentflow.training.optim import OptimizerConfig, build_optimizer
from tests import tiny
from tests.dispatch import watched


class Images:
    """Images by position; what is read is counted."""

    def __init__(self, bad: tuple[int, ...] = ()):
        self.bad, self.read = bad, []

    def at(self, positions: torch.Tensor | range) -> SimpleNamespace:
        positions = [int(position) for position in positions]
        self.read += positions
        values = torch.tensor([float("nan") if position in self.bad else float(position) for position in positions])
        return SimpleNamespace(positions=torch.tensor(positions), values=values)

    def names_at(self, positions: list[int]) -> list[str]:
        return [f"{position}.png" for position in positions]


def compare(network: nn.Module, batch: SimpleNamespace) -> SimpleNamespace:
    loss = network(batch.values[:, None]).square().squeeze(1)
    return SimpleNamespace(loss=loss)


def train(
    runtime: Runtime, images: Images, steps: range, *, scaled: bool = False, hook=None, size: int = 2
) -> nn.Module:
    """Steps of two micro-batches of `size` images in each process; the guard is read at the end."""
    torch.manual_seed(0)
    network = nn.Linear(1, 1)
    if hook:
        network.weight.register_hook(hook)
    optimizer = build_optimizer(network, OptimizerConfig())
    guard = FiniteGuard(optimizer, runtime, scaled=scaled, remedy="do something")
    for step in steps:
        first = (step * runtime.world + runtime.rank) * 2 * size
        parts = [torch.arange(first, first + size), torch.arange(first + size, first + 2 * size)]
        losses = [compare(network, images.at(part)).loss for part in parts]
        torch.cat(losses).mean().backward()
        norm = nn.utils.get_total_norm([parameter.grad for parameter in network.parameters()])
        images.read.clear()
        guard.watch(norm, losses, step, parts)
        if not scaled:
            optimizer.step()
        optimizer.zero_grad()
    guard.raise_if_bad(compare, network, images, saved_at=1)
    assert not guard.positions
    return network


@pytest.mark.parametrize("scaled", [False, True])
def test_good_steps_pass_and_nothing_is_kept(scaled):
    images = Images()
    train(tiny.CPU, images, range(5), scaled=scaled)
    assert images.read == []


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("bad", "step", "found", "example"),
    [((0, 16), 1, 1, 0), ((9, 16), 3, 1, 9), ((15,), 4, 1, 15), ((16, 19), 5, 2, 16)],
)
def test_any_image_of_any_micro_batch_is_found(scaled, bad, step, found, example):
    """Read with the log only, five steps later at most: the first bad step counts, and its images are read again."""
    images = Images(bad)
    with pytest.raises(NonFiniteError) as caught:
        train(tiny.CPU, images, range(5), scaled=scaled)
    assert str(caught.value) == (
        f"step {step}: non-finite values in the loss of {found} of 4 images, for example "
        f"{example}.png. The step was skipped; the newest checkpoint is step 1. Check the images, or do something"
    )
    assert images.read == list(range(4 * step - 4, 4 * step))


def test_the_weights_are_those_before_the_bad_step():
    sound = train(tiny.CPU, Images(), range(2))
    torch.manual_seed(0)
    network = nn.Linear(1, 1)
    optimizer, images = build_optimizer(network, OptimizerConfig()), Images((9,))
    guard = FiniteGuard(optimizer, tiny.CPU, scaled=False, remedy="")
    for step in range(5):
        batch = images.at(range(4 * step, 4 * step + 4))
        loss = compare(network, batch).loss
        loss.mean().backward()
        norm = nn.utils.get_total_norm([parameter.grad for parameter in network.parameters()])
        guard.watch(norm, [loss], step, [batch.positions])
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(network.weight, sound.weight)


def test_a_gradient_that_is_bad_while_the_loss_is_not():
    with pytest.raises(NonFiniteError, match=r"step 1: .* in the gradient of weight and 0 other parameters"):
        train(tiny.CPU, Images(), range(2), hook=lambda gradient: gradient * float("inf"))


def test_what_cannot_be_computed_again_is_an_error_all_the_same(monkeypatch):
    def full(network, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    guard = FiniteGuard(build_optimizer(nn.Linear(1, 1), OptimizerConfig()), tiny.CPU, scaled=False, remedy="")
    guard.watch(torch.tensor(float("inf")), [torch.ones(2)], 0, [torch.arange(2)])
    with pytest.raises(NonFiniteError, match="non-finite values in the gradient"):
        guard.raise_if_bad(full, nn.Linear(1, 1), Images(), 0)


@pytest.mark.parametrize("scaled", [False, True])
def test_watching_waits_for_nothing_and_keeps_no_images(scaled):
    runtime = Runtime(torch.device("meta"))
    guard = FiniteGuard(build_optimizer(nn.Linear(1, 1), OptimizerConfig()), runtime, scaled=scaled, remedy="")
    norm, losses = torch.empty((), device="meta"), [torch.empty(8, device="meta") for _ in range(2)]
    with watched() as waits:
        for step in range(3):
            guard.watch(norm, losses, step, [torch.arange(8), torch.arange(8)])
    assert not waits
    assert {part.dtype for parts in guard.positions.values() for part in parts} == {torch.int64}


# Several processes


@dataclass(frozen=True)
class Thread(Runtime):
    """One of two processes that are threads of this one."""

    meeting: threading.Barrier | None = None
    parts: dict | None = None

    def gather(self, tensor: Tensor) -> Tensor:
        self.parts[self.rank] = tensor
        self.meeting.wait(20)
        found = torch.cat([self.parts[rank] for rank in range(self.world)])
        self.meeting.wait(20)
        return found


def together(act) -> list:
    meeting, parts = threading.Barrier(2), {}
    runtimes = [Thread(torch.device("cpu"), rank, 2, meeting=meeting, parts=parts) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(act, runtimes))


@pytest.mark.parametrize(("bad", "step"), [((5,), 1), ((17, 20, 27), 3), ((12, 15, 21), 2)])
def test_a_bad_loss_of_one_process_is_the_same_error_in_all(bad, step):
    """Under loss scaling each process looks at its own losses: 8 images a step, the second half of them another's."""

    def run(runtime: Runtime) -> str:
        with pytest.raises(NonFiniteError) as caught:
            train(runtime, Images(bad), range(4), scaled=True)
        return str(caught.value)

    one, other = together(run)
    assert one == other
    here = [position for position in bad if position // 8 == step - 1]
    assert f"step {step}: " in one
    assert f"in the loss of {len(here)} of 8 images, for example {here[0]}.png" in one


def test_processes_that_find_nothing_go_on_together():
    assert len(together(lambda runtime: train(runtime, Images(), range(3), scaled=True))) == 2
