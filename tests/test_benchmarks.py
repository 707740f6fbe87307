"""The benchmarks run, at a tiny size, so that they cannot rot; what they measure here means nothing."""

from __future__ import annotations

import importlib
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from latentflow.artifacts import read_json
from latentflow.data.painting.input_rules import InputRules
from latentflow.model.flow_model import read_config
from latentflow.networks.dit import DiTConfig
from latentflow.training.memory import forward_flops
from tests import tiny

TINY_NETWORK = "network={depth: 2, hidden_size: 32, num_heads: 2, patch_size: 2}"
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Import a script of the folder as Python runs it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def numbers(values):
    """Every number of nested mappings and lists."""
    if isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            yield from numbers(value)
    elif isinstance(values, int | float):
        yield values


def test_unet(benchmark, tmp_path):
    sizes = ["--channels", "32", "--multipliers", "1", "2", "--latent-size", "8", "--batch-size", "2"]
    results = benchmark("unet").main([*sizes, "--rounds", "2", "--no-compile", "--results", str(tmp_path)])
    assert all(math.isfinite(number) for number in numbers(results))
    assert (tmp_path / "unet-cpu.json").is_file()


def test_optimizer(benchmark, tmp_path):
    sizes = ["--depth", "2", "--hidden-size", "32", "--batch-size", "2", "--rounds", "2"]
    results = benchmark("optimizer").main([*sizes, "--results", str(tmp_path)])
    assert all(math.isfinite(number) for number in numbers(results))
    # A block has 4 matrices of 32 x 32 and 3 of 32 x 88, and the batch 32 tokens.
    extra = 5 * (4 * 6 * 32**3 + 3 * (4 * 32**2 * 88 + 2 * 32**3)) / (6 * 32 * (4 * 32**2 + 3 * 32 * 88))
    assert results["by_arithmetic"] == pytest.approx({"Muon": 1 + extra, "Muon, every 2nd": 1 + extra / 2})
    assert (tmp_path / "optimizer-cpu.json").is_file()


def test_transformer(benchmark, tmp_path):
    sizes = ["--depth", "2", "--hidden-size", "32", "--batch-size", "2", "--rounds", "2"]
    results = benchmark("transformer").main([*sizes, "--results", str(tmp_path)])
    assert all(math.isfinite(number) for number in numbers(results))
    assert results["parameters"]["value residual"] - results["parameters"]["plain"] == 2
    head = 4 * (32**2 + 32) + 32 * 16 + 16
    assert results["parameters"]["head"] - results["parameters"]["plain"] == head
    assert results["times_the_operations"]["value residual"] == 1 < results["times_the_operations"]["head"]
    assert (tmp_path / "transformer-cpu.json").is_file()


@pytest.mark.parametrize("case", ["DiT modern, classes", "U-Net, classes"])
def test_onnx_parity(benchmark, tmp_path, case):
    arguments = ["--only", case, "--hidden-size", "32", "--latent-size", "4"]
    results = benchmark("onnx_parity").main([*arguments, "--results", str(tmp_path)])
    assert 0 < results["largest_relative_error"][case] < 1e-5
    assert (tmp_path / "onnx_parity-cpu.json").is_file()


def test_overhead(benchmark, tmp_path, capsys):
    arguments = ["--rounds", "3", "--results", str(tmp_path)]
    changes = [TINY_NETWORK, "data.image_size=32", "training.batch_size=2"]
    results = benchmark("overhead").main([*arguments, *changes])
    written = read_json(tmp_path / "overhead-cpu.json")
    assert {key: written[key] for key in results} == results
    assert all(math.isfinite(number) for number in numbers(results))
    training, sampling = results["training"], results["sampling"]
    assert training["num_steps"] == 3
    assert sampling["num_steps"] == 2
    for figures in (training, sampling):
        assert min(numbers(figures["seconds_per_step"])) > 0
        assert min(numbers(figures["seconds_of_bare_network"])) > 0
        assert 0 < figures["not_network_by_part"]["wall"] < 1
    parts = training["share_of_part"]
    expected = {"reading", "randomness", "latents and condition", "mixing and loss", "gradient clipping"}
    assert parts.keys() == expected | {"finite guard", "optimizer", "EMA", "log", "everything else"}
    assert all(part["wall"] > 0 for part in parts.values())
    assert sum(part["wall"] for part in parts.values()) == pytest.approx(training["not_network_by_part"]["wall"])
    for clock in ("wall", "cpu"):
        whole = training["optimizer_clipping_ema"][clock] + training["everything_but_these"][clock]
        assert whole == pytest.approx(training["not_network_by_part"][clock])
    main_thread = results["main_thread"]
    assert main_thread["num_steps"] == 15
    assert 0 < main_thread["milliseconds"]["median"]["main_thread"] < main_thread["milliseconds"]["high"]["wall"] * 1.5
    assert main_thread["milliseconds_of_part"].keys() == parts.keys() | {"network"}
    assert results["main_thread_alone"]["num_steps"] == 15
    assert "not the network, by part" in capsys.readouterr().out


