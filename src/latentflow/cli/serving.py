"""Verbs that serve models to browsers and programs."""

from __future__ import annotations

from functools import partial

from latentflow.cli.options import ComputesIn, Device, Model, Precision, command
from latentflow.cli.output import runtime_for
from latentflow.studio.request import ServeRequest

verb = partial(command, group="Serving")


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
