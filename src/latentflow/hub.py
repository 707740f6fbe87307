"""Fetch and push model folders on the Hugging Face hub, with one-line errors.

Endpoint, cache, token and offline mode are those of huggingface_hub: HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from textwrap import shorten
from typing import Literal

from latentflow.artifacts import read_json
from latentflow.errors import ArtifactError, ConfigError

CARD_FILE = "README.md"
CARD_NAME = "PATH_OF_THIS_FOLDER"
"""Stands for the model in its card; a push replaces it by the hub id."""

PIPELINE_FILE = "model_index.json"  # every diffusers pipeline has it
_LOG_IN = "`hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class HubId:
    """A repository `owner/name`, and a branch, tag or commit; None: the default branch."""

    repo: str
    revision: str | None = None
    kind: Literal["model", "dataset"] = "model"

    @classmethod
    def parse(cls, text: str, revision: str | None = None) -> HubId:
        """Parse `owner/name` or `owner/name@revision`; the revision may also be given separately.

        Raises:
            ConfigError: the id is malformed, or there are two revisions.
        """
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        repo, at, inner = text.partition("@")
        try:
            validate_repo_id(repo)
        except HFValidationError:
            repo = ""
        revisions = [name for name in (inner, revision) if name]
        if "/" not in repo or (at and not inner) or not all(_is_ref(name) for name in revisions):
            raise ConfigError(f"{text!r} is not a hub id like 'owner/name' or 'owner/name@revision'")
        if inner and revision and inner != revision:
            raise ConfigError(f"{text!r} and revision {revision!r} are two revisions; give one")
        return cls(repo, inner or revision)

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo

    def pinned(self, snapshot: Path) -> str:
        """The id with the commit that `fetch` downloaded, which names the folder of the snapshot."""
        return f"{self.repo}@{snapshot.name}"

    @property
    def url(self) -> str:
        """Its page on the hub."""
        return self.page + (f"/tree/{self.revision}" if self.revision else "")

    @property
    def page(self) -> str:
        """Its page, whatever the revision."""
        return f"{_endpoint()}/{'datasets/' if self.kind == 'dataset' else ''}{self.repo}"


def fetch(source: HubId, patterns: Sequence[str]) -> Path:
    """Download the files of a repository that match `patterns`, unless they are cached; returns their folder.

    Raises:
        ArtifactError: they are neither in the cache nor available from the hub.
    """
    from huggingface_hub import snapshot_download

    with _explained(source, "read"):
        wanted = [*patterns, PIPELINE_FILE]
        return Path(snapshot_download(source.repo, revision=source.revision, allow_patterns=wanted))


def files_of_dataset(source: HubId) -> list[str]:
    """The names of all files of a data set, sorted; offline those that are in the cache.

    Raises:
        ArtifactError: the data set is neither in the cache nor available from the hub.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    with _explained(source, "read"):
        if not constants.HF_HUB_OFFLINE:
            return sorted(HfApi().list_repo_files(source.repo, revision=source.revision, repo_type="dataset"))
        nothing = {"repo_type": "dataset", "ignore_patterns": "*"}  # but where the cache is
        folder = Path(snapshot_download(source.repo, revision=source.revision, **nothing))
        return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def fetch_dataset(source: HubId, names: Sequence[str]) -> Path:
    """Download some files of a data set, unless they are cached; returns the folder that they lie in.

    Raises:
        ArtifactError: they are neither in the cache nor available from the hub.
    """
    from huggingface_hub import snapshot_download

    exactly = [escape(name) for name in names]
    with _explained(source, "read"):
        folder = snapshot_download(source.repo, revision=source.revision, repo_type="dataset", allow_patterns=exactly)
    return Path(folder)


def looks_like(folder: Path) -> str:
    """What a folder that is not one of our models seems to hold, for an error message."""
    for name in (PIPELINE_FILE, "config.json"):
        if not (folder / name).is_file():
            continue
        config = read_json(folder / name)
        config = config if isinstance(config, dict) else {}
        if "_class_name" in config:
            kind = "pipeline" if name == PIPELINE_FILE else "model"
            return f"it looks like the diffusers {kind} {config['_class_name']}"
        if "model_type" in config:
            return f"it looks like the transformers model {config['model_type']}"
    return f"it holds {', '.join(sorted(file.name for file in folder.iterdir())) or 'nothing of the kind'}"


def require_token(token: str | None = None) -> str:
    """The given token, or the one that huggingface_hub finds.

    Raises:
        ConfigError: there is no token.
    """
    from huggingface_hub import get_token

    token = token or get_token()
    if not token:
        raise ConfigError(f"pushing to {_endpoint()} needs a token with write access: {_LOG_IN}")
    return token


