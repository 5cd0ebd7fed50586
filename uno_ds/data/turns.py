"""The turns of a conversation row: {from, value} with marks for images, {role, content}, and
contents that are lists of text and image parts."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from uno_ds.data.files import parse_json
from uno_ds.data.images import BadRow

PLACEHOLDER = "<image>"
ANSWER = "gpt"
# A system turn is context, like a question.
ROLES = {
    "human": "human",
    "user": "human",
    "system": "human",
    "gpt": ANSWER,
    "assistant": ANSWER,
}
QUESTIONS = ("human", "user")
TEXT_TYPES = ("text", "input_text", "output_text")
IMAGE_TYPES = ("image", "image_url", "input_image")
# Where an image part holds its image, in the order in which they are looked at.
IMAGE_KEYS = ("image", "image_url", "bytes", "path", "url", "data")


@dataclass(frozen=True)
class ImageValue:
    """A value of an image column."""

    value: Any


class _Mark:
    """The place of the next image of the row."""


_MARK = _Mark()
Piece = str | ImageValue


def read_turns(
    given: Any, images: list[Any], needs_answers: bool = True
) -> list[tuple[str, list[Piece]]]:
    """(role, pieces) of every turn: role "human" or ANSWER, texts and images in their order.
    `needs_answers`: an answer has to hold a text.

    `images` are the row's own. They take the places of the marks and of image parts without an
    image; where there is neither, they come first in the first question. Raises BadRow."""
    if isinstance(given, str):
        given = parse_json(given, (list,))
    if not isinstance(given, list) or not given:
        raise BadRow("no_conversation", "conversations must be a list of turns")
    contents = [_pieces(turn, images) for turn in given]
    unsplit = chain.from_iterable(contents)
    has_image_parts = any(not isinstance(piece, str) for piece in unsplit)
    if not has_image_parts:
        contents = [_split_at_marks(pieces) for pieces in contents]
    all_pieces = list(chain.from_iterable(contents))
    marks = sum(piece is _MARK for piece in all_pieces)
    held = sum(isinstance(piece, ImageValue) for piece in all_pieces)
    if images and not marks and not held:
        questions = [place for place, turn in enumerate(given) if _speaker(turn) in QUESTIONS]
        first = questions[0] if questions else 0
        contents[first] = [*([_MARK] * len(images)), *contents[first]]
    elif marks != len(images) and not (marks == 0 and held):
        raise BadRow("image_count", f"{marks} {PLACEHOLDER} marks for {len(images)} images")
    pending = iter(images)
    turns: list[tuple[str, list[Piece]]] = []
    for turn, pieces in zip(given, contents, strict=True):
        filled = [ImageValue(next(pending)) if piece is _MARK else piece for piece in pieces]
        turns.append((_role(turn), [_stripped(piece) for piece in filled if not _is_blank(piece)]))
    for role, parts in turns:
        has_text = any(isinstance(part, str) for part in parts)
        if needs_answers and role == ANSWER and not has_text:
            raise BadRow("missing_answer", "a gpt turn holds no text")
    return turns


def _pieces(turn: Any, images: list[Any]) -> list[Any]:
    """Texts, marks and images of one turn; marks inside of texts are still text."""
    content = None
    if isinstance(turn, Mapping):
        content = turn.get("value")
        if content is None:
            content = turn.get("content")
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise BadRow(
            "bad_turn",
            f"a turn must be {{from, value}} or {{role, content}} with a text or a list of parts, "
            f"got {turn!r:.60}",
        )
    return [_part(item, images) for item in content]


def _part(item: Any, images: list[Any]) -> Any:
    if isinstance(item, str):
        return item
    if not isinstance(item, Mapping):
        raise BadRow("bad_turn", f"a part of a turn must be a text or an object, got {item!r:.60}")
    kind = item.get("type")
    if kind is None:
        kind = "text" if item.get("text") is not None else "image"
    if kind in TEXT_TYPES and isinstance(item.get("text"), str):
        return item["text"]
    if kind not in IMAGE_TYPES:
        raise BadRow(
            "unsupported_part",
            f"a part of type {kind!r:.40}; read are {', '.join((*TEXT_TYPES, *IMAGE_TYPES))}",
        )
    value = next((item[key] for key in IMAGE_KEYS if item.get(key) is not None), None)
    if kind == "image_url" and isinstance(value, Mapping):
        value = value.get("url")
    if value is not None:
        return ImageValue(value)
    index = item.get("index")
    if index is None:
        return _MARK
    if type(index) is not int or not 0 <= index < len(images):
        raise BadRow("image_count", f"a part names image {index!r:.20} of {len(images)}")
    return ImageValue(images[index])


def _split_at_marks(pieces: list[Any]) -> list[Any]:
    split: list[Any] = []
    for piece in pieces:
        for number, text in enumerate(piece.split(PLACEHOLDER)):
            split += [_MARK, text] if number else [text]
    return split


def _is_blank(piece: Piece) -> bool:
    return isinstance(piece, str) and not piece.strip()


def _stripped(piece: Piece) -> Piece:
    return piece.strip() if isinstance(piece, str) else piece


def _role(turn: Mapping[str, Any]) -> str:
    role = ROLES.get(_speaker(turn))
    if role is None:
        shown = turn.get("from", turn.get("role"))
        raise BadRow(
            "bad_turn", f"a turn is from {shown!r:.60}, which is none of {', '.join(ROLES)}"
        )
    return role


def _speaker(turn: Mapping[str, Any]) -> str:
    return str(turn.get("from", turn.get("role"))).lower()
