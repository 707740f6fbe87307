"""The server: requests over HTTP, drawn by the queue.

    guard (host, origin, token)  ->  read, bounded  ->  check  ->  queue  ->  encode  ->  one answer, complete

The event loop reads and answers; checking images and encoding pictures happens in threads, and drawing in the thread
of the queue.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

import latentflow
from latentflow.model.flow_model import FlowModel
from latentflow.sampling.picture_content import usual_suffix
from latentflow.sampling.samples import Samples
from latentflow.studio.bodies import Asked, read_asked
from latentflow.studio.counters import Counters
from latentflow.studio.queue import DrawingJob, DrawingQueue
from latentflow.studio.reference import operation, reference_page
from latentflow.studio.refusals import Refused, refusal_of
from latentflow.studio.request import ServeRequest
from latentflow.studio.tasks import TASKS, Checked, Task, check

_LOG = logging.getLogger("latentflow.studio")
_TYPES = {".png": "image/png", ".tiff": "image/tiff"}
_THREADS = 4
_OTHERS = {
    "/info": "Classes, sizes, sampling preset, limits",
    "/health": "200 while pictures are drawn, else 503",
    "/metrics": "Counters for Prometheus",
    "/openapi.json": "This page for programs",
}
_WRONG = {404: "there is nothing at this path; see /docs", 405: "this path takes another method; see /docs"}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"


class Service:
    """One model behind the server.

    Args:
        model: what is served.
        request: limits.
        queue: where requests wait; closed by the caller.
    """

    def __init__(self, model: FlowModel, request: ServeRequest, queue: DrawingQueue):
        self.model, self.request, self.queue = model, request, queue
        self.counters = Counters()
        self._open = 0
        self.threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="serving")

    async def handle(self, task: Task, http: Request) -> Response:
        """Answer one request."""
        began = time.perf_counter()
        self._open += 1
        try:
            response = await self._answer(task, http)
        except Exception as error:
            refused = refusal_of(error)
            if refused.status == 500:
                _LOG.error("%s failed", task.name, exc_info=error)
            response = _refusal(refused)
        finally:
            self._open -= 1
        self.counters.answered(task.name, response.status_code, time.perf_counter() - began)
        return response

    async def _answer(self, task: Task, http: Request) -> Response:
        if self.queue.is_closed:
            raise Refused(503, self.queue.fault or "the server is being closed", retry_after="10")
        if self._open > 2 * self.request.most_waiting:  # before the memory for its body is taken
            raise Refused(429, f"{self._open} requests are open, and no more may be; try again", retry_after="1")
        asked = await self._read(http)
        limits = {
            "most_images": self.request.most_images,
            "most_pixels": self.request.most_megapixels * 1_000_000,
        }
        if asked.images:
            checked = await self._in_thread(lambda: check(self.model, task, asked, **limits))
        else:
            checked = check(self.model, task, asked, **limits)
        job = self.queue.submit(self.model, checked.prepared)
        samples = await self._drawn(job, http)
        return await self._in_thread(lambda: _encoded(samples, checked))

    async def _read(self, http: Request) -> Asked:
        """What is asked for, unless it takes too long to arrive."""
        seconds = self.request.most_seconds
        try:
            return await asyncio.wait_for(read_asked(http, self.request.most_megabytes << 20), seconds)
        except asyncio.TimeoutError:
            raise Refused(408, f"the request did not arrive within {seconds} s") from None

    async def _drawn(self, job: DrawingJob, http: Request) -> Samples:
        """Wait for a job, no longer than may be, nor longer than the client does."""
        drawn = asyncio.wrap_future(job.future)
        gone = asyncio.ensure_future(_left(http))
        try:
            await asyncio.wait({drawn, gone}, timeout=self.request.most_seconds, return_when=asyncio.FIRST_COMPLETED)
            if drawn.done():
                return drawn.result()
            job.stop()
            if gone.done():
                raise Refused(499, "the client has gone")
            seconds = self.request.most_seconds
            raise Refused(504, f"the pictures took more than {seconds} s; ask for fewer images or fewer steps")
        finally:
            gone.cancel()
            drawn.cancel()
            with suppress(asyncio.CancelledError):
                await gone

    async def _in_thread(self, call: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.threads, call)

    def info(self) -> dict[str, Any]:
        """What a client has to know of the model, and the limits; no path of this machine."""
        config, conditioning = self.model.config, self.model.config.conditioning
        tasks = ["sample", "inpaint"]
        tasks += ["mask-to-image"] if conditioning.map_class_names else []
        tasks += ["translate"] if config.inputs else []
        names = ("batch_size", "most_images", "most_waiting", "most_megabytes", "most_megapixels", "most_seconds")
        return {
            "latentflow": latentflow.__version__,
            "weights": self.model.weights_hash[:12],
            "tasks": tasks,
            "image_size": config.image_size.written,
            "image_sizes": [size.written for size in config.sizes],
            "pixels": config.pixel_format.title,
            "classes": list(conditioning.class_names),
            "map_classes": list(conditioning.map_class_names),
            "map_palette": [list(colour) for colour in conditioning.map_palette],
            "conditions": {one.name: one.describe() for one in conditioning.columns},
            "sampling": config.sampling.model_dump(mode="json", exclude={"guide"}),
            "limits": {name: getattr(self.request, name) for name in names},
        }

    def health(self) -> tuple[int, dict[str, Any]]:
        """Whether pictures are drawn."""
        if self.queue.fault:
            return 503, {"status": "failed", "reason": self.queue.fault}
        if self.queue.is_closed:
            return 503, {"status": "closing"}
        return 200, {"status": "ok", "waiting": self.queue.waiting}


async def _left(http: Request) -> None:
    """Ends when the client has closed its connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _refusal(refused: Refused) -> Response:
    body = json.dumps({"error": str(refused)})
    return Response(body, refused.status, refused.headers, "application/json")


