"""Models as pipelines of diffusers with their own code: loaded offline, they draw the same pictures, or are refused."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.api import LatentFlow
from latentflow.autoencoder import Autoencoder
from latentflow.convert.exported import LIMIT
from latentflow.convert.pipeline import folder_pipeline
from latentflow.convert.pipeline.pipeline_folder import export_pipeline
from latentflow.errors import ArtifactError
from latentflow.flow.multistep import AdamsBashforth
from latentflow.flow.path import CosinePath
from latentflow.model.config import ModelConfig
from latentflow.model.student_record import StudentRecord
from latentflow.networks.dit import DiTConfig
from latentflow.networks.unet import UNetConfig
from latentflow.networks.velocity_network import NoisePrediction
from latentflow.pixel_format import PixelFormat
from latentflow.randomness import ImageRandom
from tests import tiny
from tests.convert.parity import relative_error
from tests.processes import run_here

SIZES = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 2}
MODERN = DiTConfig(**SIZES, variant="modern", value_residual=True)
COLUMNS = [
    {"name": "age", "kind": "number", "mean": 50.0, "deviation": 10.0},
    {"name": "view", "kind": "label", "class_names": ["front", "side"]},
    {"name": "finding", "kind": "labels", "class_names": ["a", "b", "c"]},
]


def changed(given: LatentFlow, **values: Any) -> LatentFlow:
    """The model with another config and random weights."""
    config = ModelConfig.model_validate({**given.config.model_dump(), **values})
    network = tiny.randomise(config.build_network()).eval().requires_grad_(False)
    return LatentFlow(config, network, given.autoencoder)


MODELS: dict[str, Callable[[Autoencoder], LatentFlow]] = {
    "classic": lambda kl: tiny.model(
        kl, solver="heun", steps=4, guidance=1.7, guidance_interval=(0.2, 0.9), guided_channels=3, shift=2.0
    ),
    "modern": lambda kl: changed(
        tiny.model(kl, conditioning={**tiny.SPATIAL, "columns": COLUMNS, "augmentation": ["zoom"]}, guidance=2.0),
        network=MODERN,
    ),
    "unconditional": lambda kl: changed(
        tiny.model(kl, class_names=(), conditioning={"constant_embedding": True}, solver="rk4", steps=3)
    ),
    "gray": lambda kl: tiny.model(kl, pixel_format=PixelFormat(channels=1)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, kl) -> Callable[[str], tuple[LatentFlow, Path]]:
    """A model and its folder, exported when first asked for."""
    made: dict[str, tuple[LatentFlow, Path]] = {}

    def export(name: str) -> tuple[LatentFlow, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp("pipeline") / name
            model = MODELS[name](kl)
            assert export_pipeline(model, folder).error <= LIMIT / 10
            made[name] = model, folder
        return made[name]

    return export


@pytest.fixture
def load(tmp_path, monkeypatch) -> Callable[[Path], Any]:
    """`DiffusionPipeline.from_pretrained`, offline, whose copies of code go into a folder of the test's own."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        monkeypatch.delitem(sys.modules, name)

    def loaded(folder: Path) -> Any:
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return loaded


def stored(images: list[Image.Image]) -> np.ndarray:
    arrays = np.stack([np.asarray(image) for image in images])
    return arrays if arrays.ndim == 4 else arrays[..., None]


@pytest.mark.parametrize("name", MODELS)
def test_the_pictures_are_those_of_the_model(folders, load, name):
    """Everything from the presets; also for seeds of more than 32 bits."""
    model, folder = folders(name)
    pipe = load(folder)
    assert type(pipe).__module__.startswith("diffusers_modules.local"), "the code of the folder"
    for seed in (0, 2**40 + 5):
        drawn = pipe(num_images=3, seed=seed)
        expected = model.sample(num=3, seed=seed)
        levels = expected.pixels.permute(0, 2, 3, 1).numpy().astype(int)
        difference = np.abs(stored(drawn.images) - levels)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3  # the rounding of a level
    latents = pipe(num_images=3, seed=seed, output_type="latent").images
    assert relative_error(latents, expected.latents) < 1e-5
    assert latents.std() > 1e-2


def test_the_noise_is_that_of_the_seeds_to_the_bit():
    seeds = [0, 1, 17, 2**32 - 1, 2**32, 2**63 - 1]
    for shape in ((4, 8, 8), (3, 5, 7), (1, 1, 1)):
        expected = ImageRandom.of_seeds("sample", seeds).normal(*shape)
        assert torch.equal(folder_pipeline._noise(seeds, shape, "cpu"), expected)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "rk4", "ab2", "ab3", "ab4"])
