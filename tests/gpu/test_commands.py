"""The verbs on a GPU, each in a process of its own as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.artifacts import read_tensors
from latentflow.data.cache.reader import LatentCache
from latentflow.metrics.features.lpips import load_lpips
from latentflow.metrics.pairs import PairJudge
from tests import tiny
from tests.gpu.conftest import all_well, latentflow, torchrun
from tests.metrics.features.test_lpips import published

PRECISIONS = ("fp32", "tf32", "bf16")
FEW = {"precision": "fp32", "steps": 5}


@pytest.fixture(scope="module")
def model(tmp_path_factory, kl) -> Path:
    """A model of three classes, with weights that make something of its noise."""
    folder = tmp_path_factory.mktemp("models") / "fruit"
    tiny.model(kl, time_scale=1.0, solver="heun", steps=4).save_pretrained(folder)
    return folder


def pictures(folder: Path) -> np.ndarray:
    """What `sample` drew, in the order of seeds."""
    files = sorted(file for file in folder.glob("*.png") if not file.name.startswith("grid"))
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files]).astype(int)


def test_sample_draws_alike_in_every_precision(device, model, tmp_path):
    command = ("sample", model, "--num", 6, "--batch-size", 4)
    there = [(*command, "--device", device, "--precision", word, "--out", tmp_path / word) for word in PRECISIONS]
    all_well(*there, (*command, "--device", "cpu", "--out", tmp_path / "cpu"))
    drawn = {name: pictures(tmp_path / name) for name in (*PRECISIONS, "cpu")}
    assert np.abs(drawn["fp32"] - drawn["cpu"]).max() <= 1
    for precision in ("tf32", "bf16"):
        assert np.abs(drawn[precision] - drawn["fp32"]).mean() < 4


def test_evaluate_scores_alike(device, model, images, tmp_path):
    """With features that need no download, on the device and on the CPU."""
    options = ("--data", images, "--features", "random", "--num", 18, "--precision", "fp32", "--resamples", 0, "--json")
    places = {"there": device, "here": "cpu"}
    commands = [
        ("evaluate", model, *options, "--device", place, "--out", tmp_path / name) for name, place in places.items()
    ]
    there, here = (list(values(json.loads(printed.splitlines()[-1]))) for printed in all_well(*commands))
    assert len(there) > 1
    assert there == pytest.approx(here, rel=2e-2, abs=1e-3)


def values(found: object):
    """The numbers of nested results, but times."""
    if isinstance(found, dict):
        for key, value in found.items():
            if "second" not in key:
                yield from values(value)
    elif isinstance(found, list):
        for value in found:
            yield from values(value)
    elif isinstance(found, float):
        yield found


def test_lpips_takes_images_from_anywhere(device, tmp_path):
    """Its weights are on the device; images may be there, too, or on the CPU."""
    alexnet, linear = published()
    torch.save(alexnet, tmp_path / "alexnet-owt-7be5be79.pth")
    torch.save(linear, tmp_path / "alex.pth", _use_new_zipfile_serialization=False)
    random = torch.Generator().manual_seed(0)
    images, real = (torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=random) for _ in range(2))
    here = PairJudge(lpips=load_lpips(tmp_path))(images, real)
    judge = PairJudge(lpips=load_lpips(tmp_path).to(device))
    for place in ("cpu", device):
        there = judge(images.to(place), real.to(place))
        assert {name: value.device.type for name, value in there.items()} == dict.fromkeys(here, "cpu")
        for name, value in here.items():
            torch.testing.assert_close(there[name], value, rtol=1e-3, atol=1e-4)


def test_encode_reads_in_other_processes(device, kl_folder, tmp_path):
    """They are not forked from a process that has begun to use the GPU, and the cache is that of one process."""
    images = tiny.write_images(tmp_path / "many", per_class=40)
    command = ("encode", images, "--autoencoder", kl_folder, "--image-size", tiny.IMAGE_SIZE, "--batch-size", 16)
    places = {"there": (device, 2), "here": ("cpu", 0)}
    options = {name: ("--device", place, "--num-workers", number) for name, (place, number) in places.items()}
    all_well(*((*command, *given, "--out", tmp_path / name) for name, given in options.items()))
    there, here = caches = [LatentCache(tmp_path / name) for name in places]
    rows = list(range(len(here)))
    assert len(rows) == 120
    assert there.names() == here.names()
    ours, theirs = (one.moments(rows, [False] * len(rows)) for one in caches)
    assert (ours - theirs).abs().max() < 1e-2 * theirs.abs().max()


def test_training_from_images_reads_in_other_processes(device, images, kl_folder, recipe_file, tmp_path):
    """Images are read by processes of their own, and encoded in the step."""
    files = [
        recipe_file(f"workers{number}", data={"path": images, "num_workers": number}, training=FEW) for number in (0, 2)
    ]
    all_well(*(("train", file, "--device", device) for file in files))
    ours, theirs = (read_tensors(tmp_path / file.stem / "model" / "velocity.safetensors") for file in files)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-2, atol=1e-3)


def test_two_processes_stay_on_the_cpu(device, recipe_file, tmp_path):
    """On a machine with a GPU, with and without it in sight."""
    two, one = (("train", recipe_file(name, training=FEW), "--device", "cpu") for name in ("two", "one"))
    all_well(two, one, launchers=[torchrun(2)])
    ours, theirs = (read_tensors(tmp_path / name / "model" / "velocity.safetensors") for name in ("one", "two"))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("verb", ["train", "sample"])
def test_more_processes_than_gpus_are_refused_in_one_line(cuda, recipe_file, model, tmp_path, verb):
    """Once, and with what helps; and nothing has been written."""
    processes = torch.cuda.device_count() + 1
    out = tmp_path / "refused"
    args = (recipe_file("refused"),) if verb == "train" else (model, "--num", 4, "--out", out)
    done = latentflow(verb, *args, launcher=torchrun(processes))
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("latentflow: ")]
    assert len(lines) == 1, done.stderr
    assert f"{processes} processes" in lines[0]
    assert "--device cpu" in lines[0]
    assert not list(out.glob("*.png")) and not (out / "metrics.jsonl").exists()


def test_fp16_is_refused_on_a_cpu_in_one_line(device, model, tmp_path):
    done = latentflow("sample", model, "--device", "cpu", "--precision", "fp16", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "fp16" in done.stderr
