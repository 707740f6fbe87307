"""`latentflow serve`: opens the model and the port, and closes both in order."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path
from types import FrameType

import uvicorn

from latentflow.console import say
from latentflow.errors import ConfigError, LatentFlowError
from latentflow.model.flow_model import FlowModel
from latentflow.runtime import Runtime
from latentflow.sampling.drawing import make_drawing
from latentflow.sampling.picture_content import require_suffix, usual_suffix
from latentflow.sampling.request import SampleRequest
from latentflow.studio.guarding import Guard, is_loopback
from latentflow.studio.queue import DrawingQueue
from latentflow.studio.request import ServeRequest
from latentflow.studio.server import Service, make_app

TOKEN = "LATENTFLOW_TOKEN"
_BACKLOG = 1024  # connections that were not accepted yet


class _Server(uvicorn.Server):
    """Refuses what is waiting as soon as it is to end, and sends what is being drawn."""

    queue: DrawingQueue

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self.queue.begin_to_close()


def serve(model: str | Path, request: ServeRequest, *, runtime: Runtime | None = None) -> None:
    """Serve a model until SIGTERM or Ctrl-C.

    Raises:
        ArtifactError, ConfigError: there is no such model, or the address cannot be listened on.
    """
    listener = _listener(request.host, request.port)
    try:
        flow = FlowModel.from_pretrained(model, runtime=runtime)
        require_suffix(usual_suffix(flow.config.pixel_format), flow.config.pixel_format)
        if Path(model).exists():
            flow.reference = Path(model).resolve().name  # pictures go to others, whom the folder does not concern
        _prepare(flow)
        token = request.token or os.environ.get(TOKEN) or None
        if token is not None:
            request = ServeRequest(**{**dict(request), "token": token})
        if not is_loopback(request.host) and token is None:
            say(
                f"warning: {request.host} can be reached from other machines, and anybody there may draw: give "
                "a --token, or leave out --host"
            )
        run(flow, request, listener)
    finally:
        listener.close()


def _prepare(flow: FlowModel) -> None:
    """Compute now what the first request would wait for: the hash of the weights; a guide of the preset is opened."""
    _ = flow.weights_hash
    with suppress(LatentFlowError):  # not every model draws from seeds alone
        make_drawing(flow, SampleRequest(num=1))


def run(flow: FlowModel, request: ServeRequest, listener: socket.socket) -> None:
    """Serve a model on a socket that is bound, until the process gets SIGTERM or SIGINT."""
    queue = DrawingQueue(batch_size=request.batch_size, most_waiting=request.most_waiting)
    service = Service(flow, request, queue)
    guard = Guard(
        make_app(service),
        request.host,
        request.token,
        frozenset(request.origins),
        frozenset(map(str.lower, request.hosts)),
    )
    config = uvicorn.Config(
        guard,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        proxy_headers=False,
        ws="none",
        backlog=_BACKLOG,
        timeout_graceful_shutdown=request.most_seconds,
    )
    server = _Server(config)
    server.queue = queue
    listener.listen(_BACKLOG)  # before its address is said
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    say(f"serving on http://{shown}:{port} (documentation: http://{shown}:{port}/docs); end it with Ctrl-C")
    try:
        server.run(sockets=[listener])
    finally:
        queue.close()
        service.threads.shutdown(cancel_futures=True)


def _listener(host: str, port: int) -> socket.socket:
    """A socket that is bound, before the model is loaded."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host!r}: there is no such address ({error}); give 127.0.0.1") from error
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; give another --port, or 0 for a free one"
        ) from error
    return listener
