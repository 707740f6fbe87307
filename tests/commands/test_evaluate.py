"""`latentflow evaluate`: every task, the same result however the work is shared, and bad input refused at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo

from latentflow.api import LatentFlow
from latentflow.commands.evaluate import evaluate
from latentflow.commands.sample import sample
from latentflow.data.items import stack_pixels
from latentflow.data.pictures import reading as module
from latentflow.data.sources.images import open_images
from latentflow.data.stores.files import FolderStore, ZipStore
from latentflow.errors import DataError
from latentflow.evaluation.request import EvaluationRequest
from latentflow.evaluation.samples_in_files import open_samples
from latentflow.metrics.evaluation_report import EvaluationReport
from latentflow.metrics.features.extractors import RandomFeatures, open_features
from latentflow.metrics.features.lpips import load_lpips
from latentflow.metrics.pairs import psnr, ssim
from latentflow.metrics.scores import frechet_distance
from latentflow.metrics.statistics import FeatureStatistics
from latentflow.metrics.stored_statistics import load_reference
from latentflow.sampling.request import SampleRequest
from latentflow.sizes import Size
from tests import tiny
from tests.metrics.features.test_lpips import published
from tests.processes import finish, run_here, start, start_processes, wait_until

FAST = ("--features", "random", "--device", "cpu", "--resamples", 0)
NUM = 20
SEGMENTER = """
import torch

def truth(images):  # finds what `write_segmented` has not: the reddest third of brightness
    return (images.float().mean(1) / 86).long().clamp(max=2)

def wrong(images):
    return images.float().mean(1)
