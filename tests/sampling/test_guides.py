"""Guides: other models in the place of the null condition; who may guide whom, and under which conditions."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from latentflow.api import LatentFlow
from latentflow.autoencoder import Autoencoder
from latentflow.commands.benchmark import benchmark
from latentflow.commands.diagnose import diagnose
from latentflow.commands.evaluate import evaluate
from latentflow.commands.fit_solver import fit_solver
from latentflow.errors import ArtifactError, ConfigError
from latentflow.evaluation.request import BenchmarkRequest, DiagnoseRequest, EvaluationRequest
from latentflow.flow.path import CosinePath
from latentflow.model.conditioning import ColumnCondition
from latentflow.model.config import SamplingPreset
from latentflow.model.guide_reference import GuideReference
from latentflow.sampling.call_cost import multiply_adds, relative_cost
from latentflow.sampling.drawing import make_drawing
from latentflow.sampling.guides import open_guide
from latentflow.sampling.pipeline import Given, conditioned_velocity, draw_all
from latentflow.sampling.preview import preview_drawing
from latentflow.sampling.request import FitSolverRequest, SampleRequest
from latentflow.shapes import Condition
from latentflow.sizes import Size
from tests import tiny
from tests.processes import run_here

C, SIDE = 4, tiny.IMAGE_SIZE // tiny.FACTOR
FAST = {"solver": "euler", "steps": 3}


@pytest.fixture(scope="module")
def place(tmp_path_factory, kl):
    """Models in folders: guides of all kinds, and a run with snapshots."""
    place = tmp_path_factory.mktemp("models")

    def save(name, model, **config):
        sized = LatentFlow(model.config.model_copy(update=config), model.network, model.autoencoder)
        sized.save_pretrained(place / name)

    def small(**changes):
        made = tiny.model(kl, seed=2)
        network = made.config.network.model_copy(update=changes)
        config = made.config.model_copy(update={"network": network})
        built = tiny.randomise(config.build_network(), seed=2).eval().requires_grad_(False)
        return LatentFlow(config, built, kl)

    other = tiny.model(kl, seed=1)
    save("same", other)
    save("turned", tiny.model(kl, seed=1, class_names=("cherry", "apple", "berry", "date")))
    save("fewer", tiny.model(kl, seed=1, class_names=("apple", "berry")))
    save("nothing", tiny.model(kl, seed=1, class_names=()))
    save("small", small(depth=1))
    save("always", tiny.model(kl, seed=1, class_names=("plum",), label_dropout=0.0))
    save("path", other, path=CosinePath())
    save("scaled", other, normalisation=other.config.normalisation.model_copy(update={"scale": [2.0] * C}))
    save("large", other, image_size=Size.of(2 * tiny.IMAGE_SIZE))
    save("holes", tiny.model(kl, seed=1, conditioning={"inpainting": True}))
    run = place / "run"
    tiny.model(kl).save_pretrained(run / "model")
    for step in (6, 12):
        tiny.model(kl, seed=step).save_pretrained(run / "checkpoints" / f"step-{step:08d}" / "model")
    (run / "recipe.yaml").write_text("training: {steps: 100}\n", encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def model(kl):
    return tiny.model(kl, time_scale=20.0)


@pytest.fixture(scope="module")
def unlabelled(kl):
    return tiny.model(kl, class_names=(), time_scale=20.0)


def drawn(model, guide, *, num=3, **given):
    return make_drawing(model, SampleRequest(**{"num": num, "guidance": 2.0, "guide": guide, **FAST, **given}))


def at(model, drawing, given=None):
    """Velocity of a drawing at a random point, and the point."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(drawing.seeds), C, SIDE, SIDE, generator=generator)
    time = torch.tensor([0.2, 0.5, 0.9][: len(x)])
    return conditioned_velocity(model, drawing, given or {}, x.shape)(x, time), x, time


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("same", [0, 1, 2]),
        ("turned", [1, 2, 0]),  # by their names
        ("fewer", [2, 2, 2]),  # one is unknown, so none is given
        ("nothing", None),
        ("small", [0, 1, 2]),
    ],
)
def test_the_guide_has_its_own_condition(model, place, name, labels):
    """v = v_guide + s (v - v_guide), with the labels that the guide knows by name."""
    drawing = drawn(model, place / name, classes=["apple", "berry", "cherry"])
    guide = LatentFlow.from_pretrained(place / name, device="cpu")
    found, x, time = at(model, drawing)
    v = model.network(x, time, Condition(labels=torch.tensor([0, 1, 2])))
    v_guide = guide.network(x, time, Condition(labels=None if labels is None else torch.tensor(labels)))
    torch.testing.assert_close(found, v_guide + 2 * (v - v_guide))


