"""Runs that hold images out: what is measured of them, the best weights, and that training does not change by it."""

from __future__ import annotations

import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.api import LatentFlow
from latentflow.artifacts import read_tensors
from latentflow.autoencoder import Autoencoder
from latentflow.commands.train import prepare
from latentflow.commands.train import train as train_command
from latentflow.data.sources.images import open_images
from latentflow.errors import ArtifactError, ConfigError
from latentflow.flow.times import TrainingTimes
from latentflow.model.flow_model import read_config
from latentflow.training import checkpoint, held_out_watch, velocity
from latentflow.training.checkpoint import newest_checkpoint, step_of
from latentflow.training.held_out_watch import HeldOutWatch, read_best, steps_between
from latentflow.training.log import read_metrics
from latentflow.training.settings import to_yaml
from latentflow.training.step import training_step
from tests import tiny
from tests.training.test_loop import at_step, final


@pytest.fixture
def recipe(tmp_path, cache, kl_folder):
    """The tiny recipe on 18 images, 4 of which are held out."""

    def make(name: str, *, data: Path | None = None, **given):
        source = {"path": data or cache, "held_out": 0.2, **given.pop("source", {})}
        return tiny.recipe(**{"autoencoder": kl_folder, **given}, data=source, out=tmp_path / name)

    return make


@pytest.fixture
def train(recipe):
    def run(name: str, **given) -> Path:
        return train_command(recipe(name, **given), runtime=tiny.CPU).run

    return run


@pytest.fixture
def often(monkeypatch):
    """Measure every second step of a few, whatever it costs."""
    monkeypatch.setattr(held_out_watch, "COST", 1e9)


def best(run: Path) -> dict[str, bytes]:
    return {file: (run / "best" / file).read_bytes() for file in ("velocity.safetensors", "config.json")}


def test_held_out_images_are_never_trained_on(recipe, images):
    prepared = prepare(recipe("run"), tiny.CPU)
    trained, held_out = set(prepared.images.kept.tolist()), set(prepared.held_out.kept.tolist())
    assert (len(trained), len(held_out)) == (14, 4)
    assert trained | held_out == set(range(18))
    seen = prepared.images.indices_at(range(200)).unique().tolist()
    assert set(seen) == trained
    record = prepared.model.config.training
    assert record.num_images == sum(record.images_per_class) == 14
    names = prepared.images.source.names()
    assert set(record.held_out.rows(names)) == held_out
    assert prepared.describe()["held out"] == "4 images, never trained on"
    # The same images of a folder, whose names are the same, whatever the seed.
    other = prepare(recipe("other", data=images, training={"seed": 5}), tiny.CPU)
    assert {other.images.source.name(row) for row in other.held_out.kept.tolist()} == {names[row] for row in held_out}


def test_few_images_and_published_recipes_hold_nothing_out(recipe, cache):
    assert prepare(recipe("run", source={"held_out": "auto"}), tiny.CPU).held_out is None
    prepared = prepare(recipe("other", source={"held_out": 0}), tiny.CPU)
    assert prepared.held_out is None and prepared.model.config.training.held_out is None
    assert prepared.describe()["held out"] == "none"


def test_the_log_and_the_model(train, often):
    run = train("run", training={"log_every": 2})
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
    for line in lines:
        assert list(line["held_out_loss_by_time"]) == [f"{n / 10:.1f}-{(n + 1) / 10:.1f}" for n in range(10)]
        # Training times are uniform, so that the loss is the mean over the bins.
        assert line["held_out_loss"] == pytest.approx(sum(line["held_out_loss_by_time"].values()) / 10)
    lowest = min(lines, key=lambda line: line["held_out_loss"])
    record = read_config(run / "best").training
    assert (record.step, record.held_out_loss) == (lowest["step"], lowest["held_out_loss"])
    assert record.images_seen == lowest["images_seen"]
    assert read_config(run / "model").training.held_out == record.held_out
    assert read_config(run / "model").training.held_out_loss is None


def test_what_is_measured(recipe, kl):
    """By hand: the averaged weights on held-out images, times spread evenly, conditions dropped as in training."""
    prepared = prepare(recipe("run"), tiny.CPU)
    watch = watch_of(prepared)
    average = {name: tensor + 0.01 for name, tensor in prepared.model.network.state_dict().items()}
    found = watch.measure(average, 3, 12)
    own = {name: tensor.clone() for name, tensor in prepared.model.network.state_dict().items()}
    prepared.model.network.load_state_dict(average)
    network = prepared.model.network.eval()
    batch = prepared.held_out.at(range(64))
    result = training_step(
        prepared.model, network, batch, times=TrainingTimes(stratified=True), batch_size=64, seed=watch.seed
    )
    bins = (result.time * 10).long()
    by_time = [result.loss[bins == n].mean().item() for n in range(10)]
    assert list(found["held_out_loss_by_time"].values()) == pytest.approx(by_time, rel=1e-5)
    assert watch.num_draws == 64 and set(batch.indices.tolist()) == set(prepared.held_out.kept.tolist())
    prepared.model.network.load_state_dict(own)
    assert watch.measure(average, 3, 12)["held_out_loss"] == found["held_out_loss"]


