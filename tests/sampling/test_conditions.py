"""Sampling with spatial conditions: conditions, guidance on each of them, and one picture per seed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from latentflow.api import LatentFlow
from latentflow.errors import ConfigError
from latentflow.flow.solvers import integrate
from latentflow.flow.times import sampling_times
from latentflow.sampling.drawing import Drawing, check_drawing, guided_by, make_drawing
from latentflow.sampling.pipeline import Given, conditioned_velocity, draw_all, initial_noise
from latentflow.sampling.request import SampleRequest
from latentflow.shapes import Condition
from tests import tiny
from tests.sampling.test_pipeline import ROUNDING, same_pictures

SPACE = ["inpainting", "semantic_map"]
EVERYTHING = ["label", *SPACE]
LATENTS = (4, 8, 8)
FIELDS = {"label": ("labels",), "inpainting": ("masked_latents", "mask"), "semantic_map": ("class_fractions",)}


@pytest.fixture(scope="module")
def model(kl) -> LatentFlow:
    return tiny.model(kl, time_scale=20.0, conditioning=tiny.SPATIAL)


def given(num_images: int, seed: int = 0) -> Given:
    """Latents, masks and maps, no two images alike."""
    generator = torch.Generator().manual_seed(seed)
    return Given(
        masked_latents=torch.randn(num_images, *LATENTS, generator=generator),
        mask=torch.rand(num_images, 1, 8, 8, generator=generator),
        class_fractions=torch.rand(num_images, 3, 8, 8, generator=generator).softmax(1),
    )


def request(model: LatentFlow, num: int, conditions: list[str] = EVERYTHING, **preset) -> Drawing:
    classes = ["cherry", "apple"] if "label" in conditions else []
    return make_drawing(
        model,
        SampleRequest(num=num, classes=classes, **preset),
        conditions=[name for name in conditions if name != "label"],
    )


def only_some(conditions: list[str], whole: Given) -> Given:
    fields = [name for kind in conditions for name in FIELDS[kind] if name != "labels"]
    return Given(**{name: getattr(whole, name) for name in fields})


# One seed, one picture


@pytest.mark.parametrize("guidance", [{}, {"guidance": 3.0}, {"guidance": 3.0, "guided_by": ["inpainting"]}])
def test_a_picture_does_not_depend_on_its_batch(model, guidance):
    asked, spatial = request(model, 16, seed=5, solver="euler", steps=6, **guidance), given(16)
    whole = draw_all(model, asked, spatial, batch_size=16)
    assert whole.latents.std() > 1
    for batch_size in (1, 3):
        same_pictures(draw_all(model, asked, spatial, batch_size=batch_size), whole)


def test_adaptive_steps_do_not_depend_on_the_batch(kl):
    model = tiny.model(kl, time_scale=200.0, conditioning=tiny.SPATIAL)
    guidance = {"guidance": 3.0, "guided_by": ["inpainting"]}
    asked, spatial = request(model, 16, seed=5, solver="dopri5", rtol=1e-3, atol=1e-3, **guidance), given(16)
    whole = draw_all(model, asked, spatial, batch_size=16)
    assert len(whole.evaluations.unique()) > 1  # images have steps of their own
    for batch_size in (1, 3):
        same_pictures(draw_all(model, asked, spatial, batch_size=batch_size), whole)


def test_one_row_is_for_all_images(model):
    one, asked = given(1), request(model, 5, seed=5, guidance=2.0)
    repeated = Given(**{name: getattr(one, name).expand(5, -1, -1, -1) for name in FIELDS["inpainting"]})
    repeated = replace(repeated, class_fractions=one.class_fractions.expand(5, -1, -1, -1))
    for batch_size in (2, 5):
        drawn = draw_all(model, asked, one, batch_size=batch_size)
        same_pictures(drawn, draw_all(model, asked, repeated, batch_size=5))
    assert (drawn.latents[0] - drawn.latents[2]).abs().max() > 0.1  # equal classes, other seeds


def test_each_image_has_its_own_conditions(model):
    asked, whole, other = request(model, 3, seed=5), given(3), given(3, seed=1)
    drawn = draw_all(model, asked, whole).latents
    for name in ("masked_latents", "mask", "class_fractions"):
        changed = getattr(whole, name).clone()
        changed[1] = getattr(other, name)[1]
        latents = draw_all(model, asked, replace(whole, **{name: changed})).latents
        torch.testing.assert_close(latents[[0, 2]], drawn[[0, 2]], rtol=0, atol=ROUNDING)
        assert (latents[1] - drawn[1]).abs().max() > 0.01, name


# Conditions


def test_conditions_that_are_not_given_are_null(model):
    """As training puts it: null label, latents 0, mask 1, shares 0."""
    nulls = {"labels": 3, "masked_latents": 0, "mask": 1, "class_fractions": 0}
    for conditions in ([], ["label"], ["inpainting"], ["semantic_map"], EVERYTHING):
        asked = request(model, 2, conditions)
        part = only_some(conditions, given(2)).on(model.device, 2)
        velocity = conditioned_velocity(model, asked, part, (2, *LATENTS))
        for kind, names in FIELDS.items():
            for name in names:
                value = getattr(velocity.condition, name)
                if kind not in conditions:
                    assert (value == nulls[name]).all()
                else:
                    expected = torch.tensor([2, 0]) if name == "labels" else getattr(given(2), name)
                    assert torch.equal(value, expected)


@pytest.mark.parametrize("nobody", [[], ["none"]])
def test_no_class_draws_unconditionally(kl, nobody):
    model = tiny.model(kl, time_scale=20.0)
    drawn = model.sample(num=3, classes=nobody, seed=2)
    assert (drawn.drawing.labels, drawn.drawing.told) == ([], [])
    null = torch.full((3,), 3)

    def velocity(x, t):
        return model.network(x, t.float(), model.config.conditioning.build(x.shape, "cpu", Condition(labels=null)))

    with torch.inference_mode():
        x = integrate(velocity, initial_noise(model, drawn.drawing), sampling_times(2), solver="euler").x
    torch.testing.assert_close(drawn.latents, x, rtol=0, atol=ROUNDING)
    assert [drawn.name(row) for row in range(3)] == [f"seed-0000000{n}.png" for n in (2, 3, 4)]


def test_classes_of_a_model_with_spatial_conditions(model):
    """Without spatial conditions the classes of the seeds; with them no class."""
    assert make_drawing(model, SampleRequest(num=4)).labels == [0, 1, 2, 0]
    assert make_drawing(model, SampleRequest(num=4), conditions=SPACE).labels == []
    assert make_drawing(model, SampleRequest(num=4, classes=["berry"]), conditions=SPACE).told == ["label", *SPACE]


def test_noise_in_place_of_the_seeds_own(model):
    drawn = model.sample(num=3, seed=4)
    own = initial_noise(model, drawn.drawing)
    again = model.sample(num=3, seed=4, noise=own)
    assert torch.equal(again.latents, drawn.latents)
    elsewhere = model.sample(num=3, seed=70, noise=own, batch_size=2)
    same_pictures(elsewhere, drawn)
    one_for_all = draw_all(
        model, make_drawing(model, SampleRequest(num=3, classes=["berry"])), Given(noise=own[:1])
    ).latents
    torch.testing.assert_close(one_for_all[0], one_for_all[2], rtol=0, atol=ROUNDING)
    with pytest.raises(ConfigError, match=r"noise of shape \[2, 4, 8, 8\]; 3 images of this model need \[3, 4, 8, 8\]"):
        model.sample(num=3, noise=own[:2])


# Guidance


@pytest.mark.parametrize("by", [["label"], ["inpainting"], ["semantic_map"], SPACE, EVERYTHING, None])
def test_guidance_leads_away_from_the_null_condition(model, by):
    """v = v_null + s (v_cond - v_null), where the null condition lacks what guides."""
    asked, scale = request(model, 2, guidance=3.0, guided_by=by), 3.0
    part = given(2).on(model.device, 2)
    velocity = conditioned_velocity(model, asked, part, (2, *LATENTS))
    condition = velocity.condition
    null = model.config.conditioning.without(condition, by or EVERYTHING)
    x, time = torch.randn(2, *LATENTS, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.8])
    cond, without = (model.velocity(x, time, each) for each in (condition, null))
    torch.testing.assert_close(velocity(x, time), without + scale * (cond - without), rtol=0, atol=1e-4)
    assert (cond - without).abs().max() > 0.01
    assert velocity.evaluations.tolist() == [2, 2]


def test_guidance_by_each_condition_gives_another_picture(model):
    drawn = {}
    for by in (["label"], ["inpainting"], ["semantic_map"], SPACE, EVERYTHING):
        samples = draw_all(model, request(model, 2, guidance=3.0, guided_by=by), given(2))
        assert samples.evaluations.tolist() == [4, 4]  # 2 steps, guided
        drawn[tuple(by)] = samples.latents
    plain = draw_all(model, request(model, 2), given(2))
    assert plain.evaluations.tolist() == [2, 2]
    pictures = [plain.latents, *drawn.values()]
    for place, one in enumerate(pictures):
        assert all((one - other).abs().max() > 0.01 for other in pictures[:place])
    by_default = draw_all(model, request(model, 2, guidance=3.0), given(2))
    assert torch.equal(by_default.latents, drawn[tuple(EVERYTHING)])


@pytest.mark.parametrize("conditions", [["label"], ["inpainting"], SPACE, EVERYTHING])
def test_by_default_all_given_conditions_guide(model, conditions):
    assert guided_by(model, request(model, 2, conditions, guidance=2.0)) == conditions
    assert guided_by(model, request(model, 2, conditions, guidance=2.0, guided_by=[])) == conditions
    never = tiny.model(model.autoencoder, conditioning={**tiny.SPATIAL, "inpainting_dropout": 0.0})
    if "inpainting" in conditions and len(conditions) > 1:
        rest = [name for name in conditions if name != "inpainting"]
        assert guided_by(never, request(never, 2, conditions, guidance=2.0)) == rest


@pytest.mark.parametrize(
    ("made", "conditions", "by", "said"),
    [
        (
            {},
            ["label"],
            ["inpainting"],
            "guided by inpainting, which is not given (conditions given: label);",
        ),
        ({}, [], ["label"], "guided by label, which is not given"),
        ({}, [], None, "no condition is given, so guidance has nothing to act on"),
        (
            {"map_dropout": 0.0},
            EVERYTHING,
            ["semantic_map"],
            "its unconditional branch was not trained; this model supports guidance on label, in",
        ),
        ({"map_dropout": 0.0}, ["semantic_map"], None, "the model was trained with conditioning.map_dropout = 0"),
        ({}, EVERYTHING, ["semantic_mop"], "guided by 'semantic_mop': no such condition; did you mean 'semantic_map'?"),
        (
            {"inpainting": False},
            ["label"],
            ["inpainting"],
            "its unconditional branch was not trained",
        ),
    ],
)
def test_guidance_that_means_nothing_is_refused(kl, made, conditions, by, said):
    model = tiny.model(kl, conditioning={**tiny.SPATIAL, **made})
    with pytest.raises(ConfigError) as caught:
        request(model, 2, conditions, guidance=2.0, guided_by=by)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("label", "this model requires the condition label: it was trained with label_dropout = 0; give --classes"),
        ("inpainting", "it can only fill holes: `latentflow inpaint` with the method 'condition'"),
        ("semantic_map", "give a map: `latentflow inpaint --map`"),
    ],
)
def test_a_condition_that_was_never_dropped_must_be_given(kl, missing, said):
    dropout = {"label": "label_dropout", "inpainting": "inpainting_dropout", "semantic_map": "map_dropout"}[missing]
    spatial, kept = dict(tiny.SPATIAL), {}
    (kept if missing == "label" else spatial)[dropout] = 0.0
    model = tiny.model(kl, conditioning=spatial, **kept)
    with pytest.raises(ConfigError) as caught:
        request(model, 1, [name for name in EVERYTHING if name != missing])
    assert said in str(caught.value)
    check_drawing(model, request(model, 1, EVERYTHING))


@pytest.mark.parametrize("kind", SPACE)
def test_a_condition_that_the_model_has_not_is_refused(kl, kind):
    with pytest.raises(ConfigError, match=f"not trained with the condition {kind}; it is conditioned on label"):
        make_drawing(tiny.model(kl), SampleRequest(num=1), conditions=[kind])
