"""The page as a server: its routes, the server's own for programs, the queue, and what guards them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

import uvicorn
from fastapi import FastAPI

import latentflow
from latentflow.studio.guarding import App, Guard
from latentflow.studio.page import page_router
from latentflow.studio.page_jobs import PageJobs
from latentflow.studio.page_models import PageModels
from latentflow.studio.queue import DrawingQueue
from latentflow.studio.request import LOOPBACK, ServeRequest
from latentflow.studio.server import Service, make_app
from latentflow.studio.uploads import Uploads

TOGETHER_ON_CPU = 4
"""Pictures in one batch on a CPU, so that the page fills while it draws; on a GPU it is the usual number."""


@contextmanager
def opened_page(models: PageModels, host: str = LOOPBACK) -> Iterator[tuple[App, DrawingQueue]]:
    """The application, guarded, and its queue, which ends with the context.

    Programs find the first model under /api, as `latentflow serve` offers it.
    """
    on_cpu = models.runtime.device.type == "cpu"
    request = ServeRequest(batch_size=TOGETHER_ON_CPU) if on_cpu else ServeRequest()
    queue = DrawingQueue(batch_size=request.batch_size, most_waiting=request.most_waiting)
    jobs = PageJobs(queue)
    choices, service = models.choices(), None
    try:
        with TemporaryDirectory(prefix="latentflow-studio-") as folder:
            app = FastAPI(title="latentflow", version=latentflow.__version__, docs_url=None, redoc_url=None)
            app.openapi_url = None
            app.include_router(page_router(models, jobs, Uploads(Path(folder))))
            if choices:
                service = Service(models.open(choices[0].key), request, queue)
                app.mount("/api", make_app(service))
            yield Guard(app, host), queue
    finally:
        jobs.stop_all()
        queue.close()
        if service is not None:
            service.threads.shutdown(cancel_futures=True)


class PageServer(uvicorn.Server):
    """Refuses what is waiting as soon as it is to end.

    Args:
        app: that is served.
        queue: that it draws with.
    """

    def __init__(self, app: App, queue: DrawingQueue):
        options = {"log_config": None, "access_log": False, "server_header": False, "lifespan": "off", "ws": "none"}
        super().__init__(uvicorn.Config(app, proxy_headers=False, timeout_graceful_shutdown=5, **options))
        self._queue = queue

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._queue.begin_to_close()

    def serve_on(self, listening: socket.socket) -> None:
        """Answer on a socket until the process gets SIGTERM or SIGINT."""
        self.run(sockets=[listening])
