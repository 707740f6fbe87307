"""Statistics of reference images on disk, with everything that must agree before scores may be compared.

Our files are safetensors. The .npz files of pytorch-fid are read, too, but do not say how they were made.
"""

from __future__ import annotations

import shlex
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
from latentflow.metrics.statistics import FeatureStatistics
from latentflow.records import Record
from latentflow.sizes import ImageSize

_KEY = "latentflow.reference"
FOREIGN_SUFFIXES = (".npz", ".npy")
_RESAVE = "import sys, numpy; numpy.savez(sys.argv[2], **numpy.load(sys.argv[1], allow_pickle=True).item())"
"""What a user runs to turn a .npy file into .npz; never run here."""


class Provenance(Record):
    """How reference statistics were made."""

    data: str
    """The images and their number in one line."""
    fingerprint: str
    """`ImageSource.fingerprint` of the images; "" if not known."""
    image_size: ImageSize
    """To which images were cropped and resized before feature extraction; 0 if not known."""
    resize: str
    """How they were resized."""
    feature_name: str
    """`FeatureExtractor.name`."""
    feature_hash: str
    """`FeatureExtractor.hash`; "" if not known, as in files of other programs."""
    schema_version: int = 1


@dataclass(frozen=True)
class Reference:
    """Statistics and how they were made."""

    statistics: FeatureStatistics
    provenance: Provenance

    def save(self, path: str | Path) -> None:
        """Write a .safetensors file, complete or not at all."""
        write_tensors(path, self.statistics.state(), {_KEY: self.provenance.model_dump_json()})

    def require_same_features(self, name: str, hash: str, dim: int) -> str | None:
        """Refuse a feature network other than the one the reference was made with.

        Returns:
            A warning if the file does not name its network, so that only the number of features could be compared.

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
            return f"{made.data} does not say which feature network it was made with; assuming {name}"
        if (made.feature_name, made.feature_hash) != (name, hash):
            raise DataError(
                f"the reference was made with features {made.feature_name} ({made.feature_hash[:12]}), these are "
                f"{name} ({hash[:12]}): scores would be meaningless; compute the reference again"
            )
        return None


def load_reference(path: str | Path) -> Reference:
    """Read statistics from a .safetensors file of ours, or from a .npz file with arrays `mu` and `sigma`.

    Raises:
        ArtifactError: the file is missing, damaged or of another kind. A .npy file, in which `mu` and `sigma` can only
            be pickled, is refused with the command that turns it into .npz.
    """
    path = Path(path)
    if path.suffix == ".npy":
        raise ArtifactError(_refusal(path) if path.exists() else f"{path} does not exist")
    if path.suffix == ".npz":
        return _foreign(path)
    if path.suffix != ".safetensors":
        raise ArtifactError(f"{path} is not a file of statistics; those end in .safetensors or .npz")
    with open_tensors(path) as file:
        text = (file.metadata() or {}).get(_KEY)
        if text is None:
            raise ArtifactError(f"{path} holds other tensors, not reference statistics")
        try:
            tensors = checked_tensors(file, path)
            return Reference(FeatureStatistics.from_state(tensors), Provenance.model_validate_json(text))
        except (ValidationError, SafetensorError, DataError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ArtifactError(f"{path} cannot be used: {reason}; compute the statistics again") from error


def _refusal(path: Path) -> str:
    files = shlex.join([str(path), str(path.with_suffix(".npz"))])
    return (
        f"{path} was not read: mu and sigma in a .npy file are a pickle, which can run code. If you trust the file, "
        f'save it as .npz with: python -c "{_RESAVE}" {files}'
    )


def _foreign(path: Path) -> Reference:
    arrays = _npz(path)
    if missing := {"mu", "sigma"} - arrays.keys():
        raise ArtifactError(
            f"{path} has no {' and no '.join(sorted(missing))}; statistics are an array mu of D values and an array "
            "sigma of D x D values"
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
        with np.load(path) as file:  # which refuses pickled objects by default
            return {name: file[name] for name in ("mu", "sigma") if name in file.files}
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ArtifactError(f"{path} is damaged, or not written by numpy.savez ({error})") from error
