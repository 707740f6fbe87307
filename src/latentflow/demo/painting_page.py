"""The sections of the demo's page about painting: semantic maps, holes, and what each condition is worth."""

from __future__ import annotations

from pathlib import Path

from latentflow.demo.figures import DemoFigures
from latentflow.demo.painting import NUM_COLUMNS
from latentflow.pages.html import contact_sheet, figure, paragraph, table


def maps_section(figures: DemoFigures, out: Path) -> str:
    """Mask-to-image."""
    stage = figures.maps
    text = (
        f"The same network, told a semantic map (which pixels belong to a circle, a square, ...) and no class. Of "
        f"{stage.num_images} maps that nothing was trained on, a program finds in the pictures what was asked for with "
        f"a mean intersection over union of {_best_iou(figures):.3f}; in the real images of these maps it is "
        f"{stage.real_iou:.3f}, and {stage.reconstructed_iou:.3f} after a trip through the autoencoder."
    )
    names = ["map", *(f"s = {run.scale:g}" for run in stage.runs), "real image"]
    sheet = contact_sheet(out / "samples" / "maps.png", names, num_columns=min(NUM_COLUMNS, stage.num_images))
    rows = [[f"{run.scale:g}", f"{run.iou:.3f}", f"{run.evaluations:.0f}"] for run in stage.runs]
    best = [n for n, run in enumerate(stage.runs) if run.iou == _best_iou(figures)]
    return (
        paragraph(text)
        + figure(sheet, "The first maps, painted from the same noise at several guidance scales s. Colours are free.")
        + figure(table(["guidance by the map", "mean IoU", "calls per image"], rows, strong=best), "")
    )


def holes_section(figures: DemoFigures, out: Path) -> str:
    """Inpainting."""
    stage = figures.holes
    text = (
        f"The same network again, told what lies outside a hole, and the hole. The holes of {stage.num_images} "
        f"held-out images (strokes, boxes, halves and borders; on average {100 * stage.share:.0f} % of the image) were "
        "filled and pasted into the image. Errors are against what the hole covered, in levels of 255: one right "
        "answer among many, so that even a perfect model does not reach zero. A model that is told "
        "nothing is the same network with its condition nulled. Replacing the known part along the path needs no "
        "training for inpainting and works with every model."
    )
    changed = sum(run.known_changed for run in stage.runs)
    names = ["image", "hole", *(_short(run.name) for run in stage.runs[:-1])]
    sheet = contact_sheet(out / "samples" / "holes.png", names, num_columns=min(NUM_COLUMNS, stage.num_images))
    rows = [[run.name, f"{run.rmse:.1f}", f"{run.evaluations:.0f}"] for run in stage.runs]
    best = min(run.rmse for run in stage.runs)
    strong = [n for n, run in enumerate(stage.runs) if run.rmse == best]
    caption = f"Values outside the holes that were changed, over all of these: {changed}."
    return (
        paragraph(text)
        + figure(sheet, "The first images, none chosen by hand.")
        + figure(table(["filled by", "error inside", "calls per image"], rows, strong=strong), caption)
    )


def losses_section(figures: DemoFigures) -> str:
    """Held-out loss with and without each condition."""
    stage = figures.losses
    text = (
        f"The loss on held-out images ({stage.num_draws:,} draws of image, time and noise, the same for each row) says "
        "how much of the velocity a condition lets the network know. Told nothing, every condition is null."
    )
    rows = [
        [" and ".join(run.told).replace("_", " ") or "nothing", f"{run.loss:.4f}", f"{run.standard_error:.4f}"]
        for run in stage.runs
    ]
    return paragraph(text) + figure(table(["told", "loss", "standard error"], rows), "")


def _best_iou(figures: DemoFigures) -> float:
    return max(run.iou for run in figures.maps.runs)


def _short(name: str) -> str:
    """A name that fits beside a row of pictures."""
    return name.replace("told the known part, guidance", "s =").replace("replaced along the path", "replaced")