def test_guided_by_takes_a_condition_from_the_guide(model, place):
    """As domain guidance has it, also where the classes are the same."""
    found, x, time = at(model, drawn(model, place / "same", guided_by=["label"]))
    guide = LatentFlow.from_pretrained(place / "same", device="cpu")
    v = model.network(x, time, Condition(labels=torch.tensor([0, 1, 2])))
    v_guide = guide.network(x, time, Condition(labels=torch.full((3,), 3)))
    torch.testing.assert_close(found, v_guide + 2 * (v - v_guide))


def test_an_unlabelled_model_is_guided(unlabelled, place):
    """By one without labels, and by one that has them."""
    for name, labels in (("nothing", None), ("same", torch.full((3,), 3))):
        found, x, time = at(unlabelled, drawn(unlabelled, place / name))
        guide = LatentFlow.from_pretrained(place / name, device="cpu")
        v, v_guide = unlabelled.network(x, time, Condition()), guide.network(x, time, Condition(labels=labels))
        torch.testing.assert_close(found, v_guide + 2 * (v - v_guide))
    with pytest.raises(ConfigError, match="unconditional, so guidance has nothing to act on"):
        make_drawing(unlabelled, SampleRequest(guidance=2.0))


def test_spatial_conditions_reach_a_guide_that_has_them(kl, place):
    model = tiny.model(kl, conditioning={"inpainting": True})
    given = {"masked_latents": torch.randn(3, C, SIDE, SIDE), "mask": torch.rand(3, 1, SIDE, SIDE)}
    labels = torch.tensor([0, 1, 2])
    request = SampleRequest(num=3, guidance=2.0, classes=["apple", "berry", "cherry"], **FAST)
    for name, fields in (("holes", given), ("same", {})):
        asked = SampleRequest(**{**dict(request), "guide": GuideReference(model=str(place / name))})
        found, x, time = at(model, make_drawing(model, asked, conditions=["inpainting"]), given)
        guide = LatentFlow.from_pretrained(place / name, device="cpu")
        v = model.network(x, time, Condition(labels=labels, **given))
        v_guide = guide.network(x, time, Condition(labels=labels, **fields))
        torch.testing.assert_close(found, v_guide + 2 * (v - v_guide))


# What is refused


@pytest.mark.parametrize(
    ("guide", "said"),
    [
        ("path", r"another path \(cosine\) than the model \(linear\)"),
        ("scaled", "another latent normalisation"),
        ("large", r"another latent size \(4 x 16 x 16\) than the model \(4 x 8 x 8\)"),
        ("always", "requires the condition label, which is not that of the model"),
    ],
)
def test_guides_that_do_not_fit(model, place, guide, said):
    with pytest.raises(ConfigError, match=f"^guide .*{guide} .*{said}.*; give"):
        drawn(model, place / guide)


def test_a_guide_of_another_autoencoder(model, tmp_path):
    tiny.kl(seed=5).save_pretrained(tmp_path / "ae")
    tiny.model(Autoencoder.from_pretrained(tmp_path / "ae")).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"another autoencoder \(.{12}\) than the model \(.{12}\)"):
        drawn(model, tmp_path / "other")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"guidance": 1.0}, "guide .*same has no effect: guidance is 1"),
        ({"guidance": None}, "guide .*same has no effect: guidance is 1"),
        ({"guided_by": ["semantic_map"]}, "guided by semantic_map, which is not given"),
        ({"guided_by": ["lable"]}, "did you mean 'label'"),
    ],
)
def test_settings_that_do_not_fit_a_guide(model, place, given, said):
    with pytest.raises(ConfigError, match=said):
        drawn(model, place / "same", **given)


