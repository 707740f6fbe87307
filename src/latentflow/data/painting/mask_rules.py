"""Which random holes are drawn for inpainting; `masks` draws them. No torch here: the command line reads these rules.

Random holes follow the large masks of LaMa (Suvorov et al., arXiv 2109.07161), which arXiv 2307.08698 trains with under
the name "mixed". There are two additions: halves and borders, for outpainting; and no mask is ever empty. Lengths are
shares of the image, so any image size works.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from latentflow.errors import ConfigError
from latentflow.records import Record

HoleKind = Literal["strokes", "boxes", "halves", "borders"]
MaskPolicy = Literal["mixed", HoleKind]
MaskForm = Literal["share", "sign"]

MIXTURE: dict[HoleKind, float] = {"strokes": 0.4, "boxes": 0.4, "halves": 0.1, "borders": 0.1}
"""How often the policy "mixed" draws each kind."""

BOX_MARGIN = 10 / 256
"""Least distance of a box from the border, as a share of the side."""

REACH: dict[HoleKind, tuple[float, float]] = {
    "strokes": (0.0, 1.0),
    "boxes": (0.0, (1 - 2 * BOX_MARGIN) ** 2),
    "halves": (1 / 3, 2 / 3),
    "borders": (1 / 8, 3 / 4),
}
"""Least and largest share of an image that a hole of each kind can cover."""


class MaskRules(Record):
    """How random holes are drawn; stored in recipes, latent caches and model folders.

    Raises:
        ConfigError: no mask can meet these rules.
    """

    policy: MaskPolicy = Field(
        "mixed",
        description="strokes: thick brush strokes; boxes: rectangles; halves: one side of a straight cut; borders: "
        "all but a rectangle, for outpainting; mixed: "
        + ", ".join(f"{weight:.0%} {kind}" for kind, weight in MIXTURE.items())
        + ", without those that the shares rule out.",
    )
    least_share: float = Field(0.05, ge=0, le=1, description="Least share of the image that a hole covers.")
    most_share: float = Field(0.75, ge=0, le=1, description="Largest share of the image that a hole covers.")
    widest_stroke: float = Field(
        100 / 256, ge=0.02, le=1, description="Width of the widest stroke, as a share of the image's shorter side."
    )
    largest_box: float = Field(
        150 / 256, ge=0.05, le=0.9, description="Longest side of a box, as a share of the image's width or height."
    )

    told_as: MaskForm = Field(
        "share",
        description="How the network is given a hole. share: painted gray, with the share of each latent pixel that "
        "lies in it, 0 to 1; sign: painted black, with 1 or -1 by the first pixel of each latent pixel, as published.",
    )
    folder: str = Field("", description="A folder of mask files to choose from instead; empty: holes are random.")

    @model_validator(mode="after")
    def _check(self) -> MaskRules:
        least, most = self.least_share, self.most_share
        if least >= most:
            raise ConfigError(f"least_share {least:g} is not below most_share {most:g}; 0.05 and 0.75 are usual")
        if not self.weights():
            low, high = REACH[self.policy]
            raise ConfigError(
                f"masks of the policy {self.policy!r} cover {low:.3g} to {high:.3g} of the image, never {least:g} to "
                f"{most:g}; widen least_share and most_share, or use 'strokes'"
            )
        return self

    def weights(self) -> dict[HoleKind, float]:
        """How often each kind is drawn, up to a common factor, without the kinds that cannot meet the shares."""
        weights = MIXTURE if self.policy == "mixed" else {self.policy: 1.0}
        reach = {kind: self.reach(kind) for kind in weights}
        return {kind: weight for kind, weight in weights.items() if reach[kind][0] <= reach[kind][1]}

    def reach(self, kind: HoleKind) -> tuple[float, float]:
        """Least and largest share that a hole of `kind` covers under these rules; least > largest: none can."""
        low, high = REACH[kind]
        return max(low, self.least_share), min(high, self.most_share)
