"""Images whose paired inputs are made from the images themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from latentflow.data.items import ImageItem, ImageSource, stack_pixels
from latentflow.data.painting.input_pixels import derived_format, derived_inputs
from latentflow.data.painting.input_rules import InputRules
from latentflow.sizes import Size


class DerivedInputs:
    """A source whose images get an input that is made from them; everything else is that of the source.

    Args:
        source: any images.
        rules: with a derived origin.

    Raises:
        ConfigError: inputs of this origin cannot be made from these images.
    """

    def __init__(self, source: ImageSource, rules: InputRules):
        rules.size(source.image_size)
        self.source, self.rules = source, rules
        self.input_format = derived_format(rules, source.pixel_format)
        self.input_origin = rules.origin

    def __getattr__(self, name: str) -> Any:
        if name == "source":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> ImageItem:
        """Image `index` with its input; raises what the source raises."""
        return self._with_input(self.source[index])

    def cropped(self, index: int, size: Size) -> ImageItem:
        """The same at another size; for a source that crops."""
        return self._with_input(self.source.cropped(index, size))

    def _with_input(self, item: ImageItem) -> ImageItem:
        made = derived_inputs(stack_pixels([item.pixels]), self.rules)[0]
        return replace(item, input=made.permute(1, 2, 0).numpy())
