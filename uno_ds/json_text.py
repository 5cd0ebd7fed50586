"""JSON that others wrote: every mistake in it is a ValueError of one short line."""

import json
from typing import Any

_LONGEST_NAME = 120


def read_json(text: bytes | str) -> Any:
    """The value in JSON text, UTF-8 with or without a byte-order mark. Raises ValueError and
    nothing else, also for an object that holds a name twice: `json` keeps the last one without a
    word.
    """
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        return json.loads(decoded, object_pairs_hook=_without_repetition)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def shown(name: str) -> str:
    """A name as a message can hold it: at most 120 characters, and escapes for what a terminal
    would not print.
    """
    visible = name if name.isprintable() else ascii(name)[1:-1]
    if len(visible) <= _LONGEST_NAME:
        return visible
    return f"{visible[: _LONGEST_NAME - 3]}..."


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the name '{shown(name)}' stands twice in it")
        result[name] = value
    return result
