"""`latentflow bound`: against Gaussian latents of a linear autoencoder, on tiny models, and its refusals."""

from __future__ import annotations

import io
import json
import math
import re
from contextlib import redirect_stdout
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from latentflow.analysis.bound import VARIANTS, empirical_velocity, gaussian_w2
from latentflow.api import LatentFlow
from latentflow.autoencoder import Autoencoder
from latentflow.commands import bound as module
from latentflow.errors import ConfigError, DataError, NonFiniteError
from latentflow.evaluation.encoded_images import encode_reference, open_images_for, velocity_given
from latentflow.evaluation.measured_bound import data_velocity, differentiable_decoder, measure_bound
from latentflow.evaluation.request import BoundRequest
from latentflow.flow.path import LinearPath
from latentflow.flow.solvers import integrate
from latentflow.flow.times import sampling_times
from latentflow.model.conditioning import NOTHING
from latentflow.pages.bound import bound_page, dominant_term, looseness, parts
from latentflow.pages.numbers import number
from latentflow.shapes import Condition
from latentflow.sizes import Size
from tests import tiny
from tests.processes import run_here

SMALL = {"num": 6, "num_data": 18, "points": 4, "bins": 2, "batch_size": 3}


def run_bound(model, data, out=None, **given):
    return module.bound(BoundRequest(model=model, data=data, out=out, **{**SMALL, **given}), tiny.CPU)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, kl) -> Path:
    folder = tmp_path_factory.mktemp("models") / "fruit"
    tiny.model(kl).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory, model_folder, images):
    """A bound of the tiny model, and the folder it was written to."""
    folder = tmp_path_factory.mktemp("out") / "bound"
    return run_bound(model_folder, images, folder), folder


# ---- where everything is known


class LinearAutoencoder(nn.Module):
    """Images of 2 x 2 pixels to latents [B, D, 1, 1]: z = A^T x / scale^2, and back, x = A z, with A^T A = scale^2."""

    scale, dimensions = 0.5, 3

    def __init__(self):
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(5)))[0]
        self.weight = nn.Parameter(self.scale * rotation[:, : self.dimensions])
        self.config = {}

    def encode(self, x, return_dict):
        grids = nn.functional.pixel_unshuffle(x, 2)
        return (torch.einsum("bchw,cd->bdhw", grids, self.weight) / self.scale**2,)

    def decode(self, z, return_dict):
        return (nn.functional.pixel_shuffle(torch.einsum("bdhw,cd->bchw", z, self.weight), 2),)


