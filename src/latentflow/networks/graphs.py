"""Computations that are launched as one CUDA graph.

A network launches hundreds of kernels, and launching one takes the host longer than a small network's kernel takes the
GPU. A graph launches all of them at once. It repeats the same kernels on the same memory: inputs are copied to where
the first ones lay, and results appear where the first ones lay. So a computation may be captured if nothing in it
depends on a number that the host would have to know, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor

from latentflow.console import notice
from latentflow.runtime import LAUNCHING

Result = TypeVar("Result")
Inputs = Mapping[str, Tensor]
Capture = Callable[[Callable[[], Result]], tuple[Result, Callable[[], None]]]
"""Records the kernels of a function that it calls; returns its result, and what computes it again in the same place."""


class Graph(Generic[Result]):
    """Calls `compute`, and after some calls replays its kernels instead; if they cannot be captured, it calls on.

    Args:
        compute: a function of named tensors of the same shapes in every call.
        calls_before: in which networks are compiled, and libraries choose and set up their kernels.
        what: the computation, for a notice.
        capture: of the kernels; `cuda_graph`.
        clones: whether inputs are copied to memory of their own; if not, the first ones captured are overwritten, and
            inputs that lie where they lay need no copy.
    """

    def __init__(
        self,
        compute: Callable[[Inputs], Result],
        *,
        calls_before: int,
        what: str,
        capture: Capture,
        clones: bool = True,
    ):
        self._compute, self._calls_left = compute, calls_before
        self._what, self._capture, self._clones = what, capture, clones
        self._captured: tuple[dict[str, Tensor], Result, Callable[[], None]] | None = None

    def __call__(self, inputs: Inputs) -> Result:
        """The result for some inputs; that of a replay is overwritten by the next one."""
        self._calls_left -= 1
        if self._calls_left == -1:
            self._record(inputs)
        if self._captured is None:
            return self._compute(inputs)
        places, result, replay = self._captured
        pairs = [(place, inputs[name]) for name, place in places.items()]
        if moved := [(place, x) for place, x in pairs if place.data_ptr() != x.data_ptr()]:
            torch._foreach_copy_(*map(list, zip(*moved, strict=True)))
        replay()
        return result

    @property
    def is_captured(self) -> bool:
        """Whether calls are replays."""
        return self._captured is not None

    def _record(self, inputs: Inputs) -> None:
        places = {name: x.clone() if self._clones else x for name, x in inputs.items()}
        try:
            result, replay = self._capture(lambda: self._compute(places))
        except RuntimeError as error:  # out of memory is one, too
            reason = str(error).partition("\n")[0]
            notice(f"{self._what} cannot be one CUDA graph, and is launched kernel by kernel: {reason}", self._what)
            return
        self._captured = places, result, replay


def cuda_graph(compute: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
    """A `Capture` for CUDA. What it computes is there after the first replay."""
    graph = torch.cuda.CUDAGraph()
    # Other threads go on reading batches and writing files, but torch records all graphs on one stream. The context of
    # the current stream leaves that of a failed capture.
    current = torch.cuda.current_stream()
    with LAUNCHING, torch.cuda.stream(current), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = compute()
    return result, graph.replay
