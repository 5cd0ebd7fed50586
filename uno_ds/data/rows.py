"""What a row of each layout means: from raw columns to an example with decoded pictures, or BadRow."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from uno_ds.data.files import is_inside, one_line, parse_json
from uno_ds.data.images import BadRow
from uno_ds.files_on_disk import read_regular
from uno_ds.sequence.tasks import Encoded

LAYOUTS = ("t2i", "edit", "vlm")
CAPTION_COLUMNS = ("captions", "caption", "text")
IMAGE_COLUMNS = ("image", "images", "jpg", "png", "webp")
PLACEHOLDER = "<image>"
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image of a prepared source: what each encoder gave, and where it may be a condition of the visual encoder its resized
    picture. What the recipe of the preparation had no use for is None."""

    latent: Encoded | None
    target: Encoded | None
    picture: Image.Image | None


# Of a prepared source: token ids and PreparedImage.
Text = str | list[int]
Picture = Image.Image | PreparedImage
Part = Text | Picture
Load = Callable[[Any], Picture]


@dataclass(frozen=True)
class TextToImage:
    key: str
    image: Picture
    captions: list[Text]


@dataclass(frozen=True)
class Edit:
    """`captions` are of the target and may be empty."""

    key: str
    source: Picture
    target: Picture
    instructions: list[Text]
    captions: list[Text]


@dataclass(frozen=True)
class Conversation:
    """`turns` are (role, parts): role "human" or "gpt", parts texts and pictures in their order; there is a "gpt" turn."""

    key: str
    turns: list[tuple[str, list[Part]]]


Example = TextToImage | Edit | Conversation


@dataclass(frozen=True)
class EditSequence:
    """An edit row before one of its pairs is drawn. `instructions[i]`: wordings of the edit from image i to i + 1, there is one
    in all; `captions[i]` are of image i + 1. Both have an entry for each image but the first."""

    images: list[Any]
    instructions: list[list[Text]]
    captions: list[list[Text]]

    @property
    def pairs(self) -> list[int]:
        """The images from which an edit leads on."""
        return [index for index, wordings in enumerate(self.instructions) if wordings]

    def draw(self, key: str, load: Load, rng: np.random.Generator) -> Edit:
        """One of the pairs. Raises BadRow if `load` does."""
        index = self.pairs[int(rng.integers(len(self.pairs)))]
        return Edit(
            key,
            load(self.images[index]),
            load(self.images[index + 1]),
            self.instructions[index],
            self.captions[index],
        )


def layout_of(columns: set[str]) -> str | None:
    """The layout that the names of columns tell, or None."""
    if "conversations" in columns:
        return "vlm"
    if {"image_list", "instruction_list"} <= columns:
        return "edit"
    return (
        "t2i"
        if columns.intersection(IMAGE_COLUMNS) and columns.intersection(CAPTION_COLUMNS)
        else None
    )


def parse(
    layout: str, key: str, row: Mapping[str, Any], load: Load, rng: np.random.Generator
) -> Example:
    """An example of `row`; `load` turns an image column's value into a picture. Raises BadRow."""
    if layout == "t2i":
        captions = _captions(row)
        return TextToImage(key, load(_first_image(row)), captions)
    return edit_of(row).draw(key, load, rng) if layout == "edit" else _conversation(key, row, load)


def edit_of(row: Mapping[str, Any]) -> EditSequence:
    """Raises BadRow."""
    images, instructions, captions = (
        row.get("image_list"),
        row.get("instruction_list"),
        row.get("caption_list"),
    )
    if not isinstance(images, list) or len(images) < 2:
        raise BadRow("missing_image", "image_list must hold at least two images")

    def entries(value: Any, first: int) -> list[list[Text]]:
        """The texts of `value` from entry `first` on, one entry for each image but the first."""
        given = [texts(entry) for entry in value[first:]] if isinstance(value, list) else []
        return (given + [[]] * len(images))[: len(images) - 1]

    sequence = EditSequence(
        images,
        entries([instructions] if isinstance(instructions, str) else instructions, 0),
        entries(captions, 1),
    )
    if not sequence.pairs:
        raise BadRow("missing_instruction", "instruction_list holds no text for any pair of images")
    return sequence