class KnownVelocity(nn.Module):
    """The velocity of latents N(mean, diag(std^2)), wrong by `shift`: a function of x, time and nothing else."""

    def __init__(self, mean, std, shift):
        super().__init__()
        self.mean, self.std, self.shift = (nn.Parameter(x.float()) for x in (mean, std, shift))
        self.path = LinearPath()

    def forward(self, x, time, condition):
        alpha, sigma = self.path.alpha(time)[:, None], self.path.sigma(time)[:, None]
        d_alpha, d_sigma = self.path.d_alpha(time)[:, None], self.path.d_sigma(time)[:, None]
        slopes = (alpha * d_alpha * self.std**2 + sigma * d_sigma) / (alpha**2 * self.std**2 + sigma**2)
        along = x.flatten(1) - alpha * self.mean
        return (d_alpha * self.mean + slopes * along + self.shift).reshape(x.shape)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A model of known velocity on images whose latents are nearly Gaussian, and those images."""
    folder = tmp_path_factory.mktemp("gaussian")
    generator = np.random.default_rng(0)
    for number_, pixels in enumerate(generator.normal(127.5, 30, (700, 2, 2, 3)).clip(0, 255).round()):
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number_}.png")
    autoencoder = Autoencoder(LinearAutoencoder(), "linear")
    config = tiny.model(Autoencoder(tiny.kl(), "kl"), class_names=()).config
    record = config.autoencoder.model_copy(update={"num_channels": 3, "factor": 2})
    config = config.model_copy(
        update={"image_size": Size.of(2), "autoencoder": record, "normalisation": autoencoder.normalisation}
    )
    images = torch.from_numpy(
        np.stack([np.asarray(Image.open(folder / f"{n}.png")) for n in range(700)]).astype(np.float32)
    )
    latents = autoencoder.encode(images.permute(0, 3, 1, 2) / 127.5 - 1).flatten(1).double()
    shift = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    network = KnownVelocity(latents.mean(0), latents.std(0), shift).eval().requires_grad_(False)
    return LatentFlow(config, network, autoencoder), folder, latents, shift


@pytest.fixture(scope="module")
def known_bound(known):
    flow, folder, *_ = known
    reference, reconstruction = encode_reference(
        flow, open_images_for(flow, folder), 700, least=2, batch_size=64, seed=0, num_decoded=700
    )
    request = BoundRequest(model="known", data=str(folder), num=256, points=32, bins=4, batch_size=64)
    return measure_bound(flow, reference, reconstruction, request)


def test_terms_are_those_of_the_linear_autoencoder_and_the_gaussian(known, known_bound):
    flow, folder, latents, shift = known
    bound = known_bound.bound
    assert known_bound.told == "nothing" and known_bound.num_data == 700
    assert bound.decoder.tolist() == pytest.approx([0.5] * 32, rel=1e-5)
    pixels = np.stack([np.asarray(Image.open(folder / f"{n}.png")) for n in range(700)])
    flat = nn.functional.pixel_unshuffle(torch.from_numpy(pixels / 127.5 - 1).permute(0, 3, 1, 2), 2).flatten(1)
    weight = flow.autoencoder.model.weight.double()
    lost = flat - flat @ weight @ weight.T / 0.25
    # the decoder clamps to [-1, 1], which nearly nothing here reaches
    assert bound.reconstruction.distance.value == pytest.approx(float(lost.square().sum(1).mean().sqrt()), rel=1e-3)
    std = latents.std(0)
    for number_, time in enumerate((0.125, 0.375, 0.625, 0.875)):
        inside = torch.linspace(time - 0.125, time + 0.125, 200, dtype=torch.float64)[:, None]
        slopes = (-(1 - inside) * std**2 + inside) / ((1 - inside) ** 2 * std**2 + inside**2)
        assert float(bound.growth.two_sided.highest[number_]) <= float(slopes.abs().max()) * 1.01
        assert float(bound.growth.two_sided.highest[number_]) >= float(slopes.abs().max()) * 0.85
        assert float(bound.growth.one_sided.highest[number_]) <= float((-slopes).max()) + 0.02
    # the loss is the squared shift and the conditional variance; the error against so many latents is near the shift's
    t = (torch.arange(400, dtype=torch.float64) + 0.5)[:, None] / 400
    variance = float((std**2 / ((1 - t) ** 2 * std**2 + t**2)).sum(1).mean())
    squared = float(shift.square().sum())
    spread = bound.loss.integral_standard_error()
    assert bound.loss.integral() == pytest.approx(squared + variance, abs=4 * spread)
    assert squared - 0.05 < bound.error.integral() < bound.loss.integral()


def test_the_bound_holds_and_the_coupling_is_below_it(known, known_bound):
    """The images' true distance to the model's, both Gaussian but for rounding, is below every total."""
    flow, _, latents, _ = known
    corners = torch.cat([torch.zeros(1, 3), torch.eye(3)]).double()[:, :, None, None]
    ends = integrate(velocity_given(flow, NOTHING, 4), corners, sampling_times(400), solver="rk4").x.flatten(1)
    columns = (ends[1:] - ends[0]).T
    exact = gaussian_w2(latents.mean(0), latents.T.cov(), ends[0], columns @ columns.T)
    bound = known_bound.bound
    for variant in VARIANTS:
        assert bound.flow_distance(variant, "velocity").value > exact
    assert exact <= known_bound.coupling.value + 4 * known_bound.coupling.standard_error
    assert known_bound.coupling.value < bound.flow_distance("one_sided", "velocity").value * 1.05
    total = sum(parts(known_bound, "one_sided", "velocity").values())
    assert total == pytest.approx(bound.total("one_sided", "velocity").value)


# ---- pieces


def test_the_decoder_is_the_models_but_for_the_clamp(kl):
    flow = tiny.model(kl)
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = differentiable_decoder(flow)(latents.requires_grad_())
    assert found.requires_grad
    torch.testing.assert_close(found.detach().clamp(-1, 1), flow.decode(latents.detach()))


def test_data_velocity_looks_at_latents_of_the_same_label(kl, images):
    flow = tiny.model(kl)
    reference, _ = encode_reference(flow, open_images_for(flow, images), 18, least=2, batch_size=4, seed=0)
    assert sorted(reference.indices) == list(range(18)) and reference.told == "the label of each image"
    x, time = torch.randn(4, 4, 8, 8), torch.tensor([0.3, 0.5, 0.7, 0.9])
    labels = torch.tensor([2, 0, 2, 1])
    found = data_velocity(flow, reference, Condition(labels=labels))(x, time)
    for row, label in enumerate(labels):
        alike = reference.latents[reference.given.labels == label]
        assert len(alike) == 6
        expected = empirical_velocity(flow.config.path, alike, x[row : row + 1], time[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], expected)


def test_numbers_as_people_write_them():
    written = [number(x) for x in (0.0, 3.14159, 1234.5, 1e6, 1e-4, math.inf, math.nan, None, -0.05)]
    assert written == ["0", "3.14", "1,234", "1.0e+06", "1.0e-04", "beyond 1e308", "", "", "-0.05"]


# ---- the command


def test_files_and_page(measured):
    result, folder = measured
    assert {file.name for file in folder.iterdir()} == {
        *("page.html", "bound.json", "two_sided.svg", "one_sided.svg", "error.svg")
    }
    record = json.loads((folder / "bound.json").read_text())
    assert BoundRequest(**record["request"]) == result.request
    assert [term["value"] for term in record["terms"]] == [term.value for term in result.bound.terms()]
    assert [(one["variant"], one["error"]) for one in record["totals"]] == [
        (variant, error) for error in ("loss", "velocity") for variant in VARIANTS
    ]
    assert len(record["by_time"]["two_sided"]["highest"]) == 2
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert page == bound_page(result)
    words = " ".join(unescape(page).split())
    assert not re.search(r"""(src|href)=["'](?!data:)|https?://(?!www\.w3\.org)|<script|@import|url\(""", page)
    assert page.count('<svg class="wide"') == page.count('<svg class="narrow"') == 3
    for said in (dominant_term(result), looseness(result), "the label of each image", "18 images (of the same label)"):
        assert said in words, said
    for name in ("two_sided", "one_sided", "error"):
        assert (folder / f"{name}.svg").read_text().startswith("<svg xmlns=")


