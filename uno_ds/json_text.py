"""JSON that others wrote: every mistake in it is a ValueError of one short line."""

import json
import re
from itertools import chain
from typing import Any

_LONGEST_NAME = 120
_DEEPEST = 100
# A string, to its end or to that of the text, or a sign of the structure.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\Z)|[{}\[\]:\n]', re.DOTALL)


class _Repetition(ValueError):
    pass


def read_json(text: bytes | str) -> Any:
    """The value in JSON text, UTF-8 with or without a byte-order mark. Raises ValueError and
    nothing else, also for an object that holds a name twice: `json` keeps the last one without a
    word. At most 100 levels deep."""
    decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    try:
        value = json.loads(decoded, object_pairs_hook=_without_repetition)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except _Repetition:
        raise ValueError(_repetition(decoded)) from None
    level = [value]
    for _ in range(_DEEPEST):
        level = list(chain.from_iterable(map(_parts, level)))
    if level:
        raise ValueError("it is nested too deep")
    return value


def shown(name: str) -> str:
    """A name as a message can hold it: at most 120 characters, and escapes for what a terminal
    would not print."""
    visible = name if name.isprintable() else ascii(name)[1:-1]
    if len(visible) <= _LONGEST_NAME:
        return visible
    return f"{visible[: _LONGEST_NAME - 3]}..."


def _parts(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise _Repetition
    return result


def _repetition(text: str) -> str:
    """Which name occurs twice in an object of correct JSON, and in which lines."""
    objects: list[dict[str, int]] = []
    string, line = "", 1
    for token in _TOKEN.findall(text):
        if token == "\n":
            line += 1
        elif token in "{[":
            objects.append({})
        elif token in "}]":
            objects.pop()
        elif token != ":":
            string = token
        else:
            name, names = json.loads(string), objects[-1]
            if name in names:
                lines = f"{names[name]} and {line}"
                return f"the name '{shown(name)}' occurs twice in it, in lines {lines}"
            names[name] = line
    raise AssertionError("no name occurs twice")
