"""The hub round trip, against a small hub of our own on this machine: nothing here needs a network."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants, file_download, utils
from PIL import Image

from latentflow.api import LatentFlow
from latentflow.errors import ArtifactError, ConfigError
from latentflow.hub import CARD_NAME, HubId
from latentflow.model.flow_model import find_model
from tests import tiny
from tests.processes import run_here

TOKEN = "hf_writer"
MODEL_FILES = {
    "README.md",
    "config.json",
    "velocity.safetensors",
    "autoencoder/config.json",
    "autoencoder/diffusion_pytorch_model.safetensors",
}


@dataclass
class Repo:
    """Branches are lists of commits; a commit is every file by its path."""

    private: bool = False
    branches: dict[str, list[dict[str, bytes]]] = field(default_factory=lambda: {"main": [{".gitattributes": b""}]})
    messages: list[str] = field(default_factory=list)

    def commits(self) -> dict[str, dict[str, bytes]]:
        """Every commit by its hash."""
        return {_commit_hash(files): files for commits in self.branches.values() for files in commits}

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Hash and files of a branch or a commit."""
        if revision in self.branches:
            return _commit_hash(self.branches[revision][-1]), self.branches[revision][-1]
        return (revision, self.commits()[revision]) if revision in self.commits() else None

    @property
    def files(self) -> dict[str, bytes]:
        """What the default branch holds, but for what every repository holds."""
        return {name: content for name, content in self.branches["main"][-1].items() if name != ".gitattributes"}


class FakeHub:
    """The few routes of the hub that huggingface_hub uses; what is pushed is kept in a dict."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.gated: set[str] = set()
        self.readers: set[str] = set()
        """Tokens that may read only."""
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = unquote(self.path.partition("?")[0])
                hub.requests.append((self.command, path))
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                status, headers, content = hub.answer(self.command, path, body, token)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_POST = do_PUT = _answer

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def written(self) -> list[str]:
        """Paths of the requests that were to change something."""
        return [path for command, path in self.requests if command in ("POST", "PUT")]

    @property
    def downloaded(self) -> set[str]:
        """Files of which the content was asked for."""
        return {path.split("/", 5)[-1] for command, path in self.requests if command == "GET" and "/resolve/" in path}

    def answer(self, command: str, path: str, body: bytes, token: str) -> tuple[int, dict[str, str], bytes]:
        if token and token != TOKEN and token not in self.readers:
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b"{}"
        if command in ("POST", "PUT") and token in self.readers:
            return 403, {"X-Error-Message": "You need a token that may write"}, b"{}"
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return _json({})
        if path.startswith("/lfs/"):
            self.blobs[path.removeprefix("/lfs/")] = body
            return _json({})
        if re.fullmatch(r"/(.+?)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        if api := re.fullmatch(r"/api/(?:models/|(datasets/))([^/]+/[^/]+)(?:/(\w+)/(.+?))?", path):
            repo_id, route, rest = (api[1] or "") + api[2], api[3] or "revision", api[4] or "main"
        elif file := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/(resolve)/(.+)", path):
            repo_id, route, rest = file.groups()
        else:
            return 404, {}, b"{}"
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not token):
            return 404 if token else 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if repo_id in self.gated and route != "revision":
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        return getattr(self, f"_{route}")(repo_id, repo, rest, body)

    def _create(self, wanted):
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        if repo_id in self.repos:
            return _json({"url": f"{self.url}/{repo_id}"}, status=409)
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.repos[repo_id] = Repo(private=private)
        return _json({"url": f"{self.url}/{repo_id}"})

    def _branch(self, repo_id, repo, name, body):
        if name in repo.branches:
            return _json({}, status=409)
        repo.branches[name] = repo.branches["main"][-1:]
        return _json({})

    def _revision(self, repo_id, repo, revision, body):
        if (found := repo.at(revision)) is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        commit, files = found
        siblings = [{"rfilename": name} for name in files]
        return _json(
            {
                "id": repo_id.removeprefix("datasets/"),
                "sha": commit,
                "private": repo.private,
                "siblings": siblings,
                "tags": [],
            }
        )

    def _tree(self, repo_id, repo, revision, body):
        if (found := repo.at(revision)) is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        _, files = found
        return _json([_tree_entry(name, content) for name, content in files.items()])

    def _resolve(self, repo_id, repo, place, body):
        revision, name = place.split("/", 1)
        commit, files = repo.at(revision)
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{_sha(files[name])}"'}, files[name]

    def _preupload(self, repo_id, repo, revision, body):
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
        return _json({"files": [{"path": n, "uploadMode": modes[n], "shouldIgnore": False} for n in names]})

    def _batch(self, wanted):
        objects = [
            {"oid": one["oid"], "size": one["size"], "actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}}
            for one in wanted["objects"]
        ]
        return _json({"transfer": "basic", "objects": objects})

    def _commit(self, repo_id, repo, revision, body):
        files = dict(repo.branches[revision][-1])
        for line in map(json.loads, body.decode().splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                repo.messages.append(value["summary"])
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            else:
                assert key == "deletedFile"
                del files[value["path"]]
        repo.branches[revision].append(files)
        return _json({"commitUrl": f"{self.url}/{repo_id}/commit/x", "commitOid": _commit_hash(files)})


def _json(value, status: int = 200) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _commit_hash(files: dict[str, bytes]) -> str:
    return hashlib.sha1(json.dumps({name: _sha(content) for name, content in files.items()}).encode()).hexdigest()


def _tree_entry(name: str, content: bytes) -> dict[str, object]:
    large = {"lfs": {"oid": _sha(content), "size": len(content), "pointerSize": 130}}
    entry = {"type": "file", "path": name, "size": len(content), "oid": _sha(content)[:40]}
    return {**entry, **(large if name.endswith(".safetensors") else {})}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty HF_HOME, and nobody logged in."""
    folder = tmp_path / "hf_home"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    utils.disable_progress_bars()
    yield folder
    utils.enable_progress_bars()


