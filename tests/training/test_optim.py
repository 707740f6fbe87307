"""The optimizer: what decays, how gradients are clipped, and what a run of an earlier version meant."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from latentflow.networks.dit import DiTConfig
from latentflow.networks.unet import UNetConfig
from latentflow.networks.velocity_network import VelocityPrediction, build_network
from latentflow.runtime import Runtime
from latentflow.training.config import Recipe, load_recipe, recipe_names
from latentflow.training.optim import (
    OptimizerConfig,
    build_optimizer,
    clip_gradients,
    loss_scaler,
    scaler_state,
    split_by_decay,
)
from latentflow.training.settings import load_settings, to_yaml
from tests.dispatch import watched

EVERY_KEY = {
    "learning_rate": 1e-3,
    "betas": [0.9, 0.99],
    "weight_decay": 0.1,
    "warmup_steps": 0,
    "schedule": "constant",
    "final_learning_rate": 1e-5,
    "clip_norm": 1.0,
}
"""What runs wrote down before there was `weight_decay_on`."""


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "table": nn.Embedding(3, 4),
            "mix": nn.Conv2d(4, 4, 3),
            "norm": nn.GroupNorm(2, 4),
            "out": nn.Linear(4, 2),
        }
    )


def stepped(network: nn.Module, **given) -> dict[str, torch.Tensor]:
    """The weights after one step whose gradients are zero: only decay moves them."""
    optimizer = build_optimizer(network, OptimizerConfig(learning_rate=0.1, **given))
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return network.state_dict()


def test_only_matrices_decay():
    before = {name: tensor.clone() for name, tensor in small().state_dict().items()}
    after = stepped(small(), weight_decay=0.5)
    for name, tensor in before.items():
        factor = 0.95 if name in ("mix.weight", "out.weight") else 1.0  # 1 - learning rate * weight decay
        torch.testing.assert_close(after[name], factor * tensor, msg=name)


def test_all_decay_when_asked_to():
    before = {name: tensor.clone() for name, tensor in small().state_dict().items()}
    after = stepped(small(), weight_decay=0.5, weight_decay_on="all")
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], 0.95 * tensor, msg=name)


@pytest.mark.parametrize(
    "config",
    [
        DiTConfig(depth=2, hidden_size=32, num_heads=2, patch_size=2, variant="classic"),
        DiTConfig(depth=2, hidden_size=32, num_heads=2, patch_size=2, variant="modern"),
        UNetConfig(channels=32, multipliers=[1, 2], attention_factors=[2]),
    ],
    ids=["classic", "modern", "unet"],
)
def test_our_networks_are_split_as_said(config):
    network = build_network(config, VelocityPrediction(), channels=4, num_classes=3)
    decaying, spared = ({id(tensor) for tensor in part} for part in split_by_decay(network))
    assert not decaying & spared
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_matrix = isinstance(module, nn.Linear | nn.Conv2d) and name == "weight"
            assert (id(parameter) in decaying) == is_matrix, (type(module), name)
            assert id(parameter) in decaying | spared


def test_the_state_does_not_depend_on_the_groups():
    """Moments belong to parameters: a run may go on with other groups."""
    ours, theirs = small(), small()
    for network, given in ((ours, "matrices"), (theirs, "all")):
        optimizer = build_optimizer(network, OptimizerConfig(weight_decay=0.1, weight_decay_on=given))
        for number, parameter in enumerate(network.parameters(), start=1):
            parameter.grad = torch.full_like(parameter, number)
        optimizer.step()
        network.moments = [optimizer.state[parameter]["exp_avg"] for parameter in network.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(ours.moments, theirs.moments, strict=True))


# What a recipe means


def test_new_recipes_spare_and_published_ones_do_not():
    assert Recipe().optimizer.weight_decay_on == "matrices"
    for name in recipe_names():
        recipe = load_recipe(name)
        published = "the paper's" in recipe.description
        assert recipe.optimizer.weight_decay_on == ("all" if published else "matrices"), name


def test_a_run_of_an_earlier_version_decays_all(tmp_path):
    """It wrote down every key that there was."""
    (tmp_path / "recipe.yaml").write_text(f"optimizer: {EVERY_KEY}", encoding="utf-8")
    old = load_settings(Recipe, tmp_path / "recipe.yaml")
    assert old.optimizer.weight_decay_on == "all"
    (tmp_path / "again.yaml").write_text(to_yaml(old), encoding="utf-8")
    assert load_settings(Recipe, tmp_path / "again.yaml") == old
    (tmp_path / "mine.yaml").write_text("optimizer: {weight_decay: 0.1}", encoding="utf-8")
    assert load_settings(Recipe, tmp_path / "mine.yaml").optimizer.weight_decay_on == "matrices"
    chosen = load_settings(Recipe, tmp_path / "recipe.yaml", ["optimizer.weight_decay_on=matrices"])
    assert chosen.optimizer.weight_decay_on == "matrices"


def test_every_key_is_every_key():
    later = {"weight_decay_on", "kind", "momentum", "orthogonalise_every"}
    assert OptimizerConfig.model_fields.keys() == EVERY_KEY.keys() | later


# Gradients


def with_gradients(scale: float) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))]
    for parameter in parameters[:2]:
        parameter.grad = torch.full_like(parameter, scale)
    return parameters


@pytest.mark.parametrize("largest", [None, 1.0, 100.0])
def test_clipping_by_hand(largest):
    parameters = with_gradients(2.0)
    norm = clip_gradients(parameters, largest)
    assert norm.item() == pytest.approx(2 * math.sqrt(7))
    expected = 2.0 if largest != 1.0 else 1 / math.sqrt(7)
    for parameter in parameters[:2]:
        torch.testing.assert_close(parameter.grad, torch.full_like(parameter, expected), rtol=1e-5, atol=0)


def test_clipping_is_that_of_torch_bit_for_bit():
    ours, theirs = with_gradients(0.7), with_gradients(0.7)
    assert torch.equal(clip_gradients(ours, 0.3), nn.utils.clip_grad_norm_(theirs, 0.3))
    assert torch.equal(ours[0].grad, theirs[0].grad)


@pytest.mark.parametrize("largest", [None, 1.0])
def test_clipping_and_stepping_let_the_host_run_ahead(largest):
    network = small().to("meta")
    optimizer = build_optimizer(network, OptimizerConfig(weight_decay=0.1))
    for group in optimizer.param_groups:
        group["fused"], group["foreach"], group["capturable"] = False, True, False  # meta has no fused update
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with watched() as waits:
        norm = clip_gradients(list(network.parameters()), largest)
        optimizer.step()
        optimizer.zero_grad()
    assert not waits
    assert norm.device.type == "meta"
    assert all(parameter.grad is None for parameter in network.parameters())


# fp16


def test_a_loss_scaler_goes_on_where_it_was():
    """Steps since the last change count: the scale grows at the same step."""
    fp16 = Runtime(torch.device("cpu"), precision="fp16")

    def steps(scaler, number: int) -> None:
        weight = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for _ in range(number):
            scaler.scale(weight.sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    whole = loss_scaler(fp16, None, 0)
    whole.set_growth_interval(5)
    steps(whole, 8)
    first = loss_scaler(fp16, None, 0)
    first.set_growth_interval(5)
    steps(first, 3)
    assert scaler_state(first) == (65536.0, 3)
    second = loss_scaler(fp16, *scaler_state(first))
    second.set_growth_interval(5)
    assert scaler_state(second) == (65536.0, 3)  # before the first step, too
    steps(second, 5)
    assert scaler_state(second) == scaler_state(whole) == (131072.0, 3)


def test_other_precisions_have_no_loss_scale():
    for precision in ("fp32", "tf32", "bf16"):
        scaler = loss_scaler(Runtime(torch.device("cpu"), precision=precision), 1024.0, 3)
        assert scaler_state(scaler) == (None, 0)
        assert scaler.scale(torch.ones(1)).item() == 1
