"""Downloads, from a small server on this machine."""

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from latentflow import ledger
from latentflow.data.stores import download
from latentflow.data.stores.download import fetched, is_address
from latentflow.errors import DataError


class FileServer:
    """Serves bytes by their path, in parts if it is asked to.

    Attributes:
        files: what it serves.
        asked: path and range of every request.
        cut: after how many bytes each of the next answers ends too early.
        failing: statuses of the next answers.
        has_versions: whether it names the version of a file, as it has to for parts.
    """

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.cut: list[int] = []
        self.failing: list[int] = []
        self.has_versions = True
        files = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path, wanted = self.path.partition("?")[0], self.headers.get("Range")
                files.asked.append((path, wanted))
                if files.failing or path not in files.files:
                    self.send_error(files.failing.pop(0) if files.failing else 404)
                    return
                content, start = files.files[path], 0
                version = f'"{hash(content)}"'
                if wanted and self.headers.get("If-Range") == version:
                    start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(content) - start))
                if files.has_versions:
                    self.send_header("ETag", version)
                self.end_headers()
                part = content[start:]
                self.wfile.write(part[: files.cut.pop(0)] if files.cut else part)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[FileServer]:
    monkeypatch.setenv("LATENTFLOW_CACHE", str(tmp_path / "kept"))
    server = FileServer()
    yield server
    server.server.shutdown()
    server.server.server_close()


def test_addresses():
    assert is_address("https://host/a.tar") and is_address("HTTP://host/a.tar")
    assert not is_address("http/a.tar") and not is_address("/http://a")


def test_files_are_downloaded_once(server):
    server.files = {"/set/a.tar": b"one", "/set/b.tar": b"two", "/other/a.tar": b"three"}
    addresses = [f"{server.url}{name}" for name in server.files]
    places = fetched(addresses)
    assert [place.read_bytes() for place in places] == [b"one", b"two", b"three"]
    assert [place.name for place in places] == ["a.tar", "b.tar", "a.tar"]
    assert places[0].parent == places[1].parent != places[2].parent
    assert places[0].is_relative_to(ledger.cache_folder())
    server.files = {}
    assert fetched([f"{one}?signature=another" for one in addresses]) == places
    assert len(server.asked) == 3


def test_a_lost_connection_goes_on_where_it_ended(server):
    server.files = {"/a.tar": bytes(range(256)) * 20}
    server.cut = [1000, 7, 0]
    (place,) = fetched([f"{server.url}/a.tar"])
    assert place.read_bytes() == server.files["/a.tar"]
    assert [wanted for _, wanted in server.asked] == [None, "bytes=1000-", "bytes=1007-", "bytes=1007-"]
    assert [file.name for file in place.parent.iterdir()] == ["a.tar"]


def test_after_a_kill_it_goes_on(server):
    server.files, server.cut = {"/a.tar": bytes(5000)}, [1000, 1000, 1000, 1000]
    with pytest.raises(DataError, match=r"a.tar cannot be read \(the connection was lost\); .* repeat the command"):
        fetched([f"{server.url}/a.tar?key=secret"])
    (place,) = fetched([f"{server.url}/a.tar"])
    assert place.read_bytes() == bytes(5000) and server.asked[-1] == ("/a.tar", "bytes=4000-")


def test_a_file_that_has_changed_meanwhile_begins_again(server):
    server.files, server.cut = {"/a.tar": b"x" * 5000}, [1000] * 4
    with pytest.raises(DataError):
        fetched([f"{server.url}/a.tar"])
    server.files = {"/a.tar": b"y" * 5000}
    assert fetched([f"{server.url}/a.tar"])[0].read_bytes() == b"y" * 5000


def test_without_versions_nothing_is_continued(server):
    server.files, server.cut, server.has_versions = {"/a.tar": bytes(5000)}, [1000], False
    assert fetched([f"{server.url}/a.tar"])[0].read_bytes() == bytes(5000)
    assert [wanted for _, wanted in server.asked] == [None, None]


def test_a_server_that_stumbles_is_asked_again(server):
    server.files, server.failing = {"/a.tar": b"x"}, [503, 500]
    assert fetched([f"{server.url}/a.tar"])[0].read_bytes() == b"x"


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (403, 1), (503, download._TRIES)])
def test_what_cannot_be_downloaded(server, status, tries):
    server.failing = [status] * tries
    with pytest.raises(DataError, match=rf"/a.tar cannot be read \({status} ") as error:
        fetched([f"{server.url}/a.tar?key=secret"])
    assert "secret" not in str(error.value) and len(server.asked) == tries
    with pytest.raises(DataError, match=r"http://127.0.0.1:9/a.tar cannot be read \(.*refused"):
        fetched(["http://127.0.0.1:9/a.tar"])
    with pytest.raises(DataError, match="names no file"):
        fetched([f"{server.url}/set/"])
