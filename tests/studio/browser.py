"""What the tests of the page share: a Chromium of the system, a page that is served, and what a person does in it."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PLACES = ("chromium", "chromium-browser", "google-chrome")
WAIT = 60_000
"""Milliseconds that a test waits at most for what a page should show."""


def chromium() -> str:
    """The browser of the system; without one the test is skipped."""
    found = next((place for name in PLACES if (place := shutil.which(name))), None)
    if found is None:
        pytest.skip("there is no chromium here; Debian's package is `chromium`")
    return found


@contextmanager
def served(app: object) -> Iterator[str]:
    """The address of an application that a thread serves."""
    import uvicorn

    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server.should_exit = True
    thread.join(timeout=10)
    listening.close()


def drop_file(page: object, file: Path, target: str = "body") -> None:
    """Drop a file on an element, as from a folder of the desktop."""
    content = list(file.read_bytes())
    kind = "image/png" if file.suffix == ".png" else "application/octet-stream"
    transfer = page.evaluate_handle(
        """([content, name, kind]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(content)], name, { type: kind }));
            return transfer;
        }""",
        [content, file.name, kind],
    )
    page.locator(target).first.dispatch_event("drop", {"dataTransfer": transfer})
