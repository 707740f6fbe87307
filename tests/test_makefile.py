"""`make` checks Python before it makes anything, and a half-made environment is made again."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PYTHON = """#!/bin/sh
# A Python that says which version it is, and whose environments hold a Python that installs nothing.
case "$2" in
*ensurepip*) exit {without_venv} ;;
*version_info*) exec "{python}" -c "import sys; sys.version_info = {version} + (0, 'final', 0); $2" ;;
venv) rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; echo "made by {version}" > "$4/made" ;;
pip) echo "$@" >> "$(dirname "$0")/../made" ;;
esac
"""


@pytest.fixture
def project(tmp_path) -> Path:
    """What `make` needs of the project, in a place with a space and an umlaut."""
    folder = tmp_path / "ein Pfad mit ü"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "constraints-oldest.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


def make(
    project: Path, version: tuple[int, int] | None, target: str = ".venv/installed", without_venv: int = 0
) -> subprocess.CompletedProcess:
    """`make .venv/installed` by a Python of some version, or by one that is not there."""
    if version is not None:
        file = project / "python"
        file.write_text(
            PYTHON.format(python=sys.executable, version=version, without_venv=without_venv), encoding="utf-8"
        )
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(
        ["make", "PYTHON=./python", target],
        cwd=project,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
        check=False,
    )


@pytest.mark.parametrize("version", [(2, 7), (3, 9), (3, 14)])
def test_another_python_is_refused_before_anything_is_made(project, version):
    done = make(project, version)
    assert done.returncode == 2
    said = f"latentflow needs Python 3.10 to 3.13, and ./python is {version[0]}.{version[1]}; "
    assert done.stderr.splitlines()[0].startswith(said)
    assert "make PYTHON=python3.11 .venv/installed" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (project / ".venv").exists()


def test_no_python_is_reported(project):
    done = make(project, None)
    assert done.returncode == 2
    assert done.stderr.startswith("there is no ./python that runs here; ")
    assert not (project / ".venv").exists()


def test_a_python_that_does_not_run_is_reported(project):
    """Managers of versions put stubs in the place of Pythons that are not installed."""
    (project / "python").write_text("#!/bin/sh\necho 'not installed; try another' >&2\nexit 127\n", encoding="utf-8")
    (project / "python").chmod(0o755)
    done = make(project, None)
    assert done.returncode == 2
    assert done.stderr.startswith("there is no ./python that runs here; ")
    assert not (project / ".venv").exists()


@pytest.mark.parametrize("version", [(3, 10), (3, 13)])
def test_a_half_made_environment_is_made_again(project, version):
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "python").write_text("of another Python", encoding="utf-8")
    done = make(project, version)
    assert done.returncode == 0, done.stderr
    made = (project / ".venv" / "made").read_text(encoding="utf-8").splitlines()
    assert made[0] == f"made by {version}"
    assert "--constraint constraints.txt" in made[1]
    assert (project / ".venv" / "installed").exists()


def test_a_finished_environment_stays(project):
    assert make(project, (3, 11)).returncode == 0
    again = make(project, (3, 11))
    assert again.returncode == 0
    assert "up to date" in again.stdout


def test_a_python_without_environments_is_reported_in_one_line(project):
    done = make(project, (3, 11), without_venv=1)
    assert done.returncode == 2
    said, of_make = done.stderr.splitlines()
    assert said.startswith("./python cannot make environments; install the package python3-venv of your system, or")
    assert said.endswith("make PYTHON=python3.11 .venv/installed")
    assert of_make.startswith("make: ***")
    assert not (project / ".venv").exists()


def test_the_oldest_versions_have_their_own_environment(project):
    assert make(project, (3, 11)).returncode == 0
    assert make(project, (3, 11), ".venv-oldest/installed").returncode == 0
    for name, constraints in ((".venv", "constraints.txt"), (".venv-oldest", "constraints-oldest.txt")):
        made = (project / name / "made").read_text(encoding="utf-8").splitlines()
        assert f"--constraint {constraints} " in made[1]


def test_what_builds_the_documentation_joins_the_environment_of_the_tests(project):
    assert make(project, (3, 11), ".venv/installed-docs").returncode == 0
    tests, docs = (project / ".venv" / "made").read_text(encoding="utf-8").splitlines()[1:]
    assert tests.endswith("--constraint constraints.txt --editable .[dev]")
    assert docs.endswith("--constraint constraints.txt --editable .[docs]")
    assert "up to date" in make(project, (3, 11), ".venv/installed-docs").stdout
