"""A step as one graph: what a CUDA graph does is played by a tape of operations."""

from __future__ import annotations

import pytest
import torch

from latentflow.commands.train import train as train_command
from latentflow.data.batches import Batch
from latentflow.errors import ConfigError
from latentflow.training import loop, velocity
from latentflow.training.captured_step import CapturedPasses
from latentflow.training.log import read_metrics
from tests import tiny
from tests.dispatch import Recorder
from tests.training.test_loop import final, recipe  # noqa: F401

CPU = torch.device("cpu")


def batch(first: int, size: int = 4) -> Batch:
    """Consecutive positions, and moments that are them."""
    positions = torch.arange(first, first + size)
    return Batch(positions, positions + 100, moments=positions.double()[:, None] + torch.zeros(size, 3).double())


class Passes:
    """The loss w (position + moment) of each image of a batch, counting its calls."""

    def __init__(self, weight):
        self.weight, self.calls = weight, 0

    def __call__(self, batch):
        self.calls += 1
        losses = self.weight * (batch.positions + batch.moments[:, 0])
        losses.sum().backward()
        return losses.detach()


def test_every_call_gives_its_own_batch():
    weight = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    passes = Passes(weight)
    captured = CapturedPasses(passes, [weight], CPU, Recorder())
    for call in range(8):
        weight.grad = None
        losses = captured(batch(10 * call))
        expected = 2 * (10.0 * call + torch.arange(4))
        assert torch.equal(losses, weight.detach() * expected)
        assert weight.grad == expected.sum()
        with torch.no_grad():
            weight -= 0.125  # in place, as optimizers do
    assert passes.calls == 4, "later steps are the fourth one again"


def test_what_cannot_be_captured_goes_on_without(caplog):
    weight = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def refuses(compute):
        compute()
        raise RuntimeError("operation not permitted when stream is capturing")

    captured = CapturedPasses(Passes(weight), [weight], CPU, refuses)
    for call in range(6):
        weight.grad = None
        captured(batch(10 * call))
        assert weight.grad == 2 * (40 * call + 6)
    assert "kernel by kernel: operation not permitted when stream is capturing" in caplog.text


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"times": {"distribution": "logit_normal", "stratified": True}},
        {"optimizer": {"kind": "muon"}},
        {"training": {"align_weight": 1.0, "align_block": 1}},
        {"network": {"value_residual": True}},
    ],
    ids=["plain", "stratified", "muon", "head", "value residual"],
)
def test_a_run_of_graphs_ends_like_one_without(recipe, monkeypatch, given):  # noqa: F811
    """Weights, averages, optimizer and log, bit for bit: no number of the recorded batch is left in the graph."""
    training = {"log_every": 2, **given.pop("training", {})}
    plain = train_command(recipe("plain", training=training, **given), runtime=tiny.CPU).run
    monkeypatch.setattr(loop, "cuda_graph", recorder := Recorder())
    monkeypatch.setattr(velocity, "captures", lambda *_: True)
    graph = train_command(recipe("graph", training=training, **given), runtime=tiny.CPU).run
    assert recorder.count == 1
    assert final(graph) == final(plain)
    logs = [[{**line, "images_per_second": 0} for line in read_metrics(run)] for run in (plain, graph)]
    assert logs[0] == logs[1]


def test_a_graph_that_cannot_be_is_refused_before_anything_is_written(recipe, tmp_path):  # noqa: F811
    with pytest.raises(
        ConfigError, match=r"training.cuda_graph = true: a graph needs CUDA, and the device is cpu; use"
    ):
        train_command(recipe("run", training={"cuda_graph": True}), runtime=tiny.CPU)
    assert not (tmp_path / "run").exists()
