"""A first stage of one's own: it learns, resumes exactly, and ends as a folder that the rest of the package takes."""

from __future__ import annotations

import math
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from latentflow.analysis.latent_space import measure_latent_space
from latentflow.artifacts import read_json, read_tensors
from latentflow.autoencoder import Autoencoder, latent_mean, sample_latents, to_uint8, to_unit_range
from latentflow.commands.train_autoencoder import train_autoencoder
from latentflow.data.batches import Batch
from latentflow.data.pictures.user_picture import psnr
from latentflow.data.sources.images import open_images
from latentflow.data.sources.synthetic import SyntheticShapes
from latentflow.errors import ArtifactError, ConfigError, DataError, NonFiniteError
from latentflow.metrics.features.judge_folder import Judge, JudgeRecord, load_judge
from latentflow.networks.feature_network import FeatureNetwork, FeatureNetworkConfig
from latentflow.networks.patch_discriminator import JudgedAutoencoder, PatchDiscriminator
from latentflow.randomness import ImageRandom
from latentflow.training import first_stage as training
from latentflow.training.checkpoint import newest_checkpoint
from latentflow.training.config import recipe_names
from latentflow.training.first_stage import (
    AUTOENCODER_RECIPES,
    AutoencoderRecipe,
    autoencoder_step,
    build_autoencoder,
    load_autoencoder_recipe,
)
from latentflow.training.first_stage_run import prepare_first_stage, split
from latentflow.training.log import read_metrics
from latentflow.training.settings import load_settings, to_yaml
from tests import tiny
from tests.processes import run_here

SMALL = {
    "data": {"path": "synthetic:40", "image_size": 16, "crop": 8, "held_out": 0.1},
    "network": {"channels": [8, 8], "norm_groups": 2},
    "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2, "schedule": "cosine"},
    "training": {"steps": 6, "batch_size": 4, "log_every": 1, "checkpoint_every": 100, "ema_decay": 0.9},
}
SMALL_DISCRIMINATOR = {"width": 8, "levels": 2}
STATE = ("network.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")


def recipe(out, **given) -> AutoencoderRecipe:
    """The small recipe with some values changed."""
    sections = {key: {**SMALL.get(key, {}), **value} for key, value in given.items() if isinstance(value, dict)}
    return AutoencoderRecipe.model_validate({**SMALL, **given, **sections, "out": str(out)})


def batch_of(num_images: int, image_size: int = 16) -> Batch:
    source = SyntheticShapes(num_images, image_size)
    pixels = torch.from_numpy(np.stack([item.pixels for item in source])).permute(0, 3, 1, 2)
    return Batch(positions=torch.arange(num_images), indices=torch.arange(num_images), pixels=pixels)


def interrupt_at(step: int, monkeypatch, number: signal.Signals) -> None:
    """Send a signal to this process while step `step` (the first is 1) is computed."""
    calls = []

    def compute(*args, **kwargs):
        calls.append(None)
        if len(calls) == step:
            signal.raise_signal(number)
        return autoencoder_step(*args, **kwargs)

    monkeypatch.setattr(training, "autoencoder_step", compute)


