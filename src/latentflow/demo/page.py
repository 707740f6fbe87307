"""The demo's figures as a page to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentflow.data.sources.synthetic import CLASS_NAMES
from latentflow.demo.figures import DemoFigures, Recognised
from latentflow.demo.painting_page import holes_section, losses_section, maps_section
from latentflow.flow.solvers import is_adaptive
from latentflow.pages.html import (
    Series,
    code,
    contact_sheet,
    details,
    figure,
    line_chart,
    page,
    paragraph,
    table,
    tiles,
)

_GO_ON = """\
# a folder of images; sub-folders, if there are any, are the classes
latentflow encode photos/ --autoencoder stabilityai/sd-vae-ft-mse --image-size 256 --flips --out caches/photos

# recipes are YAML files, listed by `latentflow recipes`; any key can be changed on the command line
latentflow train own_images data.path=caches/photos out=runs/photos

# a run folder is a model: classes, guidance, solver and seed are yours
latentflow sample runs/photos --num 16 --guidance 1.5 --seed 0 --out samples"""

_THIS_MODEL = """\
latentflow info {run}
latentflow sample {run} --classes "red circle,blue cross" --num 16 --guidance 3 --out more
latentflow mask-to-image {run} map.png --num 4 --out painted.png       # 0: ground, 1: circle, 2: square, ...
latentflow inpaint {run} picture.png hole.png --out filled.png         # white is painted anew
latentflow sample {run} --solver dopri5 --rtol 1e-3 --atol 1e-3 --out accurate"""


def demo_page(figures: DemoFigures, out: Path) -> str:
    """The report of a complete demo in `out`, as one HTML document."""
    sections = [
        ("What happened", _summary(figures)),
        ("The autoencoder", _autoencoder(figures, out)),
        ("Training", _training(figures)),
        ("Samples of every class", _samples(figures, out)),
        ("Guidance", _guidance(figures, out)),
        ("Painting semantic maps", maps_section(figures, out)),
        ("Filling holes", holes_section(figures, out)),
        ("What each condition is worth", losses_section(figures)),
        ("Solvers", _solvers(figures)),
        ("Are they what was asked for?", _recognition(figures)),
        ("How to go on", _how_to_go_on(out)),
    ]
    lead = (
        "One image generator for four tasks (pictures of nothing in particular, of a class, of a semantic map, and in "
        "holes), trained on this machine by flow matching in the latent space of an autoencoder, and then measured."
    )
    footer = "Written by latentflow demo. Every figure on this page is in report.json beside it."
    return page("latentflow: the demo", lead, sections, footer)


def key_figures(figures: DemoFigures) -> dict[str, str]:
    """The figures that sum up a complete demo, name => value."""
    encoding, training, sampling = figures.encoding, figures.training, figures.sampling
    assert encoding and training and sampling
    return {
        "samples with the right shape and colour": f"{_share(sampling.recognised)} of {sampling.recognised.num_images}",
        "maps asked for and recovered": f"mean IoU {max(run.iou for run in figures.maps.runs):.3f} "
        f"(real images {figures.maps.real_iou:.3f})",
        "error inside holes": f"{figures.holes.runs[0].rmse:.1f} of 255, told nothing {_told_nothing(figures):.1f}",
        "real images, judged alike": _share(figures.first_stage.real),
        "their reconstructions": f"{_share(figures.first_stage.reconstructed)}, {figures.first_stage.psnr:.1f} dB",
        "encoding": f"{encoding.images_per_second:,.0f} images/s",
        "training": f"{training.images_per_second:,.0f} images/s, {training.images_seen:,} images",
        "sampling": f"{_drawn_per_second(figures):,.1f} images/s at {sampling.evaluations:.0f} network calls each",
        "seconds in all": f"{_total_seconds(figures):,.0f}",
    }


def _summary(figures: DemoFigures) -> str:
    recipe, encoding, training, sampling = figures.recipe, figures.encoding, figures.training, figures.sampling
    network, preset = recipe.network, recipe.sampling
    shape = " × ".join(map(str, encoding.latent_shape))
    text = (
        f"{encoding.num_images:,} pictures of coloured shapes, {encoding.image_size} × {encoding.image_size} pixels, "
        f"were encoded once to latents of {shape}, in {encoding.seconds:.0f} s "
        f"({encoding.images_per_second:,.0f} images/s). A diffusion transformer of "
        f"{training.num_parameters / 1e6:.1f} million parameters ({network.depth} blocks, {network.hidden_size} "
        f"channels, {_num_tokens(figures)} tokens an image) learned the velocity that carries noise to these latents, "
        f"from {training.images_seen:,} images in {training.seconds:.0f} s ({training.images_per_second:,.0f} "
        f"images/s). {sampling.recognised.num_images} new pictures were drawn with {preset.solver}, {preset.steps} "
        f"steps and guidance {preset.guidance:g}, in {sampling.drawing_seconds:.0f} s "
        f"({_drawn_per_second(figures):,.1f} images/s). In {_share(sampling.recognised)} of them a program that knows "
        f"nothing of the model finds the shape and the colour asked for; in real pictures it is "
        f"{_share(figures.first_stage.real)}. To look at the autoencoder took {figures.first_stage.seconds:.0f} s, the "
        f"guidance scales {figures.guidance.seconds:.0f} s, painting maps and holes "
        f"{figures.maps.seconds + figures.holes.seconds:.0f} s, the losses {figures.losses.seconds:.0f} s and the "
        f"solvers {figures.solvers.seconds:.0f} s: "
        f"{_total_seconds(figures):,.0f} s in all, on {_device(figures)}."
    )
    key = [
        (_share(sampling.recognised), "of the samples have the shape and the colour asked for"),
        (f"{max(run.iou for run in figures.maps.runs):.2f}", "mean IoU of maps asked for and recovered"),
        (f"{training.seconds / 60:.1f} min", f"of training, {training.images_per_second:,.0f} images/s"),
        (f"{_drawn_per_second(figures):,.1f} /s", f"images drawn, {sampling.evaluations:.0f} network calls each"),
    ]
    return tiles(key) + paragraph(text)


def _autoencoder(figures: DemoFigures, out: Path) -> str:
    stage, shape = figures.first_stage, figures.encoding.latent_shape
    side, latent_values = figures.encoding.image_size, shape[0] * shape[1] * shape[2]
    text = (
        f"The generator never sees pixels. A frozen autoencoder turns each picture into {latent_values:,} numbers, "
        f"{3 * side**2 / latent_values:.0f} times fewer than it has pixel values, and what the generator makes back "
        f"into pixels. What it loses no generator can bring back: over {stage.real.num_images} pictures that nothing "
        f"was trained on, its mean PSNR is {stage.psnr:.1f} dB, the lowest {stage.worst_psnr:.1f} dB."
    )
    sheet = contact_sheet(
        out / "samples" / "reconstructions.png",
        ["original", "reconstruction"],
        [f"{value:.1f}\N{NO-BREAK SPACE}dB" for value in stage.shown_psnr],
        num_columns=len(stage.shown_psnr),
    )
    return paragraph(text) + figure(
        sheet, "Above the originals, below what the autoencoder makes of them, with the PSNR."
    )


def _training(figures: DemoFigures) -> str:
    curve = figures.training.curve
    times = figures.recipe.times
    drawn = "spread evenly over each batch" if times.stratified else "drawn independently"
    text = (
        f"The loss is the mean squared distance between the predicted and the true velocity. It cannot reach zero: "
        f"many pictures pass through the same noisy point, and the best answer is their mean. Here it fell from "
        f"{curve[0]['loss']:.3f} to {curve[-1]['loss']:.3f}, each the mean of "
        f"{figures.recipe.training.log_every} steps. Training times follow the "
        f"{times.distribution.replace('_', '-')} distribution, {drawn}."
    )
    loss = [(line["images_seen"], line["loss"]) for line in curve]
    course = line_chart([Series("training loss", loss, markers=False)], "images seen", "loss")
    quarter = max(len(curve) // 4, 1)
    by_time = [
        Series("first quarter of the training", _mean_by_time(curve[:quarter])),
        Series("last quarter", _mean_by_time(curve[-quarter:])),
    ]
    chart = line_chart(by_time, "time t: 0 is data, 1 is noise", "loss")
    return (
        paragraph(text)
        + figure(course, "The loss over the course of the training.")
        + figure(
            chart,
            "The loss by time. Near t = 1 the input is all noise and the picture has to be guessed; near t = 0 the "
            "picture is there and the noise has to be guessed.",
        )
    )


def _samples(figures: DemoFigures, out: Path) -> str:
    columns, preset = figures.scale.num_shown, figures.recipe.sampling
    wrong = figures.sampling.recognised.wrong
    marked = [(n % len(CLASS_NAMES), n // len(CLASS_NAMES)) for n in wrong if n // len(CLASS_NAMES) < columns]
    text = (
        f"One row for each class, none chosen by hand: the first {columns} seeds that fell to it. Drawn with "
        f"{preset.solver}, {preset.steps} steps, guidance {preset.guidance:g}, which is "
        f"{figures.sampling.evaluations:.0f} calls of the network for each picture."
    )
    sheet = contact_sheet(out / "samples" / "classes.png", CLASS_NAMES, num_columns=columns, marked=marked)
    caption = "Framed in red: shape and colour were not both recognised." if marked else "All of these were recognised."
    return paragraph(text) + figure(sheet, f"{caption} All samples lie in samples/images.")


def _guidance(figures: DemoFigures, out: Path) -> str:
    runs = figures.guidance.runs
    text = (
        "Guidance moves the velocity further away from what the network would do without a class: "
        "v = v_null + s (v_class - v_null). At s = 0 the class is not heard at all, at s = 1 guidance is off; larger "
        "scales make the class plainer and the pictures more alike, and in the end garish. Every scale but 0 and 1 "
        "calls the network twice."
    )
    marked = [(row, n) for row, run in enumerate(runs) for n in run.recognised.wrong if n < len(CLASS_NAMES)]
    sheet = contact_sheet(
        out / "samples" / "guidance.png",
        [f"s = {run.scale:g}" for run in runs],
        CLASS_NAMES,
        num_columns=len(CLASS_NAMES),
        marked=marked,
    )
    rows = [[f"{run.scale:g}", *_recognised_row(run.recognised), f"{run.evaluations:.0f}"] for run in runs]
    best = max(run.recognised.both for run in runs)
    strong = [n for n, run in enumerate(runs) if run.recognised.both == best]
    figures_table = table(
        ["guidance", "both right", "95 % interval", "shape", "colour", "nothing found", "calls per image"],
        rows,
        strong=strong,
    )
    caption = "The same noise at every scale, one column for each class. Framed in red: not recognised as the class."
    share = f"Shares of {runs[0].recognised.num_images} samples for each scale, the same seeds for all."
    return paragraph(text) + figure(sheet, caption) + figure(figures_table, share)


def _solvers(figures: DemoFigures) -> str:
    runs, scale = figures.solvers.runs, figures.scale
    guidance = figures.recipe.sampling.guidance
    text = (
        f"Sampling means solving an ordinary differential equation, and solvers differ in how near they come to its "
        f"exact solution for their price. Each was given the same {scale.num_solved} noises and guidance "
        f"{guidance:g}. The reference is rk4 with {scale.reference_steps} steps "
        f"({figures.solvers.reference_evaluations:,.0f} network calls an image). Distances are root mean squares over "
        f"the latents, relative to the reference; a straight line in the chart is an order of convergence."
    )
    names = list(dict.fromkeys(run.solver for run in runs))
    series = [
        Series(name, [(run.evaluations, run.distance) for run in runs if run.solver == name], dashed=is_adaptive(name))
        for name in names
    ]
    chart = line_chart(series, "network calls per image", "relative distance", log_x=True, log_y=True)
    rows = [
        [
            run.solver,
            f"{run.steps} steps" if run.steps else f"tolerance {run.tolerance:g}",
            f"{run.evaluations:,.0f}",
            f"{run.distance:.2g}",
        ]
        for run in runs
    ]
    cells = table(["solver", "setting", "calls per image", "distance"], rows)
    caption = (
        "Lower is nearer to the exact solution, further left is cheaper. Dashed: solvers that choose their own steps."
    )
    return paragraph(text) + figure(chart, caption) + details("All figures", cells)


def _recognition(figures: DemoFigures) -> str:
    stage, recognised = figures.first_stage, figures.sampling.recognised
    text = (
        f"A program without any learning looks for the one coloured shape in a picture and names its shape and "
        f"colour, or says that there is none to be named. It finds both as labelled in {_share(stage.real)} of "
        f"{stage.real.num_images} real pictures, which is the most that can be expected, and in "
        f"{_share(stage.reconstructed)} of the same pictures after a trip through the autoencoder. "
        f"Of {recognised.num_images} samples, {_share(recognised)} show both as asked for."
    )
    judged = {
        "real pictures": stage.real,
        "their reconstructions": stage.reconstructed,
        f"samples, guidance {figures.recipe.sampling.guidance:g}": recognised,
    }
    rows = [[name, *_recognised_row(found)] for name, found in judged.items()]
    overall = table(["", "both right", "95 % interval", "shape", "colour", "nothing found"], rows, strong=[2])
    colours = list(dict.fromkeys(name.split()[0] for name in CLASS_NAMES))
    shapes = list(dict.fromkeys(name.split()[1] for name in CLASS_NAMES))
    cells = [
        [shape, *(f"{recognised.by_class[f'{colour} {shape}']:.0%}".replace("%", " %") for colour in colours)]
        for shape in shapes
    ]
    return (
        paragraph(text)
        + figure(overall, "")
        + figure(table(["both right, by class", *colours], cells), "The samples, class by class.")
    )


def _how_to_go_on(out: Path) -> str:
    return (
        paragraph("With images of your own:")
        + code(_GO_ON)
        + paragraph("With the model that this demo has trained:")
        + code(_THIS_MODEL.format(run=out / "run"))
        + paragraph("Or from Python:")
        + code(
            "from latentflow import FlowModel\n\n"
            f'model = LatentFlow.from_pretrained("{out / "run"}")\n'
            'images = model.sample(num=16, classes=["red circle", "blue cross"], guidance=2.0, seed=0).images'
        )
    )


def _told_nothing(figures: DemoFigures) -> float:
    return next(run.rmse for run in figures.holes.runs if run.name == "told nothing")


def _share(recognised: Recognised) -> str:
    return _percent(recognised.both)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def _recognised_row(found: Recognised) -> list[str]:
    low, high = found.interval
    return [
        _percent(found.both),
        f"{100 * low:.0f} to {100 * high:.0f} %",
        _percent(found.shape),
        _percent(found.colour),
        _percent(found.nothing),
    ]


def _mean_by_time(lines: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(middle of the time bin, loss), over lines of metrics.jsonl that weigh alike."""
    bins = sorted({name for line in lines for name in line["loss_by_time"]})
    points = []
    for name in bins:
        low, high = map(float, name.split("-"))
        values = [line["loss_by_time"][name] for line in lines if name in line["loss_by_time"]]
        points.append(((low + high) / 2, sum(values) / len(values)))
    return points


def _num_tokens(figures: DemoFigures) -> int:
    _, height, width = figures.encoding.latent_shape
    return height * width // figures.recipe.network.patch_size**2


def _drawn_per_second(figures: DemoFigures) -> float:
    return figures.sampling.recognised.num_images / figures.sampling.drawing_seconds


def _device(figures: DemoFigures) -> str:
    training = figures.training
    threads = f"{training.num_threads} thread{'s' if training.num_threads > 1 else ''}"
    return f"the CPU with {threads}" if training.device == "cpu" else training.device


def _total_seconds(figures: DemoFigures) -> float:
    names = ("encoding", "first_stage", "training", "sampling", "guidance", "maps", "holes", "losses", "solvers")
    return sum(getattr(figures, name).seconds for name in names)
