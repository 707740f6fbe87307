"""`latentflow studio`: the page, served from this process until it is ended."""

from __future__ import annotations

import socket
import threading
import webbrowser
from collections.abc import Callable, Sequence

from latentflow.errors import ConfigError
from latentflow.runtime import Runtime, open_runtime


def studio(
    models: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8300,
    browser: bool = True,
    say: Callable[[str], None] = lambda text: None,
    runtime: Runtime | None = None,
) -> None:
    """Serve the page until the process is interrupted.

    Args:
        models: model folders, run folders or hub ids; each is loaded when it is first used.
        host: address to listen on.
        port: 0: any that is free.
        browser: open the page in the browser of this machine.
        say: called with the address of the page, once it answers.
        runtime: where to compute; None: see `open_runtime`.

    Raises:
        ConfigError: a library of the extra `studio` is missing, or the address cannot be used.
        ArtifactError: one of `models` is neither a model nor a run.
    """
    try:
        import uvicorn

        from latentflow.studio.page_app import opened_page
    except ImportError as error:
        raise ConfigError(f"the studio needs {error.name}: pip install 'latentflow[studio]'") from None
    from latentflow.studio.page_models import PageModels

    opened = PageModels(models, runtime or open_runtime(alone=True))
    with _listening(host, port) as listening, opened_page(opened) as app:
        address = _address(host, listening.getsockname()[1])
        say(f"the studio is at {address}; Ctrl-C ends it")
        if browser:
            threading.Timer(0.5, webbrowser.open, [address]).start()
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=2))
        server.run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigError: the port is taken, or the address is none of this machine.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(128)
    except OSError as error:
        made.close()
        raise ConfigError(
            f"--port {port}: {host} cannot be used ({error.strerror}); --port 0 takes a free one"
        ) from None
    return made


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
