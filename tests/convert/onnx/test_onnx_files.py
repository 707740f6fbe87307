"""Models as ONNX files: the same function for any number of images, drawn by numpy and onnxruntime, or refused."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from latentflow.api import LatentFlow
from latentflow.autoencoder import Autoencoder
from latentflow.convert.exported import LIMIT, Exported, random_inputs
from latentflow.convert.onnx import onnx_files
from latentflow.convert.onnx.onnx_files import export_onnx
from latentflow.data.buckets import Bucket
from latentflow.errors import ArtifactError, ConfigError
from latentflow.flow.path import CosinePath, LinearPath
from latentflow.model.config import ModelConfig
from latentflow.model.student_record import StudentRecord
from latentflow.networks.dit import DiTConfig
from latentflow.networks.unet import UNetConfig
from latentflow.networks.velocity_network import DenoiserPrediction, NoisePrediction
from latentflow.sizes import Size
from tests import tiny
from tests.convert.parity import relative_error
from tests.processes import run_here

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "export.md"
SIZES = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 2}
SHALLOW = DiTConfig(**{**SIZES, "depth": 1})
MODERN = DiTConfig(**SIZES, variant="modern", value_residual=True)
COLUMNS = [
    {"name": "age", "kind": "number", "mean": 50.0, "deviation": 10.0},
    {"name": "view", "kind": "label", "class_names": ["front", "side"]},
    {"name": "finding", "kind": "labels", "class_names": ["a", "b", "c"]},
]
EVERYTHING = {**tiny.SPATIAL, "input_channels": 0, "columns": COLUMNS, "augmentation": ["zoom", "turn"]}
SQUARE, WIDE = Size(16, 16), Size(8, 24)


def changed(given: LatentFlow, **values: Any) -> LatentFlow:
    """The model with another config and random weights."""
    config = ModelConfig.model_validate({**given.config.model_dump(), **values})
    network = tiny.randomise(config.build_network()).eval().requires_grad_(False)
    return LatentFlow(config, network, given.autoencoder)


MODELS: dict[str, Callable[[Autoencoder], LatentFlow]] = {
    "classic": lambda kl: tiny.model(kl, guidance=1.7, guidance_interval=(0.2, 0.9), guided_channels=3, shift=2.0),
    "modern": lambda kl: changed(tiny.model(kl, conditioning=EVERYTHING), network=MODERN),
    "unconditional": lambda kl: changed(
        tiny.model(kl, class_names=(), conditioning={"constant_embedding": True}),
        buckets=[Bucket(size=SQUARE, num_images=1), Bucket(size=WIDE, num_images=2)],
    ),
}
OTHERS: dict[str, Callable[[Autoencoder], LatentFlow]] = {
    "noise": lambda kl: changed(tiny.model(kl), network=SHALLOW, prediction=NoisePrediction(), path=CosinePath()),
    "denoiser": lambda kl: changed(
        tiny.model(kl), network=SHALLOW, prediction=DenoiserPrediction(), path=LinearPath(sigma_min=0)
    ),
    "unet": lambda kl: changed(
        tiny.model(kl),
        network=UNetConfig(
            channels=8, multipliers=(1, 2), blocks_per_level=1, attention_factors=(2,), norm_groups=4, head_channels=8
        ),
    ),
}


FILES = onnx_files._files


@pytest.fixture(scope="module")
def exports(tmp_path_factory, kl) -> Callable[[str], tuple[LatentFlow, Exported]]:
    """A model and its folder, exported when first asked for."""
    made: dict[str, tuple[LatentFlow, Exported]] = {}

    def export(name: str) -> tuple[LatentFlow, Exported]:
        if name not in made:
            model = {**MODELS, **OTHERS}[name](kl)
            with pytest.MonkeyPatch.context() as patch:
                if name in OTHERS:  # whose autoencoder is that of the others
                    patch.setattr(onnx_files, "_files", lambda model: FILES(model)[:1])
                made[name] = model, export_onnx(model, tmp_path_factory.mktemp("onnx") / name)
        return made[name]

    return export


def velocity(folder: Path, latents: torch.Tensor, time: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
    session = onnxruntime.InferenceSession(folder / "velocity.onnx")
    feed = {"latents": latents, "time": time, **given}
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in feed.items()})[0])


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_onnxruntime_computes_the_same(exports, name):
    """For other numbers of images than were traced or compared, and inputs that the export did not see."""
    model, exported = exports(name)
    assert exported.error <= LIMIT / 3
    about = json.loads((exported.folder / "onnx.json").read_text(encoding="utf-8"))
    for num_images in (1, 2, 4, 5, 9):
        latents, time, condition = random_inputs(model.config, num_images, seed=7 + num_images)
        if condition.augmentation is not None:
            assert not condition.augmentation.any()
        given = {name: getattr(condition, name) for name in about["conditions"]}
        expected = model.velocity(latents, time, condition)
        assert expected.std() > 1e-2, "nothing to compare"
        assert relative_error(velocity(exported.folder, latents, time, given), expected) <= LIMIT
    for name in given:  # or the comparison says nothing about it
        other = {**given, name: given[name].roll(1, 0)}
        assert relative_error(velocity(exported.folder, latents, time, other), expected) > 100 * LIMIT, name
    other = velocity(exported.folder, latents, time.roll(1), given)
    assert relative_error(other, expected) > 100 * LIMIT


def test_every_size_of_a_model_of_several(exports):
    model, exported = exports("unconditional")
    decoder = onnxruntime.InferenceSession(exported.folder / "decoder.onnx")
    for sides in ((8, 8), (4, 12), (6, 2)):
        latents, time, condition = random_inputs(model.config, 2, seed=9, sides=sides)
        found = velocity(exported.folder, latents, time, {})
        assert relative_error(found, model.velocity(latents, time, condition)) <= LIMIT
        pixels = torch.from_numpy(decoder.run(None, {"latents": latents.numpy()})[0])
        assert relative_error(pixels, model.decode(latents)) <= LIMIT
    about = json.loads((exported.folder / "onnx.json").read_text(encoding="utf-8"))
    assert about["files"]["velocity"]["inputs"] == {"latents": [4, "height", "width"], "time": []}


def test_decoder_and_encoder(exports, kl):
    model, exported = exports("modern")
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    for name, given, expected in (
        ("decoder", latents, model.decode(latents)),
        ("encoder", model.decode(latents), model.encode(model.decode(latents))),
    ):
        session = onnxruntime.InferenceSession(exported.folder / f"{name}.onnx")
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: given.numpy()})[0])
        assert relative_error(found, expected) <= LIMIT
    assert not (exports("classic")[1].folder / "encoder.onnx").exists()


def run_program(folder: Path, where: Path) -> dict[str, Any]:
    """Run the program on the page in `folder`, with some of its values changed; its variables."""
    page = (folder / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert f"```python\n{program}```" in PAGE.read_text(encoding="utf-8")
    found = "Path(), 4, 50"
    assert found in program
    program = program.replace(found, f"Path({str(folder)!r}), 4, 6")
    drawn: dict[str, Any] = {}
    exec(compile(program, "README.md", "exec"), drawn)
    assert len(list(where.glob("image_*.png"))) == 4
    return drawn


@pytest.mark.parametrize("name", MODELS)
def test_the_program_on_the_page_draws_what_the_model_draws(exports, tmp_path, monkeypatch, name):
    model, exported = exports(name)
    monkeypatch.chdir(tmp_path)
    drawn = run_program(exported.folder, tmp_path)
    noise = np.random.default_rng(0).standard_normal((4, 4, 8, 8), dtype=np.float32)
    classes = {"classes": [0, 1, 2, 0]} if model.config.conditioning.num_classes else {}
    expected = model.sample(num=4, noise=torch.from_numpy(noise), solver="euler", steps=6, **classes)
    assert relative_error(torch.from_numpy(drawn["x"]), expected.latents) < 1e-4
    pictures = np.stack([np.asarray(Image.open(f"image_{i}.png")) for i in range(4)]).astype(int)
    assert np.abs(pictures - expected.pixels.permute(0, 2, 3, 1).numpy()).max() <= 1
    assert pictures.std() > 1


def test_the_program_is_short():
    program = (Path(onnx_files.__file__).parent / "templates" / "sample.py").read_text(encoding="utf-8")
    assert len([line for line in program.splitlines() if line and not line.startswith(("import", "from"))]) <= 30


def test_what_the_folder_says(exports):
    _, exported = exports("modern")
    assert {file.name for file in exported.folder.iterdir()} == {
        *("velocity.onnx", "decoder.onnx", "encoder.onnx", "onnx.json", "README.md")
    }
    about = json.loads((exported.folder / "onnx.json").read_text(encoding="utf-8"))
    conditions = {name: (one["type"], one["shape"], one["null"]) for name, one in about["conditions"].items()}
    assert conditions == {
        "labels": ("int64", [], 3),
        "masked_latents": ("float32", [4, 8, 8], 0),
        "mask": ("float32", [1, 8, 8], 1),
        "class_fractions": ("float32", [3, 8, 8], 0),
        "columns": ("float32", [7], [0, 1, 2, 0, 0, 0, 1]),
    }
    assert about["path"] == {"kind": "linear", "sigma_min": 1e-5}
    assert about["normalisation"] == {"shift": [0.1] * 4, "scale": [0.5] * 4}
    assert about["sampling"]["steps"] == 2
    session = onnxruntime.InferenceSession(exported.folder / "velocity.onnx")
    inputs = {one.name: one.shape[1:] for one in session.get_inputs()}
    assert inputs == {**about["files"]["velocity"]["inputs"], **{n: c[1] for n, c in conditions.items()}} | {
        "latents": [4, 8, 8],
        "time": [],
    }
    assert {one.shape[0] for one in session.get_inputs()} == {"batch"}
    here = str(Path(onnx_files.__file__).parents[4]).encode()
    assert not any(here in file.read_bytes() for file in exported.folder.iterdir()), "a path of this machine"


def test_a_difference_is_found_and_nothing_is_written(exports, tmp_path, monkeypatch):
    """The files are those of other weights."""
    model, exported = exports("classic")
    monkeypatch.setattr(onnx_files, "_write", lambda file, path: shutil.copy(exported.folder / path.name, path))
    other = LatentFlow(model.config, copy.deepcopy(model.network), model.autoencoder)
    other.network.final_linear.bias[-1] += 1e-3
    with pytest.raises(ArtifactError, match=r"differs from torch's by \d\.\de-0\d of its largest value"):
        export_onnx(other, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_file_that_onnxruntime_cannot_run_is_not_left(kl, tmp_path, monkeypatch):
    """A file for one number of images, as one with the traced number inside would be."""
    monkeypatch.setattr(torch.export, "Dim", lambda name, **given: None)
    with pytest.raises(ArtifactError, match="onnxruntime cannot run the velocity of this model"):
        export_onnx(tiny.model(kl), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_what_onnx_does_not_have_is_refused(kl, tmp_path):
    class Eigenvalues(torch.nn.Module):
        def forward(self, latents, time, condition):
            return torch.linalg.eigvals(latents).real[:, :, None] + latents

    given = tiny.model(kl)
    given.network = Eigenvalues()
    with pytest.raises(ArtifactError, match="the velocity of this model cannot be exported to ONNX") as refusal:
        export_onnx(given, tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert not any(tmp_path.iterdir())


def test_missing_libraries_are_named(kl, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_files, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ConfigError, match=r"needs onnxscript: pip install 'latentflow\[onnx\]'"):
        export_onnx(tiny.model(kl), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_guide_is_left_out_with_a_word(kl, tmp_path, caplog):
    from latentflow.convert.onnx.onnx_description import folder_facts

    preset = {"guidance": 2.0, "guide": {"model": "runs/photos@1/8", "weights": "0" * 12}}
    given = tiny.model(kl)
    sampling = type(given.config.sampling).model_validate(preset)
    given.config = given.config.model_copy(update={"sampling": sampling})
    about = folder_facts(given, ["velocity"], {"velocity": 0.0}, 20)
    assert about["sampling"]["guidance"] == 1.0
    assert about["sampling"]["guide"] is None
    assert "runs/photos@1/8, another model, which is not exported" in caplog.text


def test_the_command(exports, tmp_path, capsys, monkeypatch):
    model, exported = exports("classic")
    monkeypatch.setattr(onnx_files, "_write", lambda file, path: shutil.copy(exported.folder / path.name, path))
    model.save_pretrained(tmp_path / "model")
    given = ["export", tmp_path / "model", "--format", "onnx", "--out", tmp_path / "out", "--json"]
    done = run_here(given, capsys, monkeypatch)
    assert done.code == 0, done.err
    rows = json.loads(done.out)
    assert 0 < rows.pop("largest relative error") <= LIMIT
    assert rows == {"folder": str(tmp_path / "out"), "velocity": "velocity.onnx", "decoder": "decoder.onnx"}
    assert done.err == ""
    again = run_here(given, capsys, monkeypatch)
    assert again.code == 2
    assert "is not empty" in again.error


def test_a_student_is_refused_by_the_name_of_its_teacher(kl, tmp_path):
    student = changed(tiny.model(kl), student=StudentRecord(teacher="runs/photos", weights="0" * 64))
    with pytest.raises(ArtifactError, match="cannot be exported to ONNX; export its teacher, runs/photos"):
        export_onnx(student, tmp_path / "out")
    assert not any(tmp_path.iterdir())
