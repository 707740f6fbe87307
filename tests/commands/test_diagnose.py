"""`latentflow diagnose`: figures that are known, verdicts on made-up numbers, the page, and refusals."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from latentflow.analysis.diagnosis import (
    ChannelMoments,
    Diagnosis,
    Floor,
    LatentStatistics,
    LossByTime,
    Memorisation,
    Nearness,
    TrajectoryShapes,
    baseline_loss,
    channel_moments,
    fine_detail,
    largest_shift,
    nearest_members,
    nearness,
    radial_spectrum,
)
from latentflow.analysis.verdicts import verdicts
from latentflow.api import LatentFlow
from latentflow.autoencoder import LatentNormalisation, to_unit_range
from latentflow.commands.diagnose import diagnose as run_diagnose
from latentflow.data.sources.images import open_images
from latentflow.errors import ArtifactError, ConfigError, DataError
from latentflow.evaluation.request import DiagnoseRequest
from latentflow.flow.loss import flow_matching_loss
from latentflow.flow.path import CosinePath, LinearPath
from latentflow.model.config import TrainingRecord
from latentflow.networks.dit import DiTConfig
from tests import tiny
from tests.processes import run_here


def diagnose(model, data, out, **given):
    return run_diagnose(DiagnoseRequest(model=model, data=data, out=out, **given), tiny.CPU)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- arithmetic


def test_moments_of_known_distributions():
    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5).reshape(1000, 1, 10, 10) / 100_000
    exponential = -torch.log1p(-uniform)
    constant = torch.full_like(uniform, 3.0)
    found = channel_moments(torch.cat([uniform, 2 * exponential + 1, constant], 1))
    assert found.mean == pytest.approx([0.5, 3, 3], rel=1e-3)
    assert found.std == pytest.approx([1 / math.sqrt(12), 2, 0], rel=1e-3)
    assert found.skew == pytest.approx([0, 2, 0], rel=1e-2, abs=1e-9)
    assert found.kurtosis == pytest.approx([-1.2, 6, 0], rel=2e-2, abs=1e-9)


def test_spectrum_of_waves_and_of_white_noise():
    x = torch.arange(8, dtype=torch.float64)
    wave = torch.cos(2 * math.pi * 2 * x / 8).expand(1, 1, 8, 8)
    frequencies, power = radial_spectrum(wave)
    assert frequencies == [1, 2, 3, 4]
    assert power[1] > 1 and max(power[0], *power[2:]) < 1e-20
    radius = (torch.tensor([0.0, 1, 2, 3, -4, -3, -2, -1])[:, None] ** 2).add(
        torch.tensor([0.0, 1, 2, 3, -4, -3, -2, -1]) ** 2
    )
    places = int((radius.sqrt().round() == 2).sum())
    # a cosine of amplitude 1 has the sum of squares h w / 2, all of it at two of the places of this radius
    assert power[1] == pytest.approx(64 / 2 / places)
    _, white = radial_spectrum(1.5 * normal(2000, 2, 8, 8))
    assert white == pytest.approx([2.25] * 4, rel=0.03)
    assert radial_spectrum(normal(3, 1, 1, 1)) == ([], [])


@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=str)
def test_the_baseline_is_the_loss_of_the_best_gaussian_velocity(path):
    """Measured: u given x_t of independent Gaussians, by linear regression."""
    latents = torch.cat([0.5 * normal(4000, 1, 4, 4), 2 + 1.5 * normal(4000, 1, 4, 4, seed=1)], 1)
    noise = normal(4000, 2, 4, 4, seed=2)
    for time in (0.1, 0.5, 0.9):
        t = torch.full((4000,), time, dtype=torch.float64)
        x, u = path.interpolate(latents, noise, t), path.target(latents, noise, t)
        left = 0.0
        for channel in range(2):
            a, b = x[:, channel].flatten(), u[:, channel].flatten()
            a, b = a - a.mean(), b - b.mean()
            left += float((b - (a @ b) / (a @ a) * a).square().mean()) / 2
        assert baseline_loss(path, latents, torch.tensor([time])) == pytest.approx([left], rel=0.02)


def test_nearest_by_brute_force_and_copies_at_distance_zero():
    members, queries = 100 + normal(40, 7), 100 + normal(9, 7, seed=1)
    queries[4] = members[13]
    distance, index, relative = nearest_members(queries, members)
    brute = (queries[:, None] - members).norm(dim=2).min(1)
    torch.testing.assert_close(distance, brute.values, rtol=1e-4, atol=1e-4)
    assert index.tolist() == brute.indices.tolist()
    assert index[4] == 13 and distance[4] < 1e-4
    tenth = (queries[:, None] - members).norm(dim=2).sort(1).values[:, 9]
    torch.testing.assert_close(relative, brute.values / tenth, rtol=1e-4, atol=1e-4)


def test_memorisation_is_found_out():
    training, held_out, fresh = normal(300, 2, 3, 3), normal(200, 2, 3, 3, seed=1), normal(200, 2, 3, 3, seed=2)
    copies = training[:200] + 1e-3 * normal(200, 2, 3, 3, seed=3)
    honest, cheat = nearness("x", fresh, held_out, training), nearness("x", copies, held_out, training)
    assert 0.4 < honest.nearer < 0.6 and honest.copies <= 8
    assert cheat.nearer == 1 and cheat.copies == 200
    assert cheat.nearest_of_samples == list(range(200))
    mixed = nearness("x", torch.cat([copies[:60], fresh[:140]]), held_out, training)
    assert 60 <= mixed.copies <= 65
    alike = nearness("x", held_out, held_out, training)
    assert alike.nearer == 0.5 and alike.near == alike.rank - 1 == 1
    plain = nearness("x", 0.3 * fresh, held_out, training)
    assert plain.near > 150 and plain.copies <= 2  # nearer to all of them, not to one
    doubled = nearness("x", copies, held_out, training.repeat(3, 1, 1, 1))
    assert doubled.copies == 200  # though each training image is there three times


def test_the_largest_shift():
    data = ChannelMoments(mean=[0, 1], std=[1, 2], skew=[0, 0], kurtosis=[0, 0])
    found = largest_shift(ChannelMoments(mean=[0.1, 0.6], std=[1.1, 1.6], skew=[0, 0], kurtosis=[0, 0]), data)
    assert found == pytest.approx((0.2, 0.8))


# ---- verdicts


def diagnosis(**changes) -> Diagnosis:
    """A model that is fine in all respects, and what is changed about it."""
    moments = ChannelMoments(mean=[0.0], std=[1.0], skew=[0.0], kurtosis=[0.0])
    spread = [1 + n / 100 for n in range(100)]
    space = Nearness(
        space="latents",
        samples=spread,
        held_out=spread,
        nearest_of_samples=[0] * 100,
        nearest_of_held_out=[0] * 100,
        samples_alone=spread,
        held_out_alone=spread,
    )
    loss = LossByTime(data="x", times=[0.25, 0.75], loss=[0.5, 0.5], standard_error=[0.0, 0.0], baseline=[1.0, 1.0])
    fine = {
        "model": "m",
        "data": "x",
        "is_training_data": False,
        "told": "nothing",
        "sampling": "heun",
        "num": 100,
        "loss": loss,
        "training_loss": loss,
        "ways": [
            TrajectoryShapes(
                guidance=1,
                num=2,
                straightness=0.1,
                straightness_error=0.01,
                straightness_quantiles=(0.1, 0.1),
                total_turning=1.0,
                times=[0.5],
                turning=[1.0],
            )
        ],
        "latents": LatentStatistics(
            samples=moments,
            data=moments,
            halves=(moments, moments),
            frequencies=[1, 2, 3],
            spectrum_samples=[1, 1, 1],
            spectrum_data=[1, 1, 1],
            spectrum_halves=([1, 1, 1], [1, 1, 1]),
        ),
        "memorisation": Memorisation(
            against="a", is_test=True, covers=True, num_training=100, num_all=100, spaces=[space]
        ),
        "floor": Floor(label="f", num=50, real=1.0, reconstructed=2.0, samples=2.5, standard_errors=(0.1, 0.1, 0.1)),
        "seconds": 1.0,
    }
    return Diagnosis(**{**fine, **changes})


def marks(one: Diagnosis) -> dict[str, str]:
    return {found.topic: found.mark for found in verdicts(one)}


def test_a_model_that_is_fine():
    found = verdicts(diagnosis())
    assert {one.mark for one in found} == {"good"}
    assert [one.topic for one in found] == [
        *("Loss", "Overfitting", "Straightness", "Latent statistics", "Fine detail", "Memorisation"),
        "Generator and autoencoder",
    ]
    assert "Overfitting" not in marks(diagnosis(training_loss=None))


@pytest.mark.parametrize(
    ("factor", "loss", "overfitting"), [(1.04, "good", "good"), (1.7, "look", "bad"), (2.1, "bad", "bad")]
)
def test_verdicts_on_the_loss(factor, loss, overfitting):
    higher = diagnosis().loss.model_copy(update={"loss": [0.5 * factor] * 2})
    found = marks(diagnosis(loss=higher))
    assert (found["Loss"], found["Overfitting"]) == (loss, overfitting)


@pytest.mark.parametrize(
    ("value", "mark"), [(0.27, "good"), (0.29, "undecided"), (0.4, "look"), (0.7, "look"), (math.nan, "bad")]
)
def test_verdicts_on_straightness(value, mark):
    bent = diagnosis().ways[0].model_copy(update={"straightness": value})
    assert marks(diagnosis(ways=[bent]))["Straightness"] == mark


@pytest.mark.parametrize(("std", "mark"), [(1.09, "good"), (0.92, "good"), (1.2, "look"), (0.5, "bad"), (0.0, "bad")])
def test_verdicts_on_latents(std, mark):
    statistics = diagnosis().latents
    moments = statistics.samples.model_copy(update={"std": [std]})
    assert marks(diagnosis(latents=statistics.model_copy(update={"samples": moments})))["Latent statistics"] == mark


@pytest.mark.parametrize(("power", "mark", "word"), [(1.2, "good", "."), (0.7, "look", "smooth"), (3, "bad", "rough")])
def test_verdicts_on_fine_detail(power, mark, word):
    statistics = diagnosis().latents.model_copy(update={"spectrum_samples": [5.0, 5.0, power]})
    assert fine_detail([1, 2, 3], [5.0, 5.0, power], [1, 1, 1]) == pytest.approx(power)
    found = next(one for one in verdicts(diagnosis(latents=statistics)) if one.topic == "Fine detail")
    assert found.mark == mark and word in found.text


@pytest.mark.parametrize(("powers", "ratio"), [([4.0], 4), ([1, 4.0], 4), ([1, 1, 4.0], 4), ([9, 9, 9, 4.0], 4)])
def test_the_highest_frequencies_are_at_least_one(powers, ratio):
    assert fine_detail(list(range(1, len(powers) + 1)), powers, [1.0] * len(powers)) == ratio


@pytest.mark.parametrize("spectrum", [[], [0.0], [0.0, 0.0]])
def test_no_power_at_all_is_no_problem(spectrum):
    """Latents of one pixel, or data without any variation."""
    nothing = {
        "frequencies": list(range(1, len(spectrum) + 1)),
        "spectrum_samples": spectrum,
        "spectrum_data": spectrum,
        "spectrum_halves": (spectrum, spectrum),
    }
    found = diagnosis(latents=diagnosis().latents.model_copy(update=nothing))
    assert marks(found)["Fine detail"] == "undecided"


def copying(copied: int, num: int = 100, **changes) -> Diagnosis:
    """`copied` of `num` samples are copies; with as many held-out images."""
    spread = [1 + n / num for n in range(num)]
    samples = [0.1] * copied + [1.005 + n / num for n in range(num - copied)]
    space = (
        diagnosis()
        .memorisation.spaces[0]
        .model_copy(update={"samples": samples, "samples_alone": samples, "held_out": spread, "held_out_alone": spread})
    )
    return diagnosis(memorisation=diagnosis().memorisation.model_copy(update={"spaces": [space, space], **changes}))


def memorisation(one: Diagnosis):
    return next(found for found in verdicts(one) if found.topic == "Memorisation")


@pytest.mark.parametrize(
    ("copied", "num", "mark"),
    [
        *((0, 100, "good"), (1, 100, "good"), (3, 100, "undecided"), (6, 100, "look"), (20, 100, "bad")),
        *((0, 30, "undecided"), (3, 30, "undecided"), (6, 30, "look"), (30, 30, "bad"), (4, 4, "look"), (8, 8, "bad")),
    ],
)
def test_verdicts_on_memorisation(copied, num, mark):
    assert memorisation(copying(copied, num)).mark == mark


def test_what_would_decide_on_memorisation_is_said():
    assert "with 30 samples up to 10 % may be copies; --num 236 would decide it" in memorisation(copying(0, 30)).rule
    assert memorisation(copying(0, 118)).mark == "good"  # half of 236 are drawn
    part = memorisation(copying(0, num_all=1000))
    assert part.mark == "undecided" and "only 100 of 1,000" in part.rule and "--num-train 1000" in part.rule
    unknown = memorisation(copying(0, covers=False, is_test=False))
    assert unknown.mark == "undecided" and "with --train" in unknown.rule
    assert memorisation(copying(50, covers=False, is_test=False)).mark == "bad"
    plain = copying(50).memorisation.spaces[0]
    plain = plain.model_copy(update={"samples_alone": plain.held_out_alone})
    found = diagnosis(memorisation=copying(50).memorisation.model_copy(update={"spaces": [plain]}))
    assert memorisation(found).mark == "good"


def test_a_model_that_copies_nothing_is_seldom_alarmed_about():
    """Samples, held-out and training images of one distribution, thirty each: 1 in 20 may be looked at."""
    alarms = 0
    for run in range(60):
        parts = [normal(30, 1, 4, 4, seed=3 * run + n) for n in range(3)]
        space = nearness("x", *parts)
        test = Memorisation(against="", is_test=True, covers=True, num_training=30, num_all=30, spaces=[space])
        mark = memorisation(diagnosis(memorisation=test)).mark
        assert mark != "bad"
        alarms += mark == "look"
    assert alarms <= 3


def test_numbers_that_reach_across_a_limit_decide_nothing():
    noisy = diagnosis().loss.model_copy(update={"loss": [0.78] * 2, "standard_error": [0.05] * 2})
    found = {one.topic: one for one in verdicts(diagnosis(loss=noisy))}
    assert found["Loss"].mark == "undecided" and "--num" in found["Loss"].rule
    gap = diagnosis().loss.model_copy(update={"loss": [0.52] * 2, "standard_error": [0.05] * 2})
    assert marks(diagnosis(loss=gap))["Overfitting"] == "undecided"
    weak = diagnosis().memorisation.model_copy(update={"is_test": False})
    assert marks(diagnosis(memorisation=weak))["Overfitting"] == "undecided"
    shifted = ChannelMoments(mean=[0.2], std=[1.0], skew=[0.0], kurtosis=[0.0])
    statistics = diagnosis().latents.model_copy(update={"halves": (shifted, diagnosis().latents.data)})
    assert marks(diagnosis(latents=statistics))["Latent statistics"] == "undecided"
    statistics = diagnosis().latents.model_copy(update={"spectrum_halves": ([1, 1, 2], [1, 1, 1])})
    assert marks(diagnosis(latents=statistics))["Fine detail"] == "undecided"
    floor = diagnosis().floor.model_copy(update={"standard_errors": (1.0, 0.1, 1.0)})
    assert marks(diagnosis(floor=floor))["Generator and autoencoder"] == "undecided"


@pytest.mark.parametrize(("samples", "mark"), [(2.7, "good"), (5.0, "look"), (20.0, "bad")])
def test_verdicts_on_the_floor(samples, mark):
    floor = diagnosis().floor.model_copy(update={"samples": samples})
    assert marks(diagnosis(floor=floor))["Generator and autoencoder"] == mark


# ---- the command


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, kl, images) -> Path:
    """A model that says it was trained on `images`."""
    folder = tmp_path_factory.mktemp("models") / "fruit"
    flow = tiny.model(kl, guidance=2.0)
    record = TrainingRecord(data_fingerprint=open_images(images, tiny.IMAGE_SIZE).fingerprint())
    config = flow.config.model_copy(update={"training": record})
    LatentFlow(config, flow.network, kl).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory, model_folder, images):
    """A diagnosis with training images of its own, and its folder."""
    root = tmp_path_factory.mktemp("out")
    others = tiny.write_images(root / "others", per_class=4)
    return diagnose(model_folder, others, root / "out", train=images, num=12), root / "out"


def test_files_and_page(written):
    found, folder = written
    assert {str(file.relative_to(folder)) for file in folder.rglob("*.*")} == {
        *("page.html", "diagnose.json"),
        *(f"pictures/pairs_{name}.png" for name in ("latents", "features", "held_out")),
    }
    record = json.loads((folder / "diagnose.json").read_text())
    findings = record.pop("verdicts")
    assert Diagnosis.model_validate(record) == found
    assert DiagnoseRequest(**record["request"]).num == 12
    assert [one["topic"] for one in findings] == [one.topic for one in verdicts(found)]
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:)|https?://(?!www\.w3\.org)|<script|@import|url\(""", page)
    assert page.count("data:image/png;base64,") == 3
    for said in ("the images the model was trained on", "guidance 2", "mean and variance only", "training images"):
        assert said in page, said


