"""`latentflow invert`: a model and an image => the noise it would be drawn from, and how well it is recovered."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from latentflow.artifacts import require_writable, write_tensors
from latentflow.data.pictures.shown import as_shown
from latentflow.data.pictures.user_picture import describe_file
from latentflow.locks import writes
from latentflow.model.flow_model import FlowModel
from latentflow.progress import image_progress
from latentflow.runtime import Runtime
from latentflow.sampling.contact_sheet import save_grid
from latentflow.sampling.inversion import (
    ROUND_TRIPS,
    Inversion,
    RoundTrip,
    RoundTripRow,
    compare_round_trips,
)
from latentflow.sampling.inversion import invert as find_noise
from latentflow.sampling.picture_content import usual_suffix
from latentflow.sampling.picture_file import read_facts
from latentflow.sampling.picture_folder import refuse_others
from latentflow.sampling.request import InvertRequest


@dataclass(frozen=True)
class InvertResult:
    """What `invert` found; the files are in the folder.

    Attributes:
        inversion: the noise.
        round_trip: the image drawn again from it.
        table: other solvers, steps and tolerances; empty unless requested.
    """

    inversion: Inversion
    round_trip: RoundTrip
    table: list[RoundTripRow]


_ROUND_TRIP = "round_trip"
_DRAWN = tuple(f"{_ROUND_TRIP}{suffix}" for suffix in (".png", ".tiff"))
_PICTURES = ("input.png", "autoencoder.png", *_DRAWN)


def _why_not(file: Path, image: str) -> str:
    """Why a picture in the folder does not belong to an inversion of `image`; "" if it does."""
    if file.name not in _PICTURES:
        return "not part of an inversion"
    drawn = next((one for name in _DRAWN if (one := file.with_name(name)).is_file()), None)
    facts = (read_facts(str(drawn)) or {}) if drawn else {}
    origin = (facts.get("inputs") or {}).get("image")
    return "" if origin in (image, None) and (facts or not drawn) else f"of {origin or 'another picture'}"


@writes("out")
def invert(
    model: str | Path,
    image: str | Path,
    request: InvertRequest,
    out: str | Path,
    *,
    table: bool = False,
    runtime: Runtime | None = None,
) -> InvertResult:
    """Invert an image and draw it again; see `latentflow.sampling.inversion.invert`.

    Args:
        out: a folder; it gets input.png (what the model sees), autoencoder.png (encoded and decoded), round_trip.png
            (with the inversion in between; .tiff where PNG does not hold the model's pixel format) and
            noise.safetensors (`noise` and `latents`).
        table: also compare solvers, see `compare_round_trips`.

    Raises:
        ArtifactError, ConfigError, DataError: before anything is written.
    """
    require_writable(out)
    refuse_others(Path(out), lambda file: _why_not(file, describe_file(image)))
    flow = FlowModel.from_pretrained(model, precision="fp32", runtime=runtime)
    inversion = find_noise(flow, image, request)
    round_trip = inversion.round_trip(flow)
    rows = []
    if table:
        with image_progress("comparing", len(ROUND_TRIPS)) as on_images:
            rows = compare_round_trips(flow, [image], classes=request.classes, on_images=on_images)
    folder = Path(out)
    pixel_format = flow.config.pixel_format
    save_grid(folder / "input.png", as_shown(inversion.pixels, pixel_format), 1)
    save_grid(folder / "autoencoder.png", as_shown(round_trip.autoencoded, pixel_format), 1)
    round_trip.samples.save_as(folder / f"{_ROUND_TRIP}{usual_suffix(pixel_format)}")
    write_tensors(
        folder / "noise.safetensors",
        {"noise": inversion.noise, "latents": inversion.latents},
        metadata={"latentflow": inversion.drawing.model_dump_json()},
    )
    return InvertResult(inversion, round_trip, rows)
