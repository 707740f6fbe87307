"""`latentflow train-features`: a judge resumes exactly, knows its images, and is refused where it does not fit."""

from __future__ import annotations

import json
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.artifacts import read_json, read_tensors
from latentflow.commands.evaluate import evaluate
from latentflow.commands.train_features import train_features
from latentflow.data.items import ImageItem, stack_pixels
from latentflow.data.sources.images import open_images
from latentflow.data.sources.stored import ImageFiles
from latentflow.data.sources.synthetic import SyntheticShapes
from latentflow.errors import ArtifactError, ConfigError, DataError
from latentflow.evaluation.request import DiagnoseRequest, EvaluationRequest, SweepRequest
from latentflow.metrics.features.extractors import open_features
from latentflow.metrics.features.judge_folder import JudgeRecord, load_judge
from latentflow.networks.feature_network import FeatureNetworkConfig
from latentflow.training import feature_run, loop
from latentflow.training.feature_run import network_for, prepare_features, steps_for, train_feature_network
from latentflow.training.feature_step import feature_step
from latentflow.training.log import read_metrics
from latentflow.training.request import TrainFeaturesRequest
from tests import tiny
from tests.dispatch import Recorder
from tests.processes import finish, run_here, start, start_processes, wait_until

SMALL = {"image_size": tiny.IMAGE_SIZE, "side": 16, "width": 8, "steps": 12, "batch_size": 16}
COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])
FILES = ("judge.json", "judge.safetensors")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """260 noisy pictures of three classes, which differ in their colour."""
    folder, random = tmp_path_factory.mktemp("photos") / "fruit", np.random.default_rng(0)
    for number in range(260):
        label = number % 3
        place = folder / tiny.CLASSES[label]
        place.mkdir(parents=True, exist_ok=True)
        pixels = COLOURS[label] + random.integers(-55, 55, (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number:03d}.png")
    return folder


def request(photos: Path, out: Path, **given) -> TrainFeaturesRequest:
    return TrainFeaturesRequest(**{"data": photos, "out": out, **SMALL, **given})


@pytest.fixture(scope="module")
def judge(photos, tmp_path_factory) -> Path:
    """A judge of the three classes, never interrupted."""
    folder = tmp_path_factory.mktemp("judges") / "fruit"
    assert train_features(request(photos, folder), runtime=tiny.CPU).outcome.finished
    return folder


@pytest.fixture(scope="module")
def blind(tmp_path_factory) -> Path:
    """A judge that learned from unlabelled images."""
    folder, flat = tmp_path_factory.mktemp("judges") / "blind", tmp_path_factory.mktemp("flat") / "photos"
    flat.mkdir()
    for number, item in enumerate(SyntheticShapes(260, tiny.IMAGE_SIZE)):
        Image.fromarray(item.pixels).save(flat / f"{number:03d}.png")
    assert train_features(request(flat, folder, steps=40), runtime=tiny.CPU).outcome.finished
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, kl) -> Path:
    """A model of the three classes."""
    folder = tmp_path_factory.mktemp("models") / "fruit"
    tiny.model(kl).save_pretrained(folder)
    return folder


@pytest.fixture
def command(capsys, monkeypatch):
    return lambda *args: run_here(args, capsys, monkeypatch)


def same_judge(folder: Path, other: Path) -> None:
    for file in FILES:
        assert (folder / file).read_bytes() == (other / file).read_bytes(), file


# The judge