def write_judge(folder, seed: int = 0):
    """An untrained judge, as `latentflow train-features` writes it."""
    torch.manual_seed(seed)
    config = FeatureNetworkConfig(side=16, widths=(8, 16))
    known = {"data": "", "fingerprint": "", "num_images": 0, "image_size": 16, "class_names": [], "steps": 0}
    record = JudgeRecord(**known, method="labels", network=config, accuracy=0.0, num_held_out=0, hash="")
    Judge(FeatureNetwork(config), torch.zeros(config.dim), torch.ones(config.dim), None).save(folder, record)
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return write_judge(tmp_path_factory.mktemp("judges"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run long enough to have learned something, and what it returned."""
    run = tmp_path_factory.mktemp("runs") / "long"
    given = recipe(
        run,
        data={"crop": None},
        optimizer={"learning_rate": 1e-2},
        training={"steps": 80, "batch_size": 8},
        save_dtype="float16",
    )
    return run, train_autoencoder(given, runtime=tiny.CPU)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A short run in one go."""
    run = tmp_path_factory.mktemp("runs") / "short"
    assert train_autoencoder(recipe(run), runtime=tiny.CPU).outcome.finished
    return run


# What is computed


def test_the_loss_is_the_sum_its_weights_say():
    given = recipe("unused", data={"crop": None}, loss={"edge_weight": 0.25, "kl_weight": 0.125})
    network, batch = build_autoencoder(given.network, 16, seed=0), batch_of(3)
    step = autoencoder_step(network, batch, recipe=given, runtime=tiny.CPU)

    pixels = to_unit_range(batch.pixels)
    posterior = network.encode(pixels).latent_dist
    latents = sample_latents(posterior.parameters, 4, ImageRandom.at(0, "posterior", batch.positions))
    decoded = network.decode(latents).sample
    torch.testing.assert_close(step.reconstruction, (decoded - pixels).abs().mean((1, 2, 3)))
    across = (decoded.diff(dim=3) - pixels.diff(dim=3)).abs().mean((1, 2, 3))
    down = (decoded.diff(dim=2) - pixels.diff(dim=2)).abs().mean((1, 2, 3))
    torch.testing.assert_close(step.edges, across + down)
    torch.testing.assert_close(step.kl, posterior.kl() / posterior.mean[0].numel())  # diffusers sums over the latents
    torch.testing.assert_close(step.posterior_std, posterior.std.mean((1, 2, 3)))
    torch.testing.assert_close(step.loss, step.reconstruction + 0.25 * step.edges + 0.125 * step.kl)


def test_the_equivariance_term_is_added_and_reaches_encoder_and_decoder():
    weights = {"edge_weight": 0.25, "kl_weight": 0.125}
    plain = recipe("unused", data={"crop": None}, loss=weights)
    given = recipe("unused", data={"crop": None}, loss={**weights, "equivariance_weight": 2.0})
    network, batch = build_autoencoder(given.network, 16, seed=0), batch_of(3)
    step = autoencoder_step(network, batch, recipe=given, runtime=tiny.CPU)
    without = autoencoder_step(network, batch, recipe=plain, runtime=tiny.CPU)
    assert without.equivariance is None
    torch.testing.assert_close(step.loss, without.loss + 2 * step.equivariance)
    step.equivariance.mean().backward()
    assert all(network.get_submodule(side).conv_in.weight.grad.abs().max() > 0 for side in ("encoder", "decoder"))


def test_the_terms_for_texture_are_added(judge):
    weights = {"edge_weight": 0.25, "kl_weight": 0.125}
    plain = recipe("unused", data={"crop": None}, loss=weights)
    more = {"perceptual_weight": 2.0, "judge": str(judge), "adversarial_weight": 0.5, "adversarial_after": 1}
    given = recipe("unused", data={"crop": None}, loss={**weights, **more}, discriminator=SMALL_DISCRIMINATOR)
    network, batch = build_autoencoder(given.network, 16, seed=0), batch_of(4)
    judged = JudgedAutoencoder(network, PatchDiscriminator(3, 8, 2))
    opened = load_judge(judge)[1].network
    options = {"recipe": given, "runtime": tiny.CPU, "judge": opened}
    before = autoencoder_step(judged, batch, **options)
    assert before.adversarial.tolist() == before.discriminator.tolist() == [0.0] * 4

    second = replace(batch, positions=batch.positions + 4)  # step 2 of batches of 4
    step = autoencoder_step(judged, second, **options)
    without = autoencoder_step(network, second, recipe=plain, runtime=tiny.CPU)
    assert without.perceptual is without.adversarial is without.discriminator is None
    together = without.loss + 2 * step.perceptual + 0.5 * step.adversarial + step.discriminator
    torch.testing.assert_close(step.loss, together)
    assert (step.discriminator > 0).all()


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_an_image_has_the_same_loss_in_any_batch(weight):
    given = recipe("unused", loss={"equivariance_weight": weight})
    network, batch = build_autoencoder(given.network, 16, seed=0), batch_of(4)
    single = Batch(positions=batch.positions[2:3], indices=batch.indices[2:3], pixels=batch.pixels[2:3])
    together = autoencoder_step(network, batch, recipe=given, runtime=tiny.CPU).loss
    torch.testing.assert_close(autoencoder_step(network, single, recipe=given, runtime=tiny.CPU).loss, together[2:3])


def test_crops_are_parts_of_the_images_and_move():
    batch = batch_of(1)
    seen = set()
    for position in range(128):
        moved = Batch(positions=torch.tensor([position]), indices=batch.indices, pixels=batch.pixels)
        crop = training._random_crops(moved, 14, seed=0)[0]
        places = [
            (y, x) for y in range(3) for x in range(3) if (batch.pixels[0, :, y : y + 14, x : x + 14] == crop).all()
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) == 9, "some places, the far edges among them, are never cut out"


def test_bf16_is_near_fp32():
    given = recipe("unused")
    network, batch = build_autoencoder(given.network, 16, seed=0), batch_of(4)
    exact, rough = (
        autoencoder_step(network, batch, recipe=given, runtime=tiny.CPU.with_precision(word))
        for word in ("fp32", "bf16")
    )
    assert rough.loss.dtype == torch.float32
    assert not torch.equal(rough.loss, exact.loss)
    torch.testing.assert_close(rough.loss, exact.loss, rtol=0.02, atol=0)


def test_loss_falls(trained):
    losses = [line["loss"] for line in read_metrics(trained[0])]
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]  # measured: 0.45; after five steps it is 0.48


def test_psnr_has_its_exact_value():
    pixels = torch.full((3, 3, 4, 4), 100, dtype=torch.uint8)
    rebuilt = pixels.clone()
    rebuilt[1] += 5
    rebuilt[2] -= 100
    expected = [20 * math.log10(255) + 10 * math.log10(3 * 4 * 4), 20 * math.log10(255 / 5), 20 * math.log10(255 / 100)]
    torch.testing.assert_close(psnr(pixels, rebuilt), torch.tensor(expected, dtype=torch.float64))


# What is saved


def test_the_folder_loads_and_round_trips(trained):
    run, result = trained
    autoencoder = Autoencoder.from_pretrained(run / "autoencoder")
    assert (autoencoder.factor, autoencoder.num_channels, autoencoder.num_moments) == (2, 4, 8)
    source = open_images("synthetic:40", 16)
    _, held_out = split(range(40), 0.1, seed=0)
    pixels = torch.from_numpy(np.stack([source[i].pixels for i in held_out])).permute(0, 3, 1, 2)
    rebuilt = to_uint8(autoencoder.decode(latent_mean(autoencoder.encode(to_unit_range(pixels)), 4)))
    assert psnr(pixels, rebuilt).mean().item() == pytest.approx(result.report.psnr, abs=1e-6)
    assert result.report.psnr > 15.5  # measured: 16.5; one gray for all reaches 14.9


def test_float16_is_what_lies_on_disk(trained, uninterrupted):
    def num_bytes(run):
        return (run / "autoencoder" / "diffusion_pytorch_model.safetensors").stat().st_size

    assert num_bytes(trained[0]) < 0.6 * num_bytes(uninterrupted)


def test_the_latents_have_unit_variance(trained):
    run, result = trained
    autoencoder = Autoencoder.from_pretrained(run / "autoencoder")
    source = open_images("synthetic:40", 16)
    pixels = torch.from_numpy(np.stack([item.pixels for item in source])).permute(0, 3, 1, 2)
    raw = sample_latents(autoencoder.encode(to_unit_range(pixels)), 4, ImageRandom.of_seeds("test", range(40)))
    latents = autoencoder.normalisation.normalise(raw)
    assert latents.std().item() == pytest.approx(1, abs=0.03)
    assert latents.mean().item() == pytest.approx(0, abs=0.03)
    assert latents.mean((0, 2, 3)).tolist() == pytest.approx(result.report.channel_mean, abs=0.05)
    assert latents.std((0, 2, 3)).tolist() == pytest.approx(result.report.channel_std, rel=0.05)


def test_the_run_folder_tells_what_was_done(trained):
    run, result = trained
    report = read_json(run / "metrics" / "report.json")
    assert report["psnr"] == result.report.psnr
    assert report["num_bytes"] == sum(file.stat().st_size for file in (run / "autoencoder").iterdir())
    assert load_settings(AutoencoderRecipe, run / "recipe.yaml").training.steps == 80
    assert (run / "reconstructions.png").exists()
    assert read_json(run / "autoencoder" / "config.json")["scaling_factor"] == report["scaling_factor"]


def test_every_image_is_trained_on_or_held_out():
    kept, held_out = split(range(0, 200, 2), 0.1, seed=0)
    assert sorted(kept + held_out) == list(range(0, 200, 2))
    assert len(held_out) == 10
    assert split(range(0, 200, 2), 0.1, seed=1)[1] != held_out
    assert len(split(range(100_000), 0.5, seed=0)[1]) == 256
    assert len(split(range(2), 0.01, seed=0)[1]) == 1


# Resume


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch, uninterrupted, number):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(4, patch, number)
        stopped = train_autoencoder(recipe(run), runtime=tiny.CPU)
    assert (stopped.outcome.step, stopped.outcome.finished, stopped.outcome.signal) == (4, False, number)
    assert stopped.report is None
    assert not (run / "autoencoder").exists()

    assert train_autoencoder(recipe(run), runtime=tiny.CPU).outcome.finished
    for file in STATE:
        ours, theirs = (newest_checkpoint(folder) / file for folder in (run, uninterrupted))
        assert ours.read_bytes() == theirs.read_bytes(), file
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (run / "autoencoder" / file).read_bytes() == (uninterrupted / "autoencoder" / file).read_bytes()
    losses = [[line["loss"] for line in read_metrics(folder)] for folder in (run, uninterrupted)]
    assert losses[0] == losses[1]


