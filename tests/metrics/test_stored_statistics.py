"""Reference statistics on disk: our files, those of other programs, and those that could run code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from latentflow.artifacts import write_tensors
from latentflow.errors import ArtifactError, DataError
from latentflow.metrics.statistics import FeatureStatistics
from latentflow.metrics.stored_statistics import Provenance, Reference, load_reference
from tests.conftest import Bomb

MEAN = np.array([1.0, -2.0, 0.5])
COVARIANCE = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.25], [0.0, 0.25, 3.0]])


def provenance(**changed) -> Provenance:
    given = {
        "data": "18 images in 3 classes from fruit",
        "fingerprint": "abc",
        "image_size": 64,
        "resize": "centre crop",
        "feature_name": "random",
        "feature_hash": "f" * 64,
    }
    return Provenance(**{**given, **changed})


@pytest.fixture
def statistics() -> FeatureStatistics:
    return FeatureStatistics.of(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)))


def test_own_files_keep_everything(statistics, tmp_path):
    Reference(statistics, provenance()).save(tmp_path / "reference.safetensors")
    loaded = load_reference(tmp_path / "reference.safetensors")
    assert loaded.provenance == provenance()
    assert loaded.statistics.n == 20
    assert torch.equal(loaded.statistics.mean, statistics.mean)
    torch.testing.assert_close(loaded.statistics.covariance, statistics.covariance, rtol=1e-14, atol=0)


def test_features_must_be_the_same(statistics):
    reference = Reference(statistics, provenance())
    assert reference.require_same_features("random", "f" * 64, 3) is None
    for name, hash in (("inception", "f" * 64), ("random", "0" * 64)):
        with pytest.raises(DataError, match="scores would be meaningless"):
            reference.require_same_features(name, hash, 3)
    with pytest.raises(DataError, match="3 features per image and random gives 5"):
        reference.require_same_features("random", "f" * 64, 5)
    unknown = Reference(statistics, provenance(feature_hash=""))
    assert "assuming inception" in unknown.require_same_features("inception", "0" * 64, 3)


def test_other_files_are_no_references(statistics, tmp_path):
    write_tensors(tmp_path / "weights.safetensors", {"weight": torch.zeros(2)})
    with pytest.raises(ArtifactError, match="other tensors"):
        load_reference(tmp_path / "weights.safetensors")
    Reference(statistics, provenance()).save(tmp_path / "cut.safetensors")
    content = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-9])
    with pytest.raises(ArtifactError, match="truncated"):
        load_reference(tmp_path / "cut.safetensors")
    write_tensors(tmp_path / "half.safetensors", {"mean": torch.zeros(2)}, {"latentflow.reference": "{}"})
    with pytest.raises(ArtifactError, match=r"half\.safetensors cannot be used.*compute the statistics again"):
        load_reference(tmp_path / "half.safetensors")
    with pytest.raises(ArtifactError, match="does not exist"):
        load_reference(tmp_path / "absent.safetensors")
    with pytest.raises(ArtifactError, match=r"end in \.safetensors or \.npz"):
        load_reference(tmp_path / "statistics.pkl")


def assert_foreign(reference: Reference) -> None:
    assert reference.statistics.mean.tolist() == MEAN.tolist()
    assert reference.statistics.covariance.tolist() == COVARIANCE.tolist()
    assert reference.statistics.n == 0
    assert reference.provenance.feature_hash == ""


def test_npz_of_pytorch_fid(tmp_path):
    np.savez(tmp_path / "stats.npz", mu=MEAN, sigma=COVARIANCE)
    assert_foreign(load_reference(tmp_path / "stats.npz"))
    np.savez_compressed(tmp_path / "packed.npz", mu=MEAN, sigma=COVARIANCE, names=np.array(["a"], dtype=object))
    assert_foreign(load_reference(tmp_path / "packed.npz"))


def test_npy_is_refused_with_a_command_that_works(tmp_path):
    """`numpy.save` pickles a dictionary, as LFM's statistics are; the command in the message makes .npz of it."""
    file = tmp_path / "my stats.npy"
    np.save(file, {"mu": MEAN, "sigma": COVARIANCE}, allow_pickle=True)
    with pytest.raises(ArtifactError, match="was not read") as refused:
        load_reference(file)
    command = str(refused.value).partition("save it as .npz with: ")[2]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, shell=True, check=True, env={**os.environ, "PATH": path})
    assert_foreign(load_reference(tmp_path / "my stats.npz"))


@pytest.mark.parametrize("name", ["stats.npy", "stats.npz", "stats.safetensors"])
def test_a_pickle_is_not_run(tmp_path, bomb, name):
    with pytest.raises(ArtifactError, match=re.escape(name)):
        load_reference(bomb(tmp_path / name))


def test_pickled_objects_in_npz_are_not_run(tmp_path):
    trace = tmp_path / "exploded"
    np.savez(tmp_path / "stats.npz", mu=np.array([Bomb(trace)], dtype=object), sigma=COVARIANCE)
    with pytest.raises(ArtifactError, match="damaged"):
        load_reference(tmp_path / "stats.npz")
    assert not trace.exists()


def test_files_without_what_is_needed(tmp_path):
    np.savez(tmp_path / "mean.npz", mu=MEAN, other=MEAN)
    with pytest.raises(ArtifactError, match="no sigma; statistics are"):
        load_reference(tmp_path / "mean.npz")
    np.savez(tmp_path / "unlike.npz", mu=MEAN, sigma=COVARIANCE[:2, :2])
    with pytest.raises(ArtifactError, match="do not belong together"):
        load_reference(tmp_path / "unlike.npz")
    (tmp_path / "text.npz").write_text("no statistics")
    with pytest.raises(ArtifactError, match="damaged"):
        load_reference(tmp_path / "text.npz")
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as archive:
        archive.writestr("mu.npy", b"\x93NUMPY")
        archive.writestr("sigma.npy", b"\x93NUMPY")
    with pytest.raises(ArtifactError, match="damaged"):
        load_reference(tmp_path / "zip.npz")
    for name in ("absent.npz", "absent.npy"):
        with pytest.raises(ArtifactError, match=r"No such file|does not exist"):
            load_reference(tmp_path / name)
