"""Models exported to diffusers: the same function, sampled by the program on the page, or refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.api import LatentFlow
from latentflow.autoencoder import Autoencoder, LatentNormalisation
from latentflow.convert.diffusers.export import diffusers_velocity, export_diffusers
from latentflow.convert.diffusers.keys import diffusers_network
from latentflow.convert.exported import LIMIT, Exported
from latentflow.data.painting.input_rules import InputRules
from latentflow.errors import ArtifactError
from latentflow.flow.path import CosinePath, LinearPath
from latentflow.model.conditioning import Conditioning
from latentflow.model.config import AUTOENCODER_FOLDER, AutoencoderRecord, ModelConfig, SamplingPreset
from latentflow.networks.dit import DiTConfig
from latentflow.networks.unet import UNetConfig
from latentflow.networks.velocity_network import DenoiserPrediction, NoisePrediction
from latentflow.pixel_format import PixelFormat
from latentflow.shapes import Condition
from tests import tiny
from tests.convert.parity import relative_error
from tests.processes import run_here

ROOT = Path(__file__).parents[3]
LATENT_SIDE = tiny.IMAGE_SIZE // tiny.FACTOR
CLASSES = {"class_names": list(tiny.CLASSES)}


def unet(**options: Any) -> UNetConfig:
    """A U-Net of two levels; its 8 channels in 4 groups."""
    given = {"channels": 8, "multipliers": (1, 2), "blocks_per_level": 1, "attention_factors": (2,), "norm_groups": 4}
    heads = {} if options.keys() & {"num_heads", "head_channels"} else {"head_channels": 8}
    return UNetConfig(**{**given, **heads, **options})


def dit(**options: Any) -> DiTConfig:
    given = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 2, "time_scale": 1.0}
    return DiTConfig(**{**given, **options})


NETWORKS = {
    "unet": (unet(), {}),
    "unet with classes": (unet(), CLASSES),
    "unet of LFM's time": (unet(time_scale=1.0), CLASSES),
    "unet attending on the first of three levels": (unet(multipliers=(1, 2, 2), attention_factors=(1,)), {}),
    "unet attending nowhere": (unet(attention_factors=(), middle_attention=False), {}),
    "unet attending with one head": (unet(num_heads=1, attention_factors=(1, 2)), {}),
    "unet of one level": (unet(multipliers=(1,), attention_factors=(1,)), {}),
    "unet of three blocks a level": (unet(blocks_per_level=3), {}),
    "unet with residual resizing": (unet(resample="block", attention_factors=(1,), multipliers=(1, 2, 3)), CLASSES),
    "unet with shifts": (unet(modulation="shift", sinusoid_endpoint=True, norm_eps=1e-3, dropout=0.3), CLASSES),
    "dhariwal": (unet(variant="dhariwal", norm_groups=2), CLASSES),
    "unet for inpainting": (unet(), {**CLASSES, "inpainting": True}),
    "dit": (dit(), {}),
    "dit with classes": (dit(), CLASSES),
    "dit of patch 4": (dit(patch_size=4, depth=1, time_scale=10.0), CLASSES),
    "dit for inpainting": (dit(), {"inpainting": True}),
    "dit trained on variants": (dit(), {**CLASSES, "augmentation": ["zoom", "turn"]}),
    "unet trained on variants": (unet(), {"augmentation": ["zoom"]}),
}


def model(
    autoencoder: Autoencoder, network: UNetConfig | DiTConfig, conditions: dict[str, Any], /, **given: Any
) -> LatentFlow:
    """A model with random weights, none of them zero."""
    values = {
        "image_size": tiny.IMAGE_SIZE,
        "network": network,
        "path": LinearPath(),
        "conditioning": Conditioning(**conditions),
        "autoencoder": AutoencoderRecord(
            reference=AUTOENCODER_FOLDER,
            content_hash=autoencoder.content_hash,
            factor=autoencoder.factor,
            num_channels=autoencoder.num_channels,
        ),
        "normalisation": autoencoder.normalisation,
    }
    config = ModelConfig(**{**values, **given})
    built = tiny.randomise(config.build_network()).eval().requires_grad_(False)
    return LatentFlow(config, built, autoencoder)


def loaded(folder: Path, exported: Exported) -> torch.nn.Module:
    import diffusers

    subfolder, name = next(iter(exported.parts.items()))
    return getattr(diffusers, name).from_pretrained(folder, subfolder=subfolder)


def program(folder: Path) -> str:
    """The program on the page, verbatim."""
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]


def lint(source: str) -> None:
    """Check and format as this repository is; fails with the complaint."""
    for command in (["check", "--quiet"], ["format", "--diff", "--quiet"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", "sample.py", "-"]
        done = subprocess.run(ruff, cwd=ROOT, input=source, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_diffusers_computes_the_same(kl, tmp_path, name):
    """At latents, times and sizes that the export did not check; every label."""
    network, conditions = NETWORKS[name]
    given = model(kl, network, conditions)
    exported = export_diffusers(given, tmp_path / "out")
    assert exported.error <= LIMIT / 3
    theirs = loaded(tmp_path / "out", exported)

    any_size = diffusers_network(given.config).any_size
    assert any_size == (network.kind == "unet")
    sides = [(LATENT_SIDE, LATENT_SIDE), *([(4, 12), (16, 8)] if any_size else [])]
    for height, width in sides:
        torch.manual_seed(1)
        latents = torch.randn(9, 4, height, width)
        time = torch.rand(9)
        labels = torch.arange(9) % 4 if conditions.get("class_names") else None
        spatial = {}
        if conditions.get("inpainting"):
            spatial = {"masked_latents": torch.randn_like(latents), "mask": torch.rand(9, 1, height, width)}
        condition = given.config.conditioning.build(latents.shape, "cpu", Condition(labels=labels, **spatial))
        expected = given.velocity(latents, time, condition)
        assert expected.std() > 1e-2, "nothing to compare"
        assert relative_error(diffusers_velocity(theirs, given.config, latents, time, condition), expected) <= LIMIT


def test_time_and_label_matter(kl, tmp_path):
    """Otherwise the comparison above would not test them."""
    for name in ("unet with classes", "dit with classes"):
        given = model(kl, *NETWORKS[name])
        latents = torch.randn(1, 4, LATENT_SIDE, LATENT_SIDE).expand(4, -1, -1, -1)
        condition = given.config.conditioning.build(latents.shape, "cpu", Condition(torch.tensor([0, 1, 1, 3])))
        a, b, c, d = given.velocity(latents, torch.tensor([0.5, 0.5, 0.8, 0.5]), condition)
        for one, other in ((a, b), (b, c), (b, d)):
            assert (one - other).abs().max() > 1e-2 * one.abs().max()


PROGRAMS = {
    "unet": {},
    "unet with classes": {"guidance": 2.0, "guidance_interval": (0.2, 0.85), "shift": 2.5},
    "unet for inpainting": {"guidance": 1.7, "guided_by": ["label"]},
    "unet of LFM's time": {"guidance": 3.0, "guided_channels": 3},
    "dit": {"shift": 0.5},
    "dit with classes": {},
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_program_on_the_page_samples_what_the_model_samples(kl, tmp_path, monkeypatch, name):
    network, conditions = NETWORKS[name]
    preset = SamplingPreset(solver="euler", steps=7, **PROGRAMS[name])
    given = model(kl, network, conditions, sampling=preset)
    export_diffusers(given, tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    lint(program(tmp_path / "out"))
    drawn: dict[str, Any] = {}
    exec(compile(program(tmp_path / "out"), "README.md", "exec"), drawn)

    assert drawn["steps"] == 7
    expected = given.sample(
        num=4,
        noise=drawn["noise"],
        classes=drawn["labels"].tolist() if conditions.get("class_names") else None,
        guidance=drawn.get("guidance", 1.0),
    )
    assert ("guidance" in drawn) == ("class_names" in conditions)
    assert relative_error(drawn["latents"].cpu(), expected.latents) < 1e-4
    pixels = np.stack([np.asarray(Image.open(f"image_{i}.png")) for i in range(4)])
    difference = np.abs(pixels.astype(int) - expected.pixels.permute(0, 2, 3, 1).numpy().astype(int))
    assert difference.max() <= 1
    assert pixels.std() > 1


@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_the_program_takes_fifty_euler_steps_in_place_of_another_solver(kl, tmp_path, solver):
    given = model(kl, *NETWORKS["unet"], sampling=SamplingPreset(solver=solver, steps=5))
    export_diffusers(given, tmp_path / "out")
    assert "\nsteps = 50\n" in program(tmp_path / "out")


def test_a_class_model_without_null_label_is_sampled_without_guidance(kl, tmp_path):
    given = model(kl, unet(), {**CLASSES, "label_dropout": 0.0})
    export_diffusers(given, tmp_path / "out")
    assert "guidance" not in program(tmp_path / "out")
    assert "label 3 was never trained." in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_latents_scaled_per_channel(kl, tmp_path, monkeypatch):
    """The program takes the numbers from model.json: the autoencoder's config has room for only one."""
    normalisation = LatentNormalisation(shift=[0.1, -0.2, 0.3, 0.0], scale=[0.5, 0.7, 1.1, 2.0])
    given = model(kl, unet(), {}, normalisation=normalisation, sampling=SamplingPreset(solver="euler", steps=3))
    export_diffusers(given, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "model.json").read_text(encoding="utf-8"))
    assert about == {
        "image_size": tiny.IMAGE_SIZE,
        "latent_shape": [4, LATENT_SIDE, LATENT_SIDE],
        "latent_shift": normalisation.shift,
        "latent_scale": normalisation.scale,
        "class_names": [],
        "null_label": None,
    }
    assert "shift and a scale for each channel" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path / "out")
    drawn: dict[str, Any] = {}
    exec(compile(program(tmp_path / "out"), "README.md", "exec"), drawn)
    expected = given.decode(given.sample(num=4, noise=drawn["noise"]).latents)
    assert relative_error(drawn["pixels"].cpu(), expected) < 1e-4