def push_folder(
    folder: Path, target: HubId, patterns: Sequence[str], *, marker: str, private: bool, message: str, token: str
) -> str:
    """Push the files of `folder` that match `patterns` in one commit; returns their page on the hub.

    The repository is created if it does not exist. Remote files that match `patterns` but are not in `folder` belong to
    the model that is replaced, and are deleted. Other remote files are kept, and so is the remote card if `folder` has
    none.

    Args:
        marker: the file that marks a repository as one that may be overwritten.
        private: create the repository private; an existing public one is refused.

    Raises:
        ArtifactError: a file links out of `folder`, the hub refuses or cannot be reached, or the repository holds
            something else.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    files = _files_to_send(folder, patterns)
    contents: dict[str, bytes | str] = {name: str(file) for name, file in files.items()}
    if CARD_FILE in files:
        contents[CARD_FILE] = files[CARD_FILE].read_text(encoding="utf-8").replace(CARD_NAME, str(target)).encode()
    api = HfApi(token=token)
    with _explained(target, "write"):
        api.create_repo(target.repo, private=private or None, exist_ok=True)
        if private and not api.model_info(target.repo).private:
            raise ArtifactError(
                f"{target.repo} exists already and is public; nothing was sent. Make it private at "
                f"{_endpoint()}/{target.repo}/settings, or choose another name"
            )
        if target.revision:
            api.create_branch(target.repo, branch=target.revision, exist_ok=True)
        there = set(api.list_repo_files(target.repo, revision=target.revision))
        if there & {"config.json", PIPELINE_FILE} and marker not in there:
            raise ArtifactError(f"{target.url} holds something else; nothing was sent, choose another name")
        stale = sorted(name for name in there - files.keys() - {CARD_FILE} if _matches(name, patterns))
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        operations += [CommitOperationDelete(name) for name in stale]
        api.create_commit(target.repo, operations, commit_message=message, revision=target.revision)
    return target.url


def _files_to_send(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """The files of `folder` that match `patterns`, by their names relative to it.

    Raises:
        ArtifactError: a file is, or lies behind, a link that leads out of the folder.
    """
    inside = [folder.resolve()]
    if folder.parent.name == "snapshots":  # in the hub's cache, files are links to blobs that all revisions share
        inside.append(folder.parent.parent.resolve() / "blobs")
    files = {}
    for pattern in patterns:
        for path in folder.glob(pattern):
            target = path.resolve()
            if not any(target.is_relative_to(place) for place in inside):
                raise ArtifactError(
                    f"{path} links to {target}, outside the folder, which might be private; nothing was sent. "
                    "Replace the link by a copy, or delete it"
                )
            if target.is_file():
                files[path.relative_to(folder).as_posix()] = path
    return dict(sorted(files.items()))


def _is_ref(name: str) -> bool:
    """Whether it can be the name of a branch, tag or commit; the hub's cache uses it as a path."""
    return re.fullmatch(r"[\w][\w./+-]{0,249}", name) is not None and ".." not in name


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns)


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


@contextmanager
def _explained(place: HubId, purpose: str) -> Iterator[None]:
    """Turn any exception while trying to "read" or "write" a repository into an ArtifactError."""
    try:
        yield
    except ArtifactError:
        raise
    except Exception as error:  # of httpx or requests, depending on huggingface_hub's version; OSError, ValueError
        raise ArtifactError(_explanation(place, purpose, error)) from error


def _explanation(place: HubId, purpose: str, error: Exception) -> str:
    from huggingface_hub import constants, errors

    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)

    def among(*kinds: type[Exception]) -> bool:
        return any(isinstance(one, kinds) for one in chain)

    page = place.page
    status = next((one.response.status_code for one in chain if getattr(one, "response", None) is not None), None)
    cache = constants.HF_HUB_CACHE
    missing = "" if purpose == "write" else f"{place} is not in the cache {cache}, and "
    if among(errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return f"{missing}HF_HUB_OFFLINE is set; unset it to use the hub"
    if among(errors.GatedRepoError):
        return f"{page} is gated; request access there, then {_LOG_IN}"
    if among(errors.RevisionNotFoundError):
        return f"{page} has no revision {place.revision!r}; its page lists the revisions"
    if among(errors.RepositoryNotFoundError):
        return f"{page} does not exist or is private; check the name, and for a private one {_LOG_IN}"
    if status == 401:
        return f"{_endpoint()} does not accept the token; {_LOG_IN} to a valid one"
    if status == 403:
        return f"the token has no permission to {purpose} {page}; {_LOG_IN} to one that has"
    reason = shorten(str(chain[-1]) or type(chain[-1]).__name__, 160, placeholder=" ...")
    return f"{missing}{_endpoint()} cannot be used ({reason}); check the connection, or try again later"
