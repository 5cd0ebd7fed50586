"""Rows of every layout whose pictures are known by their shade, and what a source makes of them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from uno_ds.data.images import BadRow
from uno_ds.data.sources import Source

CAPTIONS = json.dumps(
    {"short": "a cup", "long": ["a white cup.", "a cup on a table."], "blank": "  "}
)


def picture(shade: int = 100, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (shade, 50, 50)).save(buffer, kind)
    return buffer.getvalue()


def shade_of(image: Image.Image) -> int:
    assert isinstance(image, Image.Image) and image.mode == "RGB"
    return image.getpixel((3, 3))[0]


def shaded_turns(example: Any) -> list[tuple[str, list[str | int]]]:
    """Turns of a conversation with the shade of each picture in its place."""
    return [(role, list(map(_text_or_shade, parts))) for role, parts in example.turns]


def _text_or_shade(part: str | Image.Image) -> str | int:
    return part if isinstance(part, str) else shade_of(part)


def write_lines(
    folder: Path, lines: list[str | dict], images: dict[str, bytes] | None = None
) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, data in (images or {"a.png": picture()}).items():
        (folder / "images" / name).write_bytes(data)
    path = folder / "conversations.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return path


def read(source: Source, index: int = 0, seed: int = 0):
    return source.read(index, np.random.default_rng(seed))


def cause(source: Source, index: int = 0) -> str:
    with pytest.raises(BadRow) as caught:
        read(source, index)
    return caught.value.cause


def talk(
    human: str = "<image>\nWhat is it?", gpt: str = "A cup.", system: str | None = None
) -> list[dict]:
    first = [] if system is None else [{"from": "system", "value": system}]
    return [*first, {"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
