"""What the embedded scenes are made of, and how they are drawn.

A scene is a plain JSON-able dictionary, the ground truth of its picture:

    kind      "one", "count", "pair" or "triple"
    objects   list of {shape, colour, x, y, size}; centre and extent as fractions of the picture's
              side
    place     of a single object: center, left, right, top or bottom; null means "not judged"
    relation  of objects[0] to objects[1]: left, right, above or below; null means "not judged"
    second_relation  only of a triple: of objects[0] to objects[2]; above or below, where the first
              is left or right
"""

from typing import Any, NotRequired, TypedDict

import numpy as np
from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 165, 70),
    "blue": (45, 85, 225),
    "yellow": (245, 200, 20),
    "purple": (150, 60, 190),
    "black": (25, 25, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUND = (238, 238, 234)
PLACES = {
    "center": (0.5, 0.5),
    "left": (0.3, 0.5),
    "right": (0.7, 0.5),
    "top": (0.5, 0.3),
    "bottom": (0.5, 0.7),
}
RELATIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
# Appended, not inserted: a kind is drawn by its place in this list.
KINDS = ("one", "count", "pair", "triple")

CROSS_ARM = 0.36
SQUARE_SIDE = 0.92  # of the nominal extent, so that a square does not look larger than a circle


class Thing(TypedDict):
    shape: str
    colour: str
    x: float
    y: float
    size: float


class Scene(TypedDict):
    kind: str
    objects: list[Thing]
    place: str | None
    relation: str | None
    second_relation: NotRequired[str]


def relations_of(scene: Scene) -> list[tuple[Thing, str, Thing]]:
    """Every relation that the scene names: (an object, its relation, to this object)."""
    if scene["relation"] is None:
        return []
    first, second, *others = scene["objects"]
    found = [(first, scene["relation"], second)]
    if "second_relation" in scene:
        found.append((first, scene["second_relation"], others[0]))
    return found


def outline(shape: str) -> list[list[tuple[float, float]]]:
    """Polygons whose union is `shape`, inside the square [-1/2, 1/2]^2 (x to the right, y down);
    none for the circle."""
    if shape == "square":
        half = SQUARE_SIDE / 2
        return [[(-half, -half), (half, -half), (half, half), (-half, half)]]
    if shape == "triangle":
        return [[(0.0, -0.5), (0.5, 0.5), (-0.5, 0.5)]]
    if shape == "cross":
        arm = CROSS_ARM / 2
        return [
            [(-0.5, -arm), (0.5, -arm), (0.5, arm), (-0.5, arm)],
            [(-arm, -0.5), (arm, -0.5), (arm, 0.5), (-arm, 0.5)],
        ]
    assert shape == "circle", shape
    return []


def draw_shape(
    canvas: ImageDraw.ImageDraw,
    shape: str,
    centre: tuple[float, float],
    extent: tuple[float, float],
    fill: Any,
) -> None:
    """Draws one shape whose nominal box has `centre` and `extent` (width, height), in pixels of the
    canvas."""
    (x, y), (width, height) = centre, extent
    if shape == "circle":
        canvas.ellipse(
            (x - width / 2, y - height / 2, x + width / 2 - 1, y + height / 2 - 1), fill=fill
        )
    for polygon in outline(shape):
        # PIL fills a polygon's border pixels too: one pixel less on the far side keeps the extent.
        canvas.polygon(
            [(x + a * width - (a > 0), y + b * height - (b > 0)) for a, b in polygon], fill=fill
        )


def draw(scene: Scene, size: int) -> Image.Image:
    """The scene as an RGB picture of `size` x `size` pixels, antialiased by drawing it larger and
    averaging."""
    oversampling = 8 if size <= 64 else 4
    side = size * oversampling
    image = Image.new("RGB", (side, side), BACKGROUND)
    canvas = ImageDraw.Draw(image)
    for thing in scene["objects"]:
        extent = thing["size"] * side
        draw_shape(
            canvas,
            thing["shape"],
            (thing["x"] * side, thing["y"] * side),
            (extent, extent),
            COLOURS[thing["colour"]],
        )
    return image.reduce(oversampling)


def make_scene(kind: str, rng: np.random.Generator) -> Scene:
    """A random scene of one kind; objects of a pair and of a triple differ in shape and in
    colour."""
    shapes = [str(shape) for shape in rng.permutation(SHAPES)]
    colours = [str(colour) for colour in rng.permutation(list(COLOURS))]
    if kind == "one":
        place = str(rng.choice(list(PLACES)))
        x, y = PLACES[place]
        thing = _thing(shapes[0], colours[0], x, y, rng.uniform(0.5, 0.555), rng, jitter=0.02)
        return Scene(kind=kind, objects=[thing], place=place, relation=None)
    if kind == "count":
        spots, extent = _count_spots(int(rng.integers(2, 4)), rng)
        things = [_thing(shapes[0], colours[0], x, y, extent, rng, jitter=0.015) for x, y in spots]
        return Scene(kind=kind, objects=things, place=None, relation=None)
    if kind == "triple":
        return _make_triple(shapes, colours, rng)
    assert kind == "pair", kind
    relation = str(rng.choice(list(RELATIONS)))
    across, down = RELATIONS[relation]
    # The two differ in height (or side) a little; the gap along their own axis stays at least one
    # pixel at 32 px.
    shifts = rng.uniform(-0.06, 0.06, size=2)
    things = []
    for index, sign in enumerate((1, -1)):
        x, y = 0.5 + sign * across * 0.245, 0.5 + sign * down * 0.245
        x, y = (x, y + shifts[index]) if across else (x + shifts[index], y)
        things.append(
            _thing(shapes[index], colours[index], x, y, rng.uniform(0.38, 0.43), rng, jitter=0.01)
        )
    return Scene(kind=kind, objects=things, place=None, relation=relation)


def _make_triple(shapes: list[str], colours: list[str], rng: np.random.Generator) -> Scene:
    """Three corners of a square: one object, one beside it, and one above or below it."""
    across, down = str(rng.choice(["left", "right"])), str(rng.choice(["above", "below"]))
    x, y = 0.5 + 0.25 * RELATIONS[across][0], 0.5 + 0.25 * RELATIONS[down][1]
    things = []
    for index, spot in enumerate([(x, y), (1 - x, y), (x, 1 - y)]):
        size = rng.uniform(0.37, 0.41)
        things.append(_thing(shapes[index], colours[index], *spot, size, rng, jitter=0.015))
    return Scene(kind="triple", objects=things, place=None, relation=across, second_relation=down)


def _count_spots(number: int, rng: np.random.Generator) -> tuple[list[tuple[float, float]], float]:
    if number == 3:
        return [(0.5, 0.25), (0.25, 0.74), (0.75, 0.74)], float(rng.uniform(0.37, 0.40))
    spots = [(0.255, 0.5), (0.745, 0.5)]
    if not rng.integers(2):
        spots = [(y, x) for x, y in spots]
    return spots, float(rng.uniform(0.38, 0.43))


def _thing(
    shape: str,
    colour: str,
    x: float,
    y: float,
    size: float,
    rng: np.random.Generator,
    jitter: float,
) -> Thing:
    dx, dy = rng.uniform(-jitter, jitter, size=2)
    return Thing(
        shape=shape,
        colour=colour,
        x=round(x + float(dx), 4),
        y=round(y + float(dy), 4),
        size=round(float(size), 4),
    )
