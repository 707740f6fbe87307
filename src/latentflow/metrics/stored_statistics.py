"""Statistics of reference images on disk, with all that must agree before a score may be compared.

Own files are safetensors; those of pytorch-fid (.npz) and of LFM (.npy) are read too, but say nothing of their origin.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError

from latentflow.artifacts import checked_tensors, open_tensors, write_tensors
from latentflow.errors import ArtifactError, DataError
from latentflow.metrics.foreign_statistics import read_pickled_arrays
from latentflow.metrics.statistics import FeatureStatistics
from latentflow.records import Record

_KEY = "latentflow.reference"
FOREIGN_SUFFIXES = (".npz", ".npy")


class Provenance(Record):
    """Where reference statistics come from."""

    data: str
    """One line for people: the images and how many there are."""
    fingerprint: str
    """`ImageSource.fingerprint` of the images; "" if it is not known."""
    image_size: int
    """Height and width in pixels that images were brought to before the feature network; 0 if it is not known."""
    resize: str
    """The rule they were brought to that size by."""
    feature_name: str
    """`FeatureExtractor.name`."""
    feature_hash: str
    """`FeatureExtractor.hash`; "" if it is not known, as in files of other programs."""
    schema_version: int = 1


@dataclass(frozen=True)
class Reference:
    """Statistics and where they come from."""

    statistics: FeatureStatistics
    provenance: Provenance

    def save(self, path: str | Path) -> None:
        """Write a .safetensors file, complete or not at all."""
        write_tensors(path, self.statistics.state(), {_KEY: self.provenance.model_dump_json()})

    def require_same_features(self, name: str, hash: str, dim: int) -> str | None:
        """Refuse another feature network than the reference was made with.

        Returns:
            A warning, where the file does not say which network that was and only the number of features agrees.

        Raises:
            DataError: another network, other weights, another preprocessing, or another number of features.
        """
        made = self.provenance
        if self.statistics.dim != dim:
            raise DataError(
                f"the reference has {self.statistics.dim} features per image and {name} gives {dim}: "
                "compute the reference with the same feature network"
            )
        if not made.feature_hash:
            return f"{made.data} does not say which feature network it was made with; it is taken to be {name}"
        if (made.feature_name, made.feature_hash) != (name, hash):
            raise DataError(
                f"the reference was made with features {made.feature_name} ({made.feature_hash[:12]}), these are "
                f"{name} ({hash[:12]}): scores would mean nothing; compute the reference again"
            )
        return None


def load_reference(path: str | Path) -> Reference:
    """Read statistics: an own .safetensors file, or .npz and .npy files with `mu` and `sigma`.

    Nothing is unpickled: see `metrics.pickled`.

    Raises:
        ArtifactError: the file is missing, damaged or of another kind.
    """
    path = Path(path)
    if path.suffix in FOREIGN_SUFFIXES:
        return _foreign(path)
    if path.suffix != ".safetensors":
        raise ArtifactError(f"{path} is no file of statistics; those end in .safetensors, .npz or .npy")
    with open_tensors(path) as file:
        text = (file.metadata() or {}).get(_KEY)
        if text is None:
            raise ArtifactError(f"{path} holds no reference statistics, but other tensors")
        try:
            tensors = checked_tensors(file, path)
            return Reference(FeatureStatistics.from_state(tensors), Provenance.model_validate_json(text))
        except (ValidationError, SafetensorError, DataError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ArtifactError(f"{path} cannot be used: {reason}; compute the statistics again") from error


def _foreign(path: Path) -> Reference:
    arrays = _npz(path) if path.suffix == ".npz" else read_pickled_arrays(path)
    if missing := {"mu", "sigma"} - arrays.keys():
        raise ArtifactError(
            f"{path} has no {' and no '.join(sorted(missing))}, but {', '.join(sorted(arrays)) or 'nothing'}; "
            "statistics are an array mu of D values and an array sigma of D x D"
        )
    try:
        mean, covariance = (torch.from_numpy(arrays[name].astype(np.float64)) for name in ("mu", "sigma"))
        statistics = FeatureStatistics.from_moments(mean.squeeze(), covariance, n=0)
    except (DataError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be used: {error}") from error
    unknown = Provenance(
        data=f"the statistics file {path.name}",
        fingerprint="",
        image_size=0,
        resize="not known",
        feature_name="not known",
        feature_hash="",
    )
    return Reference(statistics, unknown)


def _npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:  # objects are refused unless numpy is told otherwise
            return {name: file[name] for name in ("mu", "sigma") if name in file.files}
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ArtifactError(f"{path} is damaged, or not written by numpy.savez ({error})") from error