@pytest.fixture
def hub(home, monkeypatch) -> Iterator[FakeHub]:
    """A hub without repositories, and a user who may write."""
    fake = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", fake.url)
    template = fake.url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):  # older versions read it in the latter
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


@pytest.fixture
def go_offline(monkeypatch):
    """As under HF_HUB_OFFLINE=1 from now on: go_offline()."""
    reset = getattr(utils, "reset_sessions", lambda: None)  # older versions remember it in their sessions
    yield lambda: (monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True), reset())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    reset()


@pytest.fixture(scope="module")
def model(kl) -> LatentFlow:
    return tiny.model(kl)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, model) -> Path:
    folder = tmp_path_factory.mktemp("models") / "fruit"
    model.save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Files by their paths."""
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def published(hub: FakeHub, repo_id: str, files: dict[str, bytes], *, private: bool = False) -> Repo:
    """A repository that somebody else has put on the hub."""
    hub.repos[repo_id] = Repo(private=private)
    hub.repos[repo_id].branches["main"].append({".gitattributes": b"", **files})
    return hub.repos[repo_id]


def draw(model: LatentFlow) -> torch.Tensor:
    return model.sample(num=2, classes=[0, 2], seed=5).pixels


def refused(call, *said: str, error: type[Exception] = ArtifactError) -> None:
    """`call` raises an error of one line that says all of it."""
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message
    for words in said:
        assert words in message, message


def load(repo_id: str, **options) -> LatentFlow:
    return LatentFlow.from_pretrained(repo_id, device="cpu", **options)


# Round trip


def test_push_then_load_gives_the_same_samples(hub, model):
    url = model.push_to_hub("me/fruit", commit_message="Ripe")
    assert url == f"{hub.url}/me/fruit"
    repo = hub.repos["me/fruit"]
    assert set(repo.files) == MODEL_FILES
    assert repo.messages == ["Ripe"]  # one commit
    assert not repo.private

    loaded = load("me/fruit")
    assert torch.equal(draw(loaded), draw(model))
    commit, _ = repo.at("main")
    assert loaded.reference == f"me/fruit@{commit}"
    assert load(loaded.reference).reference == loaded.reference


def test_only_what_a_model_needs_is_downloaded(hub, model_folder):
    others = {"teaser.png": b"png", "old/velocity.safetensors": b"old", "run.json": b"{}", "adam.safetensors": b"adam"}
    published(hub, "me/fruit", {**contents(model_folder), **others})
    load("me/fruit")
    assert hub.downloaded == MODEL_FILES


def test_revisions(hub, model, kl):
    """A branch, by argument and in the id; then the default branch; then the commit that was there first."""
    model.push_to_hub("me/fruit")
    first, _ = hub.repos["me/fruit"].at("main")
    other = tiny.model(kl, seed=1)
    assert other.push_to_hub("me/fruit", revision="sour") == f"{hub.url}/me/fruit/tree/sour"
    for loaded in (load("me/fruit", revision="sour"), load("me/fruit@sour")):
        assert torch.equal(draw(loaded), draw(other))
    assert b'from_pretrained("me/fruit@sour")' in hub.repos["me/fruit"].at("sour")[1]["README.md"]
    other.push_to_hub("me/fruit")
    assert torch.equal(draw(load("me/fruit")), draw(other))
    assert torch.equal(draw(load("me/fruit", revision=first)), draw(model))


@pytest.mark.parametrize("branch", ["main", "sour"])
def test_a_push_replaces_the_model_and_leaves_the_rest(hub, model, deterministic, branch):
    model.push_to_hub("me/fruit", revision=branch)
    commits = hub.repos["me/fruit"].branches[branch]
    commits[-1] |= {"teaser.png": b"png", "autoencoder/diffusion_pytorch_model.fp16.safetensors": b"old"}
    tiny.model(deterministic).push_to_hub("me/fruit", revision=branch)
    assert commits[-1].keys() == {*MODEL_FILES, "teaser.png", ".gitattributes"}
    load("me/fruit", revision=branch)


def test_private(hub, model):
    model.push_to_hub("me/fruit", private=True)
    assert hub.repos["me/fruit"].private
    model.push_to_hub("me/fruit", private=True)
    model.push_to_hub("me/fruit")  # stays private
    assert hub.repos["me/fruit"].private
    assert torch.equal(draw(load("me/fruit")), draw(model))


def test_a_folder_here_wins_over_the_hub(hub, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, "me/fruit")
    assert load("me/fruit").reference == "me/fruit"
    assert hub.requests == []
    refused(lambda: load("me/fruit", revision="main"), "me/fruit", "is a local folder", "'main'", error=ConfigError)


def test_a_copy_in_the_cache_serves_when_the_hub_does_not(hub, model, go_offline):
    model.push_to_hub("me/fruit")
    online = load("me/fruit")
    hub.repos.clear()
    assert load("me/fruit").reference == online.reference
    go_offline()
    before = len(hub.requests)
    assert torch.equal(draw(load("me/fruit")), draw(model))
    assert len(hub.requests) == before


def test_a_cache_made_elsewhere_and_the_environment(model_folder, tmp_path):
    """In a process of its own: HF_HOME and HF_HUB_OFFLINE are what huggingface_hub makes of them."""
    home, commit = tmp_path / "home", "0123456789abcdef0123456789abcdef01234567"
    place = home / "hub" / "models--me--fruit"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    for name, content in contents(model_folder).items():
        blob, link = place / "blobs" / _sha(content), place / "snapshots" / commit / name
        for file in (blob, link):
            file.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(os.path.relpath(blob, link.parent))
    program = """
