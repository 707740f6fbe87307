"""The loss on held-out images: the same draws for all conditions, and times spread evenly."""

import pytest
import torch

from latentflow.training import held_out
from latentflow.training.held_out import condition_sets, held_out_loss, images_for
from tests import tiny


@pytest.fixture(scope="module")
def model(kl):
    return tiny.model(kl, conditioning=tiny.SPATIAL)


@pytest.fixture
def steps(monkeypatch):
    """What each step gave: positions, times, losses."""
    seen, step = [], held_out.training_step

    def watched(model, network, batch, **options):
        result = step(model, network, batch, **options)
        seen.append((batch.positions, result.time, result.loss))
        return result

    monkeypatch.setattr(held_out, "training_step", watched)
    return seen


def of(model, segmented, given, **options):
    images = images_for(model, segmented)
    return held_out_loss(model, images, given, **{"num_draws": 50, "batch_size": 32, **options})


def test_the_mean_over_all_draws(model, segmented, steps):
    counted = []
    result = of(model, segmented, ["label"], on_images=counted.append)
    positions, times, losses = (torch.cat(parts) for parts in zip(*steps, strict=True))
    assert positions.tolist() == list(range(50))
    assert counted == [32, 18]
    assert result.told == ("label",)
    assert result.loss == pytest.approx(losses.double().mean().item(), rel=1e-6)
    inside = (times >= 0.3) & (times < 0.4)
    assert result.by_time[3] == pytest.approx(losses[inside].double().mean().item(), rel=1e-5)
    assert len(result.by_time) == 10


@pytest.mark.parametrize("batch_size", [7, 32, 64])
def test_times_are_spread_evenly_in_every_batch(model, segmented, steps, batch_size):
    """The last, smaller one included; times from the lower end only would give another loss."""
    of(model, segmented, [], batch_size=batch_size)
    for positions, times, _ in steps:
        assert sorted((times * len(positions)).long().tolist()) == list(range(len(positions)))


def test_conditions_change_only_the_velocity(model, segmented, steps):
    losses = {
        tuple(conditions): of(model, segmented, conditions).loss
        for conditions in condition_sets(model.config.conditioning)
    }
    assert list(losses) == [(), ("label",), ("inpainting",), ("semantic_map",), ("label", "inpainting", "semantic_map")]
    assert len(set(losses.values())) == 5
    times = [torch.cat([steps[place][1], steps[place + 1][1]]) for place in range(0, 10, 2)]
    assert all(torch.equal(times[0], other) for other in times)