def _encoded(samples: Samples, checked: Checked) -> Response:
    """The answer with the pictures."""
    suffix = usual_suffix(samples.pixel_format)
    contents = [samples.content(row, suffix) for row in range(len(samples.pixels))]
    if checked.format == "png":
        headers = {"content-disposition": f'inline; filename="seed-{samples.drawing.seeds[0]:08d}{suffix}"'}
        return Response(contents[0], 200, headers, _TYPES[suffix])
    pictures = []
    for row, content in enumerate(contents):
        name = "png" if suffix == ".png" else "tiff"
        encoded = {name: base64.b64encode(content).decode(), "seed": samples.drawing.seeds[row]}
        pictures.append({**encoded, "request": json.loads(samples.facts(row))})
    body = {"images": pictures, "evaluations": samples.mean_evaluations, "seconds": samples.seconds}
    return Response(json.dumps(body), 200, {}, "application/json")


def make_app(service: Service) -> FastAPI:
    """The application, unguarded: see `guarding.Guard`."""
    app = FastAPI(title="latentflow", version=latentflow.__version__, docs_url=None, redoc_url=None)
    page = reference_page(TASKS, _OTHERS)

    def add(task: Task) -> None:
        async def draw(http: Request) -> Response:
            return await service.handle(task, http)

        draw.__name__ = task.name.replace("-", "_")
        app.add_api_route(f"/{task.name}", draw, methods=["POST"], summary=task.title, openapi_extra=operation(task))

    for task in TASKS:
        add(task)

    @app.get("/", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(page, 200, {"content-security-policy": _POLICY}, "text/html")

    @app.get("/info", summary=_OTHERS["/info"])
    async def info() -> Response:
        return Response(json.dumps(service.info()), 200, {}, "application/json")

    @app.get("/health", summary=_OTHERS["/health"])
    async def health() -> Response:
        status, facts = service.health()
        return Response(json.dumps(facts), status, {}, "application/json")

    @app.get("/metrics", summary=_OTHERS["/metrics"])
    async def metrics() -> Response:
        return Response(service.counters.text(service.queue), 200, {}, "text/plain; version=0.0.4")

    @app.exception_handler(HTTPException)
    async def refuse(http: Request, error: HTTPException) -> Response:
        return _refusal(Refused(error.status_code, _WRONG.get(error.status_code, str(error.detail))))

    return app
