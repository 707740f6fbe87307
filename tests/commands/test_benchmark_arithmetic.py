"""The benchmark of scores runs, at a tiny size, and both of its sides agree."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from latentflow.artifacts import read_json

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux only")
def test_metrics(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("metrics")
    sizes = ["--num-images", "3000", "--num-neighbours", "200", "--dim", "16", "--rounds", "2"]
    results = script.main([*sizes, "--results", str(tmp_path)])
    written = read_json(tmp_path / "metrics-cpu.json")
    assert {key: written[key] for key in results} == results
    assert results["statistics"]["largest_difference"] < 1e-12
    assert results["neighbours"]["largest_difference"] < 1e-12
    for part, other in (("statistics", "plain numpy"), ("neighbours", "plain numpy"), ("intervals", "10 resamples")):
        assert results[part]["times_faster"]["median"]["wall"] > 0
        assert results[part]["seconds"].keys() == results[part]["peak_mib"].keys() == {"latentflow", other}
    assert "times less memory" in capsys.readouterr().out