def test_it_knows_its_images_and_its_accuracy(judge, photos):
    record, loaded = load_judge(judge)
    source = open_images(photos, tiny.IMAGE_SIZE)
    assert record == JudgeRecord.model_validate(read_json(judge / "judge.json"))
    assert (record.fingerprint, record.class_names) == (source.fingerprint(), list(tiny.CLASSES))
    assert (record.num_images, record.num_held_out, record.method) == (210, 50, "labels")
    assert record.accuracy > 0.9  # of colours that no noise hides
    assert 0.8 < record.ceiling <= record.accuracy
    assert loaded.classes.accuracy == record.ceiling
    features = open_features(str(judge))
    pixels = stack_pixels([source[index].pixels for index in range(len(source))])
    found = features(pixels)
    assert found.shape == (260, record.network.dim) == (260, features.dim)
    torch.testing.assert_close(found.mean(0), torch.zeros(features.dim), atol=0.2, rtol=0)  # standardised
    labels = torch.tensor([source.label(index) for index in range(len(source))])
    assert loaded.classes.right(found, labels).double().mean() > 0.85
    assert not loaded.classes.right(found, (labels + 1) % 3).any()


def test_without_labels(blind, photos, tmp_path):
    record, loaded = load_judge(blind)
    assert (record.class_names, record.method, record.ceiling, loaded.classes) == ([], "contrastive", None, None)
    assert 3 / 99 < record.accuracy < 1  # of 100 views, each with 99 others
    both = train_features(request(photos, tmp_path / "both", without_labels=True), runtime=tiny.CPU).record
    assert (both.method, both.class_names) == ("contrastive", list(tiny.CLASSES))
    assert both.accuracy > 0.9  # whose classes are judged nevertheless


def test_a_rare_class_is_known(tmp_path):
    """One image in twenty is red."""
    folder, random = tmp_path / "parts", np.random.default_rng(0)
    for number in range(400):
        place, colour = (folder / "defect", COLOURS[0]) if number % 20 == 0 else (folder / "good", COLOURS[2])
        place.mkdir(parents=True, exist_ok=True)
        pixels = colour + random.integers(-55, 55, (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number:03d}.png")
    for method in ({}, {"without_labels": True}):
        record = train_features(
            request(folder, tmp_path / str(len(method)), steps=40, **method), runtime=tiny.CPU
        ).record
        assert record.class_names == ["defect", "good"]
        assert record.accuracy > 0.97
    for seed in range(20):  # of 50 at random often fewer are defects
        prepared = prepare_features(request(folder, tmp_path / "new", seed=seed), tiny.CPU)
        source, kept = prepared.images.source, prepared.images.kept.tolist()
        assert sum(source.label(row) == 0 for row in prepared.held_out) >= 5
        assert 50 <= len(prepared.held_out) <= 55
        assert sorted([*kept, *prepared.held_out]) == list(range(400))


def test_classes_that_look_alike_leave_a_judge_without_classes(photos, model_folder, tmp_path, caplog):
    """The notice says why; its features serve all the same."""
    folder = tmp_path / "alike"
    for number, file in enumerate(sorted(photos.rglob("*.png"), key=lambda file: file.name)):
        place = folder / tiny.CLASSES[number // 3 % 3]  # whatever its colour
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    record = train_features(request(folder, tmp_path / "judge"), runtime=tiny.CPU).record
    assert "these features are not shown to separate the classes" in caplog.text
    assert (record.class_names, record.accuracy, record.method) == ([], None, "labels")
    assert record.judged == "trained on labels, which its features are not shown to tell apart"
    assert load_judge(tmp_path / "judge")[1].classes is None
    given = {"data": photos, "num": 60, "features": str(tmp_path / "judge"), "out": tmp_path / "scores"}
    scores = evaluate(EvaluationRequest(model=model_folder, **given), tiny.CPU).report.scores
    assert list(scores) == ["fd", "precision", "recall"]


def test_classes_may_stand_in_a_table(photos, tmp_path):
    """Prepared alone: the same classes as those of folders, from a column whose name says nothing."""
    flat = tmp_path / "flat"
    flat.mkdir()
    rows = ["scan,kind"]
    for file in sorted(photos.rglob("*.png")):
        shutil.copy(file, flat)
        rows.append(f"{file.name},{file.parent.name}")
    (flat / "labels.csv").write_text("\n".join([*rows, "gone.png,apple"]), encoding="utf-8")
    asked = {"label_column": "kind", "file_column": "scan"}
    with pytest.raises(DataError, match=r"gone\.png"):
        prepare_features(request(flat, tmp_path / "judge", **asked), tiny.CPU)
    prepared = prepare_features(request(flat, tmp_path / "judge", **asked, allow_missing=True), tiny.CPU)
    assert prepared.plan.class_names == list(tiny.CLASSES) and prepared.plan.method == "labels"
    with pytest.raises(DataError, match=r"no column 'knd'.*did you mean 'kind'"):
        prepare_features(request(flat, tmp_path / "judge", label_column="knd", allow_missing=True), tiny.CPU)
    assert not (tmp_path / "judge").exists()


def test_a_finished_judge_stays_as_it_is(judge, photos):
    before = tiny.tree(judge)
    assert train_features(request(photos, judge), runtime=tiny.CPU).record.accuracy > 0.9
    assert tiny.tree(judge) == before
    left_open = train_features(request(photos, judge, steps=None, width=None, side=None), runtime=tiny.CPU)
    assert left_open.outcome.step == SMALL["steps"]  # as it began


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, photos, judge, monkeypatch):
    calls = []

    def compute(*args, **given):
        calls.append(None)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGTERM)
        return feature_step(*args, **given)

    with monkeypatch.context() as patch:
        patch.setattr(feature_run, "feature_step", compute)
        stopped = train_features(request(photos, tmp_path / "j"), runtime=tiny.CPU)
    assert (stopped.outcome.step, stopped.outcome.finished, stopped.record) == (5, False, None)
    with pytest.raises(ConfigError, match="its training has not finished: repeat the command"):
        EvaluationRequest(model="m", data="d", features=str(tmp_path / "j"))
    assert train_features(request(photos, tmp_path / "j"), runtime=tiny.CPU).outcome.finished
    same_judge(tmp_path / "j", judge)


