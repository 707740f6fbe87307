"""Sets of drawn images: the same in any batches, on any number of processes, after any interruption."""

from __future__ import annotations

import pytest
import torch

from latentflow.errors import ArtifactError, ConfigError, NonFiniteError
from latentflow.evaluation import drawn_set, shards
from latentflow.evaluation.drawn_set import plan_set
from latentflow.evaluation.shards import Work
from latentflow.metrics.features.extractors import RandomFeatures
from latentflow.randomness import derive_seed
from latentflow.sampling.captured_calls import CapturedCalls
from tests import tiny
from tests.dispatch import Recorder

NUM = 10


def draw_set(model, extractor, *, num, work=None, **given):
    """The columns of a set of images."""
    return plan_set(model, **given).draw(extractor, num, work or Work())


@pytest.fixture(scope="module")
def model(kl):
    """A model of three classes."""
    return tiny.model(kl)


@pytest.fixture(scope="module")
def extractor() -> RandomFeatures:
    return RandomFeatures()


@pytest.fixture(scope="module")
def whole(model, extractor):
    """The set that all others are held against."""
    return draw_set(model, extractor, num=NUM, seed=5)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_SIZE", 4)


def test_images_are_those_of_sample(model, extractor, whole):
    samples = model.sample(num=NUM, seed=5)
    torch.testing.assert_close(whole["features"], extractor(samples.pixels), rtol=1e-3, atol=1e-3)
    assert whole["features"].dtype == torch.float32
    assert whole["labels"].tolist() == samples.drawing.labels == [(5 + i) % 3 for i in range(NUM)]
    assert torch.equal(whole["evaluations"], samples.evaluations)
    drawing, others = whole["seconds"].sum(0)
    assert drawing > 0
    assert others > 0


def test_any_batch_size(model, extractor, whole, small_shards):
    for batch_size in (1, 3, 100):
        again = draw_set(model, extractor, num=NUM, seed=5, work=Work(batch_size=batch_size))
        torch.testing.assert_close(again["features"], whole["features"], rtol=1e-3, atol=1e-3)
        assert torch.equal(again["labels"], whole["labels"])


def test_a_graph_is_captured_once_for_all_shards(kl, extractor, small_shards, monkeypatch):
    model, recorder = tiny.model(kl, time_scale=20.0), Recorder()
    given = {"num": 8, "preset": {"solver": "ab2", "steps": 12}, "work": Work(batch_size=4)}
    plain = draw_set(model, extractor, **given)
    monkeypatch.setattr(drawn_set, "calls_for", lambda device, drawing: CapturedCalls(recorder))
    captured = draw_set(model, extractor, **given)
    assert recorder.count == 1
    assert torch.equal(captured["features"], plain["features"])


def test_image_i_does_not_know_how_many_there_are(model, extractor, whole):
    fewer = draw_set(model, extractor, num=4, seed=5)
    torch.testing.assert_close(fewer["features"], whole["features"][:4], rtol=1e-3, atol=1e-3)
    later = draw_set(model, extractor, num=4, seed=8)  # three further on, so labels are the same
    torch.testing.assert_close(later["features"], whole["features"][3:7], rtol=1e-3, atol=1e-3)


def test_finished_shards_are_not_drawn_again_and_damaged_ones_are(
    model, extractor, small_shards, tmp_path, monkeypatch
):
    folder, counted = tmp_path / "set", []
    first = draw_set(model, extractor, num=NUM, seed=5, work=Work(folder=folder))
    shard = folder / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    tiny.leave_half_written(shard)
    drawn = []
    draw = drawn_set.draw
    monkeypatch.setattr(drawn_set, "draw", lambda *a, **k: drawn.append(a[1].seeds) or draw(*a, **k))
    again = draw_set(model, extractor, num=NUM, seed=5, work=Work(folder=folder, on_images=counted.append))
    assert drawn == [[9, 10, 11, 12]]
    assert sum(counted) == NUM
    assert torch.equal(again["features"], first["features"])
    assert not list(folder.glob(".shard*"))

    drawn.clear()
    more = draw_set(
        model, extractor, num=13, seed=5, work=Work(folder=folder)
    )  # a larger set goes on from the smaller one
    assert drawn == [[13, 14, 15, 16], [17]]
    assert torch.equal(more["features"][:8], first["features"][:8])


