"""metrics.jsonl: valid JSON whatever happens, and read back as numbers."""

from __future__ import annotations

import json
import math

import pytest

from latentflow.training.log import RunLog, read_metrics

VALUES = {"images_seen": 4, "loss": 1.5, "learning_rate": 1e-3, "images_per_second": 10.0}


def log(run, first_step=0, **values):
    with RunLog(run, num_steps=9, first_step=first_step, enabled=True) as opened:
        for step in range(first_step + 1, first_step + 3):
            opened.metrics(step, {**VALUES, **values})


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_numbers_that_are_not_finite_are_null_and_read_as_nan(tmp_path, number):
    log(tmp_path, grad_norm=number, loss_by_time={"0.0-0.1": number, "0.1-0.2": 1.0})
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        found = json.loads(line, parse_constant=pytest.fail)  # called for Infinity and NaN, which are not JSON
        assert found["grad_norm"] is None
        assert found["loss_by_time"] == {"0.0-0.1": None, "0.1-0.2": 1.0}
        assert found["loss"] == 1.5
    first, _ = read_metrics(tmp_path)
    assert math.isnan(first["grad_norm"])
    assert math.isnan(first["loss_by_time"]["0.0-0.1"])


def test_lines_of_an_earlier_version_are_mended_at_resume(tmp_path):
    lines = ['{"step": 1, "loss": 1.0, "grad_norm": Infinity}', '{"step": 2, "loss": NaN}', '{"step": 3, "loss": 1.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_metrics(tmp_path)[0]["grad_norm"] == math.inf
    log(tmp_path, first_step=2)
    found = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    assert found[:2] == [{"step": 1, "loss": 1.0, "grad_norm": None}, {"step": 2, "loss": None}]
