"""What `latentflow serve` can be asked: where it listens, and how much it takes on."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from latentflow.requests import FromText, Option, Request, Whole

LOOPBACK = "127.0.0.1"


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _origins(given: list[str]) -> list[str]:
    for one in given:
        scheme, separator, rest = one.partition("://")
        if scheme not in ("http", "https") or not separator or not rest or "/" in rest:
            raise ValueError("give origins like https://example.org, without a path")
    return [one.lower() for one in given]


def _token(given: str) -> str:
    if len(given) < 8 or not given.isascii() or not given.isprintable() or " " in given:
        raise ValueError("give at least 8 ASCII letters or digits, without spaces")
    return given


class ServeRequest(Request):
    """A server of one model."""

    host: str = Field(default=LOOPBACK, description="Address to listen on; 0.0.0.0: all of this machine's.")
    port: Annotated[Whole, Option(remedy="0 takes a free one")] = Field(
        default=8000, ge=0, le=65_535, description="Port to listen on; 0: a free one."
    )
    token: Annotated[str, AfterValidator(_token), Option(metavar="SECRET")] | None = Field(
        default=None,
        description="Requests must carry it: 'Authorization: Bearer SECRET'. Default: LATENTFLOW_TOKEN of the "
        "environment, which other users of the machine do not see; none if it is not set.",
    )
    origins: Annotated[list[str], FromText(_list), AfterValidator(_origins)] = Field(
        default=[], description="Web sites whose pages may send requests, such as https://example.org; with commas."
    )
    hosts: Annotated[list[str], FromText(_list)] = Field(
        default=[], description="Names under which the server is reached, besides its address; with commas."
    )
    batch_size: Annotated[Whole, Option(remedy="16 are usual")] = Field(
        default=16, ge=1, le=65_536, description="Images computed together; does not change them."
    )
    most_images: Annotated[Whole, Option(remedy="16 are usual")] = Field(
        default=16, ge=1, le=10_000, description="Images of one request."
    )
    most_waiting: Annotated[Whole, Option(remedy="64 are usual")] = Field(
        default=64, ge=1, le=100_000, description="Requests in the queue; more are answered with 429."
    )
    most_megabytes: Annotated[Whole, Option(remedy="32 are usual")] = Field(
        default=32, ge=1, le=4096, description="Size of one request, images included, in MiB."
    )
    most_megapixels: Annotated[Whole, Option(remedy="50 are usual")] = Field(
        default=50, ge=1, le=1024, description="Size of one image of a request, in millions of pixels."
    )
    most_seconds: Annotated[Whole, Option(remedy="300 are usual")] = Field(
        default=300, ge=1, le=86_400, description="Time that a request may take; then it is answered with 504."
    )
