"""The machine that a run is planned for."""

from __future__ import annotations

from dataclasses import dataclass

from latentflow.runtime import Runtime
from latentflow.training.config import Recipe
from latentflow.training.memory import total_memory
from latentflow.training.student_recipe import StudentRecipe


@dataclass(frozen=True)
class Machine:
    """What is planned for.

    Attributes:
        name: of the device.
        memory: bytes that a process can use; None if unknown.
        precision: what networks compute in.
        gpu: whether the device is a GPU.
        num_processes: processes that share a batch.
        here: whether it is this machine.
    """

    name: str
    memory: int | None
    precision: str
    gpu: bool
    num_processes: int
    here: bool

    @property
    def half(self) -> bool:
        """Whether networks compute in half precision."""
        return self.precision in ("bf16", "fp16")


def machine_for(
    recipe: Recipe | StudentRecipe, runtime: Runtime, device_memory: float | None, processes: int
) -> Machine:
    """This machine, or another one with GPUs of `device_memory` GiB."""
    word = recipe.training.precision
    if device_memory is not None:
        precision = "bf16" if word == "auto" else word
        return Machine("a GPU", int(device_memory * 2**30), precision, True, processes, here=False)
    total, gpu = total_memory(runtime.device), runtime.device.type == "cuda"
    memory = None if total is None else total if gpu else total // processes
    return Machine(runtime.device_name, memory, runtime.precision, gpu, processes, here=True)