def test_what_was_measured(written):
    found, _ = written
    assert found.num == 12 and found.floor.num == 6 and not found.is_training_data
    assert [ways.guidance for ways in found.ways] == [2, 1] and found.ways[0].num == 6
    assert len(found.loss.loss) == 10 and found.training_loss is not None
    test = found.memorisation
    assert test.is_test and test.num_training == 18
    assert [len(space.samples) for space in test.spaces] == [6, 6]
    # the tiny data set draws its pictures in the same order: some of these are training images themselves
    assert test.num_twins == 6 - len(test.spaces[1].held_out) > 0
    assert min(test.spaces[1].held_out) > 1e-3
    assert len(found.latents.frequencies) == 4 and len(found.latents.data.mean) == 4


def test_one_set_is_split(model_folder, images, tmp_path):
    found = diagnose(model_folder, images, tmp_path / "out", num=18, guidance=1.0, batch_size=64)
    assert found.is_training_data and found.training_loss is None and not found.memorisation.is_test
    assert found.memorisation.against.startswith("9 images, half of ")
    assert "all of which the model was trained on" in found.memorisation.against
    assert len(found.ways) == 1
    assert "give training images with --train" in (tmp_path / "out" / "page.html").read_text()


def test_screen(model_folder, images, tmp_path, capsys, monkeypatch):
    options = ["--num", 8, "--out", tmp_path / "out", "--device", "cpu"]
    done = run_here(["diagnose", model_folder, "--data", images, *options, "--json"], capsys, monkeypatch)
    assert done.code == 0, done.err
    shown = json.loads(done.out)
    assert shown["page"] == str(tmp_path / "out" / "page.html") and Path(shown["page"]).is_file()
    assert set(shown["verdicts"]) >= {"Loss", "Straightness", "Memorisation"}


