"""Reference statistics on disk: own files, files of other programs, files that are programs."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from latentflow.artifacts import write_tensors
from latentflow.errors import ArtifactError, DataError
from latentflow.metrics.foreign_statistics import read_pickled_arrays
from latentflow.metrics.statistics import FeatureStatistics
from latentflow.metrics.stored_statistics import Provenance, Reference, load_reference
from tests.conftest import Bomb

MEAN = np.array([1.0, -2.0, 0.5])
COVARIANCE = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.25], [0.0, 0.25, 3.0]])
PROTOCOLS = [2, 3, 4, 5]


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


def write_npy(file: Path, content, protocol: int) -> Path:
    """What `numpy.save` writes of an object, with a protocol of our choice."""
    saved = np.empty((), dtype=object)
    saved[()] = content
    return write_program(file, pickle.dumps(saved, protocol=protocol))


def write_program(file: Path, program: bytes) -> Path:
    """A .npy file of one object whose pickle is `program`."""
    with file.open("wb") as written:
        np.lib.format.write_array_header_1_0(written, {"descr": "|O", "fortran_order": False, "shape": ()})
        written.write(program)
    return file


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
        with pytest.raises(DataError, match="scores would mean nothing"):
            reference.require_same_features(name, hash, 3)
    with pytest.raises(DataError, match="3 features per image and random gives 5"):
        reference.require_same_features("random", "f" * 64, 5)
    unknown = Reference(statistics, provenance(feature_hash=""))
    assert "is taken to be inception" in unknown.require_same_features("inception", "0" * 64, 3)


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
    with pytest.raises(ArtifactError, match=r"end in \.safetensors, \.npz or \.npy"):
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


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_npy_with_a_dictionary(tmp_path, protocol):
    assert_foreign(load_reference(write_npy(tmp_path / "a.npy", {"mu": MEAN, "sigma": COVARIANCE}, protocol)))


def test_npy_as_numpy_saves_it(tmp_path):
    np.save(tmp_path / "stats.npy", {"mu": MEAN, "sigma": COVARIANCE}, allow_pickle=True)
    assert (tmp_path / "stats.npy").read_bytes() in [
        write_npy(tmp_path / "a.npy", {"mu": MEAN, "sigma": COVARIANCE}, protocol).read_bytes()
        for protocol in PROTOCOLS
    ]
    assert_foreign(load_reference(tmp_path / "stats.npy"))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_of_every_kind(tmp_path, protocol):
    content = {
        "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
        "columns first": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "every second": np.arange(10.0)[::2],
        "other byte order": np.arange(4, dtype=">f8"),
        "integers": np.array([-1, 300], dtype=np.int16),
        "truth": np.array([True, False]),
        "single": np.float64(0.25),
        "plain": 7,
        "large": np.random.default_rng(0).standard_normal((70, 70)),
        "empty": np.zeros((0, 3)),
    }
    content["twice"] = content["float32"]
    found = read_pickled_arrays(write_npy(tmp_path / "a.npy", content, protocol))
    assert list(found) == list(content)
    for name, values in content.items():
        np.testing.assert_array_equal(found[name], values)
        assert found[name].dtype.newbyteorder("=") == np.asarray(values).dtype.newbyteorder("=")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_names_of_older_numpy(tmp_path, protocol):
    file = write_npy(tmp_path / "a.npy", {"mu": MEAN}, protocol)
    content = file.read_bytes().replace(b"numpy._core", b"numpy.core")
    if protocol >= 4:  # the length of the name, and of the frame, stand before it
        for module in (b"numpy.core.multiarray", b"numpy.core.numeric"):
            content = content.replace(bytes([len(module) + 1]) + module, bytes([len(module)]) + module)
        frame = content.index(b"\x95") + 1
        size = int.from_bytes(content[frame : frame + 8], "little") - 1
        content = content[:frame] + size.to_bytes(8, "little") + content[frame + 8 :]
    file.write_bytes(content)
    assert b"numpy.core." in content
    np.testing.assert_array_equal(read_pickled_arrays(file)["mu"], MEAN)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("place", ["instead", "inside", "beside"])
def test_a_program_is_not_run(tmp_path, protocol, place):
    trace = tmp_path / "exploded"
    bomb = Bomb(trace)
    content = {"instead": bomb, "inside": {"mu": bomb}, "beside": {"mu": MEAN, "sigma": COVARIANCE, "x": [bomb]}}[place]
    file = write_npy(tmp_path / "a.npy", content, protocol)
    with pytest.raises(ArtifactError, match="was not read: it holds"):
        load_reference(file)
    assert not trace.exists()


def test_a_command_line_is_not_run_and_is_named(tmp_path):
    class Command:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'exploded'}",)

    with pytest.raises(ArtifactError, match=r"the name (posix|nt)\.system"):
        read_pickled_arrays(write_npy(tmp_path / "a.npy", {"mu": Command()}, 4))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"cbuiltins\neval\n(S'1'\ntR.", r"the name builtins\.eval"),
        (b"cnumpy\nload\n.", r"the name numpy\.load"),
        (b"cnumpy.core.multiarray\n_reconstruct\n)R.", "a call of 'reconstruct'"),
        (b"cnumpy\nndarray\n)R.", "a call of 'ndarray'"),
        (b"cnumpy\nndarray\n)\x81.", "instruction NEWOBJ"),
        (b"}(K\x01K\x02u.", "no dictionary"),
        (b"K\x01.", "no dictionary"),
        (b"]K\x01K\x02s.", "items of a list"),
        (b"}K\x01a.", "an item of a dict"),
        (b"}}b.", "a dict with a state"),
        (b"(lp0\n.", "instruction LIST"),
        (b"}(K\x01u.", "is damaged"),
        (b"h\x05.", "is damaged"),
        (b"0.", "instruction POP"),
        (b"}", "is damaged"),
        (b"", "is damaged"),
        (b")" * 20_000 + b".", "far more"),
    ],
)
def test_other_programs_are_refused(tmp_path, program, message):
    with pytest.raises(ArtifactError, match=message):
        read_pickled_arrays(write_program(tmp_path / "a.npy", program))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([MEAN], "no dictionary"),
        ({1: MEAN}, "an entry 1 that is no array"),
        ({"mu": [1.0]}, "an entry 'mu' that is no array"),
        ({"mu": np.array(["a", "b"])}, "elements of type 'U1'"),
        ({"mu": np.array([{}], dtype=object)}, "an array of objects"),
        ({"mu": np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])}, "elements of type 'V12'"),
    ],
)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_other_contents_are_refused(tmp_path, content, message, protocol):
    with pytest.raises(ArtifactError, match=message):
        read_pickled_arrays(write_npy(tmp_path / "a.npy", content, protocol))


def test_arrays_that_lie_about_themselves(tmp_path):
    file = write_npy(tmp_path / "a.npy", {"mu": MEAN}, 4)
    content = file.read_bytes()
    three_values = content.index(b"K\x01K\x03\x85") + 3
    file.write_bytes(content[:three_values] + b"\xff" + content[three_values + 1 :])
    with pytest.raises(ArtifactError, match=r"24 bytes for an array of shape \(255,\)"):
        read_pickled_arrays(file)


def test_files_without_what_is_needed(tmp_path):
    np.save(tmp_path / "array.npy", MEAN)
    with pytest.raises(ArtifactError, match="no dictionary, but an array"):
        load_reference(tmp_path / "array.npy")
    np.savez(tmp_path / "mean.npz", mu=MEAN, other=MEAN)
    with pytest.raises(ArtifactError, match="no sigma, but mu"):
        load_reference(tmp_path / "mean.npz")
    np.savez(tmp_path / "objects.npz", mu=np.array([{}], dtype=object), sigma=COVARIANCE)
    with pytest.raises(ArtifactError, match="damaged"):
        load_reference(tmp_path / "objects.npz")
    np.savez(tmp_path / "unlike.npz", mu=MEAN, sigma=COVARIANCE[:2, :2])
    with pytest.raises(ArtifactError, match="do not belong together"):
        load_reference(tmp_path / "unlike.npz")
    for name in ("text.npz", "text.npy"):
        (tmp_path / name).write_text("no statistics")
        with pytest.raises(ArtifactError, match="damaged"):
            load_reference(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as archive:
        archive.writestr("mu.npy", b"\x93NUMPY")
        archive.writestr("sigma.npy", b"\x93NUMPY")
    with pytest.raises(ArtifactError, match="damaged"):
        load_reference(tmp_path / "zip.npz")
    for name in ("absent.npz", "absent.npy"):
        with pytest.raises(ArtifactError, match="No such file"):
            load_reference(tmp_path / name)