def test_a_model_does_not_guide_itself_unless_its_condition_is_another(place):
    model = LatentFlow.from_pretrained(place / "same", device="cpu")
    with pytest.raises(ConfigError, match="is the model itself under the same conditions"):
        drawn(model, place / "same")
    guided = drawn(model, place / "same", guided_by=["label"])
    usual = make_drawing(model, SampleRequest(num=3, guidance=2.0, **FAST))
    torch.testing.assert_close(at(model, guided)[0], at(model, usual)[0])


def test_a_model_that_is_not_there(model, place):
    with pytest.raises(ArtifactError, match="does not exist"):
        drawn(model, place / "gone" / "away")


# Names, records and repetition


def test_snapshots_of_the_own_run(place):
    run = LatentFlow.from_pretrained(place / "run", device="cpu")
    by_share, by_step = drawn(run, "@1/16"), drawn(run, f"{place / 'run'}@6")
    assert by_share.sampling.guide.model == "@1/16"
    assert by_share.sampling.guide.weights == by_step.sampling.guide.weights
    early = LatentFlow.from_pretrained(f"{place / 'run'}@12", device="cpu")
    assert drawn(early, "@6").sampling.guide.weights == by_step.sampling.guide.weights
    inner = LatentFlow.from_pretrained(place / "run" / "model", device="cpu")
    assert drawn(inner, "@6").sampling.guide.weights == by_step.sampling.guide.weights
    with pytest.raises(ArtifactError, match="no snapshot of step 50"):
        drawn(run, "@1/2")
    other = LatentFlow.from_pretrained(place / "same", device="cpu")
    with pytest.raises(ConfigError, match=r"guide @1/8: .*same is no run folder"):
        drawn(other, "@1/8")


def test_a_picture_says_its_guide_and_is_drawn_again(model, place, tmp_path):
    shutil.copytree(place / "same", tmp_path / "guide")
    first = model.sample(num=1, seed=3, guidance=2.0, guide=tmp_path / "guide", **FAST)
    (file,) = first.save(tmp_path / "pictures")
    with Image.open(file) as image:
        facts = json.loads(image.info["latentflow"])
    opened = open_guide(model, GuideReference(model=str(tmp_path / "guide")))
    assert facts["sampling"]["guide"] == {
        "model": str(tmp_path / "guide"),
        "weights": opened.flow.weights_hash[:12],
    }
    assert facts["evaluations"] == 6
    again = model.sample(num=1, seed=3, **facts["sampling"])
    assert torch.equal(again.pixels, first.pixels)
    shutil.rmtree(tmp_path / "guide")
    shutil.copytree(place / "nothing", tmp_path / "guide")
    model.guides.clear()
    with pytest.raises(ConfigError, match=r"guide .* has the weights .{12}, not .{12} as recorded"):
        model.sample(num=1, seed=3, **facts["sampling"])


def test_a_preset_may_have_a_guide(kl, place):
    """It guides also what no condition supports; `none` asks for the null condition, guidance 1 for none at all."""
    guide = GuideReference(model=str(place / "nothing"))
    model = tiny.model(kl, guidance=3.0, guide=guide, guided_by=["label"])
    drawing = make_drawing(model, SampleRequest(num=2, classes=[]))
    assert (drawing.sampling.guide.model, drawing.sampling.guidance) == (guide.model, 3.0)
    plain = make_drawing(model, SampleRequest(num=2, guide="none"))
    assert (plain.sampling.guide, plain.sampling.guidance) == (None, 3.0)
    assert make_drawing(model, SampleRequest(num=2, guidance=1.0)).sampling.guide is None
    assert make_drawing(model, SampleRequest(num=2, classes=[], guide="none")).sampling.guidance == 1
    other = make_drawing(model, SampleRequest(num=2, guide=place / "same"))
    assert other.sampling.guided_by is None
    whole = {**SamplingPreset(guidance=2.0).model_dump(), "guide": None}
    assert make_drawing(model, SampleRequest(num=2, **whole)).sampling.guide is None
    assert preview_drawing(model.config).sampling.guide is None


def test_a_whole_preset_leaves_out_what_is_null_in_it(kl):
    """A picture's record is drawn by itself, whatever the preset of the model is by now."""
    model = tiny.model(kl, guidance=3.0, guided_by=["label"], guided_channels=2)
    whole = SamplingPreset(guidance=2.0)
    assert make_drawing(model, SampleRequest(num=2, **whole.model_dump())).sampling == whole


