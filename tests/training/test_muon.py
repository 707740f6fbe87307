"""Muon: what its polynomial does to singular values, which weights it updates, and exact resume."""

from __future__ import annotations

import math
import random
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from latentflow.artifacts import read_json, read_tensors
from latentflow.commands.train import train as train_command
from latentflow.errors import ConfigError
from latentflow.networks.dit import DiTConfig
from latentflow.networks.unet import UNetConfig
from latentflow.networks.velocity_network import VelocityPrediction, build_network
from latentflow.training.checkpoint import newest_checkpoint
from latentflow.training.config import Recipe
from latentflow.training.first_stage import AutoencoderRecipe
from latentflow.training.guard import FiniteGuard
from latentflow.training.log import read_metrics
from latentflow.training.muon import (
    COEFFICIENTS,
    ITERATIONS,
    RMS,
    HiddenMatrix,
    Muon,
    hidden_matrices,
    newton_schulz,
    orthogonalisation_flops,
)
from latentflow.training.optim import OptimizerConfig, build_optimizer, optimizer_bytes, prepare_step
from latentflow.training.settings import load_settings, to_yaml
from tests import processes, tiny
from tests.dispatch import Recorder, watched

CONFIGS = {
    "classic": DiTConfig(depth=2, hidden_size=32, num_heads=2, patch_size=2, variant="classic"),
    "modern": DiTConfig(depth=2, hidden_size=32, num_heads=2, patch_size=2, variant="modern"),
    "unet": UNetConfig(channels=32, multipliers=[1, 2], attention_factors=[2]),
    "ncsn++": UNetConfig(channels=32, multipliers=[1, 2], attention_factors=[2], variant="ncsn++"),
}


def network_of(name: str) -> nn.Module:
    return build_network(CONFIGS[name], VelocityPrediction(), channels=4, num_classes=3)


def quintic(singular: Tensor) -> Tensor:
    """What five steps make of singular values, in float64."""
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        singular = a * singular + b * singular**3 + c * singular**5
    return singular


