"""`latentflow finetune`: a model and images => a run folder with a model that began as the other."""

from __future__ import annotations

import json
from collections.abc import Sequence

from latentflow.training.config import Recipe, load_recipe
from latentflow.training.request import FinetuneRequest

RECIPE = "finetune"


def finetune_recipe(request: FinetuneRequest, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that `latentflow train` runs to finetune a model.

    Args:
        overrides: changes of the recipe, key=value.

    Raises:
        ConfigError: a key or value that does not exist or fit, or one that the request gives as well.
    """
    asked = [f"init_from={request.model}", f"data.path={request.data}"]
    if request.method != "auto":
        asked.append(f"finetuning.method={request.method}")
    if request.rank is not None:
        asked.append(f"finetuning.rank={request.rank}")
    if request.class_from:
        pairs = [f"{new}={old}" for new, old in request.class_from.items()]
        asked.append(f"finetuning.class_from={json.dumps(pairs, ensure_ascii=False)}")
    return load_recipe(RECIPE, [*asked, *overrides])