def watch_of(prepared, **given) -> HeldOutWatch:
    config = prepared.recipe.training
    times = given.pop("times", prepared.recipe.times)
    options = {"micro_batch_size": 7, "is_resumed": False, **given}
    return HeldOutWatch(prepared.model, prepared.held_out, prepared.run, times, config, **options)


def test_training_times_weigh_the_bins(recipe):
    prepared = prepare(recipe("run"), tiny.CPU)
    average = prepared.model.network.state_dict()
    times = TrainingTimes(distribution="logit_normal", mean=1.0, stratified=True)
    watch = watch_of(prepared, times=times)
    positions = torch.arange(10_000)
    drawn = times.draw(torch.rand(10_000, generator=torch.Generator().manual_seed(0)), positions, 10_000)
    shares = torch.bincount((drawn * 10).long(), minlength=10) / 10_000
    assert torch.allclose(watch.weights.float(), shares, atol=2e-3)
    found = watch.measure(average, 1, 4)
    values = list(found["held_out_loss_by_time"].values())
    assert found["held_out_loss"] == pytest.approx(
        sum(a * b for a, b in zip(watch.weights.tolist(), values, strict=True))
    )


def test_images_that_are_encoded_in_the_step_are_encoded_once(recipe, images, monkeypatch):
    prepared = prepare(recipe("run", data=images), tiny.CPU)
    watch, average = watch_of(prepared), prepared.model.network.state_dict()
    first = watch.measure(average, 1, 4)
    monkeypatch.setattr(type(prepared.held_out), "at", None)
    again = watch.measure(average, 2, 8)
    assert again["held_out_loss_by_time"] == first["held_out_loss_by_time"]
    cached = prepare(recipe("other"), tiny.CPU)
    monkeypatch.undo()
    # The cache holds the same moments in float16.
    expected = watch_of(cached).measure(average, 1, 4)["held_out_loss"]
    assert first["held_out_loss"] == pytest.approx(expected, rel=1e-3)


def test_training_is_the_same_with_and_without_measurements(train, monkeypatch):
    given = {"micro_batch_size": 2, "log_every": 2}
    monkeypatch.setattr(HeldOutWatch, "is_due", lambda watch, step: False)
    plain = final(train("plain", training=given))
    monkeypatch.setattr(HeldOutWatch, "is_due", lambda watch, step: True)
    assert final(train("measured", training=given)) == plain


def test_what_it_costs():
    """512 forward passes, each a third of a step's cost of an image: 2 % of the images between two measurements."""
    config = tiny.recipe(training={"batch_size": 64, "log_every": 50}, data={}).training
    every = steps_between(512, config)
    assert every == 150 and 0.02 * 64 * every >= 512 / 3
    assert steps_between(512, config.model_copy(update={"batch_size": 256})) == 50
    assert steps_between(512, config.model_copy(update={"batch_size": 16, "log_every": 1})) == 534


# ---- the best weights


@pytest.fixture(scope="module")
def noise(tmp_path_factory, deterministic_folder) -> Path:
    """A cache of 8 pictures with nothing to learn but themselves."""
    folder, generator = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for number in range(8):
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(np.kron(pixels, np.ones((2, 2, 1), np.uint8))).save(folder / f"{number}.png")
    autoencoder = Autoencoder.from_pretrained(str(deterministic_folder))
    tiny.write_cache(open_images(folder, tiny.IMAGE_SIZE), autoencoder, folder / "cache")
    return folder / "cache"


@pytest.fixture
def overfit(train, often, noise, deterministic_folder):
    """A run that learns 4 pictures by heart; its held-out loss is lowest near step 36."""

    def run(name: str, **training) -> Path:
        return train(
            name,
            data=noise,
            source={"held_out": 0.5},
            autoencoder=deterministic_folder,
            normalise="per_channel",
            network={"hidden_size": 64},
            optimizer={"learning_rate": 6e-3},
            training={
                "steps": 60,
                "batch_size": 16,
                "ema_decay": 0.5,
                "log_every": 6,
                "checkpoint_every": 20,
                **training,
            },
        )

    return run