@pytest.mark.parametrize("without_labels", [False, True])
def test_steps_as_graphs_learn_the_same(tmp_path, photos, monkeypatch, without_labels):
    """Bit for bit; a tape of operations plays the CUDA graph."""

    def learned(name: str) -> dict[str, torch.Tensor]:
        prepared = prepare_features(request(photos, tmp_path / name, without_labels=without_labels), tiny.CPU)
        prepared.begin()
        train_feature_network(prepared)
        return prepared.learner.state_dict()

    plain = learned("plain")
    monkeypatch.setattr(loop, "cuda_graph", recorder := Recorder())
    monkeypatch.setattr(feature_run, "Job", lambda **given: loop.Job(**{**given, "captures": True}))
    graph = learned("graph")
    assert recorder.count == 1
    assert all(torch.equal(value, graph[name]) for name, value in plain.items())


def test_from_memory_it_learns_the_same_as_from_files(tmp_path, photos, monkeypatch):
    """Also where it begins with the one and goes on with the other."""
    decoded, free = Counter(), [1 << 40]
    decode = ImageFiles.__getitem__

    def counted(source: ImageFiles, index: int) -> ImageItem:
        decoded[index] += 1
        return decode(source, index)

    def compute(*args, **given):
        calls.append(None)
        if len(calls) == 7:
            signal.raise_signal(signal.SIGTERM)
        return feature_step(*args, **given)

    monkeypatch.setattr(ImageFiles, "__getitem__", counted)
    monkeypatch.setattr(feature_run, "free_memory", lambda device: free[0])
    runs, times, calls = [], [], []
    for free[0] in (1 << 40, 0):
        prepared = prepare_features(request(photos, tmp_path / str(free[0]), steps=14), tiny.CPU)
        assert prepared.resident is ("in memory" in prepared.describe()["data"]) is (free[0] > 0)
        prepared.begin()
        decoded.clear()
        train_feature_network(prepared)
        runs.append(tiny.tree(prepared.request.out / "checkpoints"))
        times.append(decoded.total())
    assert times == [210, 224]  # once each; once for every time that one is seen
    assert runs[0] == runs[1]
    with monkeypatch.context() as patch:
        patch.setattr(feature_run, "feature_step", compute)
        train_features(request(photos, tmp_path / "both", steps=14), runtime=tiny.CPU)
    free[0] = 1 << 40
    for out in ("both", "whole"):
        assert train_features(request(photos, tmp_path / out, steps=14), runtime=tiny.CPU).outcome.finished
    same_judge(tmp_path / "both", tmp_path / "whole")


