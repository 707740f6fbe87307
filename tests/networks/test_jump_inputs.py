"""What the network of a student takes besides the time: the span of a jump, and the guidance scale."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from latentflow.networks.dit import DiTConfig
from latentflow.networks.running import compile_blocks, set_memory
from latentflow.networks.unet import UNetConfig
from latentflow.networks.velocity_network import (
    DenoiserPrediction,
    NoisePrediction,
    VelocityPrediction,
    build_network,
)
from latentflow.shapes import Condition
from tests.tiny import randomise

DIT = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 2}
UNET = {"channels": 8, "multipliers": [1, 2], "blocks_per_level": 1, "norm_groups": 4, "attention_factors": [2]}
CONFIGS = {
    "classic": DiTConfig(**DIT),
    "modern": DiTConfig(**DIT, variant="modern", value_residual=True),
    **{variant: UNetConfig(**UNET, variant=variant, num_heads=1) for variant in ("adm", "ddpm++", "ncsn++")},
}
PREDICTIONS = (VelocityPrediction(), NoisePrediction(), DenoiserPrediction())


def pair(config, prediction=PREDICTIONS[0], *, guided: bool = True) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A network with random weights, and a student that begins as it."""
    given = {"channels": 4, "num_classes": 3, "inpainting": True}
    teacher = randomise(build_network(config, prediction, **given))
    torch.manual_seed(0)
    student = build_network(config, prediction, **given, jumps=True, guided=guided)
    added, unknown = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not unknown
    assert all("jump_embedding" in name for name in added)
    return teacher, student


def inputs() -> tuple[Tensor, Tensor, Condition]:
    latents, masked = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    condition = Condition(labels=torch.tensor([0, 3, 1]), masked_latents=masked, mask=torch.ones(3, 1, 8, 8))
    return latents, torch.tensor([0.2, 0.7, 1.0]), condition


JUMP = {"span": torch.tensor([0.0, 0.3, 1.0]), "guidance": torch.tensor([1.0, 2.5, 8.0])}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=lambda one: one.kind)
@torch.no_grad()
def test_begins_as_the_network_that_it_was_made_from(name, prediction):
    teacher, student = pair(CONFIGS[name], prediction)
    latents, time, condition = inputs()
    wanted = teacher(latents, time, condition)
    assert torch.equal(student(latents, time, replace(condition, **JUMP)), wanted)
    assert torch.equal(student(latents, time, condition), wanted)


@torch.no_grad()
def test_begins_so_in_half_precision():
    teacher, student = pair(CONFIGS["modern"])
    latents, time, condition = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(student(latents, time, replace(condition, **JUMP)), teacher(latents, time, condition))


@pytest.mark.parametrize("name", ["classic", "adm"])
def test_every_part_of_the_embeddings_learns(name):
    _, student = pair(CONFIGS[name])
    latents, time, condition = inputs()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(2):  # the first step moves the last layers off zero
        optimizer.zero_grad()
        student(latents, time, replace(condition, **JUMP)).square().mean().backward()
        optimizer.step()
    added = {n: p for n, p in student.named_parameters() if "jump_embedding" in n}
    assert len(added) == 8
    assert all(parameter.grad.abs().max() > 0 for parameter in added.values())


def trained(config, **options) -> torch.nn.Module:
    return randomise(pair(config, **options)[1])


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_span_and_guidance_matter_and_are_zero_and_one_by_default(name):
    student = trained(CONFIGS[name])
    latents, time, condition = inputs()
    plain = student(latents, time, condition)
    for given in ({"span": torch.zeros(3)}, {"guidance": torch.ones(3)}):
        assert torch.equal(student(latents, time, replace(condition, **given)), plain)
    for field, values in JUMP.items():
        changed = (student(latents, time, replace(condition, **{field: values})) - plain).abs().flatten(1).amax(1)
        assert (changed > 0).tolist() == [False, True, True]


@pytest.mark.parametrize("mode", ["recompute-cheap", "checkpoint"])
def test_recomputation_keeps_the_gradients(mode):
    student, gradients = trained(CONFIGS["modern"]), []
    latents, time, condition = inputs()
    for memory in ("none", mode):
        set_memory(student, memory)
        student.zero_grad()
        student(latents, time, replace(condition, **JUMP)).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in student.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_compiled_blocks_do_the_same():
    student = trained(CONFIGS["modern"])
    latents, time, condition = inputs()
    condition = replace(condition, **JUMP)
    wanted = student(latents, time, condition)
    compile_blocks(student, backend="aot_eager")
    torch.testing.assert_close(student(latents, time, condition), wanted)


@pytest.mark.parametrize(
    ("student", "given", "named"),
    [
        ("none", {"span": torch.zeros(3)}, "condition.span: this network wants none, as it is no student"),
        ("unguided", {"guidance": torch.ones(3)}, "condition.guidance: this network wants none"),
        ("guided", {"span": torch.zeros(2)}, r"condition.span: this network wants \[3\] or none, got \[2\]"),
    ],
)
def test_refused(student, given, named):
    plain, guided = pair(CONFIGS["classic"])
    network = {"none": plain, "guided": guided, "unguided": pair(CONFIGS["classic"], guided=False)[1]}[student]
    latents, time, condition = inputs()
    with pytest.raises(ValueError, match=named):
        network(latents, time, replace(condition, **given))