def test_what_a_preset_takes_from_its_guide_needs_no_null_of_the_model(kl, place):
    guide = GuideReference(model=str(place / "same"))
    model = tiny.model(kl, label_dropout=0.0, guidance=3.0, guide=guide, guided_by=["label"])
    assert make_drawing(model, SampleRequest(num=2)).sampling.guided_by == ["label"]


# What a call costs


def test_a_smaller_guide_is_not_a_whole_call(model, place):
    """Multiply-adds of one block against two, by hand."""
    small = LatentFlow.from_pretrained(place / "small", device="cpu")
    ours, theirs = multiply_adds(model.config), multiply_adds(small.config)
    tokens, width = (SIDE // 2) ** 2, 32
    block = tokens * 12 * width**2 + 2 * tokens**2 * width + 6 * width**2
    assert ours - theirs == block
    assert relative_cost(small.config, model.config) == theirs / ours
    samples = model.sample(num=2, guidance=2.0, guide=place / "small", **FAST)
    torch.testing.assert_close(samples.evaluations, torch.full((2,), 3 * (1 + theirs / ours), dtype=torch.float64))
    assert json.loads(json.dumps(samples.mean_evaluations)) == pytest.approx(3 * (1 + theirs / ours))
    same = model.sample(num=2, guidance=2.0, guide=place / "same", **FAST)
    assert same.evaluations.tolist() == [6, 6]
    assert same.evaluations.dtype == torch.int64


# One seed, one picture


@pytest.mark.parametrize(
    "how",
    [
        {**FAST, "guidance_interval": (0.3, 0.8)},
        {"solver": "bosh3", "rtol": 1e-2, "atol": 1e-2, "guidance_interval": (0.3, 0.8)},
        {"solver": "ab3", "steps": 5},
    ],
    ids=["interval", "adaptive", "multistep"],
)
def test_images_do_not_influence_each_other(model, place, how):
    request = SampleRequest(num=5, guidance=2.0, guide=place / "small", **how)
    drawing = make_drawing(model, request)
    together, singly = draw_all(model, drawing), draw_all(model, drawing, batch_size=2)
    torch.testing.assert_close(together.evaluations, singly.evaluations)
    torch.testing.assert_close(together.latents, singly.latents, rtol=0, atol=1e-4)


def test_blends_and_known_regions_are_guided(model, place):
    """The ends of an interpolation are the pictures of `sample`; what is known stays the known image's."""
    asked = {"guidance": 2.0, "guide": place / "same", **FAST}
    frames = model.interpolate(seeds=(0, 1), classes=["apple", "cherry"], num=3, **asked)
    first = model.sample(num=1, seed=0, classes=["apple"], **asked)
    torch.testing.assert_close(frames.latents[:1], first.latents, rtol=0, atol=1e-5)
    assert frames.evaluations.tolist() == [12, 12, 12]
    known = torch.randn(1, C, SIDE, SIDE)
    hole = torch.zeros(1, 1, SIDE, SIDE)
    hole[..., :4] = 1
    drawing = drawn(model, place / "same", num=1)
    painted = draw_all(model, drawing, Given(latents=known, hole=hole)).latents
    torch.testing.assert_close(painted[..., 4:], known[..., 4:], rtol=0, atol=1e-4)
    free = replace(Given(latents=known), hole=torch.ones_like(hole))
    torch.testing.assert_close(draw_all(model, drawing, free).latents, draw_all(model, drawing).latents)


def test_a_folder_is_completed_with_the_same_guide_alone(place, tmp_path, capsys, monkeypatch):
    """The name of its folder does not count, its weights do."""
    shutil.copytree(place / "same", tmp_path / "moved")
    command = ["sample", place / "run", "--guidance", 2, "--solver", "euler", "--steps", 2, "--device", "cpu"]
    out = ["--out", tmp_path / "out", "--json"]

    def drawn_with(guide, num):
        return run_here([*command, "--num", num, "--guide", guide, *out], capsys, monkeypatch)

    assert drawn_with(place / "same", 2).code == 0
    result = drawn_with(tmp_path / "moved", 3)
    assert json.loads(result.out)["there already"] == 2
    assert json.loads(result.out)["evaluations per image"] == 4
    refused = drawn_with("@1/16", 3)
    assert refused.code == 2
    assert "guide" in refused.err
    assert len(refused.err.strip().splitlines()) == 1


def test_benchmark_and_evaluate_say_the_guide(place, images, tmp_path):
    """With its weights, and its calls by their cost."""
    how = {"guidance": 2.0, "guide": str(place / "small"), **FAST}
    model, guide = (LatentFlow.from_pretrained(place / name, device="cpu") for name in ("run", "small"))
    calls = round(3 * (1 + multiply_adds(guide.config) / multiply_adds(model.config)), 3)
    cost = benchmark(BenchmarkRequest(model=place / "run", num=2, batch_sizes=[2], repeats=1, **how), tiny.CPU)
    assert cost.evaluations == pytest.approx(calls, abs=1e-3)
    asked = EvaluationRequest(model=place / "run", data=images, features="random", metrics=["fid"], num=4, **how)
    protocol = evaluate(asked, tiny.CPU).report.protocol
    assert protocol.sampling["guide"] == {"model": str(place / "small"), "weights": guide.weights_hash[:12]}
    assert protocol.evaluations.min == protocol.evaluations.max == calls


def test_diagnose_and_fit_solver_take_a_guide(place, images, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    guide = {"model": str(place / "same"), "weights": LatentFlow.from_pretrained(place / "same").weights_hash[:12]}
    how = {"model": str(tmp_path / "run"), "guidance": 2.0, "guide": str(place / "same")}
    examined = DiagnoseRequest(**how, data=images, num=8, num_samples=4, out=tmp_path / "diagnosis")
    diagnosis = diagnose(examined, tiny.CPU)
    assert f"away from {guide['model']}" in diagnosis.sampling
    fit_solver(FitSolverRequest(**how, evaluations=[4], num=8, held_out=8, reference_steps=24), runtime=tiny.CPU)
    solvers = LatentFlow.from_pretrained(tmp_path / "run", device="cpu").fitted_solvers.solvers
    assert solvers["fitted-4"].fitted_with["guide"] == guide
    with pytest.raises(ConfigError, match=r"guide .*same has no effect: guidance is 1"):
        fit_solver(FitSolverRequest(**{**how, "guidance": 1.0}), runtime=tiny.CPU)


def test_other_images_of_the_same_model_are_inverted_with_it(model, place):
    """Fine steps there and back with a guide lose little."""
    image = Image.fromarray(torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8).numpy())
    inversion = model.invert(image, classes=["apple"], guidance=1.5, guide=place / "same", solver="rk4", steps=20)
    assert inversion.drawing.sampling.guide.model == str(place / "same")
    assert inversion.evaluations == 2 * 4 * 20
    assert inversion.round_trip(model).latent_error < 0.05


def test_named_conditions_reach_a_guide_that_has_them(kl, tmp_path):
    """By name, in the order of the guide; others, and columns of other classes, are null for it."""
    number, view = (
        {"name": "age", "kind": "number"},
        {"name": "view", "kind": "label", "class_names": ["front", "side"]},
    )
    other = {**view, "class_names": ["side", "front"]}
    columns = {"ours": [number, view], "turned": [view, {**number, "mean": 3.0}], "other": [other, number], "none": []}
    models = {
        name: tiny.model(kl, seed=seed, conditioning={"columns": [ColumnCondition(**one) for one in given]})
        for seed, (name, given) in enumerate(columns.items())
    }
    for name, one in models.items():
        one.save_pretrained(tmp_path / name)
    ours, asked = LatentFlow.from_pretrained(tmp_path / "ours"), {"age": 63, "view": "side"}
    for name, seen in (("turned", [[1, 63, 0]]), ("other", [[2, 63, 0]]), ("none", None)):
        guide = GuideReference(model=str(tmp_path / name))
        request = SampleRequest(num=1, classes=["apple"], conditions=asked, guidance=2.0, guide=guide)
        drawing = make_drawing(ours, request)
        velocity = conditioned_velocity(ours, drawing, {}, (1, 4, 8, 8))
        assert velocity.condition.columns.tolist() == [[63, 0, 1]]
        found = velocity.guide.condition.columns
        assert (None if found is None else found.tolist()) == seen
