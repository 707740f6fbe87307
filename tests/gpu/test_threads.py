"""Two threads draw on one GPU, by graphs and without them, in several precisions: the pictures are those of one."""

from __future__ import annotations

import pytest
import torch

from latentflow.autoencoder import Autoencoder
from latentflow.runtime import Runtime
from tests import tiny
from tests.sampling.test_threads import KINDS, equal, together

LONG = {"solver": "heun", "steps": 12, "guidance": 2.0}  # so many calls that they become a CUDA graph


@pytest.mark.parametrize("other", ["fp32", "tf32", "bf16"])
def test_threads_of_several_precisions(kl_folder, device, other):
    chosen = torch.device(device, 0) if device == "cuda" else torch.device(device)
    drawing = {
        precision: tiny.model(Autoencoder.from_pretrained(kl_folder), conditioning=tiny.SPATIAL).to(
            Runtime(chosen, precision=precision)
        )
        for precision in ("fp32", other)
    }
    kinds = {**KINDS, "graphs": lambda model, seed: model.sample(4, seed=seed, **LONG)}
    before = torch.get_float32_matmul_precision()
    wanted = {name: [draw(model, 7) for draw in kinds.values()] for name, model in drawing.items()}
    models = [*drawing.items()] if len(drawing) == 2 else [("fp32", drawing["fp32"])] * 2
    for _ in range(3):
        found = together(*[lambda m=m: [draw(m, 7) for draw in kinds.values()] for _, m in models])
        for (name, _), pictures in zip(models, found, strict=True):
            for kind, one, alone in zip(kinds, pictures, wanted[name], strict=True):
                assert equal(one, alone), (name, kind)
    assert torch.get_float32_matmul_precision() == before
