from __future__ import annotations

import pytest

from latentflow.artifacts import read_json
from latentflow.errors import ArtifactError
from latentflow.plans import PLAN_FILE, changed_values, claim_folder, require_same_plan, spelled_out

PLAN = {"seed": 0, "rules": {"folder": "holes", "share": 0.5}}


def test_the_first_plan_is_written_and_later_ones_find_it(tmp_path):
    assert claim_folder(tmp_path / "out", PLAN, "a search") == PLAN
    assert claim_folder(tmp_path / "out", {**PLAN, "seed": 1}, "a search") == PLAN
    assert read_json(tmp_path / "out" / PLAN_FILE) == PLAN


def test_a_folder_with_something_else_is_refused_and_left_as_it_was(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"is not empty \(thesis\.tex, \.\.\.\) and does not hold a search; choose"):
        claim_folder(tmp_path, PLAN, "a search")
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("content", ["[]", "{"])
def test_a_damaged_plan_is_refused(tmp_path, content):
    (tmp_path / PLAN_FILE).write_text(content, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"plan\.json is"):
        claim_folder(tmp_path, PLAN, "a search")


def test_another_plan_is_refused_with_the_settings_that_differ(tmp_path):
    require_same_plan(tmp_path, PLAN, PLAN, "a search")
    wanted = {"seed": 1, "rules": {"folder": "moved", "share": 0.25}, "strict": True}
    with pytest.raises(
        ArtifactError,
        match=r'holds a search with other settings \(rules\.folder: "holes", now "moved"; rules\.share: 0\.5, now '
        r"0\.25; seed: 0, now 1 and 1 more\); choose another --out, or delete the folder",
    ):
        require_same_plan(tmp_path, PLAN, wanted, "a search")


def test_free_settings_may_differ(tmp_path):
    wanted = {"seed": 1, "rules": {"folder": "moved", "share": 0.5}}
    require_same_plan(tmp_path, PLAN, wanted, "a search", free=["seed", "rules.folder"])
    with pytest.raises(ArtifactError, match=r"\(seed: 0, now 1\)"):
        require_same_plan(tmp_path, PLAN, wanted, "a search", free=["rules.folder"])


def test_changes_are_spelled_out():
    changed = changed_values({"a": {"b": 1, "c": 2}, "d": None}, {"a": {"b": 1, "c": [3]}})
    assert changed == {"a.c": (2, [3])}
    assert spelled_out(changed) == "a.c: 2, now [3]"