def test_classes_guidance_and_steps(folders, load, solver):
    model, folder = folders("classic")
    options = {"num_inference_steps": 6, "guidance_scale": 2.5, "solver": solver}
    pipe = load(folder)
    for classes in (["cherry", "apple"], [2, 0]):
        drawn = pipe(num_images=4, classes=classes, seed=7, **options, output_type="latent").images
        expected = model.sample(num=4, classes=classes, seed=7, steps=6, guidance=2.5, solver=solver).latents
        assert relative_error(drawn, expected) < 1e-5
    others = pipe(num_images=4, classes="berry", seed=7, **options, output_type="latent").images
    assert relative_error(others, expected) > 1e-2


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_few_steps_and_shifted_ones(order, steps):
    """The same states as those of the library, for dx/dt = -x t."""
    grid = folder_pipeline._times(steps, 2.0)
    *_, expected = AdamsBashforth(order).march(lambda x, t: -x * t, torch.ones(1, dtype=torch.float64), grid)
    x = torch.ones(1, dtype=torch.float64)
    found = folder_pipeline._adams_bashforth(lambda x, t: -x * t, x, grid, list(pairwise(grid)), order)
    assert torch.allclose(found, expected, atol=1e-14, rtol=0)


def test_a_picture_does_not_depend_on_its_batch(folders, load):
    _, folder = folders("classic")
    pipe = load(folder)
    whole = pipe(num_images=4, seed=3, output_type="latent").images
    apart = pipe(num_images=4, seed=3, batch_size=3, output_type="latent").images
    assert torch.allclose(whole, apart, atol=1e-5)
    assert torch.allclose(whole[2:], pipe(num_images=2, seed=5, output_type="latent").images, atol=1e-5)
    (pixels,) = pipe(num_images=1, latents=whole[:1], output_type="pt", return_dict=False)
    assert pixels.abs().max() <= 1


def test_holes_and_maps(folders, load):
    """The conditions of a picture, as the verbs of latentflow make them."""
    model, folder = folders("modern")
    pipe = load(folder)
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 4, (16, 16), generator=generator)
    indices[indices == 3] = 255
    expected = model.mask_to_image(indices.numpy().astype(np.uint8), num=2, seed=4, classes=[1])
    given = pipe.map_fractions(indices[None])
    drawn = pipe(num_images=2, seed=4, classes=1, conditions=given, output_type="latent").images
    assert relative_error(drawn, expected.latents) < 1e-5

    image = torch.randint(0, 256, (16, 16, 3), generator=generator).numpy().astype(np.uint8)
    hole = np.zeros((16, 16), np.uint8)
    hole[3:9, 5:12] = 255
    expected = model.inpaint(Image.fromarray(image), Image.fromarray(hole), num=2, seed=4, method="condition")
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
    given = pipe.known_part(pixels, torch.from_numpy(hole > 0)[None, None].float())
    drawn = pipe(num_images=2, seed=4, conditions=given, output_type="latent").images
    assert relative_error(drawn, expected.latents) < 1e-5


def test_named_conditions(folders, load):
    model, folder = folders("modern")
    conditions = {"age": 63, "view": "side", "finding": ["a", "c"]}
    expected = model.sample(num=2, seed=1, classes=[2], conditions=conditions)
    row = torch.tensor([[63.0, 0, 1, 1, 0, 1, 0]])
    drawn = load(folder)(num_images=2, seed=1, classes=2, conditions={"columns": row}, output_type="latent").images
    assert relative_error(drawn, expected.latents) < 1e-5


WRONG = {
    "class 'pear': this model knows apple, berry, cherry": {"classes": "pear"},
    "class 3: this model knows": {"classes": [3]},
    "condition 'mask': this model takes labels": {"conditions": {"mask": torch.ones(1, 1, 8, 8)}},
    "solver 'dopri5': choose one of euler, midpoint, heun, rk4, ab2, ab3, ab4": {"solver": "dopri5"},
    "must be 1 or more": {"num_inference_steps": 0},
    "no condition is given that guidance could strengthen": {"classes": [], "guidance_scale": 2.0},
}


