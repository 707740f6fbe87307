"""What strangers ask of the page: other sites, other names, other folders."""

from __future__ import annotations

import io
import json
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

import latentflow
from latentflow.errors import ArtifactError, ConfigError, DataError
from latentflow.requests import RequestError
from latentflow.studio import page_jobs
from latentflow.studio.page_jobs import PageJobs
from latentflow.studio.page_models import PageModels
from latentflow.studio.page_tasks import GivenFiles, checked_request, page_task
from latentflow.studio.queue import DrawingQueue
from latentflow.studio.uploads import Uploads, safe_name
from tests import tiny


def asked(url: str, *, body: object = None, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers of an answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


def test_the_page_may_ask_nobody_else(studio):
    status, _, headers = asked(studio.address)
    assert status == 200
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert "http" not in policy
    files = list((Path(latentflow.__file__).parent / "studio" / "templates").iterdir())
    assert {"index.html", "main.js", "studio.css"} <= {file.name for file in files}
    for file in files:
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text and "https://" not in text, file.name


def test_other_sites_and_other_names_are_refused(studio):
    asking = {"model": studio.all, "task": "sample", "request": {"num": 1}}
    assert asked(f"{studio.address}page/jobs", body=asking, Origin="https://evil.example")[0] == 403
    assert asked(f"{studio.address}page/state", Host="evil.example")[0] in (400, 403, 421)
    assert asked(f"{studio.address}page/jobs", body=asking, Origin=studio.address.rstrip("/"))[0] == 200


@pytest.mark.parametrize("path", ["../page.py", "..%2fpage.py", "%2e%2e/%2e%2e/api.py", "/etc/passwd", "main.js%00"])
def test_no_path_leads_out_of_the_page(studio, path):
    status, body, _ = asked(f"{studio.address}page/files/{path}")
    assert status == 404
    assert b"import" not in body


def test_only_the_given_models_are_opened(studio, tmp_path):
    """A model that is on the disk, but was not given."""
    stranger = tmp_path / "stranger"
    stranger.symlink_to(studio.all)
    status, body, _ = asked(f"{studio.address}page/model?key={urllib.parse.quote(str(stranger))}")
    assert status == 422
    assert "none of the models that this page was opened with" in json.loads(body)["error"]


def test_what_is_no_question_is_one_line(studio):
    for body in ("text", [], {"model": 1}, {"model": studio.all, "task": "sample", "request": 3}):
        status, answer, _ = asked(f"{studio.address}page/jobs", body=body)
        assert (status, json.loads(answer)) == (422, {"error": "ask with JSON of a model, a task and a request"})
    status, answer, _ = asked(f"{studio.address}page/jobs/nothing")
    assert status == 422 and "draw them again" in json.loads(answer)["error"]


def test_a_picture_cannot_name_a_model_elsewhere():
    """The name of a guide in a picture's metadata may be a hub id, which would be downloaded."""
    with pytest.raises(RequestError, match="there is no such folder on this machine"):
        checked_request("sample", {"guide": "somebody/model"})
    assert checked_request("sample", {"guide": "@1/8"}).guide.model == "@1/8"
    with pytest.raises(ConfigError, match="at most 1,000 images"):
        checked_request("sample", {"num": 1001})
    with pytest.raises(ConfigError, match="there is no task 'smaple'; did you mean 'sample'"):
        checked_request("smaple", {})


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\photos\\cat.png", "cat.png"),
        ("a\nb\x1b[2J.png", "a_b_[2J.png"),
        ("<b>.png", "_b_.png"),
        ("..", "picture"),
        ("x" * 300 + ".png", "x" * 80 + ".png"),
        (".png", ".png".strip(".")),
    ],
)
def test_names_of_files_are_names(name, safe):
    assert safe_name(name) == safe


def test_uploads_are_pictures(tmp_path):
    uploads = Uploads(tmp_path)
    with pytest.raises(DataError, match=r"page\.svg cannot be used"):
        uploads.add("page.svg", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    with pytest.raises(ConfigError, match="upload it again"):
        uploads.find("../../etc")
    bomb = io.BytesIO()
    Image.new("1", (20_000, 6_000)).save(bomb, "PNG")
    with pytest.raises(DataError, match="20000 x 6000 pixels; the page takes at most 100,000,000"):
        uploads.add("bomb.png", bomb.getvalue())
    assert list(tmp_path.iterdir()) == []


def test_old_pictures_are_forgotten(studio, monkeypatch):
    """By number and by bytes; those that are being drawn are kept."""
    model = studio.models.open(studio.other)
    queue = DrawingQueue()
    try:
        jobs = PageJobs(queue)
        task = page_task(model, "sample", {"num": 2}, GivenFiles())
        first = jobs.begin("model", model, task)
        first.drawn.result(timeout=60)
        assert first.num_bytes >= 2 * 3 * 16 * 16
        monkeypatch.setattr(page_jobs, "MOST_BYTES", first.num_bytes)
        second = jobs.begin("model", model, task)
        assert jobs.find(first.key) is first
        second.drawn.result(timeout=60)
        third = jobs.begin("model", model, task)
        with pytest.raises(ConfigError, match="draw them again"):
            jobs.find(first.key)
        third.drawn.result(timeout=60)
        monkeypatch.setattr(page_jobs, "MOST_KEPT", 1)
        assert jobs.find(jobs.begin("model", model, task).key)
        with pytest.raises(ConfigError, match="draw them again"):
            jobs.find(second.key)
    finally:
        queue.close()


def test_places_that_are_no_models_are_refused_at_once(tmp_path):
    with pytest.raises(ArtifactError, match="is not a model folder"):
        PageModels([str(tmp_path)], tiny.CPU)
