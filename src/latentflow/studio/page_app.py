"""The application that a process of the page serves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from fastapi import FastAPI

from latentflow.studio.page import page_router
from latentflow.studio.page_jobs import DrawingThread, PageJobs
from latentflow.studio.page_models import PageModels
from latentflow.studio.uploads import Uploads

TOGETHER = {"cpu": 4}
"""Pictures of one part of a job, by device; `_TOGETHER_ELSEWHERE` on others."""

_TOGETHER_ELSEWHERE = 16


@contextmanager
def opened_page(models: PageModels) -> Iterator[FastAPI]:
    """The application, and what it needs while it is served: a drawing thread and a folder for uploads."""
    thread = DrawingThread()
    jobs = PageJobs(thread.submit)
    together = TOGETHER.get(models.runtime.device.type, _TOGETHER_ELSEWHERE)
    with TemporaryDirectory(prefix="latentflow-studio-") as folder:
        app = FastAPI(title="latentflow", docs_url=None, redoc_url=None, openapi_url=None)
        app.include_router(page_router(models, jobs, Uploads(Path(folder)), batch_size=together))
        try:
            yield app
        finally:
            jobs.stop_all()
            thread.close()
