"""The parts of an interleaved row: texts and images in order, with their roles and switches."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from uno_ds.data.captions import CaptionReader
from uno_ds.data.examples import Load, Picture, Text
from uno_ds.data.files import parse_json
from uno_ds.data.images import BadRow
from uno_ds.data.turns import ANSWER, ROLES, ImageValue, read_turns

VIEWS = ("vit", "latents", "both")
# Of a part that is a mapping. `type` and `id` are not read.
PART_KEYS = ("text", "image", "role", "loss", "generate", "views", "captions", "type", "id")


@dataclass(frozen=True)
class TextPart:
    """`texts`: wordings of the same text, of which a sample takes one; `loss`: its tokens are
    trained by cross entropy."""

    texts: list[Text]
    loss: bool = False


@dataclass(frozen=True)
class ImagePart:
    """`generate`: the image is noised and trained; `views`: one of VIEWS, in which it is shown to
    what comes after it, None: by default; `captions`: of a generated image, for supervision."""

    image: Picture
    generate: bool = False
    views: str | None = None
    captions: list[Text] | None = None


Part = TextPart | ImagePart


def read_parts(given: Any, row: Mapping[str, Any], load: Load, reader: CaptionReader) -> list[Part]:
    """The parts of a row. `row`: its raw columns, by whose names, or whose number in the column
    `images`, an image part may name its image. Raises BadRow."""
    if isinstance(given, str):
        given = parse_json(given, (list,))
    if not isinstance(given, list) or not given:
        raise BadRow("no_parts", "parts must be a list of {text} and {image}")
    return checked([_part(number, item, row, load, reader) for number, item in enumerate(given)])


def parts_of_turns(given: Any, images: list[Any], load: Load) -> list[Part]:
    """The parts of a conversation: what the assistant writes is trained, what it draws is
    generated. Raises BadRow."""
    parts: list[Part] = []
    for role, pieces in read_turns(given, images, needs_answers=False):
        is_answer = role == ANSWER
        for piece in pieces:
            if isinstance(piece, ImageValue):
                parts.append(ImagePart(load(piece.value), is_answer, captions=[]))
            else:
                parts.append(TextPart([piece], is_answer))
    return checked(parts)


def checked(parts: list[Part]) -> list[Part]:
    """The parts, if something of them is trained. Raises BadRow."""
    if not any(is_trained(part) for part in parts):
        raise BadRow("no_target", "no image is generated and no text has a loss")
    return parts


def is_trained(part: Part) -> bool:
    return part.generate if isinstance(part, ImagePart) else part.loss


def _part(
    number: int, item: Any, row: Mapping[str, Any], load: Load, reader: CaptionReader
) -> Part:
    def bad(cause: str, detail: str) -> BadRow:
        return BadRow(cause, f"part {number}: {detail}")

    if not isinstance(item, Mapping):
        raise bad("bad_part", f"it must be an object, got {item!r:.60}")
    values = {str(key): value for key, value in item.items() if value is not None}
    for key in values:
        if key not in PART_KEYS:
            raise bad("bad_part", f"unknown key {key!r:.40}; known are {', '.join(PART_KEYS)}")
    role = values.get("role", "user")
    if ROLES.get(str(role).lower()) is None:
        raise bad("unknown_role", f"the role is {role!r:.40}, which is none of {', '.join(ROLES)}")
    is_answer = ROLES[str(role).lower()] == ANSWER
    for switch in ("loss", "generate"):
        if not isinstance(values.get(switch, False), bool):
            raise bad("bad_part", f"{switch} must be true or false, got {values[switch]!r:.40}")
    texts = _texts(values.get("text"))
    if texts is None:
        raise bad("bad_part", "text must be a text or a list of wordings")
    if "image" in values and not texts:
        if values.get("loss"):
            raise bad("bad_part", "loss is for texts; an image has generate")
        if values.get("views", "both") not in VIEWS:
            raise bad("bad_part", f"views must be one of {', '.join(VIEWS)}")
        part = ImagePart(
            load(_image_of(values["image"], row)),
            values.get("generate", is_answer),
            values.get("views"),
            [*reader.texts(values.get("captions"))],
        )
        return part if part.generate else replace(part, captions=[])
    if "image" in values:
        raise bad("bad_part", "it has a text and an image; make two parts of it")
    if not texts:
        cause = "missing_image" if values.get("type") == "image" else "bad_part"
        raise bad(cause, "it has neither a text nor an image")
    if values.get("generate"):
        raise bad("bad_part", "generate is for images; a text has loss")
    return TextPart([*texts], values.get("loss", is_answer))


def _texts(value: Any) -> list[str] | None:
    """The wordings that are not blank; None for a value that is no text. Unlike captions, a text
    that is JSON is left as it is."""
    wordings = value if isinstance(value, list) else [value or ""]
    if not all(isinstance(wording, str) for wording in wordings):
        return None
    return [wording.strip() for wording in wordings if wording.strip()]


def _image_of(value: Any, row: Mapping[str, Any]) -> Any:
    """The value itself, that of the column it names, or the image of the column `images` whose
    number it is."""
    if isinstance(value, str) and row.get(value) is not None:
        return row[value]
    if type(value) is not int:
        return value
    images = row.get("images")
    if not isinstance(images, list) or not 0 <= value < len(images):
        raise BadRow("missing_image", f"there is no image {value} in the column images")
    return images[value]
