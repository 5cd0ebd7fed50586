"""Texts of caption and instruction columns: strings, lists and objects of them, and JSON text of
either."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from uno_ds.data.files import parse_json
from uno_ds.data.images import BadRow

# Keys of a captions object that hold no caption, in lower case and with underscores. Left out
# unless a source names its keys.
METADATA_KEYS = frozenset(
    """
    aesthetic_score captioner clip_score confidence created_at dataset date file file_name filename
    hash height id image_id image_path input_ids key lang language language_code license locale
    logprobs md5 model model_id model_name model_version path probability sample_id score sha256
    similarity source split status timestamp token token_ids tokens type uid uri url uuid version
    width
    """.split()
)
# Opens a list or object whose first item is a string, in JSON or as Python prints it. No caption
# begins like this by chance.
_OPENING = re.compile(r"""\s*[\[{]\s*["']""")


class CaptionReader:
    """Reads the texts of one source. `keys`: the keys of objects whose values are texts; None: all
    but METADATA_KEYS, and `left_out` collects those of them under which texts were met."""

    def __init__(self, keys: Iterable[str] | None = None):
        self.keys = None if keys is None else frozenset(keys)
        self.left_out: set[str] = set()

    def texts(self, value: Any) -> list[str]:
        """The non-blank strings in a string, a list or a mapping of them, without the blanks around
        them and repetitions.

        Numbers and lists of token ids are no texts. Raises BadRow "bad_json" for JSON that breaks
        off."""
        return list(dict.fromkeys(self._walk(value)))

    def _walk(self, value: Any) -> Iterator[str]:
        value = unpack(value)
        if isinstance(value, str):
            if value.strip():
                yield value.strip()
        elif isinstance(value, Mapping):
            for key, item in value.items():
                if self._wanted(str(key)):
                    yield from self._walk(item)
                elif self.keys is None and _holds_text(item):
                    self.left_out.add(str(key))
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from self._walk(item)

    def _wanted(self, key: str) -> bool:
        if self.keys is not None:
            return key in self.keys
        return key.strip().lower().replace("-", "_") not in METADATA_KEYS


def unpack(value: Any) -> Any:
    """`value`, decoded where it is JSON text of a list or an object, or the pairs of an Arrow map,
    which become a mapping.

    Raises BadRow "bad_json" for a text that begins like JSON of strings and is none.
    """
    if isinstance(value, (list, tuple)):
        pairs = bool(value) and all(isinstance(item, tuple) and len(item) == 2 for item in value)
        return dict(value) if pairs else value
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return parse_json(value, (dict, list))
    except BadRow:
        if _OPENING.match(value):
            raise
        return value


def _holds_text(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, (list, tuple)):
        return any(isinstance(item, str) for item in value)
    return isinstance(value, Mapping)
