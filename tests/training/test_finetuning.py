"""Runs that begin with the weights of another model."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from latentflow.api import LatentFlow
from latentflow.artifacts import read_tensors
from latentflow.commands.finetune import finetune_recipe
from latentflow.commands.sweep import write_preset
from latentflow.commands.train import prepare
from latentflow.commands.train import train as train_command
from latentflow.data.sources.images import open_images
from latentflow.errors import ArtifactError, ConfigError
from latentflow.flow.path import CosinePath
from latentflow.model.config import SamplingPreset
from latentflow.networks.velocity_network import NoisePrediction
from latentflow.requests import RequestError
from latentflow.shapes import Condition
from latentflow.sizes import Size
from latentflow.training import held_out_watch, velocity
from latentflow.training.checkpoint import newest_checkpoint
from latentflow.training.config import Recipe, load_recipe
from latentflow.training.finetuning import FEW_IMAGES, fit_to_source, with_method
from latentflow.training.fitting import Situation
from latentflow.training.log import read_metrics
from latentflow.training.request import FinetuneRequest
from tests import tiny
from tests.tiny import write_cache
from tests.training.test_loop import at_step, final

METHODS = ("full", "lora", "biases")
OPEN: dict[str, Any] = {"training": {**tiny.RECIPE["training"], "steps": 6}, "optimizer": {"learning_rate": 1e-2}}
"""Of a recipe that leaves to the source what it can."""


@pytest.fixture(scope="module")
def source(tmp_path_factory, kl) -> Path:
    """A model of three other classes."""
    folder = tmp_path_factory.mktemp("source") / "model"
    tiny.model(kl, class_names=("pear", "cherry", "plum"), guidance=2.0, steps=3).save_pretrained(folder)
    return folder


@pytest.fixture
def made(tmp_path, cache, source):
    """A recipe on three classes of which the source knows one."""

    def make(name: str = "run", **given: Any) -> Recipe:
        data = {"path": str(cache), "flip": False, "held_out": 0.2, **given.pop("data", {})}
        finetuning = {"method": "full", **given.pop("finetuning", {})}
        values = {**OPEN, "init_from": str(source), "out": str(tmp_path / name), "data": data, "finetuning": finetuning}
        for key, value in given.items():
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
        return Recipe.model_validate(values)

    return make


@pytest.fixture
def train(made):
    def run(name: str = "run", **given: Any) -> Path:
        return train_command(made(name, **given), runtime=tiny.CPU).run

    return run


@pytest.fixture
def often(monkeypatch):
    """Measure held-out images every second step."""
    monkeypatch.setattr(held_out_watch, "COST", 1e9)


def refused(kind: type[Exception], recipe: Recipe, *words: str) -> None:
    """Trains, and makes sure that it is refused with these words and that nothing was written."""
    with pytest.raises(kind) as caught:
        train_command(recipe, runtime=tiny.CPU)
    assert "\n" not in str(caught.value)
    for part in words:
        assert part in str(caught.value)
    assert not Path(recipe.out).exists()


# What a run takes from its source


@pytest.mark.parametrize("method", METHODS)
def test_step_0_is_the_source(made, source, method):
    prepared = prepare(made(finetuning={"method": method, "class_from": ["apple=plum"]}), tiny.CPU)
    before, after = LatentFlow.from_pretrained(source, device="cpu"), prepared.model
    assert after.config.conditioning.class_names == list(tiny.CLASSES)
    latents, time = torch.randn(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    with torch.no_grad():
        for ours, theirs in ((0, 2), (2, 1), (3, 3)):  # apple begins as plum, cherry is known, null stays
            given = [
                one.config.conditioning.build(latents.shape, "cpu", labelled(label))
                for one, label in ((after, ours), (before, theirs))
            ]
            assert torch.equal(after.velocity(latents, time, given[0]), before.velocity(latents, time, given[1]))


def labelled(label: int) -> Condition:
    return Condition(labels=torch.full((3,), label))


def test_what_the_source_decides(made, source):
    own = LatentFlow.from_pretrained(source, device="cpu").config
    prepared = prepare(made(), tiny.CPU)
    recipe, config = prepared.recipe, prepared.model.config
    assert recipe.network == config.network == own.network
    assert (recipe.path, recipe.normalise, config.normalisation) == (own.path, "source", own.normalisation)
    assert (config.sampling.guidance, config.sampling.steps) == (2.0, 3)
    assert recipe.sampling == config.sampling
    assert config.training.source == str(source)
    assert config.training.source_weights == recipe.finetuning.weights == prepared.model.config.training.source_weights
    assert recipe.finetuning.weights == LatentFlow.from_pretrained(source, device="cpu").weights_hash[:12]
    rows = prepared.describe()
    assert rows["begins as"] == f"{source}, weights {recipe.finetuning.weights}"
    assert prepare(made(sampling={"steps": 7}), tiny.CPU).recipe.sampling.steps == 7


def test_what_belongs_to_the_weights_of_the_source_stays_with_it(made, source, tmp_path):
    """Its guide, the scale that was chosen for that, and a solver that was fitted to it."""
    shutil.copytree(source, tmp_path / "source")
    chosen = {"solver": "fitted-6@01234567", "steps": 6, "guidance": 3.0, "guide": "@1/8", "rtol": 0.5}
    write_preset(tmp_path / "source", SamplingPreset.model_validate(chosen))
    recipe = prepare(made(init_from=str(tmp_path / "source")), tiny.CPU).recipe
    assert recipe.sampling == SamplingPreset(rtol=0.5)


def test_without_labels_nothing_is_guided(made):
    prepared = prepare(made(data={"labels": False}), tiny.CPU)
    assert prepared.recipe.sampling.guidance == 1.0
    assert prepared.model.config.conditioning.constant_embedding


def test_conditions_of_the_source_stay_unless_the_recipe_says_otherwise(tmp_path, made, kl, segmented_cache):
    folder = tmp_path / "spatial"
    tiny.model(kl, conditioning=tiny.SPATIAL).save_pretrained(folder)
    data = {"path": str(segmented_cache)}
    prepared = prepare(made(init_from=str(folder), data=data), tiny.CPU)
    assert {"inpainting", "semantic_map"} < prepared.model.config.conditioning.kinds.keys()
    without = made(init_from=str(folder), data=data, conditioning={"semantic_map": False})
    assert "semantic_map" not in prepare(without, tiny.CPU).model.config.conditioning.kinds
    without = made("none", init_from=str(folder), data=data, conditioning={"inpainting": False})
    refused(ConfigError, without, "conditioning.inpainting=true")


def test_another_size(tmp_path, made, images, kl):
    write_cache(open_images(images, 24), kl, tmp_path / "larger")
    model = prepare(made(data={"path": str(tmp_path / "larger")}), tiny.CPU).model
    assert model.config.latent_shape == (4, 12, 12)


# What is trained


def test_what_each_method_trains(train, source):
    before = read_tensors(source / "velocity.safetensors")
    changed = {}
    for method in METHODS:
        run = train(method, finetuning={"method": method, "rank": 2 if method == "lora" else None})
        after = read_tensors(run / "model" / "velocity.safetensors")
        assert after.keys() == before.keys()
        changed[method] = {name for name in after if not torch.equal(after[name], before[name])}
        trained = read_tensors(newest_checkpoint(run) / "network.safetensors")
        averaged = read_tensors(newest_checkpoint(run) / "ema.safetensors")
        moments = {name.rpartition("/")[0] for name in read_tensors(newest_checkpoint(run) / "optimizer.safetensors")}
        assert trained.keys() == averaged.keys() == moments
        assert LatentFlow.from_pretrained(run, device="cpu").sample(num=1, seed=0).images
    assert changed["full"] == before.keys()
    assert changed["biases"] == {name for name in before if name.endswith("bias")} | {"label_embedding.weight"}
    assert "label_embedding.weight" in changed["lora"]
    assert "blocks.0.attention.qkv.weight" in changed["lora"] and "blocks.0.attention.qkv.bias" not in changed["lora"]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_stopped_goes_on_exactly(train, monkeypatch, often, method):
    given = {"finetuning": {"method": method}, "training": {"checkpoint_every": 2}}
    whole = train("whole", **given)
    with monkeypatch.context() as patch:
        patch.setattr(velocity, "training_step", at_step(4, lambda: signal.raise_signal(signal.SIGTERM)))
        train("parted", **given)
    assert newest_checkpoint(whole.parent / "parted").name < newest_checkpoint(whole).name
    parted = train("parted", **given)
    assert final(parted) == final(whole)
    both = [read_tensors(run / "best" / "velocity.safetensors") for run in (whole, parted)]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


def test_the_saved_recipe_is_the_same_run(tmp_path, train):
    run = train("run", finetuning={"method": "biases", "class_from": ["apple=plum"]})
    again = load_recipe(run / "recipe.yaml", [f"out={tmp_path / 'again'}"])
    assert final(train_command(again, runtime=tiny.CPU).run) == final(run)


def test_a_network_that_predicts_noise(tmp_path, made, kl):
    flow = tiny.model(kl)
    config = flow.config.model_copy(update={"prediction": NoisePrediction(), "path": CosinePath()})
    flow.config, flow.network = config, tiny.randomise(config.build_network(), scale=0.3)
    flow.save_pretrained(tmp_path / "noise")
    run = train_command(made(init_from=str(tmp_path / "noise"), finetuning={"method": "biases"}), runtime=tiny.CPU).run
    after = LatentFlow.from_pretrained(run, device="cpu")
    assert (after.config.prediction, after.config.path.kind) == (NoisePrediction(), "cosine")
    assert all(line["loss"] < 10 for line in read_metrics(run) if "loss" in line)


# What is refused


def test_another_autoencoder(made, images, deterministic, deterministic_folder, source, tmp_path):
    write_cache(open_images(images, tiny.IMAGE_SIZE), deterministic, tmp_path / "other")
    words = (str(deterministic_folder), deterministic.content_hash[:12], f"--autoencoder {source}/autoencoder")
    refused(ConfigError, made(data={"path": str(tmp_path / "other")}), *words)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"normalise": "per_channel"}, ["normalise = per_channel", "use normalise=source, or leave it out"]),
        ({"path": {"kind": "cosine"}}, ["path = ", "leave path out"]),
        ({"network": {"depth": 3, "hidden_size": 32, "num_heads": 2, "patch_size": 2}}, ["leave network out"]),
        ({"finetuning": {"class_from": ["apple=fig"]}}, ["no class 'fig'"]),
        ({"finetuning": {"class_from": ["fig=pear"]}}, ["no class 'fig'"]),
        ({"finetuning": {"class_from": ["apple=pear"]}, "data": {"labels": False}}, ["the data have no classes"]),
        ({"finetuning": {"weights": "0" * 12}}, ["has the weights", "began with 000000000000"]),
        (
            {"finetuning": {"method": "biases"}, "training": {"ema_lengths": [0.1]}},
            ["training.ema_lengths", "leave it out"],
        ),
    ],
)
def test_what_does_not_go_with_the_source(made, given, words):
    refused(ConfigError, made(**given), *words)


def test_sources_that_are_none(made, tmp_path, train, cache):
    (tmp_path / "empty").mkdir()
    refused(ArtifactError, made(init_from=str(tmp_path / "empty")), str(tmp_path / "empty"), "velocity.safetensors")
    refused(ArtifactError, made(init_from=str(tmp_path / "nowhere")), "does not exist")
    refused(ArtifactError, made(init_from=str(cache)), "is not a model folder")
    run = train("first")
    before = tiny.tree(run)
    with pytest.raises(ArtifactError, match="lies inside"):
        train_command(made("first", init_from=str(run)), runtime=tiny.CPU)
    assert tiny.tree(run) == before


def test_a_run_is_apart_from_each_model_that_it_begins_with(made, tmp_path, source):
    """Base and adapter in one name, and a snapshot of the run itself."""
    base, tuned = shutil.copytree(source, tmp_path / "base"), tmp_path / "tuned"
    tiny.finetuned(base).save_pretrained(tuned / "best")
    before = tiny.tree(tmp_path)
    for name, out in ((f"{base}+{tuned}@best", base), (f"{base}+{tuned}@best:0.5", tuned), (f"{tuned}@best", tuned)):
        with pytest.raises(ArtifactError, match="lies inside"):
            train_command(made(init_from=name, out=str(out)), runtime=tiny.CPU)
    assert tiny.tree(tmp_path) == before


def test_sizes_that_do_not_fit(made, images, kl, tmp_path):
    write_cache(open_images(images, 18), kl, tmp_path / "odd")
    refused(ConfigError, made(data={"path": str(tmp_path / "odd")}), "9 x 9", "multiples of 2")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("finetuning.method=bias", "did you mean 'biases'"),
        ("finetuning.rank=0", "at least 1"),
        ("finetuning.class_from=corgi", "corgi=Pembroke"),
        ("finetuning.class_from=[a=b, a=c]", "a is given twice"),
    ],
)
def test_keys_that_cannot_be(key, words):
    with pytest.raises(ConfigError, match=words):
        load_recipe("finetune", ["init_from=x", key])


def test_settings_without_a_source():
    with pytest.raises(ConfigError, match="add init_from=MODEL"):
        load_recipe("own_images", ["finetuning.method=full"])
    with pytest.raises(ConfigError, match=r"finetuning\.rank = 4 is for lora"):
        load_recipe("finetune", ["init_from=x", "finetuning.method=full", "finetuning.rank=4"])
    with pytest.raises(RequestError, match="rank 4 is for --method lora"):
        FinetuneRequest(model="x", data="y", method="biases", rank=4)
    recipe = load_recipe("finetune", ["data.path=x", "out=y"])
    with pytest.raises(ConfigError, match="add init_from=MODEL"):
        prepare(recipe, tiny.CPU)


def test_a_run_goes_on_with_the_source_it_began_with(tmp_path, made, source, kl):
    moved = shutil.copytree(source, tmp_path / "source")
    recipe = made(init_from=str(moved), training={"steps": 2})
    train_command(recipe, runtime=tiny.CPU)
    other = tiny.model(kl, class_names=("pear", "cherry", "plum"), seed=1)
    shutil.rmtree(moved)
    other.save_pretrained(moved)
    with pytest.raises(ConfigError, match="restore that model, or choose another out"):
        train_command(made(init_from=str(moved), training={"steps": 3}), runtime=tiny.CPU)
    with pytest.raises(ConfigError, match=r"finetuning\.method cannot change"):
        train_command(made(finetuning={"method": "biases"}, training={"steps": 3}), runtime=tiny.CPU)
    assert train_command(made(training={"steps": 3}), runtime=tiny.CPU).outcome.finished  # at another place


def test_a_run_goes_on_with_the_classes_it_began_with(tmp_path, made, images, kl):
    train_command(made(training={"steps": 2}), runtime=tiny.CPU)
    renamed = shutil.copytree(images, tmp_path / "renamed")
    (renamed / "apple").rename(renamed / "apricot")
    write_cache(open_images(renamed, tiny.IMAGE_SIZE), kl, tmp_path / "other")
    words = "trained on the classes apple, berry, cherry, but .* has apricot, berry, cherry"
    with pytest.raises(ConfigError, match=words):
        train_command(made(data={"path": str(tmp_path / "other")}, training={"steps": 3}), runtime=tiny.CPU)


def test_another_recipe_can_begin_with_a_model(tmp_path, cache, source):
    given = [f"init_from={source}", f"data.path={cache}", f"out={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match="use normalise=source"):
        prepare(load_recipe("own_images", given), tiny.CPU)
    prepared = prepare(load_recipe("own_images", [*given, "normalise=source"]), tiny.CPU)
    assert prepared.recipe.finetuning.method == "lora"
    assert prepared.recipe.times.distribution == "logit_normal"
    assert prepared.model.adapted_from is not None


# What is decided


def test_few_images_get_lora():
    recipe = load_recipe("finetune", ["init_from=x"])
    assert with_method(recipe, FEW_IMAGES).finetuning.method == "full"
    few = with_method(recipe, FEW_IMAGES - 1).finetuning
    assert (few.method, few.rank) == ("lora", 16)
    asked = with_method(load_recipe("finetune", ["init_from=x", "finetuning.rank=4"]), 10**6).finetuning
    assert (asked.method, asked.rank) == ("lora", 4)


@pytest.mark.parametrize(
    ("num_images", "steps", "why"),
    [
        (20, 1000, "steps: 1,000, the minimum for small data sets"),
        (100, 3000, "steps: 3,000, 30 per image; with more it would memorise them"),
        (800, 24_000, "steps: 24,000, usual for finetuning"),
        (10**6, 24_000, "steps: 24,000, usual for finetuning"),
    ],
)
def test_few_images_are_trained_for_fewer_steps(source, num_images, steps, why):
    recipe = with_method(load_recipe("finetune", [f"init_from={source}", "network.name=DiT-S/2"]), num_images)
    situation = Situation(num_images, 0, Size.of(4), gpu=False, memory=None)
    fitted, lines = fit_to_source(recipe, situation, num_parameters=1000)
    assert fitted.training.steps == steps
    assert lines[-1] == why
    asked = with_method(
        load_recipe("finetune", [f"init_from={source}", "network.name=DiT-S/2", "training.steps=70"]), 20
    )
    fitted, lines = fit_to_source(asked, situation, num_parameters=1000)
    assert (fitted.training.steps, len(lines)) == (70, 1)


@pytest.mark.parametrize(("method", "rate"), [("full", 1e-4), ("lora", 2e-4), ("biases", 1e-3)])
def test_what_the_verb_asks_for(tmp_path, cache, source, method, rate):
    request = FinetuneRequest(model=source, data=cache, method=method, class_from={"apple": "plum, red"})
    with pytest.raises(ConfigError, match="no class 'plum, red'"):
        prepare(finetune_recipe(request, [f"out={tmp_path / 'run'}"]), tiny.CPU)
    request = FinetuneRequest(model=source, data=cache, method=method, class_from={"apple": "plum"})
    recipe = prepare(finetune_recipe(request, [f"out={tmp_path / 'run'}"]), tiny.CPU).recipe
    training = recipe.training
    assert (training.steps, training.batch_size, training.ema_decay) == (1000, 16, 0.999)
    assert (recipe.optimizer.learning_rate, recipe.optimizer.warmup_steps) == (rate, 100)
    assert (recipe.fit, recipe.finetuning.method) == (False, method)
    assert recipe.finetuning.former_classes == {"apple": "plum"}
    short = prepare(finetune_recipe(request, [f"out={tmp_path / 'run'}", "training.steps=100"]), tiny.CPU).recipe
    assert (short.training.steps, short.optimizer.warmup_steps, short.training.ema_decay) == (100, 10, 0.999)
