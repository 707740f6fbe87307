"""Guides and fitted solvers on a GPU: as graphs or not, and on any device, they draw the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from latentflow.api import LatentFlow
from latentflow.autoencoder import Autoencoder
from latentflow.commands.fit_solver import fit_solver
from latentflow.model.guide_reference import GuideReference
from latentflow.runtime import Runtime
from latentflow.sampling import pipeline
from latentflow.sampling.captured_calls import plainly
from latentflow.sampling.drawing import make_drawing
from latentflow.sampling.pipeline import Given, draw_all
from latentflow.sampling.request import FitSolverRequest, SampleRequest
from tests import tiny

LABELS = {"solver": "ab4", "steps": 12, "guidance": 2.0}


@pytest.fixture
def guided(kl_folder, tmp_path):
    """A model in a folder, and the request that has it guided by another one."""
    autoencoder = Autoencoder.from_pretrained(kl_folder)
    tiny.model(autoencoder, seed=1, time_scale=20.0).save_pretrained(tmp_path / "guide")
    tiny.model(autoencoder, time_scale=20.0).save_pretrained(tmp_path / "model")
    return tmp_path / "model", {**LABELS, "guide": GuideReference(model=str(tmp_path / "guide"))}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.7)], ids=["always", "between"])
def test_a_guide_as_graphs_draws_the_same(cuda, guided, monkeypatch, caplog, precision, interval):
    model = LatentFlow.from_pretrained(guided[0], device=cuda, precision=precision)
    request = make_drawing(model, SampleRequest(num=20, guidance_interval=interval, **guided[1]))
    captured = draw_all(model, request, batch_size=5)
    monkeypatch.setattr(pipeline, "calls_for", lambda device, drawing: plainly)
    plain = draw_all(model, request, batch_size=5)
    assert "kernel by kernel" not in caplog.text
    torch.testing.assert_close(captured.latents, plain.latents, rtol=1e-3, atol=1e-3)
    assert torch.equal(captured.evaluations, plain.evaluations)


def test_a_guided_batch_is_asked_for_without_waiting(cuda, guided):
    model = LatentFlow.from_pretrained(guided[0], device=cuda, precision="bf16")
    request = make_drawing(model, SampleRequest(num=6, **guided[1]))
    first = pipeline._begin(model, request, Given()).arrived()
    torch.cuda.set_sync_debug_mode("error")
    try:
        begun = pipeline._begin(model, request, Given())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(begun.arrived().pixels, first.pixels)


def test_a_guide_draws_what_it_draws_on_the_cpu(device, guided):
    here, there = (
        LatentFlow.from_pretrained(guided[0], device=place, precision="fp32").sample(num=4, seed=7, **guided[1])
        for place in ("cpu", device)
    )
    torch.testing.assert_close(there.latents.cpu(), here.latents, rtol=1e-3, atol=1e-3)
    assert torch.equal(there.evaluations.cpu(), here.evaluations)


def test_a_solver_is_fitted_as_on_the_cpu(device, kl_folder, tmp_path):
    """To the same error within a tenth; what is stored draws the same pictures on both."""
    checks = {}
    for place in ("cpu", device):
        folder = tmp_path / place
        tiny.model(Autoencoder.from_pretrained(kl_folder), steps=3, time_scale=1.0).save_pretrained(folder)
        request = FitSolverRequest(model=folder, evaluations=[4], num=8, held_out=8, reference_steps=24)
        where = replace(tiny.CPU, device=torch.device(place))
        (checks[place],) = fit_solver(request, batch_size=8, runtime=where)
    assert checks[device].is_kept and checks["cpu"].is_kept
    assert checks[device].error == pytest.approx(checks["cpu"].error, rel=0.1)
    here, there = (
        LatentFlow.from_pretrained(tmp_path / device, device=place, precision="fp32").sample(num=4, solver="fitted-4")
        for place in ("cpu", device)
    )
    torch.testing.assert_close(there.latents.cpu(), here.latents, rtol=1e-3, atol=1e-3)


def test_a_fitted_solver_as_graphs_draws_the_same(cuda, kl_folder, tmp_path, monkeypatch, caplog):
    tiny.model(Autoencoder.from_pretrained(kl_folder), steps=3, time_scale=1.0).save_pretrained(tmp_path / "model")
    request = FitSolverRequest(model=tmp_path / "model", evaluations=[4], num=8, held_out=8, reference_steps=24)
    fit_solver(request, batch_size=8, runtime=Runtime(torch.device(cuda, 0), precision="fp32"))
    model = LatentFlow.from_pretrained(tmp_path / "model", device=cuda, precision="fp32")
    drawing = make_drawing(model, SampleRequest(num=20, solver="fitted-4"))
    captured = draw_all(model, drawing, batch_size=4)
    monkeypatch.setattr(pipeline, "calls_for", lambda device, drawing: plainly)
    plain = draw_all(model, drawing, batch_size=4)
    assert "kernel by kernel" not in caplog.text
    torch.testing.assert_close(captured.latents, plain.latents, rtol=1e-3, atol=1e-3)
