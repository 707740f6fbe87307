"""The cost of drawing an image, in network calls, milliseconds and memory."""

from __future__ import annotations

import contextlib
import math
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from latentflow.evaluation.request import BenchmarkRequest
from latentflow.flow.times import sampling_times
from latentflow.model.config import SamplingPreset
from latentflow.model.flow_model import FlowModel
from latentflow.progress import image_progress
from latentflow.sampling.call_cost import multiply_adds
from latentflow.sampling.captured_calls import Calls, calls_for
from latentflow.sampling.drawing import Drawing, make_drawing
from latentflow.sampling.pipeline import conditioned_velocity, initial_noise, solve
from latentflow.sampling.request import SampleRequest


@dataclass(frozen=True)
class BatchCost:
    """The cost of an image in batches of one size.

    Attributes:
        batch_size: images computed together.
        network_milliseconds: of the solver with its network calls, per image; the median of the repeats.
        decoder_milliseconds: from latents to 8-bit pixels on the CPU, per image; the median of the repeats.
        peak_bytes: most memory a batch needed at a time, as `BenchmarkResult.memory` says; None: not measured.
    """

    batch_size: int
    network_milliseconds: float
    decoder_milliseconds: float
    peak_bytes: int | None

    @property
    def images_per_second(self) -> float:
        return 1000 / max(self.network_milliseconds + self.decoder_milliseconds, 1e-9)


@dataclass(frozen=True)
class BenchmarkResult:
    """The cost of drawing.

    Attributes:
        request: as it was given.
        sampling: how the images were drawn.
        told: their conditions; of maps and holes, nothing was known.
        num: images drawn for each figure.
        repeats: timed repeats, after one that warms up.
        evaluations: mean network calls per image; a guided call counts twice, or as much more as its guide costs.
        fewest, most: of any image.
        histogram: number of images by their network calls, rising.
        batches: the cost at each batch size, rising.
        parameters: of the network.
        decoder_parameters: of the autoencoder's decoder, or of the whole where it has no part of that name.
        multiply_adds: of one network call for one image; None: torch cannot count them.
        device: its name.
        precision: what the network computed in.
        threads: that torch computes with on the CPU.
        memory: what `BatchCost.peak_bytes` are.
    """

    request: BenchmarkRequest
    sampling: SamplingPreset
    told: list[str]
    num: int
    repeats: int
    evaluations: float
    fewest: float
    most: float
    histogram: dict[float, int]
    batches: list[BatchCost]
    parameters: int
    decoder_parameters: int
    multiply_adds: int | None
    device: str
    precision: str
    threads: int
    memory: str


def measure_cost(flow: FlowModel, request: BenchmarkRequest) -> BenchmarkResult:
    """Draw images several times over; nothing is written.

    A model gets every condition that it knows, so that guidance costs what it costs: its classes in turn, and maps and
    holes in which nothing is known.
    """
    sizes = sorted(set(request.batch_sizes))
    drawings = {size: _drawing(flow, request, math.ceil(request.num / size) * size) for size in sizes}
    total = (1 + request.repeats) * sum(len(drawing.seeds) for drawing in drawings.values())
    with image_progress("drawing", total) as on_images:
        timed = [_timed(flow, drawing, size, request.repeats, on_images) for size, drawing in drawings.items()]
    counts, drawing = timed[-1].evaluations, drawings[sizes[-1]]
    histogram = Counter(counts.tolist())
    autoencoder = flow.autoencoder.model
    return BenchmarkResult(
        request=request,
        sampling=drawing.sampling,
        told=list(drawing.told),
        num=len(counts),
        repeats=request.repeats,
        evaluations=float(counts.double().mean()),
        fewest=min(histogram),
        most=max(histogram),
        histogram=dict(sorted(histogram.items())),
        batches=[one.cost for one in timed],
        parameters=_num_parameters(flow.network),
        decoder_parameters=_num_parameters(getattr(autoencoder, "decoder", autoencoder)),
        multiply_adds=multiply_adds(flow.config),
        device=device_name(flow.device),
        precision=drawing.precision,
        threads=torch.get_num_threads(),
        memory=timed[-1].memory,
    )


@dataclass(frozen=True)
class _Timed:
    """Images of one batch size, and what they cost."""

    evaluations: Tensor
    cost: BatchCost
    memory: str


def _timed(flow: FlowModel, drawing: Drawing, size: int, repeats: int, on_images: Callable[[int], None]) -> _Timed:
    """Draw in batches of one size, once to warm up and then `repeats` times."""
    batches = [drawing.at(slice(start, start + size)) for start in range(0, len(drawing.seeds), size)]
    seconds, calls = [], calls_for(flow.device, drawing)
    peak = _PeakMemory(flow.device)
    for _ in range(1 + repeats):
        drawn = [_draw_timed(flow, batch, calls) for batch in batches]
        seconds.append([sum(batch.network for batch in drawn), sum(batch.decoder for batch in drawn)])
        on_images(len(drawing.seeds))
    counts = torch.cat([batch.evaluations for batch in drawn])
    network, decoder = (median(times) * 1000 / len(counts) for times in zip(*seconds[1:], strict=True))
    return _Timed(counts, BatchCost(size, network, decoder, peak.grown()), peak.what)


def device_name(device: torch.device) -> str:
    """The name of a device, as its maker has it if that is known."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class _Drawn:
    """Images, and the seconds that network and decoder took."""

    evaluations: Tensor
    network: float
    decoder: float


def _drawing(model: FlowModel, request: BenchmarkRequest, num: int) -> Drawing:
    """Images with every condition that the model knows; the content of maps and holes does not change the cost."""
    sample = SampleRequest(num=num, classes=model.config.seen_classes, seed=request.seed, **request.preset())
    others = [name for name in model.config.conditioning.dropout if name != "label"]
    return make_drawing(model, sample, task="benchmark", conditions=others)


@torch.inference_mode()
def _draw_timed(model: FlowModel, drawing: Drawing, calls: Calls) -> _Drawn:
    sampling = drawing.sampling
    noise = initial_noise(model, drawing)
    velocity = conditioned_velocity(model, drawing, {}, noise.shape, calls)
    times = sampling_times(sampling.steps, sampling.shift)
    began = _now(model.device)
    solution = solve(model, drawing, velocity, noise, times)
    arrived = _now(model.device)
    model.pixels(solution.x).cpu()
    return _Drawn(velocity.evaluations, arrived - began, _now(model.device) - arrived)


def _now(device: torch.device) -> float:
    """Seconds, once the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


class _PeakMemory:
    """The peak memory since this object was made, above the memory in use at that time.

    Attributes:
        what: which memory that is.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            self.what = "allocated on the GPU, weights included (torch.cuda.max_memory_allocated)"
            torch.cuda.reset_peak_memory_stats(device)
            return
        self.what = "growth of the process's peak resident memory while drawing (ru_maxrss)"
        with contextlib.suppress(OSError):  # Linux: forget the peak so far, which loading the model may have made
            Path("/proc/self/clear_refs").write_bytes(b"5")
        self.before = _resident_peak()
        if device.type != "cpu" or self.before is None:
            self.what, self.before = f"not measured on {device.type} with {platform.system()}", None

    def grown(self) -> int | None:
        """Bytes; None: not measured."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return None if self.before is None else _resident_peak() - self.before


def _resident_peak() -> int | None:
    """The largest resident memory of this process so far in bytes; None if the system does not give it."""
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
