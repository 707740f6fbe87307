"""Checkpoints on a GPU: copied between two steps without waiting for either; fp16 goes on at its loss scale."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from latentflow.artifacts import read_json
from latentflow.commands.train import train as train_command
from latentflow.runtime import open_runtime
from latentflow.training import checkpoint
from latentflow.training.checkpoint import CheckpointWriter, Keeping, Progress, load_checkpoint, newest_checkpoint
from latentflow.training.ema import EMA
from latentflow.training.guard import FiniteGuard
from latentflow.training.optim import OptimizerConfig, build_optimizer, clip_gradients
from tests import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
SIZE = 2048


@pytest.fixture(scope="module")
def runtime():
    return open_runtime("cuda", "fp32")


class Training:
    """A step of it is some milliseconds of the device's work, and hardly any of the host's."""

    def __init__(self, runtime):
        torch.manual_seed(0)
        self.network = nn.Sequential(*[nn.Linear(SIZE, SIZE) for _ in range(8)]).to(runtime.device)
        self.ema = EMA(self.network, 0.9)
        self.optimizer = build_optimizer(self.network, OptimizerConfig(weight_decay=0.1))
        self.guard = FiniteGuard(self.optimizer, runtime, scaled=False, remedy="")
        self.x = torch.randn(4096, SIZE, device=runtime.device)
        self.done = 0

    @property
    def parts(self):
        return self.network, self.ema, self.optimizer

    def step(self) -> None:
        loss = self.network(self.x).square().mean(1)
        loss.mean().backward()
        norm = clip_gradients(list(self.network.parameters()), 1.0)
        self.guard.watch(norm, [loss], self.done, [torch.arange(4)])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.done)
        self.done += 1


@pytest.mark.parametrize("on_gpu", [True, False], ids=["a copy on the GPU", "a copy in pinned memory"])
def test_a_copy_is_of_one_step_and_the_host_runs_ahead(runtime, tmp_path, on_gpu):
    training = Training(runtime)
    for _ in range(3):
        training.step()
    with CheckpointWriter(tmp_path, runtime.device, Keeping(1)) as writer:
        writer._on_gpu = on_gpu
        writer.save(Progress(3, 12), *training.parts)  # the first pinned memory takes long to get
        writer.wait()
        training.step()
        state = checkpoint.training_state(*training.parts)
        expected = {(file, name): value.cpu() for file, part in state.items() for name, value in part.items()}
        torch.cuda.synchronize()
        for _ in range(20):  # work that is still to be done when the copy is asked for
            training.x @ training.x.T
        writer.save(Progress(4, 16), *training.parts)
        for _ in range(5):
            training.step()
    copy = Training(runtime)
    assert load_checkpoint(newest_checkpoint(tmp_path), *copy.parts) == Progress(4, 16)
    found = checkpoint.training_state(*copy.parts)
    for (file, name), value in expected.items():
        assert torch.equal(found[file][name].cpu(), value), (file, name)


def test_steps_and_saves_let_the_host_run_ahead(runtime, tmp_path):
    """Torch itself would warn of, here refuse, whatever makes the host wait."""
    training = Training(runtime)
    training.step()
    with CheckpointWriter(tmp_path, runtime.device, Keeping(1)) as writer:
        writer.save(Progress(1, 4), *training.parts)
        writer.wait()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                training.step()
            copy = writer._copy(checkpoint.training_state(*training.parts))
            training.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert copy.made is not None


def test_fp16_goes_on_where_it_was(cache, kl_folder, tmp_path):
    def train(name: str, steps: int):
        training = {"steps": steps, "precision": "fp16", "checkpoint_every": 100}
        recipe = tiny.recipe(data={"path": cache}, autoencoder=kl_folder, training=training, out=tmp_path / name)
        run = train_command(recipe, runtime=open_runtime("cuda", "fp16"), allow_change=["training.steps"]).run
        return read_json(newest_checkpoint(run) / "state.json"), newest_checkpoint(run)

    (whole, one), _ = train("whole", 10), train("parts", 4)
    parts, other = train("parts", 10)
    assert whole["loss_scale"] > 1
    assert whole["growth_tracker"] > 4
    assert {key: whole[key] for key in ("loss_scale", "growth_tracker")} == {
        key: parts[key] for key in ("loss_scale", "growth_tracker")
    }
    ours, theirs = (checkpoint.read_tensors(folder / "network.safetensors") for folder in (one, other))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)