def test_same_seed_same_bound_in_any_batch(measured, model_folder, images):
    result, _ = measured
    again = run_bound(model_folder, images, batch_size=64)
    for one, other in zip(result.bound.terms(), again.bound.terms(), strict=True):
        assert one.value == pytest.approx(other.value, rel=2e-3), one.name


def test_screen(model_folder, images, capsys, monkeypatch):
    options = [word for key, value in SMALL.items() for word in (f"--{key.replace('_', '-')}", value)]
    done = run_here(["bound", model_folder, "--data", images, *options, "--device", "cpu"], capsys, monkeypatch)
    assert done.code == 0
    for said in ("Lip(decoder)", "lower estimate", "bound: one_sided, velocity error", "distance of the flows"):
        assert said in done.out, done.out
    assert done.err.startswith("The dominant term is ")
    bad = run_here(["bound", model_folder, "--data", images, "--num", 100], capsys, monkeypatch)
    assert bad.code == 2
    assert "18 images can be read, and 100 are needed; give more images, or --num 18" in bad.error


def test_images_without_labels_are_unconditional(model_folder, tmp_path):
    flat = tiny.write_images(tmp_path / "flat", classes=(), per_class=6)
    result = run_bound(model_folder, flat, num=4)
    assert result.told == "nothing" and result.num_data == 6


