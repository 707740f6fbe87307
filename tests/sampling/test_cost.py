"""What is said of the cost of drawing, and what is compiled for it."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch

from latentflow.model.guide_reference import GuideReference
from latentflow.networks.running import compile_blocks, is_compiled
from latentflow.sampling import cost
from latentflow.sampling.cost import compile_where_it_pays, network_calls
from latentflow.sampling.drawing import Blend, make_drawing
from latentflow.sampling.guides import open_guide
from latentflow.sampling.pipeline import Given, draw, draw_all
from latentflow.sampling.request import SampleRequest
from tests import tiny


@pytest.fixture
def model(kl, monkeypatch):
    """A model on what is taken for a GPU, and compiled without a compiler."""
    monkeypatch.setattr(cost, "_can_compile", lambda device: True)
    monkeypatch.setattr(cost, "compile_blocks", partial(compile_blocks, backend="eager"))
    torch._dynamo.reset()
    return tiny.model(kl, time_scale=20.0)


def calls_of(model, monkeypatch) -> list[int]:
    """The sizes of the batches that the network is called for, as they come."""
    sizes, forward = [], model.network.forward
    monkeypatch.setattr(model.network, "forward", lambda x, *rest: sizes.append(len(x)) or forward(x, *rest))
    return sizes


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [
        ({}, {4}),
        ({"guidance": 2.0}, {8}),
        ({"guidance": 2.0, "guidance_interval": (0.2, 0.6)}, {4, 8}),
        ({"guidance": 0.0}, {4}),
    ],
)
def test_a_long_job_is_compiled_once_for_batches_of_one_size(model, monkeypatch, caplog, preset, sizes):
    """The last batch is padded, so that nothing is compiled again; the pictures are those of the plain network."""
    request = make_drawing(model, SampleRequest(num=10, solver="heun", steps=5, **preset))
    plain = draw_all(model, request, batch_size=4)
    monkeypatch.setattr(cost, "_seconds_of_a_call", lambda *given: 10.0)
    compile_where_it_pays(model, request, batch_size=4, num_batches=3)
    assert is_compiled(model.network)
    assert re.search("the network was compiled in .* s; without that, drawing would take about", caplog.text)
    seen = calls_of(model, monkeypatch)
    drawn = draw_all(model, request, batch_size=4)
    assert set(seen) == sizes
    assert drawn.drawing == plain.drawing
    assert torch.equal(drawn.evaluations, plain.evaluations)
    torch.testing.assert_close(drawn.latents, plain.latents, rtol=0, atol=1e-5)
    assert (drawn.pixels.int() - plain.pixels.int()).abs().max() <= 1


def test_a_guide_is_compiled_as_well(model, kl, monkeypatch, tmp_path):
    """For the batches that it is called with, which are not doubled; nothing is compiled later."""
    tiny.model(kl, seed=1).save_pretrained(tmp_path / "guide")
    asked = SampleRequest(num=7, solver="heun", steps=5, guidance=2.0, guidance_interval=(0.2, 0.6))
    drawing = make_drawing(model, asked.model_copy(update={"guide": GuideReference(model=str(tmp_path / "guide"))}))
    plain = draw_all(model, drawing, batch_size=3)
    monkeypatch.setattr(cost, "_WORTH_SECONDS", 0.0)
    compile_where_it_pays(model, drawing, batch_size=3, num_batches=3)
    guide = open_guide(model, drawing.sampling.guide).flow
    assert is_compiled(model.network)
    assert is_compiled(guide.network)
    seen, guided = calls_of(model, monkeypatch), calls_of(guide, monkeypatch)
    with torch._dynamo.config.patch(error_on_recompile=True):
        drawn = draw_all(model, drawing, batch_size=3)
    assert set(seen) == set(guided) == {3}
    assert 0 < len(guided) < len(seen)
    torch.testing.assert_close(drawn.latents, plain.latents, rtol=0, atol=1e-5)


def test_all_shapes_are_compiled_before_drawing(model, monkeypatch):
    """The warm-up calls the network for the very batches that are drawn; drawing then compiles nothing."""
    request = make_drawing(
        model, SampleRequest(num=7, solver="heun", steps=5, guidance=2.0, guidance_interval=(0.2, 0.6))
    )
    monkeypatch.setattr(cost, "_WORTH_SECONDS", 0.0)
    compile_where_it_pays(model, request, batch_size=3, num_batches=3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert len(draw_all(model, request, batch_size=3).pixels) == 7


def test_a_compiled_network_is_compiled_for_other_batches_before_they_are_drawn(model, kl, monkeypatch, tmp_path):
    """Doubled by guidance, and those of a guide that comes later; announced once each, and not if nothing is new."""
    tiny.model(kl, seed=1).save_pretrained(tmp_path / "guide")
    reference, notices = GuideReference(model=str(tmp_path / "guide")), []
    monkeypatch.setattr(cost, "notice", notices.append)
    monkeypatch.setattr(cost, "_WORTH_SECONDS", 0.0)
    presets = [{}, {"guidance": 2.0}, {"guidance": 2.0, "guide": reference}]
    for number, preset in enumerate(presets, start=1):
        drawing = make_drawing(model, SampleRequest(num=7, solver="heun", steps=5, **preset))
        for _ in range(2):
            compile_where_it_pays(model, drawing, batch_size=3, num_batches=3)
            assert len(notices) == number
        with torch._dynamo.config.patch(error_on_recompile=True):
            draw_all(model, drawing, batch_size=3)
        monkeypatch.setattr(cost, "_WORTH_SECONDS", 1e9)  # it has paid
    compile_where_it_pays(model, drawing, batch_size=2, num_batches=0)  # a folder whose pictures are all there
    assert len(notices) == len(presets)
    assert ["without that" in text for text in notices] == [True, False, False]


@pytest.mark.parametrize(
    ("preset", "seconds", "num_batches"),
    [
        ({"solver": "heun", "steps": 5}, 1e-3, 100),  # a second of drawing
        ({"solver": "heun", "steps": 5}, 10.0, 1),
        ({"solver": "dopri5"}, 10.0, 100),
    ],
    ids=["short", "one batch", "adaptive"],
)
def test_what_is_not_compiled(model, monkeypatch, preset, seconds, num_batches):
    monkeypatch.setattr(cost, "_seconds_of_a_call", lambda *given: seconds)
    request = make_drawing(model, SampleRequest(num=10, **preset))
    compile_where_it_pays(model, request, batch_size=4, num_batches=num_batches)
    assert not is_compiled(model.network)


def test_a_cpu_compiles_nothing(kl, monkeypatch):
    monkeypatch.setattr(cost, "_seconds_of_a_call", lambda *given: 1000.0)
    model = tiny.model(kl)
    compile_where_it_pays(model, make_drawing(model, SampleRequest(num=10)), batch_size=4, num_batches=100)
    assert not is_compiled(model.network)


def test_what_pictures_are_drawn_from_is_filled_up_as_well(model):
    request = make_drawing(model, SampleRequest(num=3, solver="heun", steps=5))
    noise = torch.randn(3, *model.config.latent_shape, generator=torch.Generator().manual_seed(0))
    given = Given(noise=noise, latents=noise[:1], hole=torch.ones(1, 1, *noise.shape[2:]))
    plain = draw_all(model, request, given, batch_size=8)
    compile_blocks(model.network, backend="eager")
    drawn = list(draw(model, request, given, batch_size=8))
    torch.testing.assert_close(drawn[0].latents, plain.latents, rtol=0, atol=1e-5)


def test_network_calls_are_those_of_the_pictures(kl):
    """Both sides of a blend are called, also where only a named condition differs; a scale of 0 may do without one."""
    age = {"columns": [{"name": "age", "kind": "number", "mean": 50.0, "deviation": 10.0}]}
    model = tiny.model(kl, conditioning=age)
    drawing = make_drawing(model, SampleRequest(num=1, conditions={"age": [20.0]}))
    towards = drawing.model_copy(update={"blends": [Blend(seed=1, weight=0.5, conditions={"age": 60.0})]})
    presets = ({"guidance": 0.0}, {"guidance": 0.0, "guided_channels": 2}, {"guidance": 2.0}, {})
    for preset in presets:
        for one in (drawing, towards):
            asked = one.model_copy(update={"sampling": one.sampling.model_copy(update=preset)})
            assert network_calls(asked) == int(draw_all(model, asked).evaluations[0])
