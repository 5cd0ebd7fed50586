"""Compares a picture, drawn or generated, with a scene, by program, without a model.

Every pixel is taken as a mixture of the background and one palette colour, which makes antialiased
borders harmless; connected regions of one colour are objects; their shape is the template that
overlaps them best in their own box."""

import functools
from collections import Counter
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from uno_ds.data.scene_drawing import (
    BACKGROUND,
    COLOURS,
    RELATIONS,
    SHAPES,
    SQUARE_SIDE,
    Scene,
    Thing,
    draw_shape,
    relations_of,
)

WORKING_SIDE = 64  # larger pictures are averaged down to this before they are judged
MIXTURE = 0.5  # share of the palette colour from which a pixel belongs to an object
SMALLEST_AREA = 0.015  # of the picture; less is a speck and not an object
SMALLEST_OVERLAP = 0.65  # intersection over union with the best template; less is no known shape
CENTER_RADIUS = 0.11  # of the side: a single object nearer to the middle than this is "center"


class Found(NamedTuple):
    """An object seen in a picture; centre of its box as fractions of the sides; shape "unknown" if
    no template fits."""

    shape: str
    colour: str
    x: float
    y: float


def score(image: Image.Image, scene: Scene) -> dict[str, bool]:
    """What of `scene` the picture shows: `count`, `colours`, `shapes`, `relation` and `all`.

    `colours` and `shapes` compare the objects' colours and shapes as multisets. `relation` is the
    relation of a pair, both of a triple, or the place of a single object; where the scene names
    none it holds. `all` needs the four, and each shape in its colour."""
    found, wanted = find_objects(image), scene["objects"]
    count = len(found) == len(wanted)
    colours = Counter(thing.colour for thing in found) == Counter(
        thing["colour"] for thing in wanted
    )
    shapes = Counter(thing.shape for thing in found) == Counter(thing["shape"] for thing in wanted)
    bound = Counter((thing.shape, thing.colour) for thing in found) == Counter(
        (thing["shape"], thing["colour"]) for thing in wanted
    )
    relation = _relation_holds(found, scene)
    return {
        "count": count,
        "colours": colours,
        "shapes": shapes,
        "relation": relation,
        "all": count and bound and relation,
    }


def find_objects(image: Image.Image) -> list[Found]:
    """Objects of a picture, the largest first."""
    image = image.convert("RGB")
    if max(image.size) > WORKING_SIDE:
        image = image.resize((WORKING_SIDE, WORKING_SIDE), Image.Resampling.BOX)
    labels = _smooth(_colour_labels(np.asarray(image, dtype=np.float32)))
    height, width = labels.shape
    found = []
    for label, rows, columns in _regions(labels):
        if len(rows) < SMALLEST_AREA * labels.size:
            continue
        top, left = rows.min(), columns.min()
        mask = np.zeros((rows.max() - top + 1, columns.max() - left + 1), dtype=np.float32)
        mask[rows - top, columns - left] = 1
        centre = ((left + mask.shape[1] / 2) / width, (top + mask.shape[0] / 2) / height)
        found.append((len(rows), Found(_shape_of(mask), list(COLOURS)[label], *map(float, centre))))
    return [thing for _, thing in sorted(found, key=lambda item: -item[0])]


def _colour_labels(pixels: np.ndarray) -> np.ndarray:
    """[h, w, 3] in 0..255 to [h, w]: index of the palette colour, or -1 for background."""
    offsets = pixels - np.array(BACKGROUND, dtype=np.float32)
    directions = np.array(list(COLOURS.values()), dtype=np.float32) - np.array(
        BACKGROUND, dtype=np.float32
    )
    mixture = np.clip(offsets @ directions.T / (directions**2).sum(axis=1), 0, 1.2)
    residual = np.linalg.norm(offsets[:, :, None] - mixture[..., None] * directions, axis=-1)
    labels = residual.argmin(axis=-1)
    amount = np.take_along_axis(mixture, labels[..., None], axis=-1)[..., 0]
    return np.where(amount > MIXTURE, labels, -1)


def _smooth(labels: np.ndarray) -> np.ndarray:
    """Each pixel takes the commonest label around it, its own counted threefold: a stray pixel
    neither splits nor adds."""
    height, width = labels.shape
    votes = np.stack([labels == label for label in range(-1, len(COLOURS))]).astype(np.int32)
    padded = np.pad(votes, ((0, 0), (1, 1), (1, 1)))
    counted = 2 * votes
    for y in range(3):
        for x in range(3):
            counted += padded[:, y : y + height, x : x + width]
    return counted.argmax(axis=0) - 1


def _regions(labels: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(label, rows, columns) of every region of edge-connected pixels of one colour."""
    height, width = labels.shape
    remaining, regions = labels.copy(), []
    for row, column in zip(*np.nonzero(labels >= 0)):
        label = int(remaining[row, column])
        if label < 0:
            continue
        remaining[row, column] = -1
        stack, members = [(int(row), int(column))], []
        while stack:
            y, x = stack.pop()
            members.append((y, x))
            for next_y, next_x in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if (
                    0 <= next_y < height
                    and 0 <= next_x < width
                    and remaining[next_y, next_x] == label
                ):
                    remaining[next_y, next_x] = -1
                    stack.append((next_y, next_x))
        rows, columns = np.array(members).T
        regions.append((label, rows, columns))
    return regions


def _shape_of(mask: np.ndarray) -> str:
    height, width = mask.shape
    overlaps = {}
    for shape in SHAPES:
        template = _template(shape, width, height)
        overlaps[shape] = np.minimum(mask, template).sum() / np.maximum(mask, template).sum()
    best = max(overlaps, key=lambda shape: overlaps[shape])
    elongated = max(width, height) > 1.7 * min(width, height)
    return "unknown" if elongated or overlaps[best] < SMALLEST_OVERLAP else best


@functools.lru_cache(maxsize=4096)
def _template(shape: str, width: int, height: int) -> np.ndarray:
    """[height, width] in 0..1: how much of each pixel the shape covers when it fills the box."""
    image = Image.new("L", (width * 8, height * 8))
    fill = 1 / SQUARE_SIDE if shape == "square" else 1.0
    draw_shape(
        ImageDraw.Draw(image),
        shape,
        (width * 4, height * 4),
        (width * 8 * fill, height * 8 * fill),
        255,
    )
    return np.asarray(image.reduce(8), dtype=np.float32) / 255


def _relation_holds(found: list[Found], scene: Scene) -> bool:
    if scene["place"] is not None:
        return len(found) == 1 and _place_of(found[0]) == scene["place"]
    return all(_is_so(found, *wanted) for wanted in relations_of(scene))


def _is_so(found: list[Found], thing: Thing, relation: str, other: Thing) -> bool:
    """Whether `thing` has this relation to `other`."""
    first, second = (_find(found, wanted["colour"], wanted["shape"]) for wanted in (thing, other))
    if first is None or second is None or first is second:
        return False
    across, down = RELATIONS[relation]
    dx, dy = second.x - first.x, second.y - first.y
    along, aside = (-across * dx, abs(dy)) if across else (-down * dy, abs(dx))
    return along > aside


def _find(found: list[Found], colour: str, shape: str) -> Found | None:
    """The one object of that colour, or else of that shape."""
    for matches in (
        [thing for thing in found if thing.colour == colour],
        [thing for thing in found if thing.shape == shape],
    ):
        if len(matches) == 1:
            return matches[0]
    return None


def _place_of(thing: Found) -> str:
    dx, dy = thing.x - 0.5, thing.y - 0.5
    if max(abs(dx), abs(dy)) < CENTER_RADIUS:
        return "center"
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"
