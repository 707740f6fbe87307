"""The page as routes of a FastAPI application: what the browser loads, and what its scripts ask.

Everything comes from this process: no route refers to another machine, and the policy that is sent with the page
forbids its scripts to. All answers are JSON or pictures; what is refused is {"error": one line}.
"""

from __future__ import annotations

import json
import mimetypes
from collections.abc import Callable, Coroutine
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from torch import Tensor

import latentflow
from latentflow.errors import ConfigError, LatentFlowError
from latentflow.sampling.naming import picture_caption, seed_caption
from latentflow.sampling.picture_content import usual_suffix
from latentflow.studio.bodies import read_body
from latentflow.studio.browser_pictures import png_of, shown_png
from latentflow.studio.mask_readings import mask_readings, painted_hole, upright_mask
from latentflow.studio.model_facts import coloured_map, model_facts
from latentflow.studio.page_jobs import PageJob, PageJobs, job_facts
from latentflow.studio.page_models import PageModels
from latentflow.studio.page_tasks import GivenFiles, expected_calls, page_task
from latentflow.studio.restored import restored_request
from latentflow.studio.run_view import preview_file, run_facts
from latentflow.studio.uploads import MOST_BYTES, Upload, Uploads

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Inline styles are allowed for the shapes of empty places; scripts are not."""
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_MOST_JSON = 1 << 20


class _PageRoute(APIRoute):
    """A route whose refusals are JSON of one line, and whose answers forbid the browser to ask anybody else."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                answer = await handle(request)
            except LatentFlowError as error:
                answer = JSONResponse({"error": str(error)}, status_code=getattr(error, "status", 422))
            except OSError as error:
                answer = JSONResponse({"error": f"{error.strerror or error}"}, status_code=422)
            for name, value in _HEADERS.items():
                answer.headers.setdefault(name, value)
            return answer

        return guarded


def page_router(models: PageModels, jobs: PageJobs, uploads: Uploads) -> APIRouter:
    """The routes of the page.

    Args:
        models: that it can open.
        jobs: which it begins and watches.
        uploads: the files that it is given.
    """
    router = APIRouter(route_class=_PageRoute, include_in_schema=False)
    _add_files(router)
    _add_models(router, models, jobs)
    _add_runs(router, models)
    _add_uploads(router, models, uploads)
    _add_jobs(router, models, jobs, uploads)
    return router


def _add_files(router: APIRouter) -> None:
    """The page itself: the files of `templates`, by a list made beforehand, so that no path is ever put together."""
    folder = files("latentflow.studio").joinpath("templates")
    contents = {one.name: one.read_bytes() for one in folder.iterdir() if one.is_file()}

    @router.get("/")
    def index() -> Response:
        return Response(contents["index.html"], media_type="text/html; charset=utf-8")

    @router.get("/page/files/{name}")
    def file(name: str) -> Response:
        if name not in contents:
            return JSONResponse({"error": "there is no such file"}, status_code=404)
        kind = "text/javascript" if name.endswith(".js") else mimetypes.guess_type(name)[0]
        return Response(contents[name], media_type=kind)


def _add_models(router: APIRouter, models: PageModels, jobs: PageJobs) -> None:
    # before "/page/files/{name}" would take it: two parts
    @router.get("/page/state")
    def state() -> dict[str, Any]:
        choices = [{"key": one.key, "name": one.name} for one in models.choices()]
        return {"version": latentflow.__version__, "models": choices, "runs": models.runs}

    @router.get("/page/model")
    def facts(key: str) -> dict[str, Any]:
        model = models.open(key)
        jobs.measure(key, model)
        return {"key": key, **model_facts(model)}


def _add_runs(router: APIRouter, models: PageModels) -> None:
    def run_of(key: str) -> Path:
        if key not in models.runs:
            raise ConfigError(
                f"{key:.200} is none of the runs that this page was opened with; open it by `latentflow studio RUN`"
            )
        return Path(key)

    @router.get("/page/run")
    def run(key: str) -> dict[str, Any]:
        return run_facts(run_of(key))

    @router.get("/page/run/preview")
    def preview(key: str, step: int) -> Response:
        return Response(preview_file(run_of(key), step).read_bytes(), media_type="image/png")


def _add_uploads(router: APIRouter, models: PageModels, uploads: Uploads) -> None:
    @router.post("/page/uploads")
    async def upload(request: Request, name: str = "picture.png") -> dict[str, Any]:
        content = await read_body(request, MOST_BYTES)
        kept = await run_in_threadpool(uploads.add, name, content)
        return await run_in_threadpool(_upload_facts, models, kept)

    @router.get("/page/uploads/{key}/shown")
    def shown(key: str) -> Response:
        return Response(shown_png(uploads.find(key).file), media_type="image/png")

    @router.get("/page/uploads/{key}/masks")
    def masks(key: str, photo: str) -> list[dict[str, Any]]:
        """All that a mask may mean for a photograph, each kept as a mask."""
        mask = uploads.find(key)
        readings = mask_readings(mask.file, uploads.find(photo).file)
        return [
            {"title": one.title, "share": one.share, "id": uploads.add(mask.name, upright_mask(one.hole)).key}
            for one in readings
        ]

    @router.post("/page/uploads/painted-mask")
    async def painted(request: Request) -> dict[str, Any]:
        content = await read_body(request, MOST_BYTES)
        made = await run_in_threadpool(lambda: uploads.add("mask.png", upright_mask(painted_hole(content))))
        return {"id": made.key}

    @router.get("/page/uploads/{key}/map")
    def semantic_map(key: str, model: str) -> Response:
        """A map in the colours of a model's palette, as the page paints it; unlabelled pixels are light."""
        return Response(png_of(coloured_map(models.open(model), uploads.find(key).file)), media_type="image/png")


