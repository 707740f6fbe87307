"""The cost of drawing, announced beforehand: network calls and seconds; and when compiling the network pays."""

from __future__ import annotations

import time
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import nn

from latentflow.console import notice
from latentflow.flow.solvers import expected_evaluations, is_adaptive
from latentflow.model.flow_model import FlowModel
from latentflow.networks.running import compile_blocks, is_compiled
from latentflow.progress import duration
from latentflow.sampling.drawing import Drawing, guide_of
from latentflow.sizes import Size

MANY_CALLS = 100
"""Network calls per picture above which the cost is announced."""

_COMPILED_FOR: WeakKeyDictionary[nn.Module, set[tuple[int, Size | None, str]]] = WeakKeyDictionary()
"""Networks, and the batches that they were compiled for: number of images, image size and precision."""

_WORTH_SECONDS = 100.0  # of drawing without compiling, which takes up to half a minute and saves up to half of them


def announce_cost(model: FlowModel, drawing: Drawing, batch_size: int) -> None:
    """Announce, once, the cost of a drawing with many network calls, and a faster alternative."""
    cost = cost_of_guide(model, drawing)
    calls, quick = network_calls(drawing, cost), {"solver": "heun", "steps": 25}
    sampling = drawing.sampling.model_copy(update=quick)
    fewer = network_calls(drawing.model_copy(update={"sampling": sampling}), cost)
    if calls < MANY_CALLS or calls < 1.5 * fewer:
        return
    num = len(drawing.seeds)
    together = min(num, batch_size)
    rough = "about " if is_adaptive(drawing.sampling.solver) else ""
    seconds = _seconds_of_a_call(model, drawing, together) * -(-num // together)
    how = f"tolerance {drawing.sampling.rtol:g}" if rough else f"{drawing.sampling.steps} steps"
    notice(
        f"{drawing.sampling.solver} with {how} takes {rough}{calls:.0f} network calls per image, "
        f"about {calls * seconds:.2g} s for {num} here; "
        f"--solver heun --steps 25 takes {fewer:.0f}, about {fewer * seconds:.2g} s",
        kind=f"cost of {model.reference} {drawing.sampling}",
    )


def compile_where_it_pays(model: FlowModel, drawing: Drawing, *, batch_size: int, num_batches: int) -> None:
    """Compile the network's blocks if a GPU is going to draw for minutes, and announce how long it took.

    They are compiled for batches of this size, to which `draw_batches` pads smaller ones. A network that is compiled
    already is compiled for the batches that it has not drawn yet, and its guide as well: none of that happens while
    pictures are drawn, and timed. Nothing is compiled for adaptive solvers: they call the network with fewer and fewer
    images, and each number would be compiled again.

    Args:
        num_batches: to be drawn by this process.
    """
    if not _can_compile(model.device) or is_adaptive(drawing.sampling.solver) or not num_batches:
        return
    why = ""
    if not is_compiled(model.network):
        if num_batches < 2:
            return
        calls = network_calls(drawing, cost_of_guide(model, drawing))
        seconds = _seconds_of_a_call(model, drawing, batch_size) * calls * num_batches
        if seconds < _WORTH_SECONDS:
            return
        why = f"; without that, drawing would take about {duration(seconds)}"
    began, guide = time.perf_counter(), guide_of(model, drawing)
    sizes = _batch_sizes(drawing, batch_size, doubled=model.config.student is None)
    parts = [(model, sizes)] if guide is None else [(model, [batch_size]), (guide.flow, [batch_size])]
    if sum(_compile_for(part, drawing, sizes) for part, sizes in parts):
        notice(f"the network was compiled in {duration(time.perf_counter() - began)}{why}")


def _compile_for(model: FlowModel, drawing: Drawing, sizes: Sequence[int]) -> int:
    """Compile the network for batches of these sizes; returns how many of them it was not compiled for."""
    known = _COMPILED_FOR.setdefault(model.network, set())
    if not is_compiled(model.network):
        known.clear()
        compile_blocks(model.network)
    missing = {(num_images, drawing.image_size, drawing.precision) for num_images in sizes} - known
    for num_images, *_ in missing:
        _seconds_of_a_call(model, drawing, num_images)
    known |= missing
    return len(missing)


def cost_of_guide(model: FlowModel, drawing: Drawing) -> float:
    """The cost of a call that guides, in network calls: 1 of the null condition, that of its network for a guide.

    It is 0 for a student, which takes the guidance scale as an input.
    """
    if model.config.student is not None:
        return 0
    guide = guide_of(model, drawing)
    return 1 if guide is None else guide.cost


def network_calls(drawing: Drawing, guide_cost: float = 1) -> float:
    """Network calls per picture; a rough estimate for adaptive solvers.

    Args:
        guide_cost: see `cost_of_guide`.
    """
    sampling = drawing.sampling
    calls = expected_evaluations(sampling.solver, sampling.steps, sampling.rtol)
    blended = any(blend.label is not None or blend.conditions for blend in drawing.blends)
    only_null = sampling.guidance == 0 and sampling.guided_channels is None
    guided = 0 if sampling.guidance == 1 else guide_cost - only_null
    low, high = sampling.guidance_interval
    return calls * (1 + (high - low) * guided) * (1 + blended)


def _batch_sizes(drawing: Drawing, batch_size: int, *, doubled: bool) -> list[int]:
    """The batch sizes that the network is called with: a guided batch is `doubled`."""
    sampling = drawing.sampling
    if not doubled or sampling.guidance == 1 or (sampling.guidance == 0 and sampling.guided_channels is None):
        return [batch_size]
    always = sampling.guidance_interval == (0.0, 1.0)
    return [2 * batch_size] if always else [batch_size, 2 * batch_size]


@torch.inference_mode()
def _seconds_of_a_call(model: FlowModel, drawing: Drawing, num_images: int) -> float:
    """Wall time of one unconditional network call; on a GPU, after a first call to warm up."""
    channels, *sides = model.config.latent_shape
    if drawing.image_size is not None:
        sides = drawing.image_size.over(model.config.autoencoder.factor)
    latents = torch.zeros(num_images, channels, *sides, device=model.device)
    clock, condition = (
        torch.ones_like(latents[:, 0, 0, 0]),
        model.config.conditioning.build(latents.shape, model.device),
    )
    network, seconds = model.computing_in(drawing.precision), 0.0
    for _ in range(2 if model.device.type == "cuda" else 1):
        began = time.perf_counter()
        network.velocity(latents, clock, condition).cpu()
        seconds = time.perf_counter() - began
    return seconds


def _can_compile(device: torch.device) -> bool:
    return device.type == "cuda"
