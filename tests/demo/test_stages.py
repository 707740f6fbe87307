"""The demo, much reduced: every stage runs, the page shows what was measured, and a repeated call redoes nothing."""

from __future__ import annotations

import json
import math
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.commands.train import TrainResult
from latentflow.data.sources.synthetic import CLASS_NAMES, SyntheticShapes
from latentflow.demo import building
from latentflow.demo.building import Interrupted
from latentflow.demo.classes import steps_within
from latentflow.demo.figures import DemoScale, Recognised
from latentflow.demo.judging import judge, mean_iou
from latentflow.demo.page import key_figures
from latentflow.demo.recognition import recognise
from latentflow.demo.stages import STAGES, demo
from latentflow.demo.workshop import HELD_OUT_SEED
from latentflow.errors import ArtifactError, ConfigError
from latentflow.flow.path import LinearPath
from latentflow.flow.solvers import SOLVERS, integrate, is_adaptive
from latentflow.flow.times import sampling_times
from latentflow.studio.page_models import PageModels
from latentflow.training.interruption import Outcome
from latentflow.training.log import read_metrics
from tests import tiny
from tests.processes import run_here

NUM_IMAGES, STEPS, BATCH = 30, 4, 6
SCALE = DemoScale(
    num_judged=25,
    guidance_scales=(0.0, 1.0, 3.0),
    num_per_scale=13,
    num_painted=8,
    painting_scales=(1.0, 2.0),
    num_draws=12,
    num_solved=2,
    budgets=(4, 8),
    tolerances=(0.1,),
    reference_steps=5,
)


def overrides(autoencoder) -> list[str]:
    return [
        f"data.path=synthetic:{NUM_IMAGES}",
        "data.image_size=32",
        f"autoencoder={autoencoder}",
        "network={depth: 1, hidden_size: 16, num_heads: 2, patch_size: 4}",
        "optimizer={learning_rate: 0.001}",
        f"training={{steps: {STEPS}, batch_size: {BATCH}, log_every: 2, preview_every: 0}}",
        "sampling={solver: heun, steps: 2, guidance: 2.0}",
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory, kl_folder):
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, demo(out, scale=SCALE, overrides=overrides(kl_folder))


class _Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.headings, self.links, self.tags, self.text, self._open = [], [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._open.append(tag)
        self.links += [value for name, value in attributes if name in ("href", "src", "data", "srcset", "action")]

    def handle_endtag(self, tag):
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data):
        self.text += data if "style" not in self._open else ""
        if "h2" in self._open:
            self.headings.append(data)

    @property
    def words(self) -> str:
        """The text, with single spaces between words."""
        return " ".join(self.text.split())


@pytest.fixture(scope="module")
def page(made) -> _Page:
    return _Page((made[0] / "report.html").read_text(encoding="utf-8"))


def test_page_holds_every_section(page):
    assert page.headings == [
        "Summary",
        "The autoencoder",
        "Training",
        "Samples of every class",
        "Guidance",
        "From semantic maps to images",
        "Inpainting",
        "What each condition contributes",
        "Solvers",
        "Are the samples what was asked for?",
        "Next steps",
    ]
    assert page.tags.count("img") == 5  # reconstructions, classes, guidance, maps, holes
    for name in (*CLASS_NAMES, *SOLVERS):
        assert name in page.text


def test_page_needs_nothing_from_elsewhere(made, page):
    html = (made[0] / "report.html").read_text(encoding="utf-8")
    assert "http://" not in html and "https://" not in html
    assert len(page.links) == 5 and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert "url(" not in html and "@import" not in html


def test_recognition_is_that_of_the_saved_samples(made, page):
    out, figures = made
    files = sorted((out / "samples" / "images").glob("*.png"), key=lambda file: file.name[-12:])
    assert len(files) == SCALE.num_judged
    right = []
    for number, file in enumerate(files):
        wanted = CLASS_NAMES[number % 12]
        with Image.open(file) as image:
            assert json.loads(image.info["latentflow"])["class_name"] == wanted
            found = recognise(np.asarray(image))
        right.append(found is not None and found.class_name == wanted)
    recognised = figures.sampling.recognised
    assert recognised.both == pytest.approx(sum(right) / len(right))
    assert recognised.wrong == [number for number, ok in enumerate(right) if not ok]
    assert key_figures(figures)["samples with the right shape and colour"] == f"{100 * recognised.both:g} % of 25"