@pytest.mark.parametrize("reason", WRONG)
def test_wrong_calls_say_what_is_right(folders, load, reason):
    _, folder = folders("classic")
    with pytest.raises(ValueError, match=re.escape(reason)):
        load(folder)(**WRONG[reason])


def test_what_the_folder_holds(folders):
    _, folder = folders("modern")
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert files == {
        *("model_index.json", "pipeline.py", "README.md", "velocity/config.json", "velocity/modeling.py"),
        *("velocity/diffusion_pytorch_model.safetensors", "vae/config.json"),
        "vae/diffusion_pytorch_model.safetensors",
    }
    for file in ("pipeline.py", "velocity/modeling.py"):
        code = (folder / file).read_text(encoding="utf-8")
        assert not re.search(r"^\s*(?:from|import) +(?:latentflow|\.)", code, re.MULTILINE)
    here = str(Path(folder_pipeline.__file__).parents[4])
    assert not any(here in file.read_text(encoding="utf-8") for file in folder.rglob("*.json"))


def test_the_program_on_the_page(folders, load, monkeypatch):
    model, folder = folders("classic")
    monkeypatch.chdir(folder)
    page = (folder / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(program, "README.md", "exec"), {})
    expected = model.sample(num=4, seed=0)
    for number, image in enumerate(expected.images):
        file = folder / f"image_{number}.png"
        assert np.abs(np.asarray(Image.open(file)).astype(int) - np.asarray(image)).max() <= 1
        file.unlink()


REFUSED: dict[str, Callable[[Autoencoder], LatentFlow]] = {
    "cannot be exported as a pipeline, whose folder has the code of transformers": lambda kl: changed(
        tiny.model(kl),
        network=UNetConfig(
            channels=8, multipliers=(1, 2), blocks_per_level=1, attention_factors=(2,), norm_groups=4, head_channels=8
        ),
    ),
    "a network that predicts noise cannot be exported as a pipeline": lambda kl: changed(
        tiny.model(kl), prediction=NoisePrediction(), path=CosinePath()
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_folder_cannot_hold_is_refused(kl, tmp_path, capsys, monkeypatch, reason):
    REFUSED[reason](kl).save_pretrained(tmp_path / "model")
    before = tiny.tree(tmp_path)
    given = ["export", tmp_path / "model", "--format", "pipeline", "--out", tmp_path / "deep" / "out"]
    done = run_here(given, capsys, monkeypatch)
    assert done.code == 2
    assert reason in done.error
    assert tiny.tree(tmp_path) == before


def test_another_network_is_found_and_nothing_is_written(kl, tmp_path, monkeypatch):
    from latentflow.convert.pipeline import folder_transformer

    monkeypatch.setattr(folder_transformer, "_EPS", 1e-2)
    with pytest.raises(ArtifactError, match=r"differs from this model by \d\.\de-0\d of the largest velocity"):
        export_pipeline(tiny.model(kl), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_solver_that_the_pipeline_lacks_is_replaced_with_a_word(kl, tmp_path, load, caplog):
    given = tiny.model(kl, solver="dopri5", steps=4)
    export_pipeline(given, tmp_path / "out")
    assert "no solver dopri5; it draws with heun, 4 steps" in caplog.text
    drawn = load(tmp_path / "out")(num_images=1, output_type="latent").images
    assert relative_error(drawn, given.sample(num=1, solver="heun", steps=4).latents) < 1e-5


def test_the_command(folders, tmp_path, capsys, monkeypatch):
    model, _ = folders("classic")
    model.save_pretrained(tmp_path / "model")
    given = ["export", tmp_path / "model", "--format", "pipeline", "--out", tmp_path / "out", "--json"]
    done = run_here(given, capsys, monkeypatch)
    assert done.code == 0, done.err
    rows = json.loads(done.out)
    assert rows.pop("largest relative error") <= LIMIT
    assert rows == {
        "folder": str(tmp_path / "out"),
        "pipeline": "LatentFlowPipeline",
        "velocity": "VelocityTransformer",
        "vae": "AutoencoderKL",
    }


def test_a_student_is_refused_by_the_name_of_its_teacher(kl, tmp_path):
    student = changed(tiny.model(kl), student=StudentRecord(teacher="runs/photos", weights="0" * 64))
    with pytest.raises(ArtifactError, match="cannot be exported to a pipeline; export its teacher, runs/photos"):
        export_pipeline(student, tmp_path / "out")
    assert not any(tmp_path.iterdir())
