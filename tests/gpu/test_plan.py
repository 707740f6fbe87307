"""What `plan` estimates, against what a GPU was seen to take."""

from __future__ import annotations

import pytest
import torch

from latentflow.commands.plan import plan
from latentflow.commands.train import train
from latentflow.planning.request import PlanRequest

NETWORK = {"depth": 6, "hidden_size": 384, "num_heads": 6, "patch_size": 1, "variant": "modern"}


@pytest.mark.parametrize("variant", ["modern", "classic"])
@pytest.mark.parametrize("mode", ["none", "recompute-cheap", "checkpoint"])
def test_memory_is_what_was_planned(recipe, runtime, cuda, mode, variant):
    """Within a quarter: an estimate that is too low breaks runs, and one that is too high wastes the device."""
    place, training = runtime("bf16"), {"precision": "bf16", "steps": 3, "batch_size": 512, "compile": "false"}
    given = recipe("planned", network={**NETWORK, "variant": variant}, training={**training, "memory": mode})
    found = plan(given, "planned", PlanRequest(), place)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train(given, runtime=place)
    taken = torch.cuda.max_memory_allocated() - before
    assert 0.75 < found.memory.peak / taken < 1.34


def test_speed_is_what_was_planned(recipe, runtime, device):
    """A few probed steps say how long a step takes, to a factor; nothing is left behind on the device."""
    found = plan(recipe("probed"), "probed", PlanRequest(), runtime("fp32"))
    assert found.speed.whole
    assert 0 < found.seconds_per_step < 1