from latentflow.errors import ArtifactError
from latentflow.model.flow_model import find_model
for name in ("me/fruit", "me/fruit@main", "me/fruit@0123456789abcdef0123456789abcdef01234567"):
    print(find_model(name).name)
try:
    find_model("me/nuts")
except ArtifactError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    *found, missing = done.stdout.splitlines()
    assert found == [commit] * 3
    assert "me/nuts is not in the cache" in missing
    assert str(home / "hub") in missing
    assert "HF_HUB_OFFLINE" in missing


# What is wrong is said in one line


@pytest.mark.parametrize(
    "text",
    [
        "fruit",
        "a/b/c",
        "./me/fruit",
        "/me/fruit",
        "~/fruit",
        "me/fruit.git",
        "me/fr uit",
        "me/--",
        "me/fruit@",
        "me/fruit@../../x",
        "me/fruit@/etc",
        "me/..",
        "../me",
        "",
    ],
)
def test_no_id(hub, text, model):
    refused(lambda: HubId.parse(text), "is not a hub id like 'owner/name'", error=ConfigError)
    refused(lambda: model.push_to_hub(text), "is not a hub id", error=ConfigError)
    if text:  # the empty path is the folder that one is in
        refused(lambda: find_model(text), "does not exist", "'owner/name'")
    assert hub.requests == []