def test_overhead_measures_as_many_steps_as_it_is_told(benchmark, tmp_path):
    """A recipe that leaves the number of steps open must not end before the measurement does."""
    overhead = benchmark("overhead")
    with pytest.raises(AssertionError, match="fewer steps"), overhead.between_steps(lambda: None):
        pass
    results = overhead.main(["--quick", "--rounds", "40", "--results", str(tmp_path)])
    assert results["training"]["num_steps"] == 40


@pytest.mark.parametrize("part", ["train-s2", "bare-s2", "classic-s2", "sample", "encode", "judge"])
def test_a_part_of_the_benchmark_of_a_gpu(benchmark, tmp_path, part):
    options = ["--device", "cpu", "--quick", "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    results = benchmark("gpu").main([part, *options])
    assert all(math.isfinite(number) for number in numbers(results))
    written = read_json(tmp_path / "results" / f"gpu_{part.replace('-', '_')}-cpu.json")
    assert {key: written[key] for key in results} == results
    assert written["machine"].keys() >= {"device", "torch", "date"}
    if part.endswith("s2"):
        assert results["images_per_second"] > 0
        assert (
            0
            < results["mfu"]["measured"]
            == pytest.approx(results["flops_per_second"] / results["peak_flops_per_second"]["measured"])
        )


def test_operations_are_counted_as_on_paper(benchmark):
    """Two for each multiplication with its addition, of every matrix product of a transformer."""
    depth, size, inner, tokens, patch = 3, 32, 88, 64, 16  # inner: 2/3 of 4 times the size, in eights
    config = DiTConfig(depth=depth, hidden_size=size, num_heads=2, patch_size=2, variant="modern")
    block = tokens * (4 * size**2 + 2 * tokens * size + 3 * size * inner) + 6 * size**2
    outside = tokens * 2 * size * patch + 256 * size + size**2 + 2 * size**2
    model = benchmark("gpu").model_config(config, (4, 16, 16))
    assert forward_flops(model) == 2 * (depth * block + outside)


def test_a_failed_part_costs_no_other(tmp_path):
    """gpu.sh goes on after a part that fails and one that takes too long, and ends in a table of what is left."""
    script = [str(BENCHMARKS / "gpu.sh"), "--device", "cpu", "--quick", "--work", str(tmp_path / "work")]
    folders = ["--results", str(tmp_path / "results"), "--autoencoder", str(tmp_path / "missing")]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*script, *folders, "--parts", "encode bare-s2"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 1
    assert re.search("== encode: .* exit code 1", done.stdout)
    assert re.search("== bare-s2: .* exit code 0", done.stdout)
    assert re.search("^bare-s2 .*DiT", done.stdout, re.MULTILINE)
    assert "not measured: train-s2" in done.stdout
    options = [*folders, "--parts", "bare-s2", "--seconds", "3"]
    late = subprocess.run([*script, *options], capture_output=True, text=True, env=environment, check=False)
    assert late.returncode == 1
    assert "bare-s2: left out" in late.stdout


@pytest.mark.parametrize(
    ("option", "name", "sides"),
    [
        ([], "training_throughput", {"latent cache", "encoding in the loop"}),
        (["--holes"], "training_throughput_holes", {"holes stored in the cache", "holes cut anew"}),
    ],
)
def test_training_throughput(benchmark, tmp_path, capsys, kl_folder, option, name, sides):
    arguments = [*option, "--autoencoder", str(kl_folder), "--num-images", "12", "--results", str(tmp_path)]
    rounds = ["--rounds", "2", "--steps-per-round", "2"]
    changes = [TINY_NETWORK, "data.image_size=16", "training.batch_size=4"]
    results = benchmark("training_throughput").main([*arguments, *rounds, *changes])
    written = read_json(tmp_path / f"{name}-cpu.json")
    assert {key: written[key] for key in results} == results
    assert results["latent_shape"] == [4, 8, 8]
    assert results["images_per_second"].keys() == sides
    measured = ("images_per_second", "share_of_reading", "times_faster_from_the_cache")
    figures = [number for key in measured for number in numbers(results[key])]
    assert all(math.isfinite(number) and number > 0 for number in figures)
    assert results["images_per_second_of_writing_the_cache"] > 0
    assert "times faster from the cache" in capsys.readouterr().out


def test_a_stopwatch_counts_every_moment_once(benchmark, monkeypatch):
    measuring = benchmark("measuring")
    monkeypatch.setattr(measuring.Stopwatch, "_now", lambda self: now.copy())
    now = measuring.np.zeros(2)
    stopwatch = measuring.Stopwatch(measuring.torch.device("cpu"))

    def work(seconds: float) -> None:
        nonlocal now
        now = now + seconds

    inner = stopwatch.timed("inner", work)
    work(1)
    with stopwatch.part("outer"):
        work(2)
        inner(4)
        work(8)
    work(16)
    assert {part: value.tolist() for part, value in stopwatch.lap().items()} == {
        measuring.REST: [17, 17],
        "outer": [10, 10],
        "inner": [4, 4],
    }
    stopwatch.fine = False
    inner(32)
    assert {part: value.tolist() for part, value in stopwatch.lap().items()} == {measuring.REST: [32, 32]}


def test_few_images(benchmark, tmp_path):
    sizes = ["--images", "20", "--steps", "3", "--samples", "4", "--results", tmp_path, "--out", tmp_path / "few"]
    changes = ["data.held_out=0.4", TINY_NETWORK, "training.keep_at=[0.5]", "training.log_every=1"]
    results = benchmark("few_images").main([*map(str, sizes), *changes])
    (model,) = results["models"].values()
    assert (model["trained_on"], model["held_out"], model["warning"]) == (12, 8, "")
    assert [*model["memorised"]] == ["best", "1", "end"]
    assert all(0 <= number <= 1 for number in numbers(model["memorised"]))
    assert list(model["losses"]) == [3] and 0 < model["cost"] < 1
    assert (tmp_path / "few_images-cpu.json").is_file()


def test_distillation(benchmark, tmp_path, kl, images, cache):
    tiny.model(kl, time_scale=20.0, guidance=2.0).save_pretrained(tmp_path / "model")
    places = ["--teacher", tmp_path / "model", "--cache", cache, "--data", images, "--results", tmp_path]
    sizes = ["--num", 9, "--evaluations", "2,4", "--fit", 8, "--work", tmp_path / "work"]
    script, changes = benchmark("distillation"), ["training.steps=2", "training.batch_size=4"]
    results = script.main(list(map(str, [*places, *sizes, *changes])))
    ways = read_json(tmp_path / "distillation-cpu.json")["ways"]
    assert ways == results["ways"]
    assert {"student 2, guidance 1", "student 4, guidance 2", "preset", "ab2 in 4, guidance 1"} <= ways.keys()
    assert {name: ways[name]["evaluations"] for name in ("student 2, guidance 1", "student 4, guidance 2")} == {
        "student 2, guidance 1": 2,
        "student 4, guidance 2": 4,
    }
    equal = [name for name in ways if name.startswith(("ab2", "fitted"))]
    assert all(ways[name]["evaluations"] in (2, 4) for name in equal)
    assert all(math.isfinite(number) for number in numbers(ways))
    assert results["training"]["training"]["steps"] == 2


def test_finetuning(benchmark, tmp_path, images, kl_folder):
    """The class of the runs is not among those of the source; each run begins with the source's latents and network."""
    given = {
        "--train": images,
        "--held-out": images,
        "--autoencoder": kl_folder,
        "--features": "random",
        "--one-class": tiny.CLASSES[2],
        "--image-size": tiny.IMAGE_SIZE,
        "--images": "5",
        "--source-steps": 2,
        "--pace-steps": 2,
        "--batch-size": 2,
        "--seconds": 0.01,
        "--num": 6,
        "--draws": 4,
        "--finetune-set": "training.precision=fp32",
        "--work": tmp_path / "work",
        "--results": tmp_path,
    }
    words = [str(word) for pair in given.items() for word in pair]
    results = benchmark("finetuning").main([*words, TINY_NETWORK, "training.batch_size=2", "training.log_every=1"])
    assert [run["method"] for run in results["runs"]] == ["full", "lora", "biases", "scratch"]
    assert [run["adapter_bytes"] is not None for run in results["runs"]] == [False, True, False, False]
    guided = [any(name.startswith("guided_") for name in run) for run in results["runs"]]
    assert guided == [True, True, True, False]
    assert all(math.isfinite(number) for run in results["runs"] for number in numbers(run))
    names = [read_config(tmp_path / "work" / run / "model").conditioning.class_names for run in ("source", "lora_5")]
    assert names == [list(tiny.CLASSES[:2]), [tiny.CLASSES[2]]]
    assert (tmp_path / "work" / "grids" / "lora_5_guided.png").is_file()
    assert (tmp_path / "finetuning-cpu.json").is_file()
    given["--source"] = tmp_path / "work" / "source"  # as a run that was there before; what is done is not done again
    again = benchmark("finetuning").main([str(word) for pair in given.items() for word in pair])
    assert again["runs"] == results["runs"] and again["source"] == results["source"]
    with pytest.raises(SystemExit, match=f"knows the class {tiny.CLASSES[0]}; name another with --one-class"):
        benchmark("finetuning").main(
            [str(w) for pair in (given | {"--one-class": tiny.CLASSES[0]}).items() for w in pair]
        )


def test_published_size(benchmark, tmp_path, monkeypatch):
    """In small: convert, finetune for a step, load the adapter, and draw the same picture."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    sizes = ["--hidden-size", 32, "--depth", 2, "--num-heads", 2, "--image-size", 32, "--rank", 2]
    given = [*sizes, "--threads", 1, "--work", tmp_path, "--results", tmp_path]
    results = benchmark("published_size").main(list(map(str, given)))
    assert list(results["finetuned"]) == ["gib", "adapter_bytes", "checkpoint_bytes", "seconds"]
    assert results["finetuned"]["gib"] < 24
    assert (tmp_path / "published_size-cpu.json").is_file()


def test_conditions(benchmark, tmp_path):
    """The measure finds the size of real shapes; what an untrained model draws is not recognised, and that is said."""
    given = ["--classes", "all", "--images", 96, "--steps", 2, "--num", 4, "--results", tmp_path]
    script = benchmark("conditions")
    results = script.main(list(map(str, given)))
    written = read_json(tmp_path / "conditions-cpu.json")
    assert written["sizes"] == results["sizes"]
    floor, rows = results["sizes"]["floor"], results["sizes"]["rows"]
    assert floor["error"] < 1
    assert floor["recognised"] > 0.9
    assert [row["asked"] for row in rows] == [size for sizes in script.ASKED.values() for size in sizes]
    assert all(0 <= row["recognised"] < 0.5 for row in rows)
    assert {*results["classes"]} == {"shape alone", "colour alone", "both"}
    assert all(math.isfinite(share) for share in numbers(results["traits"]))


def test_judge_ranking(benchmark, tmp_path, kl, images):
    tiny.model(kl).save_pretrained(tmp_path / "model")
    given = ["--judge", "random", "--model", tmp_path / "model", "--data", images, "--num", 9, "--results", tmp_path]
    script = benchmark("judge_ranking")
    results = script.main(list(map(str, given)))
    written = read_json(tmp_path / "judge_ranking-cpu.json")
    assert written["sets"] == results["sets"]
    assert [*results["sets"]] == [*script.ORDER, "guidance 2"]
    assert all(math.isfinite(number) for number in numbers(results["sets"]))
    sets = {name: {"distance": float(place), "standard_error": 0.1} for place, name in enumerate(script.ORDER)}
    assert all(step["holds"] for step in script.ranking(sets))
    swapped = {**sets, "trained": sets["few steps"], "few steps": sets["trained"]}
    assert [step["holds"] for step in script.ranking(swapped)] == [True, True, False, True]


def test_translation(benchmark, tmp_path, kl, images):
    tiny.model(kl, inputs=InputRules(origin="shrink:4")).save_pretrained(tmp_path / "model")
    given = ["--model", tmp_path / "model", "--data", images, "--num", 9, "--results", tmp_path]
    script = benchmark("translation")
    results = script.main(list(map(str, given)))
    assert read_json(tmp_path / "translation-cpu.json")["sets"] == results["sets"]
    assert sorted(results["sets"]) == sorted(script.SETS)
    assert all(math.isfinite(number) for number in numbers(results["sets"]))
    assert (
        results["sets"]["inputs"]["psnr"] > results["sets"]["translated"]["psnr"]
    )  # by a network that learned nothing


def test_serving(benchmark, tmp_path):
    sizes = [
        "--clients",
        "6",
        "--requests",
        "2",
        "--rounds",
        "1",
        "--steps",
        "1",
        "--depth",
        "1",
        "--hidden-size",
        "32",
    ]
    given = [*sizes, "--image-size", "16", "--results", str(tmp_path)]
    with ThreadPoolExecutor(1) as pool:  # where a browser of another test is open, this thread has an event loop
        results = pool.submit(benchmark("serving").main, given).result()
    assert all(math.isfinite(number) for number in numbers(results))
    load, full, end = results["load"], results["full_queue"], results["sigterm"]
    assert (load["requests"], load["errors"], load["wrong_pictures"]) == (24, 0, 0)
    assert full["wrong_pictures"] == full["without_retry_after"] == 0
    assert set(full["statuses"]) <= {"200", "429"} and sum(full["statuses"].values()) == 6
    assert end["half_answers"] == end["wrong_pictures"] == 0 and end["exit_code"] == 143
    assert (tmp_path / "serving-cpu.json").is_file()
