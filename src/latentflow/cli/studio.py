"""The verb that opens the page."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from latentflow.cli.options import ComputesIn, Device, Precision, command
from latentflow.cli.output import runtime_for
from latentflow.console import say

verb = partial(command, group="Drawing")


@verb(example="latentflow studio runs/photos")
def studio(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Model folders, run folders or hub ids.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of this machine; 0: one that is free.")] = 8300,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")] = True,
    device: Device = None,
    precision: ComputesIn = Precision.auto,
) -> None:
    """Open a page to draw, fill, paint, edit and compare in, and to watch runs; all of it on this machine.

    Only programs of this machine can reach it. Ctrl-C ends it.
    """
    from latentflow.commands.studio import studio as run

    run(models, port=port, browser=browser, say=say, runtime=runtime_for(device, precision))
