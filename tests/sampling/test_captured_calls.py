"""Network calls as graphs: what a CUDA graph does is played by a tape of operations."""

from __future__ import annotations

import pytest
import torch

from latentflow.errors import NonFiniteError
from latentflow.runtime import Runtime
from latentflow.sampling import pipeline
from latentflow.sampling.captured_calls import CapturedCalls, calls_for, plainly
from latentflow.sampling.drawing import make_drawing
from latentflow.sampling.pipeline import draw_all
from latentflow.sampling.request import SampleRequest
from tests import tiny
from tests.dispatch import Recorder


@pytest.fixture(scope="module")
def model(kl):
    return tiny.model(kl, time_scale=20.0)


@pytest.fixture
def taped(monkeypatch):
    """Draw by graphs; returns what records them."""
    recorder = Recorder()
    monkeypatch.setattr(pipeline, "calls_for", lambda device, drawing: CapturedCalls(recorder))
    return recorder


@pytest.mark.parametrize(
    ("given", "graphs"),
    [
        ({"guidance": 1.0}, 2),  # of batches of 4, and of the last 3
        ({"guidance": 2.5}, 2),
        ({"guidance": 2.5, "guidance_interval": (0.3, 0.7)}, 2),  # of batches of 4, once and doubled; not of the last
        ({"guidance": 0.0}, 2),
        ({"solver": "ab4", "guidance": 2.0}, 2),
        ({"solver": "heun", "steps": 3}, 1),  # the last 3 have too few calls
    ],
)
def test_graphs_draw_the_same_pictures(model, monkeypatch, taped, given, graphs):
    """Bit for bit, several batches of other seeds and classes, of which the last is smaller."""
    drawing = make_drawing(model, SampleRequest(**{"num": 11, "seed": 4, "solver": "ab2", "steps": 12, **given}))
    with_graphs = draw_all(model, drawing, batch_size=4)
    assert taped.count == graphs
    monkeypatch.setattr(pipeline, "calls_for", lambda device, drawing: plainly)
    without = draw_all(model, drawing, batch_size=4)
    assert torch.equal(with_graphs.latents, without.latents)
    assert torch.equal(with_graphs.pixels, without.pixels)
    assert torch.equal(with_graphs.evaluations, without.evaluations)


def test_what_cannot_be_captured_is_drawn_without(model, monkeypatch, caplog):
    def refuses(compute):
        compute()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    drawing = make_drawing(model, SampleRequest(num=4, solver="ab2", steps=12))
    without = draw_all(model, drawing, batch_size=4)
    monkeypatch.setattr(pipeline, "calls_for", lambda device, drawing: CapturedCalls(refuses))
    assert torch.equal(draw_all(model, drawing, batch_size=4).latents, without.latents)
    assert "launched kernel by kernel: operation not permitted when stream is capturing" in caplog.text


def test_latents_that_are_not_finite_raise_with_graphs_as_well(kl, taped):
    model = tiny.model(kl)
    with torch.no_grad():
        next(model.network.parameters()).fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="seed 7"):
        draw_all(model, make_drawing(model, SampleRequest(num=3, seed=7, solver="ab2", steps=20)))


def test_graphs_are_for_cuda_and_for_solvers_of_fixed_steps(model):
    cuda = Runtime(torch.device("cuda", 0)).device

    def calls(device, solver):
        return calls_for(device, make_drawing(model, SampleRequest(solver=solver)))

    assert isinstance(calls(cuda, "heun"), CapturedCalls)
    assert calls(cuda, "dopri5") is plainly
    assert calls(torch.device("cpu"), "heun") is plainly