def test_ids():
    assert HubId.parse("me/fruit") == HubId("me/fruit")
    assert HubId.parse("me/fruit@refs/pr/1") == HubId("me/fruit", "refs/pr/1")
    assert HubId.parse("me/fruit@v1", "v1") == HubId.parse("me/fruit", "v1") == HubId("me/fruit", "v1")
    refused(lambda: HubId.parse("me/fruit@v1", "v2"), "v1", "v2", error=ConfigError)


def test_no_repository(hub):
    refused(lambda: load("me/fruit"), "no such folder here", f"{hub.url}/me/fruit does not exist or is private")


def test_private_repository_of_others(hub, model_folder, monkeypatch):
    published(hub, "me/fruit", contents(model_folder), private=True)
    monkeypatch.delenv("HF_TOKEN")
    refused(lambda: load("me/fruit"), "or is private", "`hf auth login`", "HF_TOKEN")


def test_gated_repository(hub, model_folder):
    published(hub, "me/fruit", contents(model_folder))
    hub.gated.add("me/fruit")
    refused(lambda: load("me/fruit"), f"{hub.url}/me/fruit is gated; request access there", "`hf auth login`")


def test_token_that_is_not_accepted(hub, model_folder, model, monkeypatch):
    published(hub, "me/fruit", contents(model_folder))
    monkeypatch.setenv("HF_TOKEN", "hf_stale")
    refused(lambda: load("me/fruit"), "does not accept the token", "`hf auth login`")
    refused(lambda: model.push_to_hub("me/other"), "does not accept the token", "`hf auth login`")
    assert "me/other" not in hub.repos


def test_no_such_revision(hub, model):
    model.push_to_hub("me/fruit")
    refused(lambda: load("me/fruit@sweet"), "has no revision 'sweet'")


def test_offline_and_not_in_the_cache(hub, home, model, go_offline):
    go_offline()
    refused(lambda: load("me/fruit"), "not in the cache", str(home), "HF_HUB_OFFLINE")
    refused(lambda: model.push_to_hub("me/fruit"), "HF_HUB_OFFLINE")
    assert hub.requests == []


def test_no_network(home, model, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    refused(lambda: load("me/fruit"), "not in the cache", str(home), "http://127.0.0.1:9", "check the connection")
    refused(lambda: model.push_to_hub("me/fruit"), "http://127.0.0.1:9", "check the connection")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"model_index.json": {"_class_name": "StableDiffusionPipeline"}},
            "diffusers pipeline StableDiffusionPipeline",
        ),
        ({"config.json": {"_class_name": "AutoencoderKL"}}, "diffusers model AutoencoderKL"),
        ({"config.json": {"model_type": "bert"}}, "transformers model bert"),
        ({"config.json": ["a", "list"], "README.md": {}}, "it holds README.md, config.json"),
    ],
)
def test_a_repository_of_something_else(hub, model, files, said):
    large = {"unet/diffusion_pytorch_model.safetensors": b"x", "model.safetensors": b"x"}
    repo = published(hub, "me/fruit", {**large, **{name: json.dumps(value).encode() for name, value in files.items()}})
    before = dict(repo.files)
    refused(lambda: load("me/fruit"), f"{hub.url}/me/fruit is not a latentflow model", said)
    assert hub.downloaded == set(files)
    refused(lambda: model.push_to_hub("me/fruit"), f"{hub.url}/me/fruit holds something else", "another name")
    assert repo.files == before


