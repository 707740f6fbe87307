"""What the stages of the demo share: its folder, the model that it has trained, and how they draw with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentflow.data.sources.synthetic import SyntheticShapes
from latentflow.demo.figures import DemoFigures
from latentflow.model.conditioning import ConditionName
from latentflow.model.flow_model import FlowModel
from latentflow.progress import image_progress
from latentflow.runtime import Runtime
from latentflow.sampling.contact_sheet import save_grid
from latentflow.sampling.drawing import make_drawing
from latentflow.sampling.pipeline import Given, draw_all
from latentflow.sampling.request import SampleRequest
from latentflow.sampling.samples import Samples

HELD_OUT_SEED = 20240612
"""The seed of images that neither the autoencoder nor the velocity network was trained on."""
BATCH = 64
"""Images computed together."""


@dataclass
class Workshop:
    """Where the demo works.

    Attributes:
        out: its folder.
        figures: its plan, and what was measured so far.
        runtime: where it computes.
    """

    out: Path
    figures: DemoFigures
    runtime: Runtime

    @cached_property
    def model(self) -> FlowModel:
        """The model, once it is trained."""
        return FlowModel.from_pretrained(self.out / "run", runtime=self.runtime)

    def held_out(self, num: int) -> SyntheticShapes:
        """Real images that nothing was trained on."""
        return SyntheticShapes(num, self.figures.recipe.data.image_size, HELD_OUT_SEED)

    def draw(
        self, num: int, given: Given | None = None, conditions: Sequence[ConditionName] = (), **request: Any
    ) -> Samples:
        """Draw from the seeds 0 to num - 1.

        Args:
            given, conditions: conditions other than the class, and their names.
            request: fields of `SampleRequest`.
        """
        drawing = make_drawing(self.model, SampleRequest(num=num, **request), conditions=conditions)
        with image_progress("sampling", num) as on_images:
            return draw_all(self.model, drawing, given or Given(), batch_size=BATCH, on_images=on_images)

    def save_sheet(self, name: str, rows: Sequence[Tensor]) -> None:
        """Write rows of as many pictures each ([B, 3, S, S] uint8) as samples/NAME.png."""
        save_grid(self.out / "samples" / f"{name}.png", torch.cat(list(rows)), len(rows[0]))


def as_tensor(pictures: Sequence[np.ndarray]) -> Tensor:
    """Pictures [S, S, 3] uint8 => [B, 3, S, S] uint8."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
