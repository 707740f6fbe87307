"""Coloured shapes on a muted ground: the built-in data set, drawn by index and seed without files.

Image i is a pure function of (seed, i, image_size): it does not depend on the number of images or the order of access,
and another image size shows the same scene. Shapes are signed distance functions, which give smooth edges without
supersampling.

Legend: H and W image height and width, S the shorter of them. Coordinates are in units of S, x to the right and y down;
the middle is (1/2, 1/2), so that both are in [0, 1] where the image is square.
"""

from __future__ import annotations

import colorsys
import hashlib
import math
from dataclasses import dataclass, field, replace

import numpy as np

from latentflow.columns import Column, ColumnValue
from latentflow.data.items import ImageItem
from latentflow.data.pictures.raster import as_raster
from latentflow.errors import DataError
from latentflow.pixel_format import PixelFormat
from latentflow.randomness import derive_seed
from latentflow.sizes import Size

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {"red": (0.99, 0.78, 0.88), "green": (0.39, 0.74, 0.70), "blue": (0.60, 0.78, 0.86)}  # HSV, each in [0, 1]
CLASS_NAMES = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)  # label = shape * 3 + colour
MAP_CLASS_NAMES = ("ground", *SHAPES)  # what the indices of a semantic map mean
MAP_PALETTE = ((88, 88, 96), (240, 180, 40), (70, 150, 220), (90, 190, 110), (200, 90, 180))  # none is a colour above
COLUMNS = (
    Column("shape", "label", SHAPES),
    Column("colour", "label", tuple(COLOURS)),
    Column("traits", "labels", ("left", "high", "large")),
    Column("size", "number"),
    Column("angle", "number"),
)
"""What is known of a shape: its class in two parts; whether its centre is in the left and in the upper half and its
radius above 0.3; the nominal radius in hundredths of the image width; the clockwise angle in degrees."""

_SIZES = {"circle": 1.0, "square": 0.9, "triangle": 1.22, "cross": 1.06}  # alike in weight to the eye, not in extent
_CROSS_ARM = 0.36  # half width of an arm of the cross, against its half length
_MARGIN = 0.03  # least distance of a shape from the border
_GROUND_NUMBERS = 20  # that `_ground` draws before the shape is placed
_ROAMING = 0.7  # share of the free room that is used; 1: shapes may touch the margin


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float, angle: float) -> np.ndarray:
    """Distance to the outline of a shape centred at the origin, negative inside; exact next to the edges.

    Args:
        shape: one of `SHAPES`.
        x, y: coordinates relative to the centre of gravity, of any broadcastable shapes and any unit.
        radius: nominal radius in the same unit; shapes of one radius look alike in size.
        angle: clockwise rotation in radians; 0 is upright.
    """
    size = radius * _SIZES[shape]
    if shape == "circle":
        return np.hypot(x, y) - size
    x, y = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    if shape == "triangle":  # size is the circumradius: the three edges lie half of it from the centre
        return np.maximum(y, np.abs(x) * (math.sqrt(3) / 2) - y / 2) - size / 2
    x, y = np.abs(x), np.abs(y)
    if shape == "square":
        return np.maximum(x, y) - size
    arm = size * _CROSS_ARM
    return np.minimum(np.maximum(x - size, y - arm), np.maximum(x - arm, y - size))


def unit_area(shape: str) -> float:
    """Area of a shape of nominal radius 1."""
    size = _SIZES[shape]
    ideal = {
        "circle": math.pi,
        "square": 4.0,
        "triangle": 0.75 * math.sqrt(3),
        "cross": 8 * _CROSS_ARM - 4 * _CROSS_ARM**2,
    }
    return ideal[shape] * size**2


def reach(shape: str) -> float:
    """Distance from the centre of gravity to the farthest corner of a shape of nominal radius 1."""
    corner = {"circle": 1.0, "square": math.sqrt(2), "triangle": 1.0, "cross": math.hypot(1, _CROSS_ARM)}
    return corner[shape] * _SIZES[shape]