def test_autoencoder_is_measured_on_images_of_another_seed(made, page):
    figures = made[1].first_stage
    assert figures.real.both == 1.0 and figures.real.num_images == SCALE.num_judged
    assert f"{figures.psnr:.1f} dB" in page.text and f"{figures.worst_psnr:.1f} dB" in page.text
    with Image.open(made[0] / "samples" / "reconstructions.png") as image:
        cells = np.asarray(image, dtype=np.float64)
    for column, shown in enumerate(figures.shown_psnr):
        original, decoded = (cells[y : y + 32, column * 34 : column * 34 + 32] for y in (0, 34))
        assert shown == pytest.approx(10 * math.log10(255**2 / np.square(original - decoded).mean()))
    source = SyntheticShapes(12, 32, HELD_OUT_SEED)
    first = next(item for item in source if item.label == 0)
    assert np.array_equal(cells[:32, :32], first.pixels)


def test_training_figures_are_those_of_the_run(made, page):
    out, figures = made
    curve, training = read_metrics(out / "run"), figures.training
    assert training.curve == curve and len(curve) == 2
    assert training.images_seen == STEPS * BATCH
    assert training.seconds == pytest.approx(sum(2 * BATCH / line["images_per_second"] for line in curve))
    assert f"from {curve[0]['loss']:.3f} to {curve[-1]['loss']:.3f}" in page.words
    assert figures.encoding.num_images == NUM_IMAGES and figures.encoding.latent_shape == (4, 16, 16)


def test_guidance_counts_its_calls(made, page):
    runs = made[1].guidance.runs
    assert [(run.scale, run.evaluations) for run in runs] == [(0.0, 4), (1.0, 4), (3.0, 8)]
    assert made[1].sampling.evaluations == 8
    assert all(run.recognised.num_images == SCALE.num_per_scale for run in runs)


def test_maps_are_recovered_from_the_pictures(made, page):
    out, figures = made
    maps = figures.maps
    source = list(SyntheticShapes(SCALE.num_painted, 32, HELD_OUT_SEED))
    assert maps.num_images == 8 and [(run.scale, run.evaluations) for run in maps.runs] == [(1.0, 4), (2.0, 8)]
    real = torch.from_numpy(np.stack([item.pixels for item in source])).permute(0, 3, 1, 2)
    wanted = [item.semantic_map for item in source]
    assert maps.real_iou == mean_iou(wanted, real) > 0.9
    with Image.open(out / "samples" / "maps.png") as image:
        cells = np.asarray(image)
    for column, item in enumerate(source):  # below the map and two guidance scales, the real image
        assert np.array_equal(cells[3 * 34 : 3 * 34 + 32, column * 34 : column * 34 + 32], item.pixels)
    assert f"{maps.real_iou:.3f}" in page.text


def test_iou_is_the_mean_over_maps_of_the_mean_over_their_classes():
    """A picture of nothing: the ground is found everywhere, the shape nowhere."""
    wanted = SyntheticShapes(1, 32, 1)[0].semantic_map
    nothing = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    assert mean_iou([wanted], nothing) == pytest.approx((wanted == 0).mean() / 2)


def test_holes_are_filled_and_nothing_else_is_touched(made, page):
    out, figures = made
    runs = figures.holes.runs
    names = ["told the known part, guidance 1", "told the known part, guidance 2", "replaced along the path"]
    assert [run.name for run in runs] == [*names, "told nothing", "mean colour of the known part"]
    assert all(run.known_changed == 0 and run.rmse > 0 for run in runs)
    assert [run.evaluations for run in runs] == [4, 8, 4, 4, 0]
    with Image.open(out / "samples" / "holes.png") as image:
        cells = np.asarray(image, dtype=np.int64)
    real, hidden = cells[:32], cells[34:66]
    inside = (hidden == 128).all(-1)
    for row in range(2, 6):
        filled = cells[row * 34 : row * 34 + 32]
        assert np.array_equal(filled[~inside], real[~inside])
    assert f"changed outside the holes, over all of these: {sum(run.known_changed for run in runs)}." in page.words
    for name in ("conditioned on the known part, guidance 1", "known part imposed along the path", "unconditional"):
        assert name in page.words


def test_each_condition_is_told_alone(made, page):
    runs = made[1].losses.runs
    everything = ["label", "inpainting", "semantic_map"]
    assert [run.told for run in runs] == [[], *([name] for name in everything), everything]
    assert all(run.loss > 0 and f"{run.loss:.4f}" in page.text for run in runs)


def test_solvers_are_held_against_the_reference(made, page):
    solvers = made[1].solvers
    assert solvers.reference_evaluations == 5 * 4 * 2
    assert {run.solver for run in solvers.runs} == set(SOLVERS)
    for run in solvers.runs:
        assert 0 < run.distance < 10
        assert f"{run.distance:.2g}" in page.text
        if run.steps is not None:
            assert run.evaluations in (2 * 4, 2 * 8)  # the whole budget, guided
    assert sum(run.tolerance is not None for run in solvers.runs) == 2


