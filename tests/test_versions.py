"""Versions agree wherever they stand: ranges and pins, linter, citation; continuous integration runs what we run."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import latentflow

ROOT = Path(__file__).parents[1]
UNTESTED = {"torch", "ruff", "mypy", "types-PyYAML", "setuptools"}
UNTESTED |= {"mkdocs-material", "mkdocstrings-python", "griffe-pydantic", "latex2mathml"}
"""torch: no build of its oldest release for the CPU; the others compute nothing."""


def _pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {pin.name.lower(): Version(next(iter(pin.specifier)).version) for pin in pins}


def _ranges() -> list[Requirement]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return [Requirement(found) for found in re.findall(r'"([a-zA-Z_0-9-]+>=[^"]+)"', text)]


def test_the_oldest_set_is_where_the_ranges_begin():
    oldest = _pins("constraints-oldest.txt")
    ranges = [one for one in _ranges() if one.name not in UNTESTED]
    assert {one.name.lower() for one in ranges} == oldest.keys()
    for one in ranges:
        lower = next(Version(bound.version) for bound in one.specifier if bound.operator == ">=")
        assert oldest[one.name.lower()] == lower, one.name


def test_the_usual_set_is_inside_the_ranges():
    usual = _pins("constraints.txt")
    for one in _ranges():
        if one.name.lower() in usual:
            assert one.specifier.contains(usual[one.name.lower()]), one.name
    assert {"torch", "diffusers", "pillow"} <= usual.keys()


def test_the_linter_of_pre_commit_is_that_of_the_tests():
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    (revision,) = re.findall(r"ruff-pre-commit\n    rev: v(\S+)", text)
    assert Version(revision) == _pins("constraints.txt")["ruff"]


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == latentflow.__version__
    assert cited["license"] in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_continuous_integration_runs_the_two_commands_of_the_makefile():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "checks.yml").read_text(encoding="utf-8"))
    ran = [step["run"] for step in workflow["jobs"]["checks"]["steps"] if "run" in step]
    assert ran == ["make test", "make docs"]
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-2:] == ran
