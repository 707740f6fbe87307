"""The names of the models that a run kept on its way."""

from fractions import Fraction

import pytest

from latentflow.api import LatentFlow
from latentflow.errors import ArtifactError
from latentflow.model.flow_model import find_model
from latentflow.model.snapshots import find_snapshot, snapshot_steps, split_snapshot, step_of_share
from tests import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory, kl):
    """A run of 1,000 steps with models of the steps 62 and 125, and a checkpoint without one."""
    run = tmp_path_factory.mktemp("runs") / "fruit"
    for step in (62, 125):
        tiny.model(kl, seed=step).save_pretrained(run / "checkpoints" / f"step-{step:08d}" / "model")
    (run / "checkpoints" / "step-00001000").mkdir()
    tiny.model(kl).save_pretrained(run / "model")
    (run / "recipe.yaml").write_text("training:\n  steps: 1000\n", encoding="utf-8")
    return run


@pytest.mark.parametrize(
    ("share", "steps", "step"),
    [(0.0625, 1000, 62), (0.125, 1000, 125), (0.29, 100, 29), (Fraction(1, 3), 100, 33), (0.125, 7, 0)],
)
def test_a_share_is_rounded_down_and_a_decimal_number_is_exact(share, steps, step):
    """0.29 * 100 is below 29 in floating point."""
    assert step_of_share(share, steps) == step


@pytest.mark.parametrize(
    ("name", "step"), [("1/16", 62), ("0.0625", 62), ("1/8", 125), ("125", 125), ("0000125", 125), ("2/16", 125)]
)
def test_names_of_a_snapshot(run, name, step):
    folder = run / "checkpoints" / f"step-{step:08d}" / "model"
    assert find_snapshot(run, name) == find_model(f"{run}@{name}") == folder
    loaded = LatentFlow.from_pretrained(f"{run}@{name}", device="cpu")
    assert loaded.reference == f"{run}@{name}"
    assert loaded.weights_hash == LatentFlow.from_pretrained(folder, device="cpu").weights_hash


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("1000", "no snapshot of step 1000 .*it has those of the steps 62, 125"),
        ("1/4", "no snapshot of step 250 "),
        ("last", "a snapshot is a step, such as .*@1000, a share of the run, such as .*@1/8, or .*@best"),
        ("best", "no snapshot of the lowest held-out loss .*data.held_out"),
        ("1/0", "a snapshot is a step"),
        ("-1", "a snapshot is a step"),
        ("", "a snapshot is a step"),
    ],
)
def test_other_names_are_refused(run, name, said):
    with pytest.raises(ArtifactError, match=said):
        find_model(f"{run}@{name}")


def test_a_run_without_snapshots_or_recipe(tmp_path):
    with pytest.raises(ArtifactError, match=r"no snapshot of step 5 .*it has none; training.keep_at"):
        find_snapshot(tmp_path, "5")
    with pytest.raises(ArtifactError, match=r"@1/8: .*recipe.yaml does not say how many steps.*name the step"):
        find_snapshot(tmp_path, "1/8")


def test_a_folder_with_an_at_sign_is_itself(run, tmp_path, kl):
    folder = tmp_path / "fruit@1000"
    tiny.model(kl, seed=3).save_pretrained(folder)
    (tmp_path / "fruit").mkdir()
    assert split_snapshot(folder) is None
    assert find_model(folder) == folder
    assert split_snapshot("owner/name@main") is None
    assert split_snapshot("@1/8") is None
    assert snapshot_steps(run) == [62, 125]
