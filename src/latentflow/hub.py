"""Folders of models on the Hugging Face hub: fetch one, push one, and say in one line what is wrong.

Endpoint, cache, token and offline mode are those of huggingface_hub: HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from textwrap import shorten

from latentflow.artifacts import read_json
from latentflow.errors import ArtifactError, ConfigError

CARD_FILE = "README.md"
CARD_NAME = "PATH_OF_THIS_FOLDER"
"""How a model card calls its model until a push puts the hub id in its place."""

PIPELINE_FILE = "model_index.json"  # every diffusers pipeline has it
_LOG_IN = "`hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class HubId:
    """A repository `owner/name`, and one of its branches, tags or commits; None: its default branch."""

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str, revision: str | None = None) -> HubId:
        """Read `owner/name` or `owner/name@revision`; the revision may be given apart instead.

        Raises:
            ConfigError: it is not an id, or there are two revisions.
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
        """The id with the commit that `fetch` got: the folder of a snapshot is named after it."""
        return f"{self.repo}@{snapshot.name}"

    @property
    def url(self) -> str:
        """Its page on the hub."""
        return f"{_endpoint()}/{self.repo}" + (f"/tree/{self.revision}" if self.revision else "")


def fetch(source: HubId, patterns: Sequence[str]) -> Path:
    """The folder in the cache with those files of a repository that match `patterns`, downloaded where they are not.

    Raises:
        ArtifactError: the hub does not give them, and the cache has not got them.
    """
    from huggingface_hub import snapshot_download

    with _explained(source, "read"):
        wanted = [*patterns, PIPELINE_FILE]
        return Path(snapshot_download(source.repo, revision=source.revision, allow_patterns=wanted))


def looks_like(folder: Path) -> str:
    """What a fetched folder without a model of ours seems to hold, for an error message."""
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
    """The token that is given, or the one that huggingface_hub knows of.

    Raises:
        ConfigError: there is none.
    """
    from huggingface_hub import get_token

    token = token or get_token()
    if not token:
        raise ConfigError(f"pushing to {_endpoint()} needs a token that may write: {_LOG_IN}")
    return token


def push_folder(
    folder: Path, target: HubId, patterns: Sequence[str], *, marker: str, private: bool, message: str, token: str
) -> str:
    """Make one commit of those files of `folder` that match `patterns`; returns the page where they are.

    The repository is created if need be. Files there that match `patterns` and are not in `folder` go:
    they belong to the model which this one replaces. Other files there stay, and a card if `folder` has none.

    Args:
        marker: the file by which a repository that may be overwritten is known.
        private: create it private; one that is there and public is refused.

    Raises:
        ArtifactError: a file is a link out of `folder`, or the hub refuses, cannot be reached, or has something else
            under that name.
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
                f"{target.repo} is there already, and public; nothing was sent. Make it private at "
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
    """The files of `folder` that match `patterns`, by their names in it; none of them lies elsewhere.

    Raises:
        ArtifactError: one is, or lies behind, a link that leads out of the folder.
    """
    inside = [folder.resolve()]
    if folder.parent.name == "snapshots":  # in the hub's cache the files of all revisions lie together, under links
        inside.append(folder.parent.parent.resolve() / "blobs")
    files = {}
    for pattern in patterns:
        for path in folder.glob(pattern):
            target = path.resolve()
            if not any(target.is_relative_to(place) for place in inside):
                raise ArtifactError(
                    f"{path} is a link to {target}, outside the folder; it might be private, and nothing was sent. "
                    "Put a copy in its place, or delete it"
                )
            if target.is_file():
                files[path.relative_to(folder).as_posix()] = path
    return dict(sorted(files.items()))


def _is_ref(name: str) -> bool:
    """Whether a branch, tag or commit may be called so; the hub's cache makes a path of it."""
    return re.fullmatch(r"[\w][\w./+-]{0,249}", name) is not None and ".." not in name


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns)


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


@contextmanager
def _explained(place: HubId, purpose: str) -> Iterator[None]:
    """Turn whatever goes wrong with `place`, which is there to "read" or "write", into an ArtifactError."""
    try:
        yield
    except ArtifactError:
        raise
    except Exception as error:  # of httpx or of requests, by the version of huggingface_hub; OSError, ValueError
        raise ArtifactError(_explanation(place, purpose, error)) from error


def _explanation(place: HubId, purpose: str, error: Exception) -> str:
    from huggingface_hub import constants, errors

    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)

    def among(*kinds: type[Exception]) -> bool:
        return any(isinstance(one, kinds) for one in chain)

    status = next((one.response.status_code for one in chain if getattr(one, "response", None) is not None), None)
    page, cache = f"{_endpoint()}/{place.repo}", constants.HF_HUB_CACHE
    missing = "" if purpose == "write" else f"{place} is not in the cache {cache}, and "
    if among(errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return f"{missing}HF_HUB_OFFLINE forbids asking the hub; unset it"
    if among(errors.GatedRepoError):
        return f"{page} is gated; ask for access there, then {_LOG_IN}"
    if among(errors.RevisionNotFoundError):
        return f"{page} has no revision {place.revision!r}; its page lists what there is"
    if among(errors.RepositoryNotFoundError):
        return f"there is no {page}, or it is private; check the name, and for a private one {_LOG_IN}"
    if status == 401:
        return f"the token is not accepted by {_endpoint()}; {_LOG_IN} anew"
    if status == 403:
        return f"the token may not {purpose} {page}; {_LOG_IN} to one that may"
    reason = shorten(str(chain[-1]) or type(chain[-1]).__name__, 160, placeholder=" ...")
    return f"{missing}{_endpoint()} cannot be used ({reason}); check the connection, or try again later"
