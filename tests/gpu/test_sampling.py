"""Drawing on a GPU: nothing is waited for before the pictures, which are the same in any batch, compiled or not."""

from __future__ import annotations

import time

import pytest
import torch

from latentflow.autoencoder import _COPIES, Autoencoder
from latentflow.commands.sample import sample as sample_command
from latentflow.networks.running import is_compiled
from latentflow.runtime import Runtime
from latentflow.sampling import cost, pipeline
from latentflow.sampling.captured_calls import plainly
from latentflow.sampling.cost import compile_where_it_pays
from latentflow.sampling.drawing import make_drawing
from latentflow.sampling.picture_file import read_facts
from latentflow.sampling.pipeline import Given, draw, draw_all
from latentflow.sampling.request import SampleRequest
from tests import tiny

FIXED = {"solver": "heun", "steps": 6, "guidance": 2.0, "guidance_interval": (0.2, 0.7)}


@pytest.fixture
def model(kl_folder, device):
    """A model that computes in bf16, which nobody has asked for by name."""
    chosen = torch.device(device, 0) if device == "cuda" else torch.device(device)
    place = Runtime(chosen, precision="bf16", precision_is_explicit=False)
    return tiny.model(Autoencoder.from_pretrained(kl_folder), time_scale=1.0).to(place)


def near(one: torch.Tensor, other: torch.Tensor, tolerance: float = 0.05) -> bool:
    return bool((one - other).abs().max() < tolerance * other.abs().max())


@pytest.mark.parametrize("solver", ["euler", "heun", "ab4", "dpmpp3m", "unipc3"])
def test_a_whole_batch_is_asked_for_without_waiting(cuda, model, solver):
    """From its seeds to 8-bit pixels on their way to the host. CUDA itself raises where anything synchronises."""
    request = make_drawing(model, SampleRequest(num=6, seed=3, **{**FIXED, "solver": solver}))
    first = pipeline._begin(model, request, Given()).arrived()  # what is made once is made
    torch.cuda.set_sync_debug_mode("error")
    try:
        begun = pipeline._begin(model, request, Given())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert begun.pixels.is_pinned()
    second = begun.arrived()
    assert torch.equal(first.latents, second.latents)
    assert torch.equal(first.pixels, second.pixels)


def test_batches_that_overlap_are_what_they_are_alone(model):
    """The next batch is on its way while the pixels of one arrive."""
    request = make_drawing(model, SampleRequest(num=20, **FIXED))
    together = list(draw(model, request, batch_size=4))
    for number, samples in enumerate(together):
        alone = pipeline._begin(model, request.at(slice(4 * number, 4 * number + 4)), Given()).arrived()
        assert torch.equal(samples.pixels, alone.pixels)
        assert samples.drawing.seeds == alone.drawing.seeds


@pytest.mark.parametrize("given", [{}, {"solver": "ab4", "steps": 16}], ids=["heun", "ab4"])
def test_graphs_draw_the_same_pictures(cuda, model, monkeypatch, caplog, given):
    request = make_drawing(model, SampleRequest(num=20, **{**FIXED, "steps": 12, **given}))
    captured = draw_all(model, request, batch_size=8)
    monkeypatch.setattr(pipeline, "calls_for", lambda device, drawing: plainly)
    plain = draw_all(model, request, batch_size=8)
    assert "kernel by kernel" not in caplog.text
    assert near(captured.latents, plain.latents, 1e-3)
    assert torch.equal(captured.evaluations, plain.evaluations)


def test_seconds_are_those_of_the_device(model):
    began = time.perf_counter()
    parts = list(draw(model, make_drawing(model, SampleRequest(num=12, **FIXED)), batch_size=4))
    assert all(part.seconds > 0 for part in parts)
    assert sum(part.seconds for part in parts) <= time.perf_counter() - began


def test_a_picture_does_not_depend_on_its_batch(model):
    """In bf16 as far as that goes."""
    whole = draw_all(model, make_drawing(model, SampleRequest(num=8, **FIXED)), batch_size=8)
    for batch_size in (1, 3):
        parts = draw_all(model, make_drawing(model, SampleRequest(num=8, **FIXED)), batch_size=batch_size)
        assert near(parts.latents, whole.latents)
        assert torch.equal(parts.evaluations, whole.evaluations)


@pytest.mark.parametrize("solver", ["bosh3", "dopri5"])
def test_adaptive_steps_do_not_depend_on_the_batch(model, solver):
    """Nobody asked for bf16, so the network computes in float32, and IEEE products on a GPU."""
    request = make_drawing(model, SampleRequest(num=8, solver=solver, rtol=1e-3, atol=1e-3, guidance=2.0))
    assert request.precision == "fp32"
    whole = draw_all(model, request, batch_size=8)
    for batch_size in (1, 3):
        parts = draw_all(model, request, batch_size=batch_size)
        same = parts.evaluations == whole.evaluations
        assert same.sum() >= 7  # an estimate may lie within rounding of a threshold
        torch.testing.assert_close(parts.latents[same], whole.latents[same], rtol=0, atol=1e-4)


def test_a_compiled_job_draws_the_same(cuda, model, monkeypatch, caplog):
    """Its last batch is filled up; all is compiled before the first one."""
    request = make_drawing(model, SampleRequest(num=10, **FIXED))
    plain = draw_all(model, request, batch_size=4)
    monkeypatch.setattr(cost, "_WORTH_SECONDS", 0.0)
    compile_where_it_pays(model, request, batch_size=4, num_batches=3)
    assert is_compiled(model.network)
    assert "the network was compiled in" in caplog.text
    with torch._dynamo.config.patch(error_on_recompile=True):
        drawn = draw_all(model, request, batch_size=4)
    assert near(drawn.latents, plain.latents)
    assert torch.equal(drawn.evaluations, plain.evaluations)


@pytest.mark.parametrize("way", ["encode", "decode"])
def test_a_slice_takes_no_more_than_is_thought(cuda, kl_folder, way):
    """Convolutions want room to work in besides, which the other half of the memory is for."""
    autoencoder = Autoencoder.from_pretrained(kl_folder).to(Runtime(torch.device("cuda", 0), precision="tf32"))
    given = (
        torch.zeros(4, 3, 512, 512, device="cuda") if way == "encode" else torch.zeros(4, 4, 256, 256, device="cuda")
    )
    autoencoder.slice_size = 4
    getattr(autoencoder, way)(given[:1])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    getattr(autoencoder, way)(given)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < 4 * 512 * 512 * 4 * _COPIES * autoencoder._widest + (256 << 20)


def test_a_picture_says_what_its_network_computed_in(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    drawn = sample_command(
        tmp_path / "model", SampleRequest(num=3, **FIXED), tmp_path / "drawn", batch_size=2, runtime=model.runtime
    )
    assert [read_facts(str(file))["precision"] for file in drawn.files] == ["bf16"] * 3