@dataclass(frozen=True)
class SyntheticShapes:
    """An image source with one coloured shape per image.

    The label is the pair of shape and colour (`CLASS_NAMES`); each run of 12 images holds every class
    once. The semantic map has 0 for the ground and one index per kind of shape (`MAP_CLASS_NAMES`).

    Args:
        count: number of images, >= 1. Image i is the same whatever the count.
        image_size: as `Size.of` takes it, both sides >= 8.
        seed: another seed, another set of images.
        pixel_format: what the 8-bit colours become; see `as_raster`.
        columns: those of `COLUMNS` that are known of each image; the images do not depend on them.

    Raises:
        DataError: `count` or `image_size` is too small, or an index lies outside the source.
    """

    count: int
    image_size: Size | int | str = 64
    seed: int = 0
    pixel_format: PixelFormat = field(default_factory=PixelFormat)
    columns: tuple[Column, ...] = ()

    class_names = CLASS_NAMES
    map_class_names = MAP_CLASS_NAMES
    map_palette = MAP_PALETTE
    input_format, input_origin = None, ""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise DataError(f"the synthetic dataset needs at least 1 image, got count = {self.count}")
        object.__setattr__(self, "image_size", Size.of(self.image_size))
        if min(self.image_size) < 8:
            raise DataError(f"the synthetic shapes need an image size of at least 8, got {self.image_size}")

    @property
    def description(self) -> str:
        named = f" with {', '.join(column.name for column in self.columns)}" if self.columns else ""
        return f"{self.count} synthetic shapes{named} at {self.image_size.words} (seed {self.seed})"

    def fingerprint(self) -> str:
        text = f"synthetic shapes v2: {self.count} images, size {self.image_size}, seed {self.seed}"
        text += "".join(f", {column.name}" for column in self.columns)
        return hashlib.sha256(text.encode()).hexdigest()

    def uncropped(self, index: int) -> np.ndarray:
        """The pixels of image `index`."""
        return self[index].pixels

    def with_format(self, pixel_format: PixelFormat) -> SyntheticShapes:
        """The same images in another format."""
        return replace(self, pixel_format=pixel_format)

    def stored_format(self, index: int) -> PixelFormat:
        """8-bit colours."""
        return PixelFormat()

    def contents(self) -> list[str]:
        """Empty: each image follows from its name, seed and size, which the fingerprint covers."""
        return [""] * self.count

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        """The name of image `index`, without drawing it."""
        if not 0 <= index < self.count:  # IndexError also ends a plain `for item in source`
            raise IndexError(f"image {index} of a source of {self.count}")
        return f"synthetic/{index:06d}"

    def label(self, index: int) -> int:
        """The label of image `index`, without drawing it."""
        block, place = divmod(index, len(CLASS_NAMES))
        return int(_random(self.seed, "labels", block).permutation(len(CLASS_NAMES))[place])

    def values(self, index: int) -> tuple[ColumnValue, ...]:
        """The columns of image `index`, without drawing it."""
        shape, colour = divmod(self.label(index), len(COLOURS))
        random = _random(self.seed, "image", index)
        random.random(_GROUND_NUMBERS)
        place = _placed(SHAPES[shape], random, self.image_size)
        traits = (place.x < 0.5, place.y < 0.5, place.radius > 0.3)
        known: dict[str, ColumnValue] = {
            "shape": shape,
            "colour": colour,
            "traits": frozenset(index for index, applies in enumerate(traits) if applies),
            "size": 100 * place.radius,
            "angle": math.degrees(place.angle),
        }
        return tuple(known[column.name] for column in self.columns)

    def __getitem__(self, index: int) -> ImageItem:
        name, label = self.name(index), self.label(index)
        pixels, semantic_map = draw_shape(label, _random(self.seed, "image", index), self.image_size)
        if self.pixel_format != PixelFormat():
            pixels = as_raster(pixels, "rgb", self.pixel_format, name).cropped(np.asarray)
        return ImageItem(pixels, label, name, semantic_map)