@pytest.mark.parametrize(
    "changed", [{"seed": 6}, {"labels": "uniform"}, {"preset": {"steps": 3}}, {"preset": {"guidance": 2.0}}]
)
def test_another_set_is_refused(model, extractor, small_shards, tmp_path, changed):
    draw_set(model, extractor, num=2, seed=5, work=Work(folder=tmp_path / "set"))
    before = tiny.tree(tmp_path)
    with pytest.raises(ArtifactError, match=r"request|label_policy"):
        draw_set(model, extractor, num=2, work=Work(folder=tmp_path / "set"), **{"seed": 5, **changed})
    assert tiny.tree(tmp_path) == before


def test_another_model_or_features_or_folder_is_refused(kl, model, extractor, tmp_path):
    draw_set(model, extractor, num=2, work=Work(folder=tmp_path / "set"))
    with pytest.raises(ArtifactError, match="weights"):
        draw_set(tiny.model(kl, seed=1), extractor, num=2, work=Work(folder=tmp_path / "set"))
    other = RandomFeatures()
    other.hash = "0" * 64
    with pytest.raises(ArtifactError, match="features"):
        draw_set(model, other, num=2, work=Work(folder=tmp_path / "set"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("precious")
    with pytest.raises(ArtifactError, match=r"thesis\.tex"):
        draw_set(model, extractor, num=2, work=Work(folder=tmp_path / "thesis"))


def test_labels(kl, model, extractor):
    drawn = {
        policy: draw_set(model, extractor, num=60, labels=policy, label_shares=shares)["labels"]
        for policy, shares in (("uniform", None), ("data", [1, 0, 3]), ("none", None))
    }
    uniform = [3 * (derive_seed(0, "label", i) >> 10) // 2**53 for i in range(60)]
    assert drawn["uniform"].tolist() == uniform
    counts = torch.bincount(drawn["data"], minlength=3).tolist()
    assert counts[1] == 0
    assert 35 <= counts[2] <= 55  # 45 are expected, with a standard deviation of 3.4
    assert set(drawn["none"].tolist()) == {-1}
    assert set(draw_set(tiny.model(kl, class_names=()), extractor, num=3)["labels"].tolist()) == {-1}


def test_bad_requests(kl, model, extractor, tmp_path):
    for given, said in (
        ({"labels": "balance"}, "did you mean 'balanced'"),
        ({"labels": "data"}, "labelled reference"),
        ({"labels": "data", "label_shares": [1, 2]}, "2 shares"),
        ({"preset": {"solver": "huen"}}, "did you mean 'heun'"),
    ):
        with pytest.raises(ConfigError, match=said):
            draw_set(model, extractor, num=2, **given)
    for condition, task in (("inpainting", "--task inpaint"), ("map", "--task mask-to-image")):
        bound = tiny.model(kl, conditioning={**tiny.SPATIAL, f"{condition}_dropout": 0.0})
        with pytest.raises(ConfigError, match=task):
            draw_set(bound, extractor, num=2, work=Work(folder=tmp_path / "set"))
    assert not (tmp_path / "set").exists()


def test_latents_that_are_not_finite_are_never_scored(kl, extractor, tmp_path):
    broken = tiny.model(kl)
    next(broken.network.parameters()).data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="seed 3 "):
        draw_set(broken, extractor, num=2, seed=3, work=Work(folder=tmp_path / "set"))
    assert [file.name for file in (tmp_path / "set").iterdir()] == ["plan.json"]