def test_images_that_are_seen_once_or_do_not_fit_stay_in_their_files(tmp_path, photos, monkeypatch):
    fits, free = 4 * 210 * (3 * tiny.IMAGE_SIZE**2 + 64), [0]  # a quarter is taken
    monkeypatch.setattr(feature_run, "free_memory", lambda device: free[0])
    for free[0], steps, stays in ((fits, 14, True), (fits, 13, False), (fits - 4, 14, False)):
        prepared = prepare_features(request(photos, tmp_path / "judge", steps=steps), tiny.CPU)
        assert prepared.resident is stays


def test_a_kill_costs_nothing_but_time(tmp_path, photos):
    args = ["train-features", photos, "--image-size", 16, "--side", 16, "--width", 8, "--batch-size", 4]
    args += ["--steps", 60, "--device", "cpu", "--without-labels"]
    log = tmp_path / "log"
    process = start([*args, "--out", tmp_path / "killed"], log)
    wait_until(lambda: any((tmp_path / "killed").glob("checkpoints/step-*/state.json")), process)
    process.kill()
    process.join()
    assert not (tmp_path / "killed" / "judge.json").exists(), "the kill came too late"
    for out in ("killed", "whole"):
        assert finish(start([*args, "--out", tmp_path / out], log), log) == 0, log.read_text()
    same_judge(tmp_path / "killed", tmp_path / "whole")


def test_two_processes_train_the_judge_of_one(tmp_path, photos, judge):
    options = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", value)]
    args = ("train-features", photos, *options, "--device", "cpu", "--out", tmp_path / "two")
    log = tmp_path / "log"
    processes = start_processes(args, log, 2)
    codes = [finish(one, log.with_name(f"log.{rank}")) for rank, one in enumerate(processes)]
    assert codes == [0, 0], [log.with_name(f"log.{rank}").read_text() for rank in range(2)]
    ours, theirs = (read_tensors(folder / FILES[1]) for folder in (tmp_path / "two", judge))
    for name, tensor in theirs.items():
        if name.startswith("network."):
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    lines = [read_metrics(folder)[-1] for folder in (tmp_path / "two", judge)]
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=1e-4)
    assert lines[0]["accuracy"] == pytest.approx(lines[1]["accuracy"], abs=1e-6)


# Defaults


def test_sizes_fit_the_images_and_the_machine():
    assert network_for(64, gpu=False) == FeatureNetworkConfig(side=32, widths=(64, 128, 256))
    assert network_for(32, gpu=False).side == 32
    assert network_for(256, gpu=False) == FeatureNetworkConfig(side=64, widths=(32, 64, 128, 128))
    assert network_for(256, gpu=True) == FeatureNetworkConfig(side=128, widths=(64, 128, 256, 256, 256))
    assert network_for(64, gpu=False, side=16, width=8).widths == (8, 16)


def test_steps_fit_the_data_and_the_machine():
    network = network_for(64, gpu=False)
    assert steps_for(200, 10, network, gpu=False)[0] == 2000  # 100 passes
    assert steps_for(1000, 10, network, gpu=False)[0] == 5000  # 50,000 images
    assert steps_for(3000, 10, network, gpu=False)[0] == 9000  # 30 passes
    steps, reason = steps_for(45_000, 64, network, gpu=False)
    assert 2 < steps * 64 / 45_000 < 8
    assert reason.endswith("about ten minutes of two CPU cores")
    assert steps_for(45_000, 64, network, gpu=True)[0] == round(30 * 45_000 / 64)


# What is judged


