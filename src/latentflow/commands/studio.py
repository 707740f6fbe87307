"""`latentflow studio`: the page, served from this process until it is ended."""

from __future__ import annotations

import socket
import threading
import webbrowser
from collections.abc import Callable, Sequence

from latentflow.commands.serve import require_libraries
from latentflow.errors import ConfigError
from latentflow.runtime import Runtime, open_runtime
from latentflow.studio.request import LOOPBACK


def studio(
    models: Sequence[str],
    *,
    port: int = 8300,
    browser: bool = True,
    say: Callable[[str], None] = lambda text: None,
    runtime: Runtime | None = None,
) -> None:
    """Serve the page until the process is interrupted.

    Args:
        models: model folders, run folders or hub ids; each is loaded when it is first used.
        port: 0: any that is free.
        browser: open the page in the browser of this machine.
        say: called with the address of the page, once it answers.
        runtime: where to compute; None: see `open_runtime`.

    Raises:
        ConfigError: a library of the extra `studio` is missing, or the port cannot be used.
        ArtifactError: one of `models` is neither a model nor a run.
    """
    require_libraries()
    from latentflow.studio.page_app import PageServer, opened_page
    from latentflow.studio.page_models import PageModels

    opened = PageModels(models, runtime or open_runtime(alone=True))
    with _listening(port) as listening, opened_page(opened) as (app, queue):
        address = f"http://{LOOPBACK}:{listening.getsockname()[1]}/"
        say(f"the studio is at {address}; Ctrl-C ends it")
        if browser:
            threading.Timer(0.5, webbrowser.open, [address]).start()
        PageServer(app, queue).serve_on(listening)


def _listening(port: int) -> socket.socket:
    """A socket that listens to this machine.

    Raises:
        ConfigError: the port is taken.
    """
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((LOOPBACK, port))
        made.listen(128)
    except OSError as error:
        made.close()
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"--port {port} cannot be used: {reason}; give another, or 0 for a free one") from None
    return made
