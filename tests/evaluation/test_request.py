"""Requests of the verbs that measure: what is refused before anything is opened, and what comes back from a report."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentflow.errors import ConfigError
from latentflow.evaluation.request import (
    BenchmarkRequest,
    BoundRequest,
    DiagnoseRequest,
    EvaluationRequest,
    SweepRequest,
)
from latentflow.metrics.names import METRICS, USUAL_METRICS

ASKED = {"model": "m", "data": "d"}


def test_every_field_is_described():
    for record in (EvaluationRequest, SweepRequest, DiagnoseRequest, BoundRequest, BenchmarkRequest):
        assert all(field.description for field in record.model_fields.values()), record


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"task": "inpant"}, "task 'inpant': did you mean 'inpaint'?"),
        ({"metrics": ["precison"]}, "did you mean 'precision'?"),
        ({"metrics": ["psnr"]}, "the task sample has no metric 'psnr'"),
        ({"metrics": ["is"], "features": "random"}, "the Inception Score needs the features 'inception'"),
        ({"metrics": ["lpips"], "reconstruction": True}, "lpips needs the weights of its network"),
        ({"metrics": ["miou"], "task": "mask-to-image"}, "miou needs a segmentation network"),
        ({"num": 1}, "number of images 1: give a whole number from 2 to 100,000,000"),
        ({"resamples": 1}, "resamples 1: give 0 for none, or 2 or more"),
        ({"neighbours": 5}, "neighbours among 5 images: each needs 5, so give 6 or more, or 0 for all"),
        ({"labels": "balance"}, "did you mean 'balanced'?"),
        ({"labels": "uniform", "task": "inpaint"}, "an image has the class of its real one"),
        ({"labels": "data", "reconstruction": True}, "labels has no effect with --reconstruction; remove it"),
        ({"steps": 3, "reconstruction": True}, "steps has no effect with --reconstruction; remove it"),
        ({"masks": "boxes"}, "masks has no effect with --task sample; remove it"),
        ({"segmenter": "a:b", "task": "inpaint"}, "segmenter has no effect with --task inpaint; remove it"),
        ({"reconstruction": True, "task": "inpaint"}, "remove --task inpaint"),
        ({"resample": 3}, "did you mean 'resamples'?"),
    ],
)
def test_what_an_evaluation_refuses(given, said):
    with pytest.raises(ConfigError) as caught:
        EvaluationRequest(**ASKED, **given)
    assert said in str(caught.value)


def test_metrics_are_named_once_and_fd_is_fid():
    assert EvaluationRequest(**ASKED, metrics=["fd", "kid", "fid"]).wanted == ["fid", "kid"]
    assert EvaluationRequest(**ASKED).wanted == []


def test_usual_metrics_are_metrics_of_their_task():
    assert METRICS.keys() == USUAL_METRICS.keys()
    assert all({*USUAL_METRICS[task]} <= {*METRICS[task]} for task in METRICS)


@pytest.mark.parametrize(
    "request_",
    [
        EvaluationRequest(model=Path("m"), data="d", metrics=["fid"], guidance_interval=(0.1, 0.8), out="a.json"),
        SweepRequest(**ASKED, intervals=[(0.0, 1.0), (0.1, 0.8)], budget=10),
        BenchmarkRequest(model="m", batch_sizes=[2], guided_by=["label"]),
    ],
)
def test_a_request_comes_back_from_json(request_):
    assert type(request_)(**request_.model_dump(mode="json")) == request_
