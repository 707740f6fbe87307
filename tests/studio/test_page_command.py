"""`latentflow studio` as a command: it answers, ends by a signal, and refuses in one line."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
import urllib.request

from tests.processes import finish, run_here, start, wait_until

LINE = re.compile(r"the studio is at (http://127\.0\.0\.1:\d+/); Ctrl-C ends it")


def asked(address: str, path: str, body: object = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(address + path, data, timeout=30) as answer:
        return json.loads(answer.read())


def test_the_page_is_served_until_it_is_ended(other_model, tmp_path):
    """SIGTERM while it draws something long: the process ends within seconds, and leaves no folder behind."""
    log, home = tmp_path / "log", tmp_path / "tmp"
    home.mkdir()
    process = start(["studio", other_model, "--port", 0, "--no-browser", "--device", "cpu"], log, {"TMPDIR": str(home)})
    wait_until(lambda: log.exists() and LINE.search(log.read_text()) is not None, process)
    address = LINE.search(log.read_text())[1]
    with urllib.request.urlopen(address, timeout=30) as answer:
        assert b"<title>latentflow studio</title>" in answer.read()
    assert asked(address, "page/state")["models"] == [{"key": str(other_model), "name": str(other_model)}]
    assert asked(address, "api/health")["status"] == "ok"
    long = {"model": str(other_model), "task": "sample", "request": {"num": 1, "steps": 10_000}}
    job = asked(address, "page/jobs", long)["id"]
    while asked(address, f"page/jobs/{job}")["state"] == "waiting":
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process, log, timeout=60) in (0, 143)
    assert list(home.glob("latentflow-studio-*")) == []
    assert "Traceback" not in log.read_text()


def test_what_is_no_model_is_one_line(tmp_path, capsys, monkeypatch):
    done = run_here(["studio", tmp_path / "nowhere", "--no-browser"], capsys, monkeypatch)
    assert done.code == 2
    assert "nowhere does not exist" in done.error


def test_a_port_that_is_taken_is_one_line(other_model, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_here(["studio", other_model, "--port", port, "--no-browser"], capsys, monkeypatch)
    assert done.code == 2
    assert done.error.endswith(
        f"--port {port} cannot be used: address already in use; give another, or 0 for a free one"
    )