def _upload_facts(models: PageModels, kept: Upload) -> dict[str, Any]:
    """What the page learns of a file: its size, and the request in it."""
    return {
        "id": kept.key,
        "name": kept.name,
        "width": kept.size[0],
        "height": kept.size[1],
        "restored": None if kept.facts is None else _restored(models, dict(kept.facts)),
    }


def _restored(models: PageModels, facts: dict[str, Any]) -> dict[str, Any]:
    """The request of a picture, with the model that drew it, or a note where that is not here."""
    found, origin = restored_request(facts), facts["drawn_by"]
    key = models.with_weights(str(origin.get("weights") or ""), str(origin.get("model") or ""))
    note = ""
    if key is None:
        note = f"drawn by {origin.get('model') or 'another model'}, whose weights none of the opened models has"
    elif found["inputs"]:
        given = ", ".join(f"{role} {text.split(' sha256:')[0]}" for role, text in found["inputs"].items())
        note = f"the request is restored; it was drawn from {given}, which has to be given again"
    names = [facts[name] for name in ("class_name", "to_class_name") if isinstance(facts.get(name), str)]
    return {**found, "model": key, "class_names": names, "note": note}


def _add_jobs(router: APIRouter, models: PageModels, jobs: PageJobs, uploads: Uploads) -> None:
    @router.post("/page/jobs")
    async def begin(request: Request) -> dict[str, Any]:
        asked = _asked(await read_body(request, _MOST_JSON))
        return await run_in_threadpool(_begin, asked)

    def _begin(asked: dict[str, Any]) -> dict[str, Any]:
        model, given = models.open(asked["model"]), asked["files"]
        paths = {role: uploads.find(key).file for role, key in given.items() if role != "noise"}
        noise = _noise_of(jobs.find(given["noise"])) if "noise" in given else None
        task = page_task(model, asked["task"], asked["request"], GivenFiles(paths, noise))
        job = jobs.begin(asked["model"], model, task)
        return {"id": job.key, "total": job.drawn.total, "size": task.size}

    @router.post("/page/estimate")
    async def estimate(request: Request) -> dict[str, Any]:
        asked = _asked(await read_body(request, _MOST_JSON))
        return await run_in_threadpool(_estimate, asked)

    def _estimate(asked: dict[str, Any]) -> dict[str, Any]:
        calls = expected_calls(models.open(asked["model"]), asked["task"], asked["request"])
        num = asked["request"].get("num", 1)
        return {"evaluations": calls, "seconds": jobs.speeds.seconds(asked["model"], calls * num)}

    @router.get("/page/jobs/{key}")
    def state(key: str, since: int = 0) -> dict[str, Any]:
        job = jobs.find(key)
        facts, done = job_facts(job), len(job.pictures)  # the state first: then its pictures are there
        return {**facts, "done": done, "pictures": [_picture_facts(job, row) for row in range(max(since, 0), done)]}

    @router.post("/page/jobs/{key}/stop")
    def stop(key: str) -> dict[str, Any]:
        jobs.find(key).drawn.stop()
        return {}

    @router.get("/page/jobs/{key}/{row}/{kind}")
    def picture(key: str, row: int, kind: str) -> Response:
        return _picture(models, jobs.find(key), row, kind)


def _noise_of(job: PageJob) -> Tensor:
    inverting = job.task.inverting
    if inverting is None or inverting.found is None:
        raise ConfigError("there is no noise yet; invert an image first")
    return inverting.found.noise


def _picture_facts(job: PageJob, row: int) -> dict[str, Any]:
    samples, own = job.pictures[row]
    drawn = samples.drawing.at(slice(own, own + 1))
    return {
        "row": row,
        "seed": drawn.seeds[0],
        "task": drawn.task,
        "caption": ", ".join(filter(None, [picture_caption(drawn, samples.class_names), seed_caption(drawn)])),
        "name": samples.name(own),
    }


def _facts_of(job: PageJob, row: int) -> str:
    """The metadata of a picture, as JSON."""
    samples, own = job.pictures[row]
    return samples.facts(own)


def _picture(models: PageModels, job: PageJob, row: int, kind: str) -> Response:
    """A picture as it is shown, its file, its metadata or its request."""
    if not 0 <= row < len(job.pictures):
        raise ConfigError(f"picture {row} of {len(job.pictures)} is not there")
    samples, own = job.pictures[row]
    if kind == "facts":
        return Response(_facts_of(job, row), media_type="application/json")
    if kind == "request":
        return JSONResponse(_restored(models, json.loads(_facts_of(job, row))))
    if kind == "file":
        suffix = ".png" if samples.finish else usual_suffix(samples.pixel_format)
        name = samples.name(own)
        content = samples.content(own, suffix)
        return Response(content, media_type="image/png" if suffix == ".png" else "image/tiff", headers=_as_file(name))
    if kind == "shown":
        return Response(png_of(samples.shown[own].permute(1, 2, 0).numpy()), media_type="image/png")
    raise ConfigError(f"a picture has no {kind!r:.40}; ask for shown, file, facts or request")


def _as_file(name: str) -> dict[str, str]:
    return {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}"}


def _asked(content: bytes) -> dict[str, Any]:
    """What a script asked for: model, task, request and files.

    Raises:
        ConfigError: it is not of this form.
    """
    try:
        asked = json.loads(content)
        return {
            "model": str(asked["model"]),
            "task": str(asked["task"]),
            "request": dict(asked["request"]),
            "files": {str(role): str(key) for role, key in dict(asked.get("files") or {}).items()},
        }
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
        raise ConfigError("ask with JSON of a model, a task and a request") from None