def of_singular_values(rows: int, columns: int, singular: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """U [rows, k], V [columns, k] and U diag(singular) V^T, all float64."""
    generator = torch.Generator().manual_seed(seed)
    sides = (torch.randn(side, len(singular), generator=generator, dtype=torch.float64) for side in (rows, columns))
    left, right = (torch.linalg.qr(side).Q for side in sides)
    return left, right, left @ (singular[:, None] * right.T)


class Blocks(nn.Module):
    """A weight of three matrices, a tall one, a convolution and a vector, which declares them."""

    hidden_matrices = {"fused": 3, "tall": 1, "mix": 1, "absent": 1}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fused = nn.Linear(8, 24)
        self.tall = nn.Linear(8, 20, bias=False)
        self.mix = nn.Conv2d(4, 8, 3)
        self.absent = None
        self.out = nn.Linear(8, 8)

    def set_gradients(self, seed: int, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


# The polynomial


@pytest.mark.parametrize(("m", "n"), [(6, 6), (5, 40)])
def test_singular_values_go_through_the_polynomial_and_vectors_stay(m, n):
    singular = torch.tensor([0.9, 0.3, 0.2, 0.05, 0.01, 0.0][:m], dtype=torch.float64)
    left, right, matrix = of_singular_values(m, n, singular)
    found = newton_schulz(matrix[None].float())[0].double()
    torch.testing.assert_close(found, left @ (quintic(singular)[:, None] * right.T), rtol=0, atol=2e-5)


def test_the_result_is_orthogonal_but_for_the_tolerance_of_the_polynomial():
    """Singular values from 0.68 to 1.21, of a matrix whose condition is 300."""
    singular = torch.logspace(0, math.log10(1 / 300), 16, dtype=torch.float64)
    _, _, matrix = of_singular_values(16, 24, singular / singular.norm())
    found = torch.linalg.svdvals(newton_schulz(matrix[None].float())[0])
    assert found.min() > 0.68
    assert found.max() < 1.21


def test_an_orthogonal_matrix_keeps_its_shape():
    _, _, matrix = of_singular_values(8, 8, torch.ones(8, dtype=torch.float64))
    found = newton_schulz(matrix[None].float() / math.sqrt(8))[0].double()
    expected = quintic(torch.tensor(8**-0.5, dtype=torch.float64)) * matrix
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_matrices_of_a_batch_do_not_meet():
    batch = torch.randn(5, 6, 9, generator=torch.Generator().manual_seed(0)) / 9
    whole = newton_schulz(batch)
    for one, matrix in zip(whole, batch, strict=True):
        torch.testing.assert_close(one, newton_schulz(matrix[None])[0], rtol=0, atol=1e-6)


# One step


def test_one_step_against_a_singular_value_decomposition():
    """Of each part by itself: 0.2 sqrt(max(m, n)) times the rate along U p(S / |S|) V^T of its gradient, in float64."""
    network, rate = Blocks(), 0.01
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    optimizer = build_optimizer(network, OptimizerConfig(kind="muon", learning_rate=rate))
    network.set_gradients(1)
    gradients = {name: value.grad.double() for name, value in network.named_parameters()}
    optimizer.step()
    for name, parts in (("fused.weight", 3), ("tall.weight", 1), ("mix.weight", 1)):
        moved = (network.get_parameter(name) - before[name]).detach().double().flatten(1).chunk(parts)
        for step, gradient in zip(moved, gradients[name].flatten(1).chunk(parts), strict=True):
            u, s, vt = torch.linalg.svd(gradient, full_matrices=False)
            direction = u @ (quintic(s / s.norm())[:, None] * vt)
            torch.testing.assert_close(step, -rate * 0.2 * math.sqrt(max(step.shape)) * direction, rtol=0, atol=1e-6)
            # near the nearest orthogonal matrix, of the size of AdamW's update
            cosine = (step * -(u @ vt)).sum() / (step.norm() * math.sqrt(len(s)))
            assert cosine > 0.97
            assert step.square().mean().sqrt().item() == pytest.approx(RMS * rate, rel=0.2)


@pytest.mark.parametrize("shape", [(12, 12), (6, 16), (16, 6)])
def test_plain_matrices_are_updated_as_by_torch(shape):
    """Ten steps against `torch.optim.Muon`, which computes in bf16: momentum, Nesterov, scale and decay."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(*shape[::-1], bias=False), nn.Linear(*shape[::-1], bias=False)
    theirs.load_state_dict(ours.state_dict())
    begun = ours.weight.detach().clone()
    rest = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], fused=True)
    optimizer = Muon([HiddenMatrix(ours.weight)], rest, learning_rate=0.02, weight_decay=0.1, momentum=0.9)
    optimizer.dtype = torch.bfloat16
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    reference = torch.optim.Muon(theirs.parameters(), **options)
    for step in range(10):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        ours.weight.grad, theirs.weight.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    moved, expected = ours.weight - begun, theirs.weight - begun
    assert (moved - expected).norm() < 0.02 * expected.norm()  # measured: 0.011, the rounding of bf16


def test_a_gradient_of_zero_moves_nothing():
    network = Blocks()
    before = network.fused.weight.detach().clone()
    optimizer = build_optimizer(network, OptimizerConfig(kind="muon"))
    network.set_gradients(0, scale=0.0)
    optimizer.step()
    assert torch.equal(network.fused.weight, before)


def test_weights_decay_where_all_matrices_do():
    """With gradients of zero only decay moves: matrices of both optimizers, and vectors if all decay."""
    for where, spared in (("matrices", 1.0), ("all", 0.95)):
        network = Blocks()
        before = {name: value.detach().clone() for name, value in network.named_parameters()}
        given = {"learning_rate": 0.1, "weight_decay": 0.5, "weight_decay_on": where}
        optimizer = build_optimizer(network, OptimizerConfig(kind="muon", **given))
        network.set_gradients(0, scale=0.0)
        optimizer.step()
        for name, value in network.named_parameters():
            torch.testing.assert_close(value, (0.95 if "weight" in name else spared) * before[name], msg=name)


def test_large_groups_are_computed_in_slices(monkeypatch):
    ours, theirs = Blocks(), Blocks()
    optimizer = build_optimizer(ours, OptimizerConfig(kind="muon"))
    monkeypatch.setattr("latentflow.training.muon._NUMBERS_TOGETHER", 1)
    sliced = build_optimizer(theirs, OptimizerConfig(kind="muon"))
    assert len(sliced.batches) == 3
    for network, one in ((ours, optimizer), (theirs, sliced)):
        network.set_gradients(3)
        one.step()
    assert all(
        torch.allclose(one, other, atol=1e-7) for one, other in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


# Every n-th step


def test_between_orthogonalisations_the_last_direction_is_used_at_the_new_rate():
    config = OptimizerConfig(kind="muon", learning_rate=0.01, warmup_steps=4, orthogonalise_every=2)
    network = Blocks()
    optimizer, moved, momenta = build_optimizer(network, config), [], []
    for step in range(4):
        before = network.tall.weight.detach().clone()
        network.set_gradients(step)
        rate = prepare_step(optimizer, config, step, 4)
        optimizer.step()
        moved.append((network.tall.weight.detach() - before) / rate)
        momenta.append(optimizer.state[network.tall.weight]["momentum_buffer"].clone())
    torch.testing.assert_close(moved[1], moved[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(moved[3], moved[2], rtol=0, atol=1e-4)
    assert (moved[2] - moved[1]).norm() > 0.1 * moved[1].norm()
    assert not torch.equal(momenta[1], momenta[0])  # which takes in every gradient


def test_every_step_is_what_it_is_without_the_option():
    """The steps at which it is due are the same as ever, if the gradients are."""
    ours, theirs = Blocks(), Blocks()
    config = OptimizerConfig(kind="muon", orthogonalise_every=3)
    often, seldom = build_optimizer(ours, OptimizerConfig(kind="muon")), build_optimizer(theirs, config)
    for step in range(4):
        before = [network.mix.weight.detach().clone() for network in (ours, theirs)]
        for network, one in ((ours, often), (theirs, seldom)):
            network.set_gradients(step)
            prepare_step(one, config, step, 4)
            one.step()
    moved = [network.mix.weight.detach() - old for network, old in zip((ours, theirs), before, strict=True)]
    torch.testing.assert_close(moved[1], moved[0], rtol=0, atol=1e-7)  # step 3


# Which weights


@pytest.mark.parametrize("name", CONFIGS)
def test_the_matrices_of_blocks_and_nothing_else(name):
    network = network_of(name)
    names = {id(parameter): key for key, parameter in network.named_parameters()}
    found = {names[id(matrix.weight)]: matrix for matrix in hidden_matrices(network)}
    outside = ("embedding", "modulation", "norm", "stem", "input_branch", "final", "out_conv", "spatial")
    inside = ("blocks.", "middle.", ".resize.")
    for key, parameter in network.named_parameters():
        is_matrix = parameter.dim() > 1 and any(word in key for word in inside)
        assert (key in found) == (is_matrix and not any(word in key for word in outside)), key
    for key, matrix in found.items():
        fused = 3 if "qkv" in key else 2 if name == "modern" and "mlp.up" in key else 1
        assert matrix.parts == fused, key
        wide = matrix.to_wide(matrix.weight)
        assert wide.shape == (matrix.parts, *matrix.shape)
        assert torch.equal(matrix.from_wide(wide), matrix.weight)
        assert torch.equal(
            wide[0] if matrix.rows == wide.shape[1] else wide[0].T, matrix.weight.flatten(1).chunk(fused)[0]
        )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("given", [{}, {"weight_decay": 0.1}, {"orthogonalise_every": 2}])
def test_every_weight_has_one_optimizer_and_its_state_is_counted(name, given):
    network, config = network_of(name), OptimizerConfig(kind="muon", **given)
    optimizer = build_optimizer(network, config)
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(map(id, network.parameters()))
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [value for parameter in network.parameters() for value in optimizer.state[parameter].values()]
    assert sum(value.nbytes for value in state) == optimizer_bytes(network, config)
    assert {value.dtype for value in state} == {torch.float32}


def test_a_rate_set_in_the_groups_reaches_both():
    network = Blocks()
    optimizer = build_optimizer(network, OptimizerConfig(kind="muon"))
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    network.set_gradients(0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in network.named_parameters())


def test_flops_by_hand():
    """Of 3 matrices of 8 x 8 and one of 8 x 20: five times X X^T, its square, and its product with X."""
    matrices = hidden_matrices(Blocks())[:2]
    expected = 5 * (3 * 6 * 8**3 + 4 * 8 * 8 * 20 + 2 * 8**3)
    assert orthogonalisation_flops(matrices) == expected
    assert orthogonalisation_flops(matrices, every=2) == expected / 2


# Steps that are skipped


@pytest.mark.parametrize("every", [1, 2])
def test_a_skipped_step_changes_nothing(every):
    config = OptimizerConfig(kind="muon", weight_decay=0.1, orthogonalise_every=every)
    network = Blocks()
    optimizer = build_optimizer(network, config)
    optimizer.found_inf = torch.zeros(())
    network.set_gradients(0)
    optimizer.step()

    def everything() -> list[Tensor]:
        state = (value for parameter in network.parameters() for value in optimizer.state[parameter].values())
        return [value.detach().clone() for value in (*network.parameters(), *state)]

    before = everything()
    network.set_gradients(1, scale=float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(before, everything(), strict=True))


def test_a_flag_that_is_down_changes_nothing():
    with_flag, without = Blocks(), Blocks()
    for network, flag in ((with_flag, torch.zeros(())), (without, None)):
        optimizer = build_optimizer(network, OptimizerConfig(kind="muon", weight_decay=0.1))
        optimizer.found_inf = flag
        for step in range(3):
            network.set_gradients(step)
            optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(with_flag.parameters(), without.parameters(), strict=True))


def test_the_guard_skips_both():
    """From the first bad gradient on, whatever comes after it."""
    network = Blocks()
    optimizer = build_optimizer(network, OptimizerConfig(kind="muon"))
    guard = FiniteGuard(optimizer, tiny.CPU, scaled=False, remedy="")
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    for step, scale in enumerate((float("inf"), 1.0)):
        network.set_gradients(0, scale)
        norm = nn.utils.get_total_norm([parameter.grad for parameter in network.parameters()])
        guard.watch(norm, [torch.ones(2)], step, [torch.arange(2)])
        optimizer.step()
    assert guard.num_bad == 2
    assert all(torch.equal(value, before[name]) for name, value in network.named_parameters())


def test_loss_scaling_skips_both():
    """GradScaler sets the flag: an overflow leaves the weights, the next step moves them."""
    network = Blocks()
    optimizer = build_optimizer(network, OptimizerConfig(kind="muon"))
    scaler = torch.amp.GradScaler("cpu")
    before = network.fused.weight.detach().clone()
    for scale, stays in ((float("inf"), True), (1.0, False)):
        scaler.scale(torch.ones(()))
        network.set_gradients(0, scale)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(network.fused.weight, before) == stays


@pytest.mark.parametrize("every", [1, 2])
def test_steps_let_the_host_run_ahead(every):
    network = network_of("modern").to("meta")
    optimizer = build_optimizer(network, OptimizerConfig(kind="muon", weight_decay=0.1, orthogonalise_every=every))
    for group in optimizer.param_groups[1:]:
        group["fused"], group["foreach"] = False, True  # meta has no fused update
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with watched() as waits:
        optimizer.step()
    assert not waits


# Runs


@pytest.mark.parametrize("every", [1, 2])
def test_a_graph_updates_as_single_kernels_do(every):
    """Weights and states bit for bit, at rates that change, with a step that is skipped."""
    networks = [Blocks(), Blocks()]
    config = OptimizerConfig(kind="muon", weight_decay=0.1, orthogonalise_every=every)
    plain, graph = (build_optimizer(network, config) for network in networks)
    graph.capture = recorder = Recorder()
    for step in range(12):
        for network, optimizer in zip(networks, (plain, graph), strict=True):
            network.set_gradients(step)
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (step + 1)
            optimizer.found_inf = torch.tensor(float(step == 9))
            optimizer.orthogonalises = step % every == 0
            optimizer.step()
        for (name, one), other in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
            assert torch.equal(one, other), (step, name)
            for key, value in plain.state[one].items():
                assert torch.equal(value, graph.state[other][key]), (step, name, key)
    assert recorder.count == every


@pytest.fixture
def recipe(tmp_path, cache, kl_folder):
    def make(name: str, **given) -> Recipe:
        chosen = {"kind": "muon", "orthogonalise_every": 3, **given.pop("optimizer", {})}
        out = {"out": tmp_path / name, "autoencoder": kl_folder}
        return tiny.recipe(data={"path": cache}, optimizer=chosen, **out, **given)

    return make


@pytest.fixture
def train(recipe):
    def run(name: str, **given) -> Path:
        return train_command(recipe(name, **given), runtime=tiny.CPU).run

    return run


def final(run: Path) -> dict[str, bytes]:
    """The newest checkpoint, byte by byte."""
    return {file.name: file.read_bytes() for file in newest_checkpoint(run).iterdir()}


@pytest.mark.parametrize("every", [1, 3])
def test_resume_is_exact(train, every):
    """Stopped where a direction is reused, and where it is replaced."""
    given = {"optimizer": {"orthogonalise_every": every, "warmup_steps": 5, "weight_decay": 0.1}}
    whole = train("whole", **given)
    for steps in (4, 6):
        train("parts", training={"steps": steps}, **given)
    assert final(train("parts", **given)) == final(whole)
    entries = {key.rpartition("/")[2] for key in read_tensors(newest_checkpoint(whole) / "optimizer.safetensors")}
    kept = {"direction"} if every > 1 else set()
    assert entries == {"exp_avg", "exp_avg_sq", "step", "momentum_buffer"} | kept


def test_resume_after_kill_9_is_exact(recipe, train, tmp_path):
    file, run, log = tmp_path / "recipe.yaml", tmp_path / "killed", tmp_path / "log"
    endless = recipe("killed", training={"steps": 100_000, "checkpoint_every": 4})
    file.write_text(to_yaml(endless), encoding="utf-8")
    for _ in range(2):
        before = newest_checkpoint(run)
        process = processes.start(("train", file, "--device", "cpu"), log)
        processes.wait_until(lambda before=before: newest_checkpoint(run) != before, process)
        process.join(random.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, log.read_text()
    ended = {"training": {"steps": read_metrics(run)[-1]["step"] + 3, "checkpoint_every": 4}}
    assert final(train("killed", **ended)) == final(train("whole", **ended))


def test_two_processes_equal_one(recipe, train, tmp_path):
    one = train("one")
    file = tmp_path / "two.yaml"
    file.write_text(to_yaml(recipe("two")), encoding="utf-8")
    workers = processes.start_processes(("train", file, "--device", "cpu"), tmp_path / "log", 2)
    for rank, worker in enumerate(workers):
        log = tmp_path / f"log.{rank}"
        assert processes.finish(worker, log) == 0, log.read_text()
    two = tmp_path / "two"
    assert read_json(two / "environment.json")["num_processes"] == 2
    for name in ("network", "ema", "optimizer"):
        here, there = (read_tensors(newest_checkpoint(run) / f"{name}.safetensors") for run in (one, two))
        for key, value in here.items():
            torch.testing.assert_close(there[key], value, rtol=0, atol=1e-4, msg=f"{name} {key}")


# What is refused


def test_a_network_that_declares_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer\.kind = muon: .* use adamw"):
        build_optimizer(nn.Linear(2, 2), OptimizerConfig(kind="muon"))


def test_an_autoencoder_is_trained_with_adamw(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("optimizer: {kind: muon}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"optimizer\.kind = muon .* use adamw"):
        load_settings(AutoencoderRecipe, file)


@pytest.mark.parametrize("key", ["optimizer.kind", "optimizer.orthogonalise_every"])
def test_a_run_keeps_its_optimizer(recipe, train, key):
    train("run", training={"steps": 2})
    changed = {"kind": "adamw", "orthogonalise_every": 1} if key.endswith("kind") else {"orthogonalise_every": 2}
    with pytest.raises(ConfigError, match=rf"{key} cannot change: checkpoints hold the state of the old one"):
        train("run", training={"steps": 2}, optimizer=changed)