def test_an_autoencoder_from_elsewhere_comes_along(tmp_path):
    """The folder is complete, and names the origin."""
    autoencoder = Autoencoder.from_pretrained("shapes")
    record = AutoencoderRecord(
        reference="shapes",
        content_hash=autoencoder.content_hash,
        factor=autoencoder.factor,
        num_channels=autoencoder.num_channels,
    )
    given = model(autoencoder, unet(), {}, autoencoder=record, image_size=8 * autoencoder.factor)
    export_diffusers(given, tmp_path / "out")
    assert Autoencoder.from_pretrained(tmp_path / "out" / "vae").content_hash == autoencoder.content_hash
    assert " from `shapes`; images of" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("make", [tiny.deterministic, tiny.deep_compression])
def test_other_autoencoders_sample_and_inpaint(tmp_path, monkeypatch, make):
    """The program, then the lines for inpainting, whose latents are those the model was trained with."""
    autoencoder = Autoencoder(make(), "test")
    given = model(autoencoder, unet(), {"inpainting": True})
    export_diffusers(given, tmp_path / "out")
    page = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    first, second = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path / "out")
    drawn: dict[str, Any] = {}
    exec(first.replace("steps = 50", "steps = 2"), drawn)
    generator = torch.Generator().manual_seed(0)
    hole = (torch.rand(2, 1, 16, 16, generator=generator) > 0.5).float()
    image = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    device = drawn["device"]
    drawn |= {"image": image.to(device), "hole": hole.to(device)}
    with torch.no_grad():
        exec(second, drawn)
    expected = given.encode(torch.where(hole > 0, 128 / 127.5 - 1, image))
    assert relative_error(drawn["masked_latents"].cpu(), expected) < 1e-5
    side = tiny.IMAGE_SIZE // autoencoder.factor
    assert drawn["mask"].shape == (2, 1, side, side)
    assert "generates the whole image. To" in page
    assert drawn["mask"].mean().item() == pytest.approx(hole.mean().item())


