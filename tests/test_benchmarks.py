"""The benchmarks run, at a tiny size, so that they cannot rot; what they measure here means nothing."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest

from latentflow.artifacts import read_json

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
    assert "not the network, by part" in capsys.readouterr().out


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
