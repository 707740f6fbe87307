"""The wheel: built from a clean copy, installed in a fresh environment, and used far from the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "latentflow"
BUILD_INPUT = ("pyproject.toml", "README.md", "LICENSE")

READ_PACKAGE_DATA = """
import latentflow
from latentflow.api import LatentFlow
from latentflow.autoencoder import Autoencoder
from latentflow.convert.published import imagenet_synsets
from latentflow.model.card import model_card
from latentflow.model.conditioning import Conditioning
from latentflow.model.config import AutoencoderRecord, ModelConfig
from latentflow.networks.dit import DiTConfig

autoencoder = Autoencoder.from_pretrained("shapes")
config = ModelConfig(
    image_size=64,
    network=DiTConfig(depth=1, hidden_size=32, num_heads=2, patch_size=2),
    conditioning=Conditioning(),
    autoencoder=AutoencoderRecord.of(autoencoder),
    normalisation=autoencoder.normalisation,
)
images = LatentFlow(config, config.build_network(), autoencoder).sample(num=1, steps=1, solver="euler").images
assert images[0].size == (64, 64)
assert "# A latent flow-matching model" in model_card(config)
assert len(imagenet_synsets()) == 1000
print(latentflow.__file__)
"""


def run(*command: object, cwd: Path) -> str:
    """What a command prints; it sees neither the repository nor its environment."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing of an earlier build gets in."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    shutil.copytree(PACKAGE, copy / "src" / "latentflow", ignore=shutil.ignore_patterns("__pycache__"))
    for name in BUILD_INPUT:
        shutil.copy(ROOT / name, copy / name)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check")
    run(*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", folder, copy, cwd=folder)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The `bin` folder of a fresh environment with the wheel, which borrows only the dependencies of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    site_packages = Path(purelib.strip())
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "borrowed.pth").write_text("\n".join(borrowed), encoding="utf-8")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "--no-deps", "--no-index", "--force-reinstall", wheel, cwd=folder)
    return folder / "bin"


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    files = {path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    expected = {name for name in files if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == expected
    assert any(name.endswith(".yaml") for name in found)
    assert any(name.endswith(".safetensors") for name in found)
    assert any(name.endswith(".j2") for name in found)


def test_the_command_works(installed, tmp_path):
    assert "sample" in run(installed / "latentflow", "--help", cwd=tmp_path)
    recipes = json.loads(run(installed / "latentflow", "recipes", "--json", cwd=tmp_path))
    assert len(recipes) == len([*(PACKAGE / "recipes").rglob("*.yaml")])


def test_the_package_data_is_read(installed, tmp_path):
    place = run(installed / "python", "-c", READ_PACKAGE_DATA, cwd=tmp_path).strip()
    assert Path(place).is_relative_to(installed.parent)