def test_latents_turn_with_the_image_if_the_term_is_used(tmp_path, trained):
    given = recipe(
        tmp_path / "run",
        data={"crop": None},
        loss={"equivariance_weight": 1.0},
        optimizer={"learning_rate": 1e-2},
        training={"steps": 80, "batch_size": 8},
    )
    train_autoencoder(given, runtime=tiny.CPU)
    pixels = torch.from_numpy(np.stack([item.pixels for item in open_images("synthetic:40", 16)])).permute(0, 3, 1, 2)
    errors = []
    for run in (trained[0], tmp_path / "run"):
        autoencoder = Autoencoder.from_pretrained(run / "autoencoder")
        errors.append(measure_latent_space(lambda x, one=autoencoder: one.encode(x)[:, :4], to_unit_range(pixels)))
    assert errors[1].turning_error < 0.75 * errors[0].turning_error  # measured: 0.28 and 0.55


def test_a_run_with_the_equivariance_term_resumes_exactly(tmp_path, monkeypatch):
    def given(name):
        return recipe(tmp_path / name, loss={"equivariance_weight": 1.0})

    whole = train_autoencoder(given("whole"), runtime=tiny.CPU)
    with monkeypatch.context() as patch:
        interrupt_at(3, patch, signal.SIGTERM)
        assert train_autoencoder(given("parts"), runtime=tiny.CPU).outcome.step == 3
    assert train_autoencoder(given("parts"), runtime=tiny.CPU).outcome.finished == whole.outcome.finished
    for file in STATE:
        ours, theirs = (newest_checkpoint(tmp_path / name) / file for name in ("whole", "parts"))
        assert ours.read_bytes() == theirs.read_bytes(), file
    lines = read_metrics(tmp_path / "parts")
    assert all(line["equivariance"] > 0 for line in lines)