REFUSED = {
    "one number of them; train with network.head_channels": (unet(num_heads=2, attention_factors=(1, 2)), {}, {}),
    "have 8 and 16 channels": (unet(num_heads=1, num_decoder_heads=2, attention_factors=(2,)), {}, {}),
    "norms have 4 and 8 groups": (unet(norm_groups=8, norm_group_channels=2), {}, {}),
    "sums are scaled by 0.7071": (unet(variant="ddpm++", norm_groups=2), {}, {}),
    "Fourier's": (unet(variant="ncsn++", norm_groups=2), {}, {}),
    "added to the time features": (unet(label_joins="features"), CLASSES, {}),
    "without a convolution": (unet(resample="plain"), {}, {}),
    "convolutions on the skip": (unet(resample="block", resample_skip_conv=True), {}, {}),
    "have filters": (unet(resample="block", resample_filter="binomial"), {}, {}),
    "only the last blocks": (unet(decoder_attention="last"), {}, {}),
    "enters on every level": (unet(input_on_every_level=True), {}, {}),
    "first level has 16 channels": (unet(multipliers=(2, 2)), {}, {}),
    "first convolution 16": (unet(stem_channels=16), {}, {}),
    "its time_scale is 0.5": (unet(time_scale=0.5), {}, {}),
    "named conditions": (unet(), {"columns": [{"name": "age", "kind": "number"}]}, {}),
    "conditioned on semantic maps": (unet(), {"map_class_names": ["sky"], "map_palette": [(0, 0, 0)]}, {}),
    "a learned vector in place of labels": (unet(), {"constant_embedding": True}, {}),
    "conditioned on paired images": (
        unet(),
        {"input_channels": 4},
        {"inputs": InputRules(form="latents"), "input_format": PixelFormat()},
    ),
    "its path is cosine": (unet(), {}, {"path": CosinePath()}),
    "predicts noise": (unet(), {}, {"prediction": NoisePrediction(), "path": CosinePath()}),
    "predicts edm": (unet(), {}, {"prediction": DenoiserPrediction(), "path": LinearPath(sigma_min=0)}),
    "for times from 0 to 1000": (dit(time_scale=1000.0), {}, {}),
    "position is 'rope'": (dit(variant="modern"), {}, {}),
    "mlp is 'swiglu'": (dit(mlp="swiglu"), {}, {}),
    "norm is 'rmsnorm'": (dit(norm="rmsnorm"), {}, {}),
    "qk_norm is True": (dit(qk_norm=True), {}, {}),
    "value_residual is True": (dit(value_residual=True), {}, {}),
    "mlp_ratio is 2": (dit(mlp_ratio=2.0), {}, {}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_the_same_function_is_refused(kl, tmp_path, reason):
    network, conditions, given = REFUSED[reason]
    with pytest.raises(ArtifactError, match=re.escape(reason)) as refusal:
        export_diffusers(model(kl, network, conditions, **given), tmp_path / "out")
    assert "cannot be exported to diffusers" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["embedding.label.weight", "decoder.1.blocks.1.skip.weight", "stem.bias"])
def test_a_difference_is_found_and_nothing_is_written(kl, tmp_path, monkeypatch, key):
    """One weight is changed on its way."""
    given = model(kl, *NETWORKS["unet with classes"])
    made = diffusers_network(given.config)
    original = type(made.keys).theirs

    def changed(self, ours):
        tensor = ours[key].clone()
        tensor[-1] += 0.1
        return original(self, {**ours, key: tensor})

    monkeypatch.setattr(type(made.keys), "theirs", changed)
    with pytest.raises(ArtifactError, match=r"differs from this model by \d\.\de-\d\d of the largest velocity"):
        export_diffusers(given, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_an_untrained_model_is_exported(kl, tmp_path):
    """Its velocity is zero everywhere, and nothing is divided by zero."""
    given = model(kl, *NETWORKS["unet"])
    given.network.reset_parameters()
    assert export_diffusers(given, tmp_path / "out").error == 0


def test_the_command(kl, tmp_path, capsys, monkeypatch):
    given = model(kl, *NETWORKS["unet with classes"])
    given.save_pretrained(tmp_path / "model")
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    done = run_here(["export", tmp_path / "model", "--out", tmp_path / "out", "--json"], capsys, monkeypatch)
    assert done.code == 0, done.err
    rows = json.loads(done.out)
    assert rows["unet"] == "UNet2DModel"
    assert 0 < rows.pop("largest relative error") <= LIMIT
    assert rows == {
        "folder": str(tmp_path / "out"),
        "unet": "UNet2DModel",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "vae": "AutoencoderKL",
    }
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"unet", "scheduler", "vae", "model.json", "README.md"}
    assert str(tmp_path) not in "".join(p.read_text(encoding="utf-8") for p in (tmp_path / "out").glob("**/*.json"))
    assert "\n0 apple, 1 berry, 2 cherry\n" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")

    before = tiny.tree(tmp_path)
    again = run_here(["export", tmp_path / "model", "--out", tmp_path / "out"], capsys, monkeypatch)
    assert again.code == 2
    assert "is not empty" in again.error
    missing = run_here(["export", tmp_path / "nothing", "--out", tmp_path / "new"], capsys, monkeypatch)
    assert missing.code == 2
    assert "does not exist" in missing.error
    assert tiny.tree(tmp_path) == before

    table = run_here(
        ["export", tmp_path / "model", "--out", tmp_path / "new", "--format", "diffusers"], capsys, monkeypatch
    )
    assert re.search(r"exact to \de-\d\d", table.out)


def test_an_unsupported_model_costs_one_line(kl, tmp_path, capsys, monkeypatch):
    model(kl, dit(time_scale=1000.0), CLASSES).save_pretrained(tmp_path / "model")
    before = tiny.tree(tmp_path)
    done = run_here(["export", tmp_path / "model", "--out", tmp_path / "deep" / "out"], capsys, monkeypatch)
    assert done.code == 2
    assert "DiTTransformer2DModel has other time frequencies" in done.error
    assert tiny.tree(tmp_path) == before
