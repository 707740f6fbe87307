"""The moving average: what is averaged and what is copied, in which precision, and at what cost."""

from __future__ import annotations

import torch
from torch import nn

from latentflow.training.ema import EMA
from tests.dispatch import watched


class Counted(nn.Module):
    """A weight, a statistic and a count."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def test_buffers_are_copied_and_parameters_are_averaged():
    network = Counted()
    ema = EMA(network, 0.9)
    with torch.no_grad():
        network.weight.fill_(1.0)
    network.mean.fill_(8.0)
    network.count += 3
    ema.update(1000)
    torch.testing.assert_close(ema.average["weight"], torch.full((2,), 0.1))
    assert ema.average["mean"].tolist() == [8.0, 8.0]
    assert ema.average["count"].item() == 3


def test_it_follows_parameters_that_move():
    """To another layout, for example: the parameter is the same, its memory another."""
    network = nn.Conv2d(4, 4, 3)
    ema = EMA(network, 0.0)
    network.to(memory_format=torch.channels_last)
    with torch.no_grad():
        network.weight.fill_(2.0)
    ema.update(1000)
    assert (ema.average["weight"] == 2).all()


def test_small_steps_are_not_lost_to_rounding():
    """Weights and average are float32, whatever the network computes in: 1e-4 of a bfloat16's step is nothing."""
    network = nn.Linear(1, 1, bias=False)
    ema = EMA(network, 0.9999)
    with torch.no_grad():
        network.weight.fill_(1.0)
        ema.average["weight"].fill_(0.0)
    for _ in range(100):
        ema.update(10**6)
    torch.testing.assert_close(ema.average["weight"].item(), 1 - 0.9999**100, rtol=1e-4, atol=0)


def test_an_update_is_two_operations_and_waits_for_nothing():
    network = Counted().to("meta")
    ema = EMA(network, 0.9)
    with watched() as waits, torch.profiler.profile() as profile:
        ema.update(3)
    assert not waits
    called = {event.key for event in profile.key_averages() if event.key.startswith("aten::_foreach")}
    assert called == {"aten::_foreach_lerp_", "aten::_foreach_copy_"}