def test_a_run_with_texture_resumes_exactly_and_saves_the_autoencoder_alone(
    tmp_path, monkeypatch, judge, uninterrupted
):
    weights = {"perceptual_weight": 1.0, "judge": str(judge), "adversarial_weight": 0.1, "adversarial_after": 2}

    def given(name):
        return recipe(tmp_path / name, loss=weights, discriminator=SMALL_DISCRIMINATOR)

    train_autoencoder(given("whole"), runtime=tiny.CPU)
    with monkeypatch.context() as patch:
        interrupt_at(4, patch, signal.SIGTERM)
        assert train_autoencoder(given("parts"), runtime=tiny.CPU).outcome.step == 4
    assert train_autoencoder(given("parts"), runtime=tiny.CPU).outcome.finished
    for file in STATE:
        ours, theirs = (newest_checkpoint(tmp_path / name) / file for name in ("whole", "parts"))
        assert ours.read_bytes() == theirs.read_bytes(), file
    lines = read_metrics(tmp_path / "parts")
    assert [line["discriminator"] > 0 for line in lines] == [False, False, True, True, True, True]
    assert all(line["perceptual"] > 0 for line in lines)

    def names(run):
        return read_tensors(run / "autoencoder" / "diffusion_pytorch_model.safetensors").keys()

    assert names(tmp_path / "whole") == names(uninterrupted)
    assert any(
        name.startswith("discriminator.") for name in read_tensors(newest_checkpoint(tmp_path / "whole") / STATE[0])
    )
    with pytest.raises(
        ConfigError, match=r"loss.adversarial_weight cannot change: the discriminator has learned with it"
    ):
        train_autoencoder(recipe(tmp_path / "whole", discriminator=SMALL_DISCRIMINATOR), runtime=tiny.CPU)


