"""Verbs that serve models to browsers and programs."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from latentflow.cli.options import ComputesIn, Device, Model, Precision, command
from latentflow.cli.output import runtime_for
from latentflow.console import say
from latentflow.studio.request import ServeRequest

verb = partial(command, group="Serving")


@verb(example="latentflow studio runs/cifar10")
def studio(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Model folders, run folders or hub ids.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of this machine; 0: a free one.")] = 8300,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")] = True,
    device: Device = None,
    precision: ComputesIn = Precision.auto,
) -> None:
    """Open a page to draw, fill, paint, edit and compare in, and to watch runs; all of it on this machine.

    Only programs of this machine can reach it; they find the first model under /api, as `serve` offers it. Needs the
    extra `studio`.
    """
    from latentflow.commands.studio import studio as run

    run(models, port=port, browser=browser, say=say, runtime=runtime_for(device, precision))


@verb(example="latentflow serve runs/cifar10 --port 8000")
def serve(
    model: Model,
    request: ServeRequest,
    device: Device = None,
    precision: ComputesIn = Precision.auto,
) -> None:
    """Serve a model over HTTP: sample, inpaint, mask-to-image, translate; its documentation is at /docs.

    One seed gives the picture that the command line gives. Needs the extra `studio`.
    """
    from latentflow.commands.serve import require_libraries
    from latentflow.commands.serve import serve as run

    require_libraries()
    run(model, request, runtime=runtime_for(device, precision))
