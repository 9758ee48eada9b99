"""Images of colored shapes, drawn from an integer: the same seed gives the same scene and the same pixels.

An image is a 3 x 3 board of places, one to five of which hold a shape. Its sides lie between 250 and 378 pixels, so
that jina-vlm makes it one tile and one thumbnail.

Color-shape pairs are split once and for all. `HELD_OUT_PAIRS` are drawn in evaluation only, and evaluation draws
nothing else; every color is held out with one kind, and trained with all others.
"""

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw


KINDS = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {
    "red": (214, 32, 38),
    "orange": (250, 138, 22),
    "yellow": (246, 216, 30),
    "green": (38, 152, 62),
    "blue": (34, 84, 208),
    "purple": (130, 46, 164),
    "pink": (248, 140, 190),
    "black": (24, 24, 26),
}
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
MAX_SHAPES = 5
GREYISH = 60  # the most that channels differ in a shade that nobody would call by a color's name
NAMELESS_DISTANCE = 60  # of a color without a name from all that have one, as points of RGB
SIDES = (250, 378)  # shortest and longest side of an image, in pixels

ALL_PAIRS = tuple((color, kind) for color in COLORS for kind in KINDS)
HELD_OUT_PAIRS = tuple((color, KINDS[(5 * i + 3) % len(KINDS)]) for i, color in enumerate(COLORS))
TRAINING_PAIRS = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT_PAIRS)


@dataclass(frozen=True)
class Shape:
    """One shape: `place` is its cell of the board; center and radius are in cells, the angle in degrees. `color` is ""
    for a color without a name."""

    kind: str
    color: str
    place: str
    center: tuple[float, float]  # x, y from the cell's top left corner
    radius: float
    angle: float
    shade: tuple[int, int, int]  # the RGB it is drawn in: its color, varied a little


@dataclass(frozen=True)
class Scene:
    """An image to be drawn: its size (width, height) in pixels, its background and its shapes in reading order."""

    size: tuple[int, int]
    background: tuple[int, int, int]
    shapes: tuple[Shape, ...]


def make_scene(
    rng: random.Random, pairs: tuple[tuple[str, str], ...], number: int | None = None, nameless: float = 0.0
) -> Scene:
    """Compose a scene from (color, kind) `pairs`, of `number` shapes (up to 9) or of any number from 1 to 5, all
    equally likely.

    In half of the scenes of up to 5, shapes are drawn from two pairs only, so that there are repetitions to be
    counted. `nameless` is the share of shapes that are drawn in a shade that has no name in `COLOURS`; their color is
    "".
    """
    number = number or rng.randint(1, MAX_SHAPES)
    if rng.random() < 0.5 and number <= MAX_SHAPES:
        pairs = [rng.choice(pairs) for _ in range(2)]
    size = (rng.randint(*SIDES), rng.randint(*SIDES))
    gray = rng.randint(222, 255)
    background = tuple(min(255, gray + rng.randint(-12, 12)) for _ in range(3))
    shapes = []
    for place in sorted(rng.sample(range(len(PLACES)), number)):
        color, kind = rng.choice(pairs)
        radius = rng.uniform(0.32, 0.44)
        center = tuple(0.5 + rng.uniform(-1, 1) * (0.47 - radius) for _ in range(2))
        if rng.random() < nameless:
            color, shade = "", _nameless_shade(rng, kind, background)
        else:
            shade = tuple(max(0, min(255, value + rng.randint(-10, 10))) for value in COLORS[color])
        shapes.append(Shape(kind, color, PLACES[place], center, radius, rng.uniform(-12, 12), shade))
    return Scene(size, background, tuple(shapes))


def _nameless_shade(rng: random.Random, kind: str, background: tuple[int, int, int]) -> tuple[int, int, int]:
    """Far from every named color; and nearer to none that is held out with this kind, unless it is grayish."""
    while True:
        shade = tuple(rng.randint(0, 255) for _ in range(3))
        distances = {color: math.dist(shade, named) for color, named in COLORS.items()}
        nearest = min(distances, key=distances.get)
        if min(distances[nearest], math.dist(shade, background)) < NAMELESS_DISTANCE:
            continue
        if (nearest, kind) not in HELD_OUT_PAIRS or max(shade) - min(shade) < GREYISH:
            return shade


def draw_scene(scene: Scene, oversampling: int = 2) -> Image.Image:
    """Draw a scene as an RGB image, `oversampling` times too large and averaged down for smooth edges."""
    width, height = (side * oversampling for side in scene.size)
    image = Image.new("RGB", (width, height), scene.background)
    canvas = ImageDraw.Draw(image)
    for shape in scene.shapes:
        row, column = divmod(PLACES.index(shape.place), 3)
        x = (column + shape.center[0]) * width / 3
        y = (row + shape.center[1]) * height / 3
        _draw_shape(canvas, shape, x, y, shape.radius * min(width, height) / 3, scene.background)
    return image.reduce(oversampling)


def _draw_shape(canvas: ImageDraw.ImageDraw, shape: Shape, x: float, y: float, radius: float, background) -> None:
    """Draw one shape about (x, y) inside a circle of `radius`, all in pixels of the canvas."""
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape.kind == "circle":
        canvas.ellipse(box, fill=shape.shade)
    elif shape.kind == "ring":
        canvas.ellipse(box, outline=shape.shade, width=max(2, round(0.36 * radius)))
    else:
        turn = math.radians(shape.angle)
        corners = [(radius * r, turn + math.radians(degrees)) for r, degrees in _CORNERS[shape.kind]]
        canvas.polygon([(x + r * math.sin(a), y - r * math.cos(a)) for r, a in corners], fill=shape.shade)


# Corners: (distance from the center, clockwise angle from the top in degrees).
# A cross's arms are half its radius wide.
_ARM = math.degrees(math.atan2(0.25, 0.95))
_CORNERS = {
    "square": [(1.0, degrees) for degrees in (45, 135, 225, 315)],
    "triangle": [(1.0, degrees) for degrees in (0, 120, 240)],
    "star": [(1.0 if i % 2 == 0 else 0.42, 36 * i) for i in range(10)],
    "cross": [
        corner
        for degrees in (0, 90, 180, 270)
        for corner in ((0.98, degrees - _ARM), (0.98, degrees + _ARM), (0.25 * math.sqrt(2), degrees + 45))
    ],
}