def test_a_run_goes_on_with_its_judge_alone(tmp_path, judge):
    given = recipe(tmp_path / "run", loss={"perceptual_weight": 1.0, "judge": str(judge)}, training={"steps": 1})
    train_autoencoder(given, runtime=tiny.CPU)
    other = {"perceptual_weight": 1.0, "judge": str(write_judge(tmp_path / "other", seed=1))}
    with pytest.raises(ConfigError, match=r"trained with another judge than .*other"):
        train_autoencoder(recipe(tmp_path / "run", loss=other), runtime=tiny.CPU)
    moved = {"perceptual_weight": 1.0, "judge": str(shutil.copytree(judge, tmp_path / "moved"))}
    assert train_autoencoder(recipe(tmp_path / "run", loss=moved), runtime=tiny.CPU).outcome.finished


def test_the_equivariance_term_is_logged_only_where_it_is_used(uninterrupted):
    assert "equivariance" not in read_metrics(uninterrupted)[0]


def test_a_run_of_an_earlier_version_has_no_equivariance_term(uninterrupted):
    saved = (uninterrupted / "recipe.yaml").read_text(encoding="utf-8")
    assert "equivariance_weight: 0.0" in saved
    with pytest.raises(ConfigError, match=r"loss.equivariance_weight: 0.0, now 0.5"):
        train_autoencoder(recipe(uninterrupted, loss={"equivariance_weight": 0.5}), runtime=tiny.CPU)


def test_a_finished_run_is_measured_again(uninterrupted):
    before = tiny.tree(uninterrupted / "autoencoder")
    result = train_autoencoder(recipe(uninterrupted), runtime=tiny.CPU)
    assert result.outcome.finished
    assert tiny.tree(uninterrupted / "autoencoder") == before


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        step = autoencoder_step(*args, **kwargs)
        step.loss.data[0] = math.nan
        return training.AutoencoderStep(step.loss * step.loss.detach(), *(step.kl.detach(),) * 4)

    monkeypatch.setattr(training, "autoencoder_step", broken)
    with pytest.raises(NonFiniteError, match=r"step 1: .* synthetic/"):
        train_autoencoder(recipe(tmp_path / "run"), runtime=tiny.CPU)


# Bad input


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"data": {"path": ""}}, ConfigError, "data.path is not set"),
        ({"data": {"path": "nowhere"}}, DataError, "cannot open nowhere"),
        ({"data": {"path": "synthetic:1"}}, DataError, "one to train on and one to hold out"),
        ({"data": {"image_size": 17}}, ConfigError, "image_size = 17 is not a multiple of 2.*use 16 or 18"),
        ({"data": {"crop": 9}}, ConfigError, "crop = 9 is not a multiple of 2"),
        ({"data": {"crop": 32}}, ConfigError, "crop = 32 is larger than data.image_size = 16"),
        ({"loss": {"adversarial_weight": 1}, "discriminator": {"levels": 4}}, ConfigError, "crops of 16 .* not of 8"),
        ({"loss": {"perceptual_weight": 1, "judge": "nowhere"}}, ArtifactError, "nowhere/judge.json"),
    ],
)
def test_bad_settings_write_nothing(tmp_path, given, error, message):
    with pytest.raises(error, match=message):
        train_autoencoder(recipe(tmp_path / "run", **given), runtime=tiny.CPU)
    assert not (tmp_path / "run").exists()


def test_a_latent_cache_is_no_data(tmp_path, cache):
    with pytest.raises(ConfigError, match="is a latent cache"):
        train_autoencoder(recipe(tmp_path / "run", data={"path": str(cache)}), runtime=tiny.CPU)