"""


@pytest.fixture
def command(capsys, monkeypatch):
    """Run `latentflow evaluate ARGS` in this process."""
    return lambda *args: run_here(("evaluate", *args), capsys, monkeypatch)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, kl) -> Path:
    """A model of three classes."""
    folder = tmp_path_factory.mktemp("models") / "fruit"
    tiny.model(kl).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def painter_folder(tmp_path_factory, kl) -> Path:
    """A model that fills holes and paints maps."""
    folder = tmp_path_factory.mktemp("models") / "painter"
    tiny.model(kl, conditioning=tiny.SPATIAL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pngs(tmp_path_factory, images) -> Path:
    """The pictures of `images` as square PNG files in one folder, with the contact sheet that `sample` writes."""
    folder = tmp_path_factory.mktemp("pngs") / "drawn"
    folder.mkdir()
    source = open_images(images, tiny.IMAGE_SIZE)
    for index in range(len(source)):
        Image.fromarray(source[index].pixels).save(folder / f"{index:02d}.png")
    Image.new("RGB", (64, 32)).save(folder / "grid.png")
    return folder


def pixels_of(images: Path) -> torch.Tensor:
    """All images of a folder: [N, 3, S, S] uint8."""
    source = open_images(images, tiny.IMAGE_SIZE)
    return stack_pixels([source[index].pixels for index in range(len(source))])


def found(result) -> dict:
    """What a command printed as JSON."""
    assert result.code == 0, result.err
    return json.loads(result.out)


def same(report: dict, other: dict, *, rtol: float = 0.0) -> None:
    """Scores and protocols agree, but for what the work cost."""
    for one in (report, other):
        one["protocol"] = {**one["protocol"], "seconds": {}}
    values, others = ({name: score["value"] for name, score in one["scores"].items()} for one in (report, other))
    assert values == pytest.approx(others, rel=rtol)
    assert report["protocol"] == other["protocol"]


def test_report_of_a_model(command, tmp_path, model_folder, images):
    options = ("--num", NUM, "--seed", 3, "--guidance", 1.5, "--out", tmp_path / "a.json", "--json")
    report = found(command(model_folder, "--data", images, *FAST[:4], *options))
    protocol, scores = report["protocol"], report["scores"]
    assert list(scores) == ["fd", "precision", "recall"]
    assert scores["fd"]["label"] == "FD (random features), a relative measure"
    assert scores["fd"]["low"] < scores["fd"]["value"] < scores["fd"]["high"]
    assert (protocol["num_images"], protocol["first_seed"], protocol["image_size"]) == (NUM, 3, tiny.IMAGE_SIZE)
    assert (protocol["label_policy"], protocol["label_counts"]) == ("balanced", [7, 7, 6])
    assert protocol["evaluations"] == {"mean": 4.0, "min": 4, "max": 4}  # two Euler steps, each guided
    assert (protocol["sampling"]["guidance"], protocol["sampling"]["solver"]) == (1.5, "euler")
    assert protocol["reference"]["num_images"] == tiny.NUM_IMAGES
    assert protocol["reference"]["resize"] == "adm-center, srgb"
    assert protocol["reference"]["fingerprint"] == open_images(images, tiny.IMAGE_SIZE).fingerprint()
    assert protocol["features"]["hash"] == RandomFeatures().hash
    assert set(protocol["seconds"]) == {"reference", "drawing", "features", "scoring"}
    assert EvaluationReport.load(tmp_path / "a.json").model_dump(mode="json") == report
    request = EvaluationRequest(**report["request"])
    assert (request.num, request.seed, request.preset()) == (NUM, 3, {"guidance": 1.5})
    assert not list(tmp_path.rglob("*.png"))
    table = command(model_folder, "--data", images, *FAST, *options[:-1])
    assert "precision" in table.out
    assert "singular" in table.err


def test_value_is_the_distance_to_the_reference(model_folder, images):
    given = {"metrics": ["fd"], "num": 9, "features": "latents", "resamples": 0}
    request = EvaluationRequest(model=model_folder, data=images, **given)
    score = evaluate(request, tiny.CPU).report.scores["fd"].value
    model = LatentFlow.from_pretrained(model_folder, runtime=tiny.CPU)
    extract = open_features("latents", autoencoder=model.autoencoder, image_size=tiny.IMAGE_SIZE)
    real = torch.from_numpy(np.stack([item.pixels for item in open_images(images, tiny.IMAGE_SIZE)])).permute(
        0, 3, 1, 2
    )
    both = (extract(model.sample(num=9).pixels), extract(real))
    assert score == pytest.approx(frechet_distance(*map(FeatureStatistics.of, both)), rel=1e-3)


def test_processes_batches_and_kills_change_nothing(command, tmp_path, model_folder, images):
    args = (model_folder, "--data", images, "--num", 520, "--metrics", "fid,kid", *FAST, "--features", "latents")
    whole = found(command(*args, "--json"))
    same(whole, found(command(*args, "--batch-size", 7, "--json")), rtol=1e-3)

    log = tmp_path / "log"
    processes = start_processes(("evaluate", *args, "--out", tmp_path / "shared"), log, 2)
    codes = [finish(one, log.with_name(f"log.{rank}")) for rank, one in enumerate(processes)]
    assert codes == [0, 0], [log.with_name(f"log.{rank}").read_text() for rank in range(2)]
    same(whole, json.loads((tmp_path / "shared" / "report.json").read_text()))

    killed = tmp_path / "killed"
    process = start(("evaluate", *args, "--out", killed), log)
    wait_until(lambda: any(killed.glob("report.features/shard-*")), process)
    process.kill()
    process.join()
    assert not (killed / "report.json").exists(), "the kill came too late"
    shard = next(killed.glob("report.features/shard-*"))
    written = shard.stat().st_mtime_ns
    same(whole, found(command(*args, "--out", killed, "--json")))
    assert shard.stat().st_mtime_ns == written


def test_processes_that_read_change_nothing(command, tmp_path, images, pngs):
    shutil.copytree(images, tmp_path / "real")
    (tmp_path / "real" / "apple" / "0.png").write_bytes(b"no image")
    args = (pngs, "--data", tmp_path / "real", *FAST, "--batch-size", 4, "--json")
    same(found(command(*args)), found(command(*args, "--num-workers", 2)))


def test_three_processes_that_keep_nothing_find_what_one_finds(command, tmp_path, model_folder, images):
    """Nine images are one shard: two of the processes have nothing to do, and say so."""
    args = (model_folder, "--data", images, "--num", 9, *FAST, "--labels", "data", "--json")
    log = tmp_path / "log"
    processes = start_processes(("evaluate", *args), log, 3)
    logs = [log.with_name(f"log.{rank}") for rank in range(3)]
    assert [finish(*one) for one in zip(processes, logs, strict=True)] == [0, 0, 0], [one.read_text() for one in logs]
    same(found(command(*args)), json.loads(next(x for x in logs[0].read_text().splitlines() if x.startswith("{"))))
    assert all("this process is done" in one.read_text() for one in logs[1:])


def test_a_process_that_dies_ends_the_other_and_a_single_one_goes_on(command, tmp_path, model_folder, images):
    args = (model_folder, "--data", images, "--num", 520, "--metrics", "fid", *FAST)
    log, out = tmp_path / "log", tmp_path / "shared"
    first, second = start_processes(("evaluate", *args, "--out", out), log, 2)
    wait_until(lambda: (out / "report.features" / "plan.json").exists(), second)
    second.kill()
    second.join()
    assert finish(first, log.with_name("log.0")) == 2
    assert "another process of this launch ended" in log.with_name("log.0").read_text()
    kept = [file.name for file in (out / "report.features").glob("shard-*")]
    assert "shard-00001.safetensors" not in kept, "the kill came too late"
    same(found(command(*args, "--json")), found(command(*args, "--out", out, "--json")))


def test_reference_is_kept_and_used_again(command, tmp_path, model_folder, images):
    file = tmp_path / "real.safetensors"
    args = (model_folder, "--num", 9, *FAST, "--json")
    first = found(command(*args, "--data", images, "--reference-out", file))
    kept = tiny.tree(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    same(first, found(command(*args, "--data", images, "--reference-out", file)))
    assert tiny.tree(tmp_path) == kept
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == times
    assert load_reference(file).provenance.fingerprint == first["protocol"]["reference"]["fingerprint"]

    stored = found(command(*args, "--data", file, "--metrics", "fid,precision,recall"))
    same(first, stored)
    shutil.rmtree(tmp_path / "real.features")
    assert list(found(command(*args, "--data", file))["scores"]) == ["fd"]
    refused = command(*args, "--data", file, "--metrics", "fid,recall")
    assert (refused.code, "only statistics" in refused.error, "recall" in refused.error) == (2, True, True)

    other = command(*args, "--data", "synthetic:9", "--reference-out", file)
    assert (other.code, "reference for something else" in other.error) == (2, True)


def test_reference_next_to_out_serves_several_results(command, tmp_path, model_folder, images):
    for name in ("a", "b"):
        found(command(model_folder, "--data", images, "--num", 9, *FAST, "--out", tmp_path / name, "--json"))
    assert len(list(tmp_path.glob("reference-*.safetensors"))) == 1
    assert len(list(tmp_path.glob("reference-*.features"))) == 1


def test_statistics_of_other_programs(command, tmp_path, model_folder, images, bomb):
    real = torch.from_numpy(np.stack([item.pixels for item in open_images(images, tiny.IMAGE_SIZE)])).permute(
        0, 3, 1, 2
    )
    statistics = FeatureStatistics.of(RandomFeatures()(real))
    np.savez(tmp_path / "real.npz", mu=statistics.mean.numpy(), sigma=statistics.covariance.numpy())
    args = (model_folder, "--num", 9, *FAST, "--json")
    report = found(command(*args, "--data", tmp_path / "real.npz"))
    assert report["scores"]["fd"]["value"] == pytest.approx(
        found(command(*args, "--data", images))["scores"]["fd"]["value"]
    )
    assert report["protocol"]["reference"]["fingerprint"].startswith("sha256:")
    assert len(report["notes"]) == 2  # neither features nor size are known
    refused = command(*args, "--data", bomb(tmp_path / "evil.npy"))
    assert (refused.code, "evil.npy" in refused.error) == (2, True)


def test_broken_reference_images_are_left_out_with_a_note(command, tmp_path, model_folder, images):
    shutil.copytree(images, tmp_path / "real")
    (tmp_path / "real" / "apple" / "0.png").write_bytes(b"no image")
    report = found(command(model_folder, "--data", tmp_path / "real", "--num", 9, *FAST, "--json"))
    assert report["protocol"]["reference"]["num_images"] == tiny.NUM_IMAGES - 1
    assert report["notes"] == ["1 of 18 reference images cannot be read and are left out"]


def test_comparison(command, tmp_path, model_folder, images):
    args = (model_folder, "--data", images, *FAST, "--json")
    found(command(*args, "--num", 9, "--out", tmp_path / "a.json"))
    against = ("--against", tmp_path / "a.json")
    report = found(command(*args, "--num", 9, "--steps", 4, *against))
    change = report["comparison"]["scores"]["fd"]
    assert report["comparison"]["differing"] == []
    assert change["difference"] == change["value"] - change["other"] != 0
    refused = command(*args, "--num", 8, *against)
    assert (refused.code, "images: 8 and 9" in refused.error) == (2, True)
    assert found(command(*args, "--num", 8, *against, "--anyway"))["comparison"]["differing"] == ["images: 8 and 9"]


def test_labels_as_in_the_reference(command, tmp_path, model_folder, images):
    shutil.copytree(images, tmp_path / "real")
    for file in (tmp_path / "real" / "berry").glob("[1-5].png"):
        file.unlink()
    args = ("--num", 60, *FAST, "--labels", "data", "--json")
    report = found(command(model_folder, "--data", tmp_path / "real", *args))
    apples, berries, cherries = report["protocol"]["label_counts"]
    assert 0 <= berries < 12 < min(apples, cherries)
    refused = command(model_folder, "--data", "synthetic:9", *args)
    assert (refused.code, "apple" in refused.error) == (2, True)


def test_real_against_real(command, tmp_path, images, pngs, model_folder):
    report = found(command(pngs, "--data", images, *FAST, "--metrics", "fid,kid,precision,recall,coverage", "--json"))
    assert report["protocol"]["task"] == "images"
    assert report["protocol"]["num_images"] == tiny.NUM_IMAGES  # without the contact sheet
    values = {name: score["value"] for name, score in report["scores"].items()}
    assert values["fd"] == pytest.approx(0, abs=1e-4)
    assert [values[name] for name in ("precision", "recall", "coverage")] == [1, 1, 1]

    for half in ("first", "second"):
        (tmp_path / half).mkdir()
    for number, file in enumerate(sorted(pngs.glob("[0-9]*.png"))):
        shutil.copy(file, tmp_path / ("first" if number % 2 else "second"))
    halves = found(command(tmp_path / "first", "--data", tmp_path / "second", *FAST, "--json"))
    drawn = found(command(model_folder, "--data", tmp_path / "second", "--num", 9, *FAST, "--json"))
    assert 0.1 < halves["scores"]["fd"]["value"] < 0.5 * drawn["scores"]["fd"]["value"]


def test_reconstruction(command, tmp_path, kl, kl_folder, model_folder, images):
    args = ("--data", images, *FAST, "--reconstruction", "--json")
    report = found(command(kl_folder, *args, "--image-size", tiny.IMAGE_SIZE))
    of_model = found(command(model_folder, *args, "--out", tmp_path / "floor"))
    assert report["scores"] == of_model["scores"]
    real = torch.from_numpy(np.stack([item.pixels for item in open_images(images, tiny.IMAGE_SIZE)])).permute(
        0, 3, 1, 2
    )
    given_back = kl.reconstruct(real)
    wanted = {"psnr": psnr(given_back, real), "ssim": ssim(given_back, real)}
    for name, values in wanted.items():
        assert report["scores"][name]["value"] == pytest.approx(float(values.mean()), rel=1e-4)
    pair = [FeatureStatistics.of(RandomFeatures()(x)) for x in (given_back, real)]
    assert report["scores"]["fd"]["value"] == pytest.approx(frechet_distance(*pair), rel=1e-4)
    assert report["protocol"]["model"]["weights"] == kl.content_hash
    refused = command(kl_folder, *args)
    assert (refused.code, "--image-size" in refused.error) == (2, True)


def test_lpips_of_reconstructions(command, tmp_path, kl, kl_folder):
    alexnet, linear = published()
    torch.save({**alexnet, **linear}, tmp_path / "lpips.pth")
    args = ("--data", "synthetic:8", "--features", "random", "--resamples", 0, "--reconstruction", "--image-size", 32)
    report = found(command(kl_folder, *args, "--metrics", "lpips", "--lpips", tmp_path / "lpips.pth", "--json"))
    images = open_images("synthetic:8", 32)
    real = torch.from_numpy(np.stack([item.pixels for item in images])).permute(0, 3, 1, 2)
    wanted = load_lpips(tmp_path / "lpips.pth")(kl.reconstruct(real), real)
    assert report["scores"]["lpips"]["value"] == pytest.approx(float(wanted.mean()), rel=1e-4)
    refused = command(kl_folder, *args, "--metrics", "lpips")
    assert (refused.code, "lpips needs the weights" in refused.error) == (2, True)


def test_inpainting(command, tmp_path, painter_folder, model_folder, segmented):
    args = ("--data", segmented, *FAST, "--task", "inpaint", "--json")
    report = found(command(painter_folder, *args, "--out", tmp_path / "a"))
    assert list(report["scores"]) == ["fd", "p-ids", "u-ids", "psnr", "ssim", "psnr-hole", "ssim-hole"]
    values = {name: score["value"] for name, score in report["scores"].items()}
    assert values["psnr-hole"] < values["psnr"]  # outside the hole nothing is changed
    assert values["ssim-hole"] <= values["ssim"]
    assert report["protocol"]["inputs"]["holes"].startswith("mixed")
    same(report, found(command(painter_folder, *args, "--batch-size", 5)), rtol=1e-3)

    replaced = found(command(model_folder, *args, "--masks", "boxes", "--num", 7))  # a model without inpainting
    assert replaced["protocol"]["num_images"] == 7
    assert replaced["protocol"]["inputs"]["holes"].startswith("boxes")
    refused = command(model_folder, *args, "--against", tmp_path / "a" / "report.json", "--masks", "boxes")
    assert (refused.code, "holes: boxes" in refused.error) == (2, True)


def test_holes_of_files(command, tmp_path, painter_folder, segmented):
    hole = np.zeros((16, 16), np.uint8)
    hole[4:8, 2:12] = 255
    (tmp_path / "masks").mkdir()
    Image.fromarray(hole).save(tmp_path / "masks" / "one.png")
    args = (
        "--data",
        segmented,
        *FAST,
        "--task",
        "inpaint",
        "--masks",
        tmp_path / "masks",
        "--metrics",
        "psnr,psnr-hole",
    )
    scores = found(command(painter_folder, *args, "--json"))["scores"]
    share = (4 * 10) / 16**2  # one hole for all images: errors in it are diluted by the rest alike
    difference = scores["psnr"]["value"] - scores["psnr-hole"]["value"]
    assert difference == pytest.approx(-10 * np.log10(share))


def test_painted_files_are_paired_by_name(command, tmp_path, images, pngs):
    flat = tmp_path / "real"
    flat.mkdir()
    for file in pngs.glob("[0-9]*.png"):
        Image.open(file).save(flat / f"{file.stem}.bmp")
    report = found(command(pngs, "--data", flat, *FAST, "--task", "inpaint", "--metrics", "ssim", "--json"))
    assert report["scores"]["ssim"]["value"] == pytest.approx(1)
    (flat / "00.bmp").rename(flat / "99.bmp")
    refused = command(pngs, "--data", flat, *FAST, "--task", "inpaint", "--metrics", "ssim")
    assert (refused.code, "no partner" in refused.error) == (2, True)


def test_maps(command, tmp_path, monkeypatch, painter_folder, segmented):
    (tmp_path / "segment_fruit.py").write_text(SEGMENTER)
    monkeypatch.syspath_prepend(tmp_path)
    args = (painter_folder, "--data", segmented, *FAST, "--task", "mask-to-image", "--metrics", "fid,miou", "--json")
    report = found(command(*args, "--segmenter", "segment_fruit:truth", "--out", tmp_path / "a.json"))
    score = report["scores"]["miou"]
    assert 0 < score["value"] < 1
    assert 0 < score["limit"] < 1
    assert report["protocol"]["inputs"] == {"segmenter": "segment_fruit:truth"}
    refused = command(*args, "--segmenter", "segment_fruit:wrong")
    assert (refused.code, "class indices" in refused.error) == (2, True)


# Bad input: each is one line, exit code 2, and nothing left behind


def test_a_report_is_compared_by_its_folder(command, tmp_path, model_folder, images):
    args = (model_folder, "--data", images, *FAST, "--num", 8, "--metrics", "fid", "--json")
    found(command(*args, "--out", tmp_path / "first"))
    compared = found(command(*args, "--against", tmp_path / "first"))
    assert compared["comparison"]["scores"]["fd"]["difference"] == 0


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, model_folder) -> Path:
    """Six samples, and the grid of them."""
    folder = tmp_path_factory.mktemp("drawn")
    sample(model_folder, SampleRequest(num=6), folder, runtime=tiny.CPU)
    return folder


def test_one_set_of_samples_is_scored_without_its_grid(command, drawn, images):
    report = found(command(drawn, "--data", images, *FAST, "--metrics", "fid", "--json"))
    assert report["protocol"]["num_images"] == 6


@pytest.mark.parametrize("packed", [False, True])
def test_a_set_of_samples_is_listed_once_and_only_the_beginnings_of_its_files_are_read(
    tmp_path, monkeypatch, drawn, packed
):
    listed = []
    for store in (FolderStore, ZipStore):
        listing = store.listing
        monkeypatch.setattr(store, "listing", lambda self, listing=listing: listed.append(self) or listing(self))
        monkeypatch.setattr(store, "read", lambda self, path: pytest.fail(f"{path} was read as a whole"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("a picture was decoded"))
    place = shutil.make_archive(str(tmp_path / "drawn"), "zip", drawn) if packed else drawn
    samples, rows = open_samples(str(place))
    assert (samples.image_size, len(rows), len(listed)) == (Size.of(tiny.IMAGE_SIZE), 6, 1)


def test_no_picture_is_decoded_twice(command, monkeypatch, drawn, images):
    decoded, to_rgb = [], module.to_rgb
    monkeypatch.setattr(module, "to_rgb", lambda image, name: decoded.append(name) or to_rgb(image, name))
    found(command(drawn, "--data", images, *FAST, "--json"))
    assert len(decoded) == len({*decoded}) == 6 + tiny.NUM_IMAGES


def test_a_sample_with_long_metadata_is_read_whole(command, tmp_path, drawn, images):
    shutil.copytree(drawn, tmp_path / "drawn")
    file = next((tmp_path / "drawn").glob("apple*.png"))
    with Image.open(file) as image:
        text = PngInfo()
        text.add_text("comment", "x" * 9000)
        text.add_text("latentflow", image.text["latentflow"])
        image.save(file, pnginfo=text)
    args = ("--data", images, *FAST, "--metrics", "fid")
    assert command(tmp_path / "drawn", *args).code == 0
    file.write_bytes(file.read_bytes()[:30])
    refused = command(tmp_path / "drawn", *args)
    assert (refused.code, f"cannot read {file.name}" in refused.error) == (2, True)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"num": 4, "seed": 20, "steps": 3}, "6 such as apple_seed-00000000.png, 4 such as"),
        ({"num": 4, "seed": 20, "steps": 3}, "steps 3, not 2"),
        ({"num": 2, "classes": "none", "seed": 3}, "told [], not ['label']"),
        (
            {"num": 2, "seed": 0},
            "one image twice, as apple_seed-00000000.png and as more/apple_seed-00000000.png",
        ),
    ],
)
def test_samples_of_two_requests_are_never_one_score(command, tmp_path, drawn, model_folder, images, request_, said):
    mixed = tmp_path / "mixed"
    shutil.copytree(drawn, mixed)
    sample(model_folder, SampleRequest(**request_), mixed / "more", runtime=tiny.CPU)
    result = command(mixed, "--data", images, *FAST, "--metrics", "fid")
    assert result.code == 2
    assert said in result.error


def test_samples_of_two_models_and_strangers(command, tmp_path, drawn, kl, images, pngs):
    mixed = tmp_path / "mixed"
    shutil.copytree(drawn, mixed)
    tiny.model(kl, seed=7).save_pretrained(tmp_path / "another")
    sample(tmp_path / "another", SampleRequest(num=8), mixed / "more", runtime=tiny.CPU)
    result = command(mixed, "--data", images, *FAST, "--metrics", "fid")
    assert result.code == 2
    assert "mixes 2 sets of images" in result.error
    assert "weights" in result.error
    shutil.rmtree(mixed / "more")
    shutil.copy(next(pngs.rglob("*.png")), mixed / "stranger.png")
    result = command(mixed, "--data", images, *FAST, "--metrics", "fid")
    assert result.code == 2
    assert "1 such as stranger.png (it has no metadata of a model)" in result.error


def test_bad_words(command, tmp_path, model_folder, painter_folder, images, segmented):
    for args, said in (
        (("--metrics", "fid,precison"), "did you mean 'precision'?"),
        (("--metrics", "psnr"), "--metrics: the task sample has no metric 'psnr'"),
        (("--metrics", "is"), "Inception Score"),
        (("--task", "inpant"), "did you mean 'inpaint'?"),
        (("--labels", "balance"), "did you mean 'balanced'?"),
        (("--num", 1), "from 2 to 100,000,000"),
        (("--num", 0), "from 2 to 100,000,000"),
        (("--num", 4), "precision needs at least 6 images"),
        (("--resamples", 1), "--resamples 1: give 0 for none"),
        (("--solver", "huen"), "did you mean 'heun'?"),
        (("--masks", "boxes"), "--masks has no effect with --task sample; remove it"),
        (("--segmenter", "a:b"), "--segmenter has no effect with --task sample; remove it"),
        (("--image-size", 18), "--image-size 18: the model was not trained on it; give one of its sizes: 16"),
        (("--against", tmp_path / "nowhere.json"), "nowhere.json; give what `latentflow evaluate --out` wrote"),
        (("--against", images), "report.json; give what `latentflow evaluate --out` wrote"),
        (("--features", "randm"), "did you mean 'random'?"),
        (("--features-precision", "bf17"), "did you mean 'bf16'?"),
        (("--neighbours", 5), "give 6 or more, or 0 for all"),
        (("--task", "inpaint", "--reconstruction"), "--reconstruction"),
        (("--task", "inpaint", "--masks", "boxs"), "did you mean 'boxes'?"),
        (("--task", "inpaint", "--num", 99), "there are 18 images"),
        (("--task", "mask-to-image"), "semantic_map"),
    ):
        result = command(model_folder, "--data", images, "--out", tmp_path / "out", "--num", 9, *FAST, *args)
        assert (result.code, said in result.error) == (2, True), (args, result)
    for args, said in (
        (("--metrics", "miou"), "--segmenter"),
        (("--metrics", "miou", "--segmenter", "no.such:thing"), "no.such:thing"),
        (("--metrics", "miou", "--segmenter", ""), "--segmenter"),
        (("--data", images), "map classes none"),
        (("--labels", "uniform"), "uniform"),
    ):
        given = (painter_folder, "--data", segmented, "--task", "mask-to-image", "--out", tmp_path / "out", *FAST)
        result = command(*given, *args)
        assert (result.code, said in result.error) == (2, True), (args, result)
    assert not list(tmp_path.iterdir())


def test_bad_places(command, tmp_path, model_folder, images, pngs, kl):
    jpegs, sizes, empty = (tmp_path / name for name in ("jpegs", "sizes", "empty"))
    for folder in (jpegs, sizes, empty):
        folder.mkdir()
    Image.new("RGB", (16, 16)).save(jpegs / "a.jpg")
    for number, size in enumerate([(16, 16), (32, 32)]):
        Image.new("RGB", size).save(sizes / f"{number}.png")
    bound = tiny.model(kl, conditioning={**tiny.SPATIAL, "map_dropout": 0.0})
    bound.save_pretrained(tmp_path / "bound")
    before = tiny.tree(tmp_path)
    for model, data, said in (
        (jpegs, images, "a.jpg is neither PNG nor TIFF"),
        (sizes, images, "1.png has 32 x 32 pixels"),
        (empty, images, "not a model folder"),
        (tmp_path / "nowhere", images, "nowhere"),
        (model_folder, empty, "no images in"),
        (model_folder, tmp_path / "nowhere.npz", "nowhere.npz"),
        (tmp_path / "bound", images, "--task mask-to-image"),
    ):
        result = command(model, "--data", data, "--num", 9, *FAST, "--out", tmp_path / "out")
        assert (result.code, said in result.error) == (2, True), (said, result)
    result = command(pngs, "--data", images, "--steps", 3, *FAST)
    assert (result.code, "--steps" in result.error) == (2, True)
    result = command(pngs, "--data", images, *FAST, "--features", "latents")
    assert (result.code, "'random'" in result.error) == (2, True)
    assert tiny.tree(tmp_path) == before


def test_missing_weights_name_what_needs_none(command, tmp_path, monkeypatch, model_folder, images):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    result = command(model_folder, "--data", images, "--num", 9, "--device", "cpu")
    assert (result.code, "--features random or latents" in result.error) == (2, True)


def test_statistics_of_another_size_or_features(command, tmp_path, model_folder, images, pngs):
    file = tmp_path / "real.safetensors"
    found(command(model_folder, "--data", images, "--num", 9, *FAST, "--reference-out", file, "--json"))
    large = tmp_path / "large"
    large.mkdir()
    for number in range(6):
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(large / f"{number}.png")
    refused = command(large, "--data", file, *FAST)
    assert (refused.code, "16 pixels, and the images to score have 32" in refused.error) == (2, True)
    refused = command(model_folder, "--data", file, "--num", 9, *FAST, "--features", "latents")
    assert (refused.code, "features random" in refused.error) == (2, True)
    refused = command(model_folder, "--data", file, *FAST, "--task", "inpaint")
    assert (refused.code, "the images themselves" in refused.error) == (2, True)


def test_features_that_are_not_finite(model_folder, images, monkeypatch):
    call = RandomFeatures.__call__
    monkeypatch.setattr(RandomFeatures, "__call__", lambda self, x: call(self, x) / 0)
    with pytest.raises(DataError, match="real images have features that are NaN or infinite"):
        evaluate(EvaluationRequest(model=model_folder, data=images, num=9, features="random"), tiny.CPU)