@pytest.mark.parametrize("solver", [name for name in SOLVERS if not is_adaptive(name)])
@pytest.mark.parametrize("budget", [4, 8, 24])
def test_steps_within_a_budget(solver, budget):
    solution = integrate(
        lambda x, t: x,
        torch.ones(1, 1, 1, 1),
        sampling_times(steps_within(solver, budget)),
        solver=solver,
        path=LinearPath(),
    )
    assert solution.evaluations.tolist() == [budget]


def test_report_json_is_what_was_returned(made):
    out, figures = made
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == json.loads(figures.model_dump_json())


def test_a_repeated_call_redoes_nothing(made, kl_folder):
    out, figures = made
    lines = []
    before = (out / "report.html").read_bytes()
    assert demo(out, scale=SCALE, overrides=overrides(kl_folder), say=lines.append) == figures
    assert lines == [f"{n}/{len(STAGES)} {stage.title}: done before" for n, stage in enumerate(STAGES, start=1)]
    assert (out / "report.html").read_bytes() == before


def test_a_lost_stage_is_done_again_with_all_that_follow(made, tmp_path, kl_folder):
    out = shutil.copytree(made[0], tmp_path / "copy")
    (out / "samples" / "guidance.png").unlink()
    lines = []
    again = demo(out, scale=SCALE, overrides=overrides(kl_folder), say=lines.append)
    assert [text.endswith("done before") for text in lines] == [True] * 4 + [False] * 5
    assert again.guidance.runs == made[1].guidance.runs and again.solvers.runs == made[1].solvers.runs


def test_other_settings_are_refused(made, kl_folder):
    out = made[0]
    with pytest.raises(ConfigError, match=r'times\.distribution: "logit_normal", now "uniform".*choose another --out'):
        demo(out, scale=SCALE, overrides=[*overrides(kl_folder), "times.distribution=uniform"])
    with pytest.raises(ConfigError, match=r"scale\.num_judged: 25, now 26"):
        demo(out, scale=SCALE.model_copy(update={"num_judged": 26}), overrides=overrides(kl_folder))


def test_another_file_of_that_name_is_refused(tmp_path, kl_folder):
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ArtifactError, match="not the record of a demo"):
        demo(tmp_path, scale=SCALE, overrides=overrides(kl_folder))


def test_interrupted_training_leaves_no_figures(tmp_path, kl_folder, monkeypatch):
    stopped = TrainResult(tmp_path, Outcome(1, finished=False, signal=15), [], None)
    monkeypatch.setattr(building, "train", lambda recipe, runtime: stopped)
    with pytest.raises(Interrupted, match="step 1, saved; repeat the command") as caught:
        demo(tmp_path, scale=SCALE, overrides=overrides(kl_folder))
    assert caught.value.signal == 15
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["first_stage"] and report["training"] is None
    assert not (tmp_path / "report.html").exists()


def test_judging_tells_shape_from_colour():
    source = SyntheticShapes(12, 64)
    pixels = torch.from_numpy(np.stack([item.pixels for item in source])).permute(0, 3, 1, 2)
    labels = [item.label for item in source]
    assert judge(pixels, labels).both == 1
    other_colour = [label // 3 * 3 + (label + 1) % 3 for label in labels]
    found = judge(pixels, other_colour)
    assert (found.both, found.shape, found.colour, found.nothing) == (0, 1, 0, 0)
    assert found.wrong == list(range(12)) and found.by_class == dict.fromkeys(CLASS_NAMES, 0.0)
    assert judge(torch.zeros_like(pixels), labels).nothing == 1


def test_interval_of_a_share():
    def interval(right, num_images):
        share = right / num_images
        blank = {"shape": 0, "colour": 0, "nothing": 0, "by_class": {}, "wrong": []}
        return Recognised(num_images=num_images, both=share, **blank).interval

    for right, num_images in ((180, 200), (3, 24), (0, 12)):  # both ends solve (p - share)^2 = z^2 p (1 - p) / n
        for p in interval(right, num_images):
            assert (p - right / num_images) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / num_images)
    assert interval(200, 200)[1] == 1.0


def test_the_command_ends_with_what_to_look_at(made, capsys, monkeypatch):
    """The last line names a run that the page can open."""
    out, figures = made
    monkeypatch.setattr("latentflow.demo.stages.demo", lambda *given, **options: figures)
    done = run_here(["demo", "--out", str(out)], capsys, monkeypatch)
    assert done.code == 0
    assert done.err.splitlines()[-1] == f"look at it: latentflow studio {out / 'run'}"
    assert [one.key for one in PageModels([str(out / "run")], tiny.CPU).choices()][:1] == [str(out / "run")]