def test_a_run_folder_belongs_to_one_recipe(uninterrupted):
    with pytest.raises(ConfigError, match=r"loss.kl_weight: 0.0001, now 0.5"):
        train_autoencoder(recipe(uninterrupted, loss={"kl_weight": 0.5}), runtime=tiny.CPU)


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown key 'loss.kl_wieght'; did you mean 'kl_weight'"):
        load_autoencoder_recipe("shapes", ["loss.kl_wieght=1"])
    with pytest.raises(ConfigError, match=r"loss.equivariance_weight = -1.*at least 0"):
        load_autoencoder_recipe("shapes", ["loss.equivariance_weight=-1"])
    with pytest.raises(ConfigError, match=r"perceptual_weight = 1 needs loss.judge=FOLDER"):
        load_autoencoder_recipe("shapes", ["loss.perceptual_weight=1"])
    with pytest.raises(ConfigError, match="did you mean 'shapes'"):
        load_autoencoder_recipe("shape")
    with pytest.raises(ConfigError, match="norm_groups = 3 does not divide the width 16"):
        load_autoencoder_recipe("shapes", ["network.norm_groups=3"])


@pytest.mark.parametrize("name", recipe_names(AUTOENCODER_RECIPES))
def test_recipes_are_valid(name, tmp_path):
    given = load_autoencoder_recipe(name)
    given.require_fitting_sizes()
    assert given.description
    (tmp_path / "again.yaml").write_text(to_yaml(given), encoding="utf-8")
    assert load_autoencoder_recipe(tmp_path / "again.yaml") == given


def test_files_may_stand_in_a_table(tmp_path, images):
    flat = tmp_path / "flat"
    flat.mkdir()
    names = []
    for number, file in enumerate(sorted(images.rglob("*.png"))):
        names.append(f"{number:02d}.png")
        (flat / names[-1]).write_bytes(file.read_bytes())
    table = flat / "patients.csv"
    table.write_text("\n".join(["age,scan", *(f"{number},{name}" for number, name in enumerate(names[:12]))]))
    asked = {"path": str(table), "file_column": "scan"}
    with pytest.raises(DataError, match="--allow-missing"):
        prepare_first_stage(recipe(tmp_path / "run", data=asked), tiny.CPU)
    prepared = prepare_first_stage(recipe(tmp_path / "run", data={**asked, "allow_missing": True}), tiny.CPU)
    assert len(prepared.images) + len(prepared.held_out) == 12
    with pytest.raises(DataError, match=r"no column 'scn'.*did you mean 'scan'"):
        prepare_first_stage(recipe(tmp_path / "run", data={**asked, "file_column": "scn"}), tiny.CPU)
    assert not (tmp_path / "run").exists()


# The command line


def test_the_command_trains_and_encode_takes_the_result(tmp_path, capsys, monkeypatch, images):
    file = tmp_path / "small.yaml"
    file.write_text(to_yaml(recipe(tmp_path / "run", data={"path": str(images)})), encoding="utf-8")
    assert run_here(["train-autoencoder", file, "--dry-run"], capsys, monkeypatch).code == 0
    assert not (tmp_path / "run").exists()
    result = run_here(["train-autoencoder", file, "training.steps=2", "--device", "cpu"], capsys, monkeypatch)
    assert result.code == 0, result.err
    assert "dB PSNR on 2 held-out images" in result.out
    encode = ["encode", images, "--autoencoder", tmp_path / "run" / "autoencoder", "--image-size", 16]
    encoded = run_here([*encode, "--out", tmp_path / "cache"], capsys, monkeypatch)
    assert encoded.code == 0, encoded.err
    assert "8 x 8 x 8" in encoded.out


def test_the_command_reports_a_signal(tmp_path, capsys, monkeypatch):
    file = tmp_path / "small.yaml"
    file.write_text(to_yaml(recipe(tmp_path / "run")), encoding="utf-8")
    interrupt_at(2, monkeypatch, signal.SIGTERM)
    result = run_here(["train-autoencoder", file, "--device", "cpu"], capsys, monkeypatch)
    assert result.code == 128 + signal.SIGTERM
    assert "stopped by a signal at step 2, saved" in result.err


def test_bad_input_is_one_line(capsys, monkeypatch):
    result = run_here(["train-autoencoder", "shapes", "data.image_size=30"], capsys, monkeypatch)
    assert result.code == 2
    assert "data.image_size = 30 is not a multiple of 4" in result.error
