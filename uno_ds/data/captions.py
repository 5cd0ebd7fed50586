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
    aesthetic_score annotator author bbox bboxes captioner categories category clip_score cocoid
    confidence created_at credit dataset date domain exif file file_name filename filepath format
    generator hash height id image_id image_path imgid info input_ids key keywords label labels lang
    lang_code language language_code license locale logprobs md5 meta metadata mime_type model
    model_id model_name model_version objects path probability provider sample_id score sentid
    sentids sha256 similarity source split status tags timestamp token token_ids tokens type uid uri
    url uuid version width
    """.split()
)
# Keys with one of these in them hold captions, also of one word.
_CAPTION_KEY = re.compile("caption|text|raw|sentence|description|prompt|title|short|long|brief|alt")
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
            has_sentence = any(map(_is_sentence, value.values()))
            for key, item in value.items():
                is_label = self.keys is None and has_sentence and _is_label(str(key), item)
                if self._wanted(str(key)) and not is_label:
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


def _is_sentence(value: Any) -> bool:
    """Whether a text, or the first of a list of texts, has blanks or letters beyond ASCII."""
    texts = value if isinstance(value, (list, tuple)) and value else [value]
    return all(isinstance(text, str) for text in texts) and not _is_word(texts[0])


def _is_label(key: str, value: Any) -> bool:
    """Whether a value beside a sentence is a word, such as the code of a language or the name of a
    model, or a list of words, such as tokens, under a key that is none of captions."""
    if _CAPTION_KEY.search(key.lower()):
        return False
    words = value if isinstance(value, (list, tuple)) else [value]
    return bool(words) and all(isinstance(word, str) and _is_word(word) for word in words)


def _is_word(text: str) -> bool:
    return text.isascii() and len(text.split()) < 2


def _holds_text(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, (list, tuple)):
        return any(isinstance(item, str) for item in value)
    return isinstance(value, Mapping)