def test_the_best_weights_are_from_before_the_held_out_loss_turns(overfit, caplog):
    run = overfit("run")
    lines = read_metrics(run)
    losses = {line["step"]: line["held_out_loss"] for line in lines}
    kept = read_best(run)
    assert losses[kept.step] == kept.loss == min(losses.values())
    assert 18 <= kept.step <= 48 and losses[60] > 1.04 * kept.loss  # measured: 36, and 1.077
    assert lines[-1]["loss"] == min(line["loss"] for line in lines)
    assert f"held-out loss rises: {kept.loss:.4f} after step {kept.step}" in caplog.text
    assert caplog.text.count("held-out loss rises") == 1
    model = LatentFlow.from_pretrained(f"{run}@best", device="cpu")
    assert model.config.training.step == kept.step
    assert model.sample(2, steps=1).pixels.shape[0] == 2
    # They are the averaged weights of this step, as of a run that ends there.
    alone = overfit("alone", steps=kept.step)
    average = read_tensors(newest_checkpoint(alone) / "ema.safetensors")
    weights = read_tensors(run / "best" / "velocity.safetensors")
    assert weights.keys() == average.keys()
    assert all(torch.equal(weights[name], average[name]) for name in average)


def test_a_stopped_run_goes_on_to_the_same_best_weights(overfit, monkeypatch):
    """Stopped before the best weights, after them before a checkpoint, and by a kill while it writes."""
    whole, stop_here = overfit("whole"), partial(signal.raise_signal, signal.SIGTERM)
    for stop in (17, 45):
        with monkeypatch.context() as patched:
            done = newest_checkpoint(whole.with_name("parts"))
            first = 0 if done is None else step_of(done)
            patched.setattr(velocity, "training_step", at_step(stop - first, stop_here))
            parts = overfit("parts")
        assert step_of(newest_checkpoint(parts)) == stop
    assert read_best(parts).step == read_best(whole).step < 45
    overfit("parts")
    assert (final(parts), best(parts)) == (final(whole), best(whole))
    assert measured(parts) == measured(whole)


def measured(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["held_out_loss"]) for line in read_metrics(run) if "held_out_loss" in line]


def test_killed_between_the_best_weights_and_the_checkpoint(overfit, monkeypatch):
    """The best weights on disk may be newer than the checkpoint; the steps to them are repeated."""
    whole, write, written = overfit("whole"), checkpoint.write_checkpoint, []

    def die(run, progress, *arguments):
        written.append(progress.step)
        if progress.step == 40:
            raise KeyError("killed here")
        return write(run, progress, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_checkpoint", die)
        with pytest.raises(KeyError):
            overfit("parts")
    parts = whole.with_name("parts")
    assert written == [20, 40] and step_of(newest_checkpoint(parts)) == 20
    assert read_best(parts).step > 20
    overfit("parts")
    assert (final(parts), best(parts)) == (final(whole), best(whole))


def test_a_new_run_deletes_the_best_weights_of_another(train, often):
    run = train("run", training={"log_every": 2})
    assert read_best(run)
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "model")
    train("run", training={"log_every": 2}, source={"held_out": 0})
    assert not (run / "best").exists()
    with pytest.raises(ArtifactError, match=r"run has no snapshot of the lowest held-out loss .*data.held_out"):
        LatentFlow.from_pretrained(f"{run}@best")


# ---- what runs began with


def test_the_share_belongs_to_the_run(train):
    train("run", training={"steps": 2})
    with pytest.raises(ConfigError, match=r"data\.held_out cannot change"):
        train("run", training={"steps": 4}, source={"held_out": 0.3})


def test_a_run_of_an_earlier_version_goes_on_without(recipe, train):
    """Its recipe does not say."""
    run = train("run", source={"held_out": 0}, training={"steps": 2})
    text = (run / "recipe.yaml").read_text(encoding="utf-8")
    (run / "recipe.yaml").write_text(text.replace("  held_out: 0.0\n", ""), encoding="utf-8")
    given = recipe("run", training={"steps": 4}, source={"held_out": "auto"})
    unset = given.data.model_copy()
    unset.model_fields_set.discard("held_out")
    train_command(given.model_copy(update={"data": unset}), runtime=tiny.CPU)
    assert "held_out: 0.0" in (run / "recipe.yaml").read_text(encoding="utf-8")
    assert read_config(run / "model").training.held_out is None
    assert "held_out: 0.0" in to_yaml(recipe("other", source={"held_out": 0}))
