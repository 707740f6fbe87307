"""A model as its users hold it: `FlowModel` with everything that can be drawn with it as methods."""

from __future__ import annotations

from typing import Any

from latentflow.model.flow_model import FlowModel
from latentflow.sampling import edits, inpaint, inversion, mask_to_image, pipeline
from latentflow.sampling.inversion import Inversion
from latentflow.sampling.samples import Samples


class LatentFlow(FlowModel):
    """A flow-matching model that draws; `LatentFlow.from_pretrained(...)` loads one.

    Seeds, conditions, guidance and solver are those of the command line, and give the same pictures.
    """

    def sample(self, num: int = 1, **request: Any) -> Samples:
        """Draw `num` images; the arguments are those of `latentflow.sampling.pipeline.sample`.

        LatentFlow.from_pretrained("runs/photos").sample(num=16, classes=["cat", "dog"], guidance=1.5, seed=0).images
        """
        return pipeline.sample(self, num=num, **request)

    def inpaint(self, image: Any, mask: Any, **request: Any) -> Samples:
        """Fill the hole of an image; the arguments are those of `latentflow.sampling.inpaint.inpaint`.

        model.inpaint("street.jpg", "hole.png", num=4, seed=0).images
        """
        return inpaint.inpaint(self, image, mask, **request)

    def mask_to_image(self, semantic_map: Any, **request: Any) -> Samples:
        """Paint a semantic map; the arguments are those of `latentflow.sampling.mask_to_image.mask_to_image`."""
        return mask_to_image.mask_to_image(self, semantic_map, **request)

    def image_to_image(self, image: Any, **request: Any) -> Samples:
        """Redraw an image; the arguments are those of `latentflow.sampling.edits.image_to_image`.

        model.image_to_image("cat.jpg", strength=0.6, classes=["dog"], num=4).images
        """
        return edits.image_to_image(self, image, **request)

    def interpolate(self, **request: Any) -> Samples:
        """Draw frames between two seeds or classes; the arguments are those of `latentflow.sampling.edits.interpolate`.

        model.interpolate(seeds=(3, 8), classes=["cat", "dog"], num=9).images
        """
        return edits.interpolate(self, **request)

    def vary(self, **request: Any) -> Samples:
        """Draw pictures near that of one seed; the arguments are those of `latentflow.sampling.edits.vary`."""
        return edits.vary(self, **request)

    def invert(self, image: Any, **request: Any) -> Inversion:
        """Find the noise of an image; the arguments are those of `latentflow.sampling.inversion.invert`.

        inversion = model.invert("cat.jpg", classes=["cat"])
        model.sample(noise=inversion.noise, classes=["dog"], guidance=1).images
        """
        return inversion.invert(self, image, **request)
