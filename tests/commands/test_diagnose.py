"""`latentflow diagnose`: what is measured of tiny models, the page, and refusals."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.analysis.diagnosis import (
    Diagnosis,
)
from latentflow.analysis.verdicts import verdicts
from latentflow.api import LatentFlow
from latentflow.autoencoder import LatentNormalisation, to_unit_range
from latentflow.commands.diagnose import diagnose as run_diagnose
from latentflow.data.batches import image_names
from latentflow.data.buckets import BucketedImages
from latentflow.data.hold_out import hold_out
from latentflow.data.sources.images import open_images
from latentflow.errors import ArtifactError, ConfigError, DataError
from latentflow.evaluation.request import DiagnoseRequest
from latentflow.flow.loss import flow_matching_loss
from latentflow.model.config import TrainingRecord
from latentflow.networks.dit import DiTConfig
from latentflow.sizes import Size
from tests import tiny
from tests.processes import run_here


def diagnose(model, data, out, **given):
    return run_diagnose(DiagnoseRequest(model=model, data=data, out=out, **given), tiny.CPU)


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
        *(f"pictures/memorised_{name}.png" for name in ("latents", "features")),
    }
    record = json.loads((folder / "diagnose.json").read_text())
    findings = record.pop("verdicts")
    assert Diagnosis.model_validate(record) == found
    assert DiagnoseRequest(**record["request"]).num == 12
    assert [one["topic"] for one in findings] == [one.topic for one in verdicts(found)]
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:)|https?://(?!www\.w3\.org)|<script|@import|url\(""", page)
    assert page.count("data:image/png;base64,") == 5
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


def test_few_training_images_have_no_loss_of_their_own(model_folder, images, tmp_path):
    others = tiny.write_images(tmp_path / "others", per_class=4)
    found = diagnose(model_folder, others, tmp_path / "out", train=images, num=8, num_train=4)
    assert found.training_loss is None and found.memorisation.num_training == 4


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
    for topic in ("Memorisation", "Memorised fraction"):
        (verdict,) = (one for one in verdicts(found) if one.topic == topic)
        assert verdict.mark == mark, verdict
    latents, _ = found.memorisation.spaces
    assert (latents.memorised > 10) if mark == "bad" else (latents.memorised == 0)  # measured: 18 and 0 of 80
    assert latents.memorised_held_out == 0


# ---- buckets


def test_a_run_on_buckets_knows_its_own_images(kl, tmp_path):
    """Those of its usual size are examined, held-out ones against those that were trained on."""
    photos, generator = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    for number in range(48):
        shape = (16, 24, 3) if number % 3 else (24, 16, 3)
        Image.fromarray(generator.integers(0, 256, shape, np.uint8)).save(photos / f"{number:02d}.png")
    sizes = [Size(16, 24), Size(24, 16)]
    own = BucketedImages.of(open_images(photos, sizes[0]), sizes)
    held_out = hold_out(image_names(own, range(48)), 0.5)
    flow = tiny.model(kl, class_names=())
    record = TrainingRecord(data_fingerprint=own.fingerprint(), held_out=held_out)
    changes = {"image_size": sizes[0], "buckets": list(own.buckets), "training": record}
    LatentFlow(flow.config.model_copy(update=changes), flow.network, kl).save_pretrained(tmp_path / "model")
    wide_held_out = sum(own.size(row) == sizes[0] for row in held_out.rows(image_names(own, range(48))))
    assert 8 <= wide_held_out < 24

    found = diagnose(tmp_path / "model", photos, tmp_path / "out")
    assert found.num == wide_held_out and not found.is_training_data and found.training_loss is not None
    assert found.data == f"{wide_held_out} held-out images of size 24x16 of 48 images from photos, in 2 shapes"
    assert found.memorisation.is_test and found.memorisation.num_training == 32 - wide_held_out
    assert "the images the model was trained on" in found.memorisation.against

    others = tiny.write_images(tmp_path / "others", per_class=4)  # which are taken at the same size
    found = diagnose(tmp_path / "model", photos, tmp_path / "given", train=others, num=8)
    assert found.data == "32 images of size 24x16 of 48 images from photos, in 2 shapes" and found.is_training_data
    assert found.memorisation.num_training == 12