# ---- refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num": 7}, "at least 8"),
        ({"num": 19}, "18 images can be read, and 19 are needed"),
        ({"train": "nowhere"}, "nowhere"),
        ({"guidance": -1.0}, "guidance -1: give a number from 0"),
    ],
)
def test_bad_values(model_folder, images, tmp_path, options, said):
    with pytest.raises((ConfigError, DataError), match=said):
        diagnose(model_folder, images, tmp_path / "out", **{"num": 8, **options})
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_diagnosed(kl, cache, images, model_folder, tmp_path):
    with pytest.raises(ConfigError, match="latent cache"):
        diagnose(model_folder, cache, tmp_path / "out", num=8)
    tiny.model(kl, conditioning={**tiny.SPATIAL, "inpainting_dropout": 0.0}).save_pretrained(tmp_path / "holes")
    with pytest.raises(ConfigError, match="this model requires the condition inpainting"):
        diagnose(tmp_path / "holes", images, tmp_path / "out", num=8)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="is a file"):
        diagnose(model_folder, images, tmp_path / "file", num=8)
    broken = tiny.model(kl)
    with torch.no_grad():
        next(broken.network.parameters()).fill_(math.nan)
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(ArtifactError, match="not finite"):
        diagnose(tmp_path / "broken", images, tmp_path / "out", num=8)


