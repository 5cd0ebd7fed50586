"""What a row of each layout means: from raw columns to an example with decoded pictures, or BadRow."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from uno_ds.data.captions import CaptionReader, unpack
from uno_ds.data.files import is_inside, one_line, parse_json
from uno_ds.data.images import BadRow
from uno_ds.files_on_disk import read_regular
from uno_ds.sequence.composition import Encoded

LAYOUTS = ("t2i", "edit", "vlm")
CAPTION_COLUMNS = ("captions", "caption", "text")
IMAGE_COLUMNS = ("image", "images", "jpg", "png", "webp")
PLACEHOLDER = "<image>"
# What a system turn says is context, like a question.
ROLES = {
    "human": "human",
    "user": "human",
    "system": "human",
    "gpt": "gpt",
    "assistant": "gpt",
}


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
    layout: str,
    key: str,
    row: Mapping[str, Any],
    load: Load,
    reader: CaptionReader,
    rng: np.random.Generator,
) -> Example:
    """An example of `row`; `load` turns an image column's value into a picture. Raises BadRow."""
    if layout == "t2i":
        captions = _captions(row, reader)
        return TextToImage(key, load(_first_image(row)), captions)
    if layout == "edit":
        return edit_of(row, reader).draw(key, load, rng)
    return _conversation(key, row, load)


def edit_of(row: Mapping[str, Any], reader: CaptionReader) -> EditSequence:
    """Raises BadRow."""
    images, instructions, captions = (
        row.get("image_list"),
        row.get("instruction_list"),
        row.get("caption_list"),
    )
    if not isinstance(images, list) or len(images) < 2:
        raise BadRow("missing_image", "image_list must hold at least two images")

    pairs = len(images) - 1

    def entries(value: Any, first: int) -> list[list[Text]]:
        """The texts of `value` from entry `first` on, one entry for each image but the first."""
        given = [reader.texts(entry) for entry in value[first:]] if isinstance(value, list) else []
        return (given + [[]] * pairs)[:pairs]

    sequence = EditSequence(
        images, entries(_wordings(instructions, pairs), 0), entries(unpack(captions), 1)
    )
    if not sequence.pairs:
        raise BadRow("missing_instruction", "instruction_list holds no text for any pair of images")
    return sequence


def _wordings(value: Any, pairs: int) -> Any:
    """`instruction_list` as a list with an entry for each pair; a single text or object is of the first pair, and so is JSON
    text of a list of strings where there is one pair only."""
    given = unpack(value)
    if isinstance(given, (str, Mapping)):
        return [given]
    flat = isinstance(given, list) and all(isinstance(item, str) for item in given)
    return [given] if isinstance(value, str) and pairs == 1 and flat else given


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
        path = _file_of(value, folder).resolve()
        if not is_inside(path, folder):
            raise BadRow("missing_image", f"'{value:.200}' is outside of the folder of images")
        return read_regular(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadRow("missing_image", f"'{value:.200}': {one_line(error)}") from None


def _file_of(name: str, folder: Path) -> Path:
    """`name` below `folder`, or beside it where no such file is there and `name` begins with the folder's own name."""
    path, parts = folder / name, Path(name).parts
    repeated = len(parts) > 1 and parts[0] == folder.absolute().name
    return folder.joinpath(*parts[1:]) if repeated and not path.exists() else path


def _captions(row: Mapping[str, Any], reader: CaptionReader) -> list[str]:
    """Captions of the first column that has any; a string in `captions` is JSON, in `caption` and `text` it is the caption
    unless it is JSON of a list or an object."""
    for column in CAPTION_COLUMNS:
        value = row.get(column)
        if column == "captions" and isinstance(value, str) and value.strip():
            value = parse_json(value, (dict, list))
        if found := reader.texts(value):
            return found
    raise BadRow("no_caption", f"no caption column holds a text{_keys_hint(row, reader)}")


def _keys_hint(row: Mapping[str, Any], reader: CaptionReader) -> str:
    """Of the objects in the caption columns: which keys they have and which were read."""
    values = [unpack(row.get(column)) for column in CAPTION_COLUMNS]
    keys = [str(key) for value in values if isinstance(value, Mapping) for key in value]
    if not keys:
        return ""
    read = ", ".join(sorted(reader.keys)) if reader.keys is not None else "all but metadata"
    return f"; an object has the keys {', '.join(keys)}, and caption_keys are {read}"


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
    values = [_value(turn) for turn in turns]
    marks = sum(value.count(PLACEHOLDER) for value in values)
    if images and not marks:
        first = next((place for place, turn in enumerate(turns) if _asks(turn)), 0)
        values[first] = PLACEHOLDER * len(images) + values[first]
    elif marks != len(images):
        raise BadRow("image_count", f"{marks} {PLACEHOLDER} marks for {len(images)} images")
    pending, parsed = iter(images), []
    for turn, value in zip(turns, values, strict=True):
        parts: list[Part] = []
        for number, text in enumerate(value.split(PLACEHOLDER)):
            if number:
                parts.append(load(next(pending)))
            if text.strip():
                parts.append(text.strip())
        role = ROLES.get(_speaker(turn))
        if role is None:
            raise BadRow(
                "bad_turn",
                f"a turn is from {_speaker(turn)!r:.60}, which is none of {', '.join(ROLES)}",
            )
        if not any(isinstance(part, str) for part in parts) and role == "gpt":
            raise BadRow("missing_answer", "a gpt turn holds no text")
        parsed.append((role, parts))
    if all(role != "gpt" for role, _ in parsed):
        raise BadRow("missing_answer", "no turn is from gpt")
    return Conversation(key, parsed)


def _speaker(turn: Mapping[str, Any]) -> str:
    return str(turn.get("from", turn.get("role")))


def _asks(turn: Mapping[str, Any]) -> bool:
    return _speaker(turn) in ("human", "user")


def _value(turn: Any) -> str:
    value = (
        (turn.get("value") if turn.get("value") is not None else turn.get("content"))
        if isinstance(turn, Mapping)
        else None
    )
    if not isinstance(value, str):
        raise BadRow("bad_turn", f"a turn must be {{from, value}} with a text, got {turn!r:.60}")
    return value