def texts(value: Any) -> list[str]:
    """The non-blank strings in a string, a list or a mapping of them, without the blanks around them and repetitions."""
    if isinstance(value, str):
        return [value.strip()] if value.strip() else []
    items = (
        value.values()
        if isinstance(value, Mapping)
        else value
        if isinstance(value, (list, tuple))
        else ()
    )
    return list(dict.fromkeys(text for item in items for text in texts(item)))


def image_bytes(value: Any, folder: Path | None) -> bytes:
    """The encoded bytes of an image column: bytes, a {bytes, path} struct, or the name of a file below `folder`."""
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if not isinstance(value, str) or not value.strip():
        raise BadRow("missing_image", f"no image, but {value!r:.60}")
    if folder is None:
        raise BadRow(
            "missing_image", f"'{value:.200}' is a file name and the source has no folder of images"
        )
    try:
        path = (folder / value).resolve()
        if not is_inside(path, folder):
            raise BadRow("missing_image", f"'{value:.200}' is outside of the folder of images")
        return read_regular(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadRow("missing_image", f"'{value:.200}': {one_line(error)}") from None


def _captions(row: Mapping[str, Any]) -> list[str]:
    """Captions of the first column that has any; a string in `captions` is JSON, in `caption` and `text` it is the caption."""
    for column in CAPTION_COLUMNS:
        value = row.get(column)
        if column == "captions" and isinstance(value, str) and value.strip():
            value = parse_json(value, (dict, list))
        if found := texts(value):
            return found
    raise BadRow("no_caption", "no caption column holds a text")


def _first_image(row: Mapping[str, Any]) -> Any:
    value = next((row[column] for column in IMAGE_COLUMNS if row.get(column) is not None), None)
    if isinstance(value, list):
        if len(value) != 1:
            raise BadRow("image_count", f"one image expected, {len(value)} given")
        value = value[0]
    return value


def _conversation(key: str, row: Mapping[str, Any], load: Load) -> Conversation:
    turns = row.get("conversations")
    if isinstance(turns, str):
        turns = parse_json(turns, (list,))
    if not isinstance(turns, list) or not turns:
        raise BadRow("no_conversation", "conversations must be a list of turns")
    images = row.get("image") if row.get("image") is not None else row.get("images")
    images = [] if images is None else images if isinstance(images, list) else [images]
    pending, parsed = iter(images), []
    placeholders = sum(_value(turn).count(PLACEHOLDER) for turn in turns)
    if placeholders != len(images):
        raise BadRow("image_count", f"{placeholders} placeholders for {len(images)} images")
    for turn in turns:
        parts: list[Part] = []
        for number, text in enumerate(_value(turn).split(PLACEHOLDER)):
            if number:
                parts.append(load(next(pending)))
            if text.strip():
                parts.append(text.strip())
        role = ROLES.get(str(turn.get("from", turn.get("role"))))
        if role is None:
            raise BadRow(
                "bad_turn",
                f"a turn is from {turn.get('from', turn.get('role'))!r:.60}, neither human nor gpt",
            )
        if not any(isinstance(part, str) for part in parts) and role == "gpt":
            raise BadRow("missing_answer", "a gpt turn holds no text")
        parsed.append((role, parts))
    if all(role != "gpt" for role, _ in parsed):
        raise BadRow("missing_answer", "no turn is from gpt")
    return Conversation(key, parsed)


def _value(turn: Any) -> str:
    value = (
        (turn.get("value") if turn.get("value") is not None else turn.get("content"))
        if isinstance(turn, Mapping)
        else None
    )
    if not isinstance(value, str):
        raise BadRow("bad_turn", f"a turn must be {{from, value}} with a text, got {turn!r:.60}")
    return value
