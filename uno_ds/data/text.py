"""Text to token ids and back. No text is encoded to the four tokens that mark texts and images."""

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

from uno_ds.json_text import shown
from uno_ds.settings import SettingsError

BOS, EOS, START_OF_IMAGE, END_OF_IMAGE = SPECIAL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
)
# Added tokens of the Qwen2 and Qwen3 tokenizers, special or not, which text is not meant to reach.
CONTROL_TOKEN = re.compile(r"<\|\w+\|>|</?(tool_call|tool_response|think)>")


class Tokenizer:
    """The tokenizer of a model folder: `tokenizer.json`, or the older vocabulary files that
    transformers reads.

    `bos`, `eos`, `start_of_image` and `end_of_image` are ids that `encode` never produces: a
    special token that is written out in the text is encoded as its characters."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        full = _load(self.folder)
        full.no_padding()
        full.no_truncation()
        self._full = full
        self._plain = _without_added_tokens(full)
        self.bos, self.eos, self.start_of_image, self.end_of_image = (
            full.token_to_id(token) for token in SPECIAL_TOKENS
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone, without bos and eos; lone surrogates, which no UTF-8 can hold,
        become question marks."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        return self._plain.encode(text, add_special_tokens=False).ids

    def most_characters(self, tokens: int) -> int | None:
        """Characters that no text of so many tokens exceeds; None where the tokenizer may drop
        characters."""
        longest = self._longest_token
        return None if longest is None else tokens * longest

    @functools.cached_property
    def _longest_token(self) -> int | None:
        """Most characters of a text that one token stands for; None if that is unknown."""
        return _longest_token(json.loads(self._plain.to_str()))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens and ids beyond the vocabulary give nothing."""
        return self._full.decode([int(index) for index in ids], skip_special_tokens=True)

    def digest(self) -> str:
        """The same for tokenizers that encode every text alike."""
        return hashlib.sha256(self._plain.to_str().encode()).hexdigest()[:16]

    def warnings(self) -> list[str]:
        """A line about added tokens that look like words of a text. `encode` encodes these words
        in pieces, so that the model's embeddings of such tokens are never used."""
        added = self._full.get_added_tokens_decoder()
        spelt = []
        for index, token in added.items():
            is_control = CONTROL_TOKEN.fullmatch(token.content)
            if not is_control and self.encode(token.content) != [index]:
                spelt.append(token.content)
        if not spelt:
            return []
        more = f" and {len(spelt) - 3} more" if len(spelt) > 3 else ""
        return [
            f"the tokenizer in {self.folder} adds {', '.join(map(shown, spelt[:3]))}{more}, which "
            "text is not encoded to: an added token counts as a control token and is spelt in "
            "pieces; to use it in text, put it into the tokenizer's own vocabulary and merges."
        ]

    def check_vocabulary(self, rows: int, key: str) -> None:
        """Raises SettingsError if a model of `rows` rows of embedding lacks one for an id."""
        needed = max(len(self), 1 + max(self._full.get_vocab(with_added_tokens=True).values()))
        if needed > rows:
            raise SettingsError(
                key,
                f"{self.folder} has {needed} tokens, but the model's vocabulary has {rows} rows.",
            )

    def __len__(self) -> int:
        """Number of ids, added tokens included; a model's embedding table may be larger."""
        return self._full.get_vocab_size(with_added_tokens=True)


def _load(folder: Path) -> tokenizers.Tokenizer:
    if not folder.is_dir():
        raise SettingsError(
            "tokenizer",
            f"'{folder}' is not a folder; it must hold tokenizer.json, or vocab.json and "
            "merges.txt.",
        )
    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise SettingsError(
                "tokenizer", f"'{file}' is not a tokenizer: {_one_line(error)}"
            ) from None
        if not _missing(tokenizer):
            return tokenizer
    # Without the file, or where tokenizer_config.json adds the special tokens to it.
    names = ("tokenizer.json", "vocab.json", "tokenizer_config.json")
    if not any((folder / name).is_file() for name in names):
        raise SettingsError(
            "tokenizer",
            f"there is no tokenizer in '{folder}'; it must hold tokenizer.json, or vocab.json and "
            "merges.txt.",
        )
    # transformers would wait for ever on a named pipe.
    strange = next((path for path in sorted(folder.iterdir()) if _is_strange(path)), None)
    if strange is not None:
        raise SettingsError(
            "tokenizer", f"'{strange}' is neither a file nor a folder; remove it from the folder."
        )
    from transformers import AutoTokenizer  # seconds to import, and needed for such folders only

    try:
        loaded: Any = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        tokenizer = tokenizers.Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    except Exception as error:
        raise SettingsError(
            "tokenizer", f"transformers cannot load the tokenizer in '{folder}': {_one_line(error)}"
        ) from None
    if _missing(tokenizer):
        raise SettingsError(
            "tokenizer",
            f"the tokenizer in '{folder}' lacks the token {', '.join(_missing(tokenizer))}.",
        )
    return tokenizer


def _is_strange(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _missing(tokenizer: tokenizers.Tokenizer) -> list[str]:
    return [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]


def _without_added_tokens(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer with nothing recognised as a whole: added tokens that are not marked
    special go too."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"], state["post_processor"] = [], None
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def _longest_token(state: Mapping[str, Any]) -> int | None:
    """Most characters that a token of a byte-level BPE stands for, from the tokenizer's JSON; None
    for other kinds.

    Each of a token's characters is a byte there, a character has at least one, and none is dropped:
    each byte has a token, and what splits the text keeps all of it. NFC composes at most four
    characters into one: no canonical decomposition is longer."""
    model = state["model"]
    vocabulary = model.get("vocab", {})
    normalizers = _steps(state["normalizer"], "normalizers")
    splitters = _steps(state["pre_tokenizer"], "pretokenizers")
    keeps_characters = (
        model["type"] == "BPE"
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and all(byte in vocabulary for byte in pre_tokenizers.ByteLevel.alphabet())
        and all(step["type"] == "NFC" for step in normalizers)
        and any(step["type"] == "ByteLevel" for step in splitters)
        and all(step["type"] in ("ByteLevel", "Digits", "Split") for step in splitters)
        and all(step.get("behavior") != "Removed" for step in splitters)
    )
    longest = max(map(len, vocabulary), default=0)
    if not keeps_characters:
        return None
    return longest * 4 if normalizers else longest


def _steps(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer as the steps it consists of."""
    if part is None:
        return []
    return list(part[inner]) if part["type"] == "Sequence" else [part]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
