"""`latentflow demo`: everything once, offline, on the built-in dataset: encode, train, sample, evaluate, report.

The demo is a list of stages. Each one leaves its figures in report.json and its files in the folder; a stage that has
left both is not repeated. The page is made from these only: no figure on it is written by hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from latentflow.artifacts import make_folder, read_json, write_json, write_text
from latentflow.demo.building import encode_images, examine_autoencoder, train_network
from latentflow.demo.classes import compare_solvers, draw_classes, sweep_guidance
from latentflow.demo.figures import DemoFigures, DemoScale
from latentflow.demo.page import demo_page
from latentflow.demo.painting import compare_losses, fill_holes, paint_maps
from latentflow.demo.workshop import Workshop
from latentflow.errors import ArtifactError, ConfigError
from latentflow.locks import writes
from latentflow.plans import changed_values, spelled_out
from latentflow.runtime import Runtime, open_runtime
from latentflow.training.config import load_recipe
from latentflow.training.settings import is_within


@dataclass(frozen=True)
class DemoStage:
    """One step of the demo.

    Attributes:
        name: of its record in `DemoFigures`.
        title: for the screen.
        run: measures, and returns the fields of the record; its wall time is added unless "seconds" is among them.
        files: what must be in the folder for the stage to count as done.
    """

    name: str
    title: str
    run: Callable[[Workshop], dict[str, Any]]
    files: tuple[str, ...] = ()

    def is_done(self, work: Workshop) -> bool:
        """Whether its figures and files are there."""
        measured = getattr(work.figures, self.name) is not None
        return measured and all((work.out / file).is_file() for file in self.files)


STAGES = (
    DemoStage("encoding", "encode the built-in dataset", encode_images, ("cache/index.json",)),
    DemoStage("first_stage", "examine the autoencoder", examine_autoencoder, ("samples/reconstructions.png",)),
    DemoStage(
        "training",
        "train the velocity network",
        train_network,
        ("run/model/config.json", "run/model/velocity.safetensors"),
    ),
    DemoStage("sampling", "draw samples of every class", draw_classes, ("samples/classes.png",)),
    DemoStage("guidance", "draw the same seeds at several guidance scales", sweep_guidance, ("samples/guidance.png",)),
    DemoStage("maps", "sample from semantic maps", paint_maps, ("samples/maps.png",)),
    DemoStage("holes", "inpaint held-out images", fill_holes, ("samples/holes.png",)),
    DemoStage("losses", "measure what each condition contributes", compare_losses),
    DemoStage("solvers", "compare the solvers", compare_solvers),
)


@writes("out")
def demo(
    out: str | Path,
    *,
    scale: DemoScale | None = None,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
    runtime: Runtime | None = None,
) -> DemoFigures:
    """Run the demo in `out`, or the stages that are missing there, and write report.json and report.html.

    Args:
        out: gets cache/, run/, samples/, report.json and report.html.
        scale: how much is drawn and measured; None: the full demo.
        overrides: `key=value` for the recipe "demo", whose data.path says what is encoded.
        say: called with the title of each stage.
        runtime: where to compute; None: see `open_runtime`.

    Raises:
        ConfigError: `out` holds a demo with other settings.
        ArtifactError: `out` holds something else, or cannot be written.
        Interrupted: training was stopped by a signal.
    """
    out = make_folder(out)
    plan = DemoFigures(scale=scale or DemoScale(), recipe=load_recipe("demo", overrides))
    work = Workshop(out, _earlier_figures(out, plan), runtime or open_runtime(alone=True))
    done = True
    for number, stage in enumerate(STAGES, start=1):
        done = done and stage.is_done(work)
        say(f"{number}/{len(STAGES)} {stage.title}" + (": done before" if done else ""))
        if not done:  # nor are the stages that build on it
            began = time.perf_counter()
            result = stage.run(work)
            result = {"seconds": time.perf_counter() - began, **result}
            work.figures = DemoFigures.model_validate({**dict(work.figures), stage.name: result})
            write_json(out / "report.json", work.figures.model_dump(mode="json"))
    write_text(out / "report.html", demo_page(work.figures, out))
    return work.figures


def _earlier_figures(out: Path, plan: DemoFigures) -> DemoFigures:
    """The figures that an earlier call has left in `out`, else the plan, without figures."""
    file = out / "report.json"
    if not file.exists():
        return plan
    try:
        found = DemoFigures.model_validate(read_json(file))
    except (ValidationError, ConfigError) as error:
        raise ArtifactError(f"{file} is not the record of a demo of this version; choose another --out") from error
    done = [stage.name for stage in STAGES]
    before, now = found.model_dump(mode="json"), plan.model_dump(mode="json")
    changed = {key: values for key, values in changed_values(before, now).items() if not is_within(key, done)}
    if changed:
        raise ConfigError(f"{out} holds a demo with other settings ({spelled_out(changed)}); choose another --out")
    return found