# ---- a model that memorises, and one that does not


def learnt(num: int, steps: int, autoencoder, folder: Path) -> Path:
    """A small model, without classes, that was trained on `num` shapes for some hundred steps."""
    source = open_images(f"synthetic:{num}:0", tiny.IMAGE_SIZE)
    pixels = torch.stack([torch.from_numpy(item.pixels.copy()).permute(2, 0, 1) for item in source])
    base = tiny.model(autoencoder, class_names=(), solver="heun", steps=8)
    raw = base.config.normalisation.restore(torch.cat([base.encode(to_unit_range(x)) for x in pixels.split(64)]))
    shift, scale = raw.mean((0, 2, 3)), 1 / raw.std((0, 2, 3))
    config = base.config.model_copy(
        update={
            "network": DiTConfig(depth=2, hidden_size=128, num_heads=2, patch_size=4),
            "normalisation": LatentNormalisation(shift=shift.tolist(), scale=scale.tolist()),
            "training": TrainingRecord(data_fingerprint=source.fingerprint()),
        }
    )
    torch.manual_seed(0)
    network, latents = config.build_network(), config.normalisation.normalise(raw)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    condition = config.conditioning.build((16, *config.latent_shape), torch.device("cpu"))
    for _ in range(steps):
        data = latents[torch.randint(num, (16,))]
        noise, time = torch.randn_like(data), torch.rand(16)
        loss = flow_matching_loss(lambda x, t: network(x, t, condition), config.path, data, noise, time).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    LatentFlow(config, network.eval().requires_grad_(False), autoencoder).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("num", "steps", "mark"), [(8, 500, "bad"), (256, 150, "good")])
def test_memorising_is_a_problem_and_nothing_else_is(num, steps, mark, deterministic, tmp_path):
    model = learnt(num, steps, deterministic, tmp_path / "model")
    options = {"num": 160, "num_train": num, "batch_size": 64}
    found = diagnose(model, "synthetic:160:9", tmp_path / "out", train=f"synthetic:{num}:0", **options)
    assert found.memorisation.is_test
    assert memorisation(found).mark == mark, memorisation(found)