def test_push_without_a_token(hub, model, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    refused(lambda: model.push_to_hub("me/fruit"), "needs a token", "`hf auth login`", "HF_TOKEN", error=ConfigError)
    assert hub.requests == []
    model.push_to_hub("me/fruit", token=TOKEN)
    assert set(hub.repos["me/fruit"].files) == MODEL_FILES


def test_push_with_a_token_that_may_only_read(hub, model):
    hub.readers.add("hf_reader")
    refused(
        lambda: model.push_to_hub("me/fruit", token="hf_reader"), "has no permission to write", f"{hub.url}/me/fruit"
    )
    assert hub.repos == {}


def test_private_push_to_a_public_repository(hub, model):
    model.push_to_hub("me/fruit")
    refused(lambda: model.push_to_hub("me/fruit@secret", private=True), "exists already and is public", "/settings")
    assert hub.repos["me/fruit"].branches.keys() == {"main"}
    assert len(hub.repos["me/fruit"].messages) == 1


# The verb


@pytest.fixture
def command(capsys, monkeypatch):
    return lambda *args: run_here(args, capsys, monkeypatch)


@pytest.fixture
def run_folder(tmp_path, model_folder) -> Path:
    """A run with everything that is nobody else's business."""
    run = tmp_path / "run"
    shutil.copytree(model_folder, run / "model")
    for name in (
        "recipe.yaml",
        "checkpoints/step-00000002/optimizer.safetensors",
        "samples/a.png",
        "model/.notes.json",
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(b"mine")
    (run / "model" / "autoencoder" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    return run


def test_push_of_a_run_sends_the_model_alone(hub, command, run_folder):
    done = command("push", run_folder, "me/fruit", "--private", "--message", "Ripe", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == {"model": f"{hub.url}/me/fruit"}
    repo, sent = hub.repos["me/fruit"], contents(run_folder / "model")
    assert repo.private
    assert repo.messages == ["Ripe"]
    assert set(repo.files) == MODEL_FILES
    for name in MODEL_FILES - {"README.md"}:
        assert repo.files[name] == sent[name]  # to the byte
    assert b"mine" not in hub.blobs.values()


def test_push_keeps_a_card_that_was_written_by_hand(hub, command, run_folder):
    (run_folder / "model" / "README.md").write_text(
        f"---\nlicense: mit\n---\n# Früchte: {CARD_NAME}\n", encoding="utf-8"
    )
    assert command("push", run_folder, "me/fruit@ripe").code == 0
    card = hub.repos["me/fruit"].at("ripe")[1]["README.md"].decode()
    assert card == "---\nlicense: mit\n---\n# Früchte: me/fruit@ripe\n"
    (run_folder / "model" / "README.md").unlink()
    assert command("push", run_folder, "me/fruit@ripe").code == 0
    assert hub.repos["me/fruit"].at("ripe")[1]["README.md"].decode() == card


def _link(path: Path, target: Path) -> None:
    path.rename(path.with_name("aside")) if path.exists() else None
    path.symlink_to(target)


@pytest.mark.parametrize(
    "name", ["README.md", "config.json", "velocity.safetensors", "autoencoder", "autoencoder/config.json"]
)
def test_push_follows_no_link_out_of_the_model(hub, command, run_folder, tmp_path, name):
    model, elsewhere = run_folder / "model", tmp_path / "elsewhere"
    shutil.copytree(model, elsewhere)
    _link(model / name, elsewhere / name)
    done = command("push", run_folder, "me/fruit")
    assert done.code == 2
    assert f"{model / name}" in done.error
    assert f"links to {elsewhere / name}" in done.error
    assert hub.written == []
    (model / name).unlink()  # what the line advises
    copy = shutil.copytree if (elsewhere / name).is_dir() else shutil.copy
    copy(elsewhere / name, model / name)
    assert command("push", run_folder, "me/fruit").code == 0
    assert set(hub.repos["me/fruit"].files) == MODEL_FILES


def test_push_follows_links_inside_the_model(hub, command, run_folder):
    model = run_folder / "model"
    (model / "card.md").write_text("---\nlicense: mit\n---\n# Fruit\n", encoding="utf-8")
    _link(model / "README.md", Path("card.md"))
    assert command("push", run_folder, "me/fruit").code == 0
    assert hub.repos["me/fruit"].files["README.md"].endswith(b"# Fruit\n")


def test_push_sends_no_other_files_of_the_folders(hub, command, run_folder):
    model = run_folder / "model"
    (model / "autoencoder" / "private").mkdir()
    for name in ("autoencoder/private/config.json", "autoencoder/credentials.json", "secret.safetensors"):
        (model / name).write_bytes(b"mine")
    (model / "link.txt").symlink_to("/etc/passwd")
    assert command("push", run_folder, "me/fruit").code == 0
    assert set(hub.repos["me/fruit"].files) == MODEL_FILES


def test_verbs_take_hub_ids(hub, command, model, tmp_path):
    model.push_to_hub("me/fruit")
    commit, _ = hub.repos["me/fruit"].at("main")
    drawn = command("sample", "me/fruit@main", "--num", 1, "--out", tmp_path / "out", "--device", "cpu")
    assert drawn.code == 0, drawn.err
    picture = next(path for path in (tmp_path / "out").iterdir() if path.name != "grid.png")
    assert f"me/fruit@{commit}" in " ".join(map(str, Image.open(picture).text.values()))
    assert command("info", "me/fruit").code == 0
    assert command("push", "me/fruit", "you/fruit").code == 0
    assert hub.repos["you/fruit"].files == hub.repos["me/fruit"].files


def test_adapters_are_pushed_and_opened_by_their_ids(hub, command, model, model_folder, tmp_path):
    tiny.finetuned(model_folder, ("date", "apple")).save_pretrained(tmp_path / "tuned")
    adapter = tmp_path / "tuned" / "adapter"
    assert command("push", adapter, "me/dates").code == 0
    assert hub.repos["me/dates"].files.items() >= contents(adapter).items() and len(contents(adapter)) == 3
    assert command("push", adapter, "me/dates").code == 0  # it may be replaced
    model.push_to_hub("me/fruit")
    both = load("me/fruit", adapter="me/dates")
    commits = {name: hub.repos[name].at("main")[0] for name in ("me/fruit", "me/dates")}
    assert both.reference == "+".join(f"{name}@{commit}" for name, commit in commits.items())
    assert load(both.reference).weights_hash == both.weights_hash
    assert both.weights_hash == load(tmp_path / "tuned").weights_hash
    refused(lambda: load("me/fruit", adapter="me/fruit"), "me/fruit is no adapter", "adapter_config.json")
    refused(lambda: load("me/fruit", adapter="me/nothing"), "me/nothing")
    refused(lambda: model.push_to_hub("me/dates"), "holds something else")
    (adapter / "adapter.safetensors").unlink()
    assert "adapter.safetensors" in command("push", adapter, "me/other").error


@pytest.mark.parametrize("damage", ["velocity.safetensors", "config.json", "autoencoder"])
def test_push_of_a_damaged_model(hub, command, run_folder, damage):
    target = run_folder / "model" / damage
    shutil.rmtree(target) if target.is_dir() else os.truncate(target, target.stat().st_size // 2)
    done = command("push", run_folder, "me/fruit")
    assert done.code == 2
    assert damage in done.error
    assert hub.requests == []


def test_push_errors_of_the_verb(hub, command, model_folder, tmp_path, monkeypatch):
    for args, said in (((model_folder, "fruit"), "'fruit'"), ((tmp_path / "nowhere", "me/fruit"), "nowhere")):
        done = command("push", *args)
        assert (done.code, said in done.error) == (2, True), done
    monkeypatch.delenv("HF_TOKEN")
    assert "`hf auth login`" in command("push", model_folder, "me/fruit").error
    assert hub.requests == []


# The model card


@pytest.mark.parametrize(
    ("conditions", "pipeline", "tag", "verb"),
    [
        ({"class_names": ()}, "unconditional-image-generation", "flow-matching", "sample"),
        ({}, "unconditional-image-generation", "class-conditional", "sample"),
        ({"conditioning": {"inpainting": True}}, "image-to-image", "inpainting", "inpaint"),
        ({"conditioning": tiny.SPATIAL}, "image-to-image", "semantic-image-synthesis", "mask-to-image"),
    ],
)
def test_card(hub, kl, conditions, pipeline, tag, verb):
    tiny.model(kl, **conditions).push_to_hub("me/fruit")
    text = hub.repos["me/fruit"].files["README.md"].decode()
    card = ModelCard(text)
    assert card.data.library_name == "latentflow"
    assert card.data.pipeline_tag == pipeline
    assert tag in card.data.tags
    assert card.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}  # no license that nobody gave
    assert CARD_NAME not in text
    assert f"latentflow {verb} me/fruit " in text
    assert 'from_pretrained("me/fruit")' in text
    assert "| sampling preset | euler, 2 steps, guidance 1 |" in text
    assert "## Limits" in text


def test_card_of_many_classes_with_odd_names(kl, tmp_path):
    names = tuple(f"class|{i}" for i in range(60))
    tiny.model(kl, class_names=names).save_pretrained(tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "class\\|49, ... (60 in all) |" in text
    assert "class\\|50" not in text
    assert f"latentflow sample {CARD_NAME} " in text