def test_evaluate_by_a_judge(command, judge, model_folder, photos, tmp_path):
    args = ("evaluate", model_folder, "--data", photos, "--features", judge, "--num", 60, "--device", "cpu")
    report = json.loads(command(*args, "--json", "--out", tmp_path / "a").out)
    record = read_json(judge / "judge.json")
    assert list(report["scores"]) == ["fd", "precision", "recall", "class-accuracy"]
    score = report["scores"]["class-accuracy"]
    assert score["limit"] == pytest.approx(record["ceiling"], abs=0.02)  # of classes that are drawn equally often
    assert 0 <= score["low"] <= score["value"] <= score["high"] <= 1
    assert score["value"] < score["limit"]  # of an untrained model
    facts = report["protocol"]["features"]
    assert facts["name"] == "judge"
    assert facts["judge"] == {name: record[name] for name in facts["judge"]}
    assert {"fingerprint", "accuracy", "class_names", "hash"} <= facts["judge"].keys()
    assert json.loads(command(*args, "--json", "--against", tmp_path / "a", "--out", tmp_path / "b").out)
    told = command(*args)
    assert "class accuracy" in told.out
    assert "real images: " in told.out
    assert "FD (judge features), a relative measure" in told.out


def test_reconstructions_are_nearer_than_an_untrained_model(judge, model_folder, photos, kl_folder):
    given = {"data": photos, "features": str(judge), "num": 60, "resamples": 0}
    drawn = evaluate(EvaluationRequest(model=model_folder, **given), tiny.CPU).report.scores
    real = evaluate(EvaluationRequest(model=photos, **given), tiny.CPU).report.scores
    rebuilt = evaluate(
        EvaluationRequest(model=model_folder, reconstruction=True, metrics=["fid", "class-accuracy"], **given), tiny.CPU
    ).report.scores
    assert real["fd"].value < drawn["fd"].value
    assert real["fd"].value < rebuilt["fd"].value
    assert list(rebuilt) == ["fd", "class-accuracy"]
    assert "class-accuracy" not in real  # of images in files no class is known


def test_class_accuracy_by_other_features_is_judged_on_the_real_images(command, model_folder, photos):
    args = ("evaluate", model_folder, "--data", photos, "--features", "random", "--num", 30, "--device", "cpu")
    scores = json.loads(command(*args, "--metrics", "class-accuracy", "--json").out)["scores"]
    assert list(scores) == ["class-accuracy"]
    assert scores["class-accuracy"]["limit"] > 0.8


def test_sweep_and_diagnose_take_a_judge(command, judge, model_folder, photos, tmp_path):
    args = ("--data", photos, "--features", judge, "--device", "cpu", "--json")
    swept = command(
        "sweep", model_folder, *args, "--out", tmp_path / "s", "--num", 24, "--solvers", "euler", "--steps", "1,2"
    )
    assert swept.code == 0, swept.err
    plan = read_json(tmp_path / "s" / "plan.json")
    assert (plan["features"], plan["feature_hash"]) == ("judge", open_features(str(judge)).hash)
    found = command("diagnose", model_folder, *args, "--out", tmp_path / "d", "--num", 16)
    assert found.code == 0, found.err
    diagnosis = read_json(tmp_path / "d" / "diagnose.json")
    assert diagnosis["floor"]["features"] == "judge"
    assert diagnosis["memorisation"]["spaces"][1]["space"] == "judge features"


def test_a_judge_without_classes_measures_distances_alone(command, blind, model_folder, photos):
    args = ("evaluate", model_folder, "--data", photos, "--features", blind, "--num", 30, "--device", "cpu", "--json")
    assert list(json.loads(command(*args).out)["scores"]) == ["fd", "precision", "recall"]


# Bad input


@pytest.fixture(scope="module")
def stranger(judge, tmp_path_factory) -> Path:
    """A judge whose third class has another name."""
    folder = tmp_path_factory.mktemp("judges") / "stranger"
    shutil.copytree(judge, folder)
    record = read_json(folder / "judge.json")
    (folder / "judge.json").write_text(json.dumps({**record, "class_names": ["apple", "berry", "date"]}))
    return folder


