"""Named columns in networks: their null values, and what they change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from latentflow.columns import ColumnRow
from latentflow.networks.column_embedding import ColumnEmbedding, ColumnInput
from latentflow.networks.dit import DiTConfig
from latentflow.networks.unet import UNetConfig
from latentflow.networks.velocity_network import VelocityPrediction, build_network
from latentflow.shapes import Condition

COLUMNS = [
    ColumnInput(ColumnRow("label", 2)),
    ColumnInput(ColumnRow("labels", 3)),
    ColumnInput(ColumnRow("number"), mean=50.0, deviation=20.0),
]
ROW = [1.0, 1.0, 0.0, 1.0, 0.0, 63.0, 0.0]
NULL = [2.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0]
NETWORKS = {
    "dit": DiTConfig(depth=1, hidden_size=32, num_heads=2, patch_size=1),
    "features": UNetConfig(channels=32, multipliers=[1], blocks_per_level=1, attention_factors=[]),
    "embedding": UNetConfig(
        channels=32, multipliers=[1], blocks_per_level=1, attention_factors=[], label_joins="embedding"
    ),
}


@pytest.fixture
def embedding() -> ColumnEmbedding:
    torch.manual_seed(0)
    made = ColumnEmbedding(COLUMNS, 16)
    made.reset_parameters()
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def test_the_vector_is_the_sum_of_those_of_the_columns(embedding):
    label, labels, number = embedding.parts
    found = embedding(torch.tensor([ROW]))
    parts = [label.table[1], labels.table[0] + labels.table[2], number(torch.tensor([[63.0, 0.0]]))[0]]
    torch.testing.assert_close(found[0], sum(parts))


def test_null_values_have_learned_vectors(embedding):
    label, labels, number = embedding.parts
    found = embedding(torch.tensor([NULL]))
    torch.testing.assert_close(found[0], label.table[2] + labels.table[3] + number.unknown)


def test_an_empty_set_is_not_an_unknown_one(embedding):
    empty = torch.tensor([[2.0, 0, 0, 0, 0, 0, 1]])
    assert not torch.allclose(embedding(empty), embedding(torch.tensor([NULL])))


def test_an_unknown_number_takes_its_value_from_nowhere(embedding):
    others = torch.tensor([[*NULL[:5], value, 1.0] for value in (0.0, 63.0, 1e6)])
    found = embedding(others)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_number_is_seen_in_deviations_from_the_mean():
    torch.manual_seed(0)
    raw, scaled = (
        ColumnEmbedding([ColumnInput(ColumnRow("number"), **how)], 8) for how in ({}, {"mean": 50.0, "deviation": 20.0})
    )
    raw.reset_parameters()
    scaled.load_state_dict(raw.state_dict())
    torch.testing.assert_close(raw(torch.tensor([[0.5, 0.0]])), scaled(torch.tensor([[60.0, 0.0]])))


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_see_each_column(kind):
    torch.manual_seed(0)
    network = build_network(NETWORKS[kind], VelocityPrediction(), channels=4, columns=COLUMNS).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    latents, time = torch.randn(1, 4, 4, 4), torch.tensor([0.5])

    def velocity(row):
        return network(latents, time, Condition(columns=torch.tensor([row])))

    own = velocity(ROW)
    for place, value in ((0, 0.0), (2, 1.0), (5, 20.0), (6, 1.0)):
        other = [value if number == place else old for number, old in enumerate(ROW)]
        assert not torch.allclose(velocity(other), own, atol=1e-5)


@pytest.mark.parametrize("kind", NETWORKS)
def test_what_does_not_fit_is_refused(kind):
    with_columns = build_network(NETWORKS[kind], VelocityPrediction(), channels=4, columns=COLUMNS)
    without = build_network(NETWORKS[kind], VelocityPrediction(), channels=4)
    latents, time = torch.randn(2, 4, 4, 4), torch.rand(2)
    with pytest.raises(ValueError, match=r"condition.columns: this network wants \(2, 7\), got none"):
        with_columns(latents, time, Condition())
    with pytest.raises(ValueError, match=r"condition.columns: this network wants \(2, 7\), got \(2, 6\)"):
        with_columns(latents, time, Condition(columns=torch.zeros(2, 6)))
    with pytest.raises(ValueError, match=r"condition.columns: this network wants none, got \(2, 7\)"):
        without(latents, time, Condition(columns=torch.zeros(2, 7)))


@pytest.mark.parametrize("kind", NETWORKS)
def test_gradients_reach_every_part_and_are_finite(kind):
    torch.manual_seed(0)
    network = build_network(NETWORKS[kind], VelocityPrediction(), channels=4, columns=COLUMNS)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    rows = torch.tensor([ROW, NULL, [0.0, 0, 1, 0, 0, 30, 0]])
    network(torch.randn(3, 4, 4, 4), torch.rand(3), Condition(columns=rows)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
