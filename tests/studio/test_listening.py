"""The server as a process: the programs of the documentation, SIGTERM while busy, addresses."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from latentflow.api import LatentFlow
from latentflow.errors import ConfigError
from latentflow.studio import listening
from latentflow.studio.request import ServeRequest
from tests import tiny
from tests.processes import run_here

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "serve.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, kl) -> Path:
    folder = tmp_path_factory.mktemp("models") / "pets"
    tiny.model(kl, class_names=("cat", "dog")).save_pretrained(folder)
    return folder


def ask(port: int, fields: dict, found: list) -> None:
    """Add the status and the body of an answer; nothing where the connection was closed before one began."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/sample", json.dumps(fields), {"Content-Type": "application/json"})
        answer = connection.getresponse()
    except (http.client.RemoteDisconnected, ConnectionError):
        return
    found.append((answer.status, answer.read()))  # half a body raises IncompleteRead


def test_documented_program_and_sigterm_while_busy(folder, tmp_path, monkeypatch):
    """One process, since each takes seconds to start."""
    command = [sys.executable, "-m", "latentflow", "serve", str(folder), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        port = int(re.search(r"http://127\.0\.0\.1:(\d+) ", process.stderr.readline())[1])
        monkeypatch.chdir(tmp_path)
        (program,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        assert len(program.strip().splitlines()) <= 12
        exec(compile(program.replace(":8000", f":{port}"), "serve.md", "exec"), {})
        model = LatentFlow.from_pretrained(folder, device="cpu")
        model.reference = folder.name  # of the folder, others learn its name alone
        assert (tmp_path / "drawn.png").read_bytes() == model.sample(seed=7, classes="cat").png(0)
        if shutil.which("node"):
            (script,) = re.findall(r"^```js\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
            written = 'import { writeFileSync } from "node:fs"; writeFileSync("again.png", picture);'
            (tmp_path / "draw.mjs").write_text(script.replace(":8000", f":{port}") + written, encoding="utf-8")
            subprocess.run(["node", "draw.mjs"], check=True, timeout=60)
            assert (tmp_path / "again.png").read_bytes() == (tmp_path / "drawn.png").read_bytes()
        found: list[tuple[int, bytes]] = []
        asked = [{"seed": seed, "steps": 40} for seed in range(12)]
        threads = [threading.Thread(target=ask, args=(port, fields, found)) for fields in asked]
        for thread in threads:
            thread.start()
        first = threading.Event()
        threading.Timer(0.1, first.set).start()
        first.wait()
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert process.wait(60) == 143
        pictures = [model.sample(**fields).png(0) for fields in asked]
        for status, body in found:
            assert status in (200, 503)
            assert body in pictures if status == 200 else "error" in json.loads(body)
        assert process.stderr.read().strip() == "latentflow: ended by SIGTERM"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("options", "warned"), [({"host": "0.0.0.0"}, True), ({"host": "0.0.0.0", "token": "a" * 8}, False), ({}, False)]
)
def test_an_address_that_others_reach_is_warned_of(folder, capsys, monkeypatch, options, warned):
    monkeypatch.setattr(listening, "run", lambda *given: None)
    listening.serve(folder, ServeRequest(port=0, **options), runtime=tiny.CPU)
    said = capsys.readouterr().err
    assert ("anybody there may draw" in said) == warned
    assert said.count("\n") == warned


def test_the_token_of_the_environment(folder, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(listening, "run", lambda flow, request, listener: seen.append((request.token, flow.reference)))
    monkeypatch.setenv("LATENTFLOW_TOKEN", "from-outside")
    listening.serve(folder, ServeRequest(port=0, host="0.0.0.0"), runtime=tiny.CPU)
    assert seen == [("from-outside", "pets")] and capsys.readouterr().err == ""
    monkeypatch.setenv("LATENTFLOW_TOKEN", "short")
    with pytest.raises(ConfigError, match="give at least 8 ASCII letters"):
        listening.serve(folder, ServeRequest(port=0), runtime=tiny.CPU)


def test_addresses_that_cannot_be_used(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^cannot listen on 127\.0\.0\.1:{port}: .*; give another --port"):
            listening.serve(folder, ServeRequest(port=port))
    with pytest.raises(ConfigError, match=r"^--host 'no\.such\.host\.invalid': there is no such address"):
        listening.serve(folder, ServeRequest(host="no.such.host.invalid"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "70000"], "--port 70000: give a whole number from 0 to 65,535"),
        (["--token", "short"], "--token 'short': give at least 8 ASCII letters"),
        (["--origins", "example.org"], "--origins ['example.org']: give origins like https://example.org"),
        (["--most-images", "0"], "--most-images 0: give a whole number from 1 to 10,000"),
    ],
)
def test_wrong_options(folder, words, message, capsys, monkeypatch):
    done = run_here(["serve", str(folder), *words], capsys, monkeypatch)
    assert done.code == 2 and message in done.err, done.err


def test_a_library_that_is_missing(folder, capsys, monkeypatch):
    monkeypatch.setattr("latentflow.commands.serve.find_spec", lambda name: None if name == "uvicorn" else "there")
    done = run_here(["serve", str(folder)], capsys, monkeypatch)
    assert (done.code, done.err.strip()) == (
        2,
        "latentflow: serving needs uvicorn, which is not installed: pip install 'latentflow[studio]'",
    )