@pytest.mark.parametrize("verb", ["evaluate", "sweep", "diagnose"])
def test_a_judge_of_other_classes_is_refused_in_one_line(command, verb, stranger, model_folder, photos, tmp_path):
    args = (verb, model_folder, "--data", photos, "--features", stranger, "--num", 100, "--device", "cpu")
    refused = command(*args, "--out", tmp_path / "out")
    assert refused.code == 2
    assert len(refused.err.strip().splitlines()) == 1
    assert "trained on other classes: it does not know cherry" in refused.err
    assert not (tmp_path / "out").exists()


def test_a_damaged_judge_is_refused(judge, tmp_path):
    folder = tmp_path / "j"
    shutil.copytree(judge, folder)
    record = read_json(folder / "judge.json")
    (folder / "judge.json").write_text(json.dumps({**record, "hash": "0" * 64}))
    with pytest.raises(ArtifactError, match=r"does not belong to its judge\.json"):
        open_features(str(folder))
    (folder / "judge.json").write_text(json.dumps({**record, "accuracy": "good"}))
    with pytest.raises(ArtifactError, match="accuracy"):
        open_features(str(folder))


def test_features_that_are_no_judge(photos):
    with pytest.raises(ConfigError, match="did you mean 'random'"):
        EvaluationRequest(model="m", data="d", features="randm")
    for kind in (EvaluationRequest, SweepRequest, DiagnoseRequest):
        with pytest.raises(ConfigError, match=r"there is no judge\.json in this folder; give the folder"):
            kind(model="m", data="d", features=str(photos))
        with pytest.raises(ConfigError, match=r"there is no such folder; give that of a judge, or one of inception"):
            kind(model="m", data="d", features=str(photos / "judge"))


def test_weights_are_refused_for_a_judge(judge):
    with pytest.raises(ConfigError, match="has no effect with a judge"):
        EvaluationRequest(model="m", data="d", features=str(judge), weights="w")


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"data": "synthetic:100"}, DataError, "100 readable images are too few"),
        ({"data": "nowhere"}, DataError, "nowhere"),
        ({"batch_size": 1}, ConfigError, "batch_size"),
        ({"width": 12}, ConfigError, "12"),
        ({"side": 8}, ConfigError, "side"),
        ({"steps": 0}, ConfigError, "steps"),
    ],
)
def test_bad_input_costs_one_line_and_leaves_nothing(tmp_path, photos, given, error, said):
    with pytest.raises(error, match=said):
        train_features(request(photos, tmp_path / "out", **given), runtime=tiny.CPU)
    assert not (tmp_path / "out").exists()


def test_another_plan_in_the_folder_is_refused(judge, photos, tmp_path):
    with pytest.raises(ArtifactError, match="steps: 12, now 13"):
        train_features(request(photos, judge, steps=13), runtime=tiny.CPU)
    other = tmp_path / "other"
    other.mkdir()
    (other / "note.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="does not hold a judge"):
        train_features(request(photos, other), runtime=tiny.CPU)
    assert [file.name for file in other.iterdir()] == ["note.txt"]


def test_a_class_of_one_image_is_refused(photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "date").mkdir()
    shutil.copy(next(photos.rglob("*.png")), folder / "date" / "only.png")
    with pytest.raises(DataError, match="date"):
        train_features(request(folder, tmp_path / "out"), runtime=tiny.CPU)


def test_out_inside_the_data_is_refused(photos):
    with pytest.raises(ArtifactError, match="lies inside"):
        train_features(request(photos, photos / "judge"), runtime=tiny.CPU)


def test_screen(command, judge, photos):
    options = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", value)]
    shown = command("train-features", photos, *options, "--device", "cpu", "--out", judge)
    assert shown.code == 0, shown.err
    assert "of 50 held-out images recognised" in shown.out
    assert "12 steps of 16 images" in shown.out