def draw_shape(label: int, random: np.random.Generator, image_size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Draw one image of class `label`: [H, W, 3] uint8 RGB, and its semantic map, [H, W] uint8."""
    shape_index, colour_index = divmod(label, len(COLOURS))
    shape, (hue, saturation, value) = SHAPES[shape_index], list(COLOURS.values())[colour_index]

    side = min(image_size)
    y, x = ((np.arange(length, dtype=np.float32) + 0.5 - (length - side) / 2) / side for length in image_size)
    x, y = x[None, :], y[:, None]
    canvas = _ground(x, y, random)

    place = _placed(shape, random, image_size)
    radius, centre_x, centre_y, angle = place.radius, place.x, place.y, place.angle

    shadow = signed_distance(shape, x - centre_x - 0.016, y - centre_y - 0.028, radius, angle)
    canvas *= 1 - 0.3 * _smooth(0.5 - shadow / 0.1)[..., None]

    distance = signed_distance(shape, x - centre_x, y - centre_y, radius, angle)
    cover = np.clip(0.5 - distance * side, 0, 1)[..., None]  # share of the pixel inside the outline
    jitter = [_between(random, -spread, spread) for spread in (0.02, 0.06, 0.06)]
    paint = _rgb(hue + jitter[0], saturation + jitter[1], value + jitter[2])
    light = 1 - 0.22 * ((x - centre_x) + 1.5 * (y - centre_y)) / (radius * 1.8)  # lit from above, slightly left
    canvas += cover * (paint * light[..., None] - canvas)

    pixels = np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8)
    return pixels, np.where(cover[..., 0] > 0.5, shape_index + 1, 0).astype(np.uint8)


@dataclass(frozen=True)
class _Place:
    """Nominal radius and centre of a shape in units of S, and its clockwise angle in radians."""

    radius: float
    x: float
    y: float
    angle: float


def _placed(shape: str, random: np.random.Generator, size: Size) -> _Place:
    radius = _between(random, 0.24, 0.36)
    needed = radius * reach(shape) + _MARGIN
    rooms = (_ROAMING * (length / min(size) / 2 - needed) for length in (size.width, size.height))
    centre_x, centre_y = (0.5 + _between(random, -room, room) for room in rooms)  # which strays from the middle
    return _Place(radius, centre_x, centre_y, _between(random, -0.2, 0.2))


def _ground(x: np.ndarray, y: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A muted ground: a gradient between two greyish tints, slow waves, and sometimes faint stripes: [H, W, 3]."""
    hue, value = _between(random, 0, 1), _between(random, 0.5, 0.88)
    tints = [
        _rgb(hue + shift, _between(random, 0.05, 0.17), value + _between(random, -0.08, 0.08))
        for shift in (0.0, _between(random, -0.15, 0.15))
    ]
    turn = _between(random, 0, 2 * math.pi)
    along = math.cos(turn) * (x - 0.5) + math.sin(turn) * (y - 0.5)
    canvas = tints[0] + _smooth(0.5 + along)[..., None] * (tints[1] - tints[0])

    tone = np.zeros(along.shape, np.float32)
    for _ in range(3):
        turn, frequency = _between(random, 0, 2 * math.pi), _between(random, 0.6, 2.2)
        wave = 2 * math.pi * frequency * (math.cos(turn) * x + math.sin(turn) * y)
        tone += 0.028 * np.sin(wave + _between(random, 0, 2 * math.pi))
    turn, frequency = _between(random, 0, math.pi), _between(random, 4, 7)
    stripes = np.sin(2 * math.pi * frequency * (math.cos(turn) * x + math.sin(turn) * y))
    tone += max(0.0, _between(random, -0.035, 0.035)) * stripes  # half of the grounds have none
    return canvas * (1 + tone[..., None])


def _random(seed: int, *parts: int | str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(derive_seed("synthetic shapes", seed, *parts)))


def _between(random: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * random.random()


def _smooth(ramp: np.ndarray) -> np.ndarray:
    """Ease a ramp from 0 to 1 with flat ends: 3 r^2 - 2 r^3."""
    ramp = np.clip(ramp, 0, 1)
    return ramp * ramp * (3 - 2 * ramp)


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32)
