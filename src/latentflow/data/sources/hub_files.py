"""Data sets on the Hugging Face hub: which files of a repository are downloaded.

Written as hf:owner/name, with a revision, a configuration and a split behind it if need be:
hf:owner/name@revision/configuration:split.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from latentflow.data.stores.files import pictures_among
from latentflow.data.stores.layout import split_of
from latentflow.errors import ArtifactError, DataError, nearest
from latentflow.hub import HubId, fetch_dataset, files_of_dataset

HUB_PREFIX = "hf:"
_CONVERTED = "refs/convert/parquet"
"""The branch on which the hub keeps data sets of other forms as parquet."""

_WRITTEN = re.compile(r"(?P<repo>[^/@:]+/[^/@:]+)(@(?P<revision>[^:]+?))?(/(?P<config>[^/@:]+))?(:(?P<split>[^/@:]+))?")
_SHARD = re.compile(r"(?P<split>.+?)-\d+-of-\d+(-\w+)?")
_NUMBER = re.compile(r"[\d_-]+")
_NO_CONFIG = ("", "data", "default")


@dataclass(frozen=True)
class HubDataset:
    """A data set as it is asked for; a configuration or split of None is the usual one."""

    source: HubId
    config: str | None
    split: str | None

    @classmethod
    def parse(cls, text: str) -> HubDataset:
        """Parse what stands behind "hf:".

        Raises:
            DataError: it is malformed.
        """
        found = _WRITTEN.fullmatch(text)
        if found is None:
            raise DataError(
                f"{HUB_PREFIX}{text} is not a data set like hf:owner/name, hf:owner/name:test or "
                "hf:owner/name@revision/configuration:split"
            )
        source = HubId.parse(found["repo"], found["revision"])
        return cls(replace(source, kind="dataset"), found["config"], found["split"])


def fetch_hub_files(asked: HubDataset) -> tuple[Path, list[Path]]:
    """Download the files of a data set: parquet, else what the hub has made of it, else tar shards, else the images.

    Returns:
        The folder of the repository, and the files of rows or archives in it; of images in files none.

    Raises:
        DataError: it has no such configuration or split, or several and none is named; or nothing that can be read.
        ArtifactError: it cannot be reached.
    """
    source, names = asked.source, files_of_dataset(asked.source)
    shards = _ending(names, ".parquet")
    images = pictures_among(names)
    if not shards and not _ending(names, ".tar") and not images and source.revision is None:
        source = replace(source, revision=_CONVERTED)
        with suppress(ArtifactError):  # not every data set has been converted
            shards = _ending(files_of_dataset(source), ".parquet")
    shards = shards or _ending(names, ".tar")
    if not shards and not images:
        raise DataError(f"{source.page} holds no parquet, tar archives or images; download and convert it yourself")
    if not shards:
        return fetch_dataset(source, names), []
    chosen = chosen_shards(shards, asked, source.page)
    folder = fetch_dataset(source, chosen)
    return folder, [folder / name for name in chosen]


def chosen_shards(names: Sequence[str], asked: HubDataset, where: str) -> list[str]:
    """The shards of the configuration and split that are asked for, or of the usual ones.

    Raises:
        DataError: there is no such one, or it is not clear which.
    """
    configs = sorted({_config_of(name) for name in names})
    config = _one(configs, asked.config, _NO_CONFIG, "configurations", f"{HUB_PREFIX}{asked.source}/NAME", where)
    names = [name for name in names if _config_of(name) == config]
    splits = sorted({_split_of(name) for name in names})
    split = _one(splits, asked.split, ("train", ""), "splits", f"{HUB_PREFIX}{asked.source}:NAME", where)
    return [name for name in names if _split_of(name) == split]


def _one(names: Sequence[str], asked: str | None, usual: Sequence[str], what: str, written: str, where: str) -> str:
    if asked is not None:
        if asked not in names:
            raise DataError(f"{where} has no {what.removesuffix('s')} {asked!r}; {nearest(asked, filter(None, names))}")
        return asked
    found = next((name for name in usual if name in names), names[0] if len(names) == 1 else None)
    if found is None:
        raise DataError(f"{where} has the {what} {', '.join(names[:8])}; name one of them: {written}")
    return found


def _config_of(name: str) -> str:
    """The folder that a file's configuration is called by: "cats" of cats/train/0000.parquet."""
    first = PurePosixPath(name).parts[0] if "/" in name else ""
    return "" if first in _NO_CONFIG or split_of(first) == first else first


def _split_of(name: str) -> str:
    path = PurePosixPath(name)
    if found := _SHARD.fullmatch(path.stem):
        return found["split"]
    if _NUMBER.fullmatch(path.stem) and len(path.parts) > 1:
        return path.parent.name
    return split_of(name)


def _ending(names: Sequence[str], suffix: str) -> list[str]:
    return [name for name in names if name.lower().endswith(suffix)]
