"""What a program meets is typed: mypy in strict mode, on the files that pyproject.toml lists."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
FILES = re.findall(r'^    "((?:src|tests)/.*\.py)",$', PYPROJECT, re.MULTILINE)


def mypy(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it; what it has learned of torch stays in .mypy_cache, without which it takes many seconds."""
    pinned = re.search(r"^mypy==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[1]
    if find_spec("mypy") is None or version("mypy") != pinned:
        pytest.skip(f"needs mypy {pinned}; other versions find other errors")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(ROOT / ".mypy_cache"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)


def test_the_public_surface_is_strictly_typed():
    done = mypy()
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"no issues found in {len(FILES)} source files" in done.stdout


def test_the_list_has_what_users_meet():
    assert {f"src/latentflow/{name}.py" for name in ("api", "autoencoder", "sampling/samples", "flow/solvers")} < set(
        FILES
    )
    assert "tests/typed_program.py" in FILES
    assert all((ROOT / name).is_file() for name in FILES)


def test_a_program_with_mistakes_is_refused(tmp_path):
    """The comments in it that expect errors are not idle: without them there are as many errors."""
    text = (ROOT / "tests" / "typed_program.py").read_text(encoding="utf-8")
    bare, expected = re.subn(r"  # type: ignore\[.*\]", "", text)
    (tmp_path / "bare.py").write_text(bare, encoding="utf-8")
    done = mypy(str(tmp_path / "bare.py"))
    assert done.stdout.count(" error: ") == expected > 4, done.stdout


def test_type_checkers_look_into_the_installed_package():
    assert (ROOT / "src" / "latentflow" / "py.typed").is_file()
    assert '"py.typed"' in PYPROJECT.partition("[tool.setuptools.package-data]")[2].partition("\n\n")[0]