def test_a_broken_image_is_left_out(model_folder, tmp_path):
    flat = tiny.write_images(tmp_path / "flat", classes=(), per_class=6)
    (flat / "2.png").write_bytes(b"no image")
    assert run_bound(model_folder, flat, num=4).num_data == 5


# ---- refusals


def save(flow: LatentFlow, folder: Path) -> Path:
    flow.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num": 1}, "at least 2"),
        ({"points": 1}, "points 1: give at least one for each of the 2 bins"),
        ({"bins": 0}, "bins 0: give a whole number of at least 1"),
        ({"num": 19}, "18 images can be read"),
    ],
)
def test_bad_values(model_folder, images, tmp_path, options, said):
    with pytest.raises((ConfigError, DataError), match=said):
        run_bound(model_folder, images, **options)


def test_a_cache_and_other_classes_and_no_images(model_folder, cache, tmp_path):
    with pytest.raises(ConfigError, match="latent cache, which holds no pixels"):
        run_bound(model_folder, cache)
    others = tiny.write_images(tmp_path / "others", classes=("ant", "bee"), per_class=2)
    with pytest.raises(ConfigError, match="ant"):
        run_bound(model_folder, others)
    with pytest.raises(DataError):
        run_bound(model_folder, tmp_path / "nothing")


def test_what_the_model_cannot_do_without(kl, images, tmp_path):
    spatial = tiny.model(kl, conditioning={**tiny.SPATIAL, "map_dropout": 0.0})
    with pytest.raises(ConfigError, match="this model requires the condition semantic_map"):
        run_bound(save(spatial, tmp_path / "spatial"), images)
    flat = tiny.write_images(tmp_path / "flat", classes=(), per_class=6)
    with pytest.raises(ConfigError, match="has no labels"):
        run_bound(save(tiny.model(kl, label_dropout=0.0), tmp_path / "labels"), flat)
    # nulls that were trained are used
    given = tiny.model(kl, conditioning=tiny.SPATIAL)
    assert run_bound(save(given, tmp_path / "given"), images).told.startswith("the label")


def test_a_model_that_is_not_finite(kl, images, tmp_path):
    """Its weights are finite, or it would not be loaded."""
    broken = tiny.model(kl)
    with torch.no_grad():
        next(broken.network.parameters()).fill_(1e38)
    with pytest.raises(NonFiniteError):
        run_bound(save(broken, tmp_path / "broken"), images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient):
        return gradient * 2


def test_an_operation_without_second_derivative(kl, images, monkeypatch, model_folder):
    decode = type(kl.model).decode

    def once(self, z, return_dict=True):
        return decode(self, _Once.apply(z), return_dict=return_dict)

    monkeypatch.setattr(type(kl.model), "decode", once)
    with pytest.raises(ConfigError, match="the decoder of this model cannot be differentiated twice: "):
        run_bound(model_folder, images)


# ---- the page in docs


def test_the_table_of_the_theory_page_is_what_its_script_prints():
    text = (Path(__file__).parents[2] / "docs" / "theory" / "bound.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    default = torch.get_default_dtype()
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            exec(compile(script, "bound.md", "exec"), SimpleNamespace().__dict__)
    finally:
        torch.set_default_dtype(default)
    lines = printed.getvalue().splitlines()
    table = text[text.index(f"\n{lines[0]}\n") + 1 :].splitlines()[: len(lines)]
    assert lines[:2] == table[:2]
    for line, shown in zip(lines[2:], table[2:], strict=True):
        numbers, others = ([float(x) for x in row.strip("| ").split("|")] for row in (line, shown))
        assert numbers == pytest.approx(others, rel=0.02)  # sums of another machine round differently
        assert numbers[1] <= min(numbers[2:]) * (1 + 1e-3)
