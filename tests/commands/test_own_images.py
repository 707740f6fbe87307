"""The held-out and the training images of a model's own data, by name: in `diagnose`, `evaluate` and `loss`."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
from PIL import Image

from latentflow.commands.diagnose import diagnose
from latentflow.commands.evaluate import evaluate
from latentflow.commands.loss import loss
from latentflow.commands.train import train
from latentflow.data.items import ImageSource
from latentflow.data.sources.images import open_images
from latentflow.data.sources.part import PartOfSource
from latentflow.evaluation.request import DiagnoseRequest, EvaluationRequest
from latentflow.model.flow_model import read_config
from latentflow.training import held_out
from latentflow.training.request import LossRequest
from tests import tiny
from tests.processes import run_here


@pytest.fixture(scope="module")
def run(tmp_path_factory, images, kl_folder) -> Path:
    """A run of 18 images, 9 of which are held out."""
    folder = tmp_path_factory.mktemp("runs") / "fruit"
    data = {"path": images, "held_out": 0.5}
    recipe = tiny.recipe(data=data, autoencoder=kl_folder, out=folder, training={"steps": 2})
    return train(recipe, runtime=tiny.CPU).run


@pytest.fixture(scope="module")
def held_out_names(run, images) -> set[str]:
    source = open_images(images, tiny.IMAGE_SIZE)
    names = [source.name(row) for row in range(len(source))]
    return {names[row] for row in read_config(run / "model").training.held_out.rows(names)}


def test_a_part_of_a_source_is_a_source(images):
    source = open_images(images, tiny.IMAGE_SIZE)
    part = PartOfSource(source, [3, 1, 17], "held-out")
    assert isinstance(part, ImageSource)
    assert len(part) == 3 and part.description == f"3 held-out images of {source.description}"
    for place, row in enumerate([3, 1, 17]):
        assert (part[place].pixels == source[row].pixels).all()
        assert (part.name(place), part.label(place)) == (source.name(row), source.label(row))
        assert part.contents()[place] == source.contents()[row]
    assert part.class_names == source.class_names and part.image_size == source.image_size
    assert part.fingerprint() not in (source.fingerprint(), PartOfSource(source, [3, 1], "held-out").fingerprint())
    with pytest.raises(IndexError):
        part[3]
    with pytest.raises(AttributeError):
        part.nothing  # noqa: B018 - the access itself
    for other in (copy.copy(part), pickle.loads(pickle.dumps(part))):
        assert other.fingerprint() == part.fingerprint()


def test_diagnose_compares_held_out_and_training_images(run, images, tmp_path, held_out_names):
    found = diagnose(DiagnoseRequest(model=str(run), data=str(images), out=tmp_path / "out"), tiny.CPU)
    test = found.memorisation
    assert test.is_test and test.covers and test.num_training == test.num_all == 9
    assert found.data.startswith("9 held-out images of ") and not found.is_training_data
    assert "9 of 9 training images of" in test.against and "the images the model was trained on" in test.against
    assert found.training_loss.data.startswith("9 training images of ")
    request = DiagnoseRequest(**found.request)
    assert (request.num, request.num_samples) == (9, 256)
    assert len(test.spaces[0].samples) == 256 and found.floor.num == 4
    assert test.num_twins == 0 and len(test.spaces[0].held_out) == 4
    page = (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    assert "9 held-out images of" in page
    # Repeated by what is stored with it.
    again = diagnose(request.model_copy(update={"out": tmp_path / "again"}), tiny.CPU)
    assert again.model_copy(update={"seconds": 0, "request": {}}) == found.model_copy(
        update={"seconds": 0, "request": {}}
    )


def test_evaluate_on_held_out_images(run, images):
    request = EvaluationRequest(
        model=str(run), data=str(images), features="random", metrics=["fid"], num=9, split="held-out", steps=1
    )
    found, whole = (evaluate(one, tiny.CPU).report for one in (request, request.model_copy(update={"split": "all"})))
    assert found.protocol.reference.data.startswith("9 held-out images of ")
    assert found.protocol.reference.num_images == 9 and whole.protocol.reference.num_images == 18
    assert found.protocol.reference.fingerprint != whole.protocol.reference.fingerprint
    (score,), (other,) = found.scores.values(), whole.scores.values()
    assert score.value != other.value


@pytest.mark.parametrize("data", ["images", "cache"])
def test_loss_on_held_out_images(run, data, request, held_out_names, monkeypatch):
    """Of the images, or of a latent cache of them."""
    place, seen = request.getfixturevalue(data), set()
    step = held_out.training_step

    def watched(model, network, batch, **options):
        seen.update(batch.indices.tolist())
        return step(model, network, batch, **options)

    monkeypatch.setattr(held_out, "training_step", watched)
    source = open_images(request.getfixturevalue("images"), tiny.IMAGE_SIZE)
    for split in ("held-out", "training"):
        seen.clear()
        loss(run, LossRequest(data=str(place), split=split, num=40), runtime=tiny.CPU)
        names = {source.name(row) for row in seen}
        assert names == held_out_names if split == "held-out" else not names & held_out_names
        assert len(names) == 9


NOT_OWN, NOTHING_HELD_OUT = "these are not the images that the model was trained with", "the model held no images out"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("loss {run} --data {other} --split held-out", f"--split held-out: {NOT_OWN}"),
        ("loss {model} --data {images} --split training", f"--split training: {NOTHING_HELD_OUT}"),
        ("loss {run} --data {images} --split test", "--split"),
        ("evaluate {run} --data {other} --split held-out", f"--split held-out: {NOT_OWN}"),
        ("evaluate {model} --data {images} --split held-out", f"--split held-out: {NOTHING_HELD_OUT}"),
        ("evaluate {pngs} --data {images} --split held-out", "--split has no effect on images in files"),
        (
            "evaluate {kl} --reconstruction --data {images} --split training",
            "--split has no effect with --reconstruction",
        ),
        ("diagnose {run} --data {images} --num-samples 3", "--num-samples 3: give a whole number from 4"),
    ],
)
def test_what_cannot_be_split_is_one_line(places, tmp_path, capsys, monkeypatch, command, said):
    words = [word.format(**places) for word in command.split()]
    out = [] if words[0] == "loss" else ["--out", tmp_path / "out", "--features", "random"]
    done = run_here((*words, "--device", "cpu", *out), capsys, monkeypatch)
    assert done.code == 2 and said in " ".join(done.err.split()), done.err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def places(run, images, kl, kl_folder, tmp_path) -> dict[str, Path]:
    """What the commands name."""
    tiny.model(kl).save_pretrained(tmp_path / "model")
    tiny.write_images(tmp_path / "other", per_class=2)
    (tmp_path / "pngs").mkdir()
    for number in range(4):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / "pngs" / f"{number}.png")
    names = ("model", "other", "pngs")
    return {"run": run, "images": images, "kl": kl_folder, **{name: tmp_path / name for name in names}}


def test_a_run_says_what_it_held_out(run, capsys, monkeypatch):
    shown = json.loads(run_here(("info", run, "--json"), capsys, monkeypatch).out)
    assert (shown["training images"], shown["held-out images"], shown["held-out loss"]) == (9, 9, None)
    assert shown["best model"].startswith("@best, of step 2, held-out loss ")
    best = json.loads(run_here(("info", f"{run}@best", "--json"), capsys, monkeypatch).out)
    assert best["held-out loss"] == read_config(run / "best").training.held_out_loss
    assert "9 images, never trained on" in (run / "model" / "README.md").read_text(encoding="utf-8")
