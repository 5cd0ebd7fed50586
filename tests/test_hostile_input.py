"""What a user, a file or a library wrote is shown as one short printable line, and reading it ends
in bounded time."""

import json
import time

import pytest

from uno_ds.recipe import load_recipe
from uno_ds.settings import LONGEST_MESSAGE, SettingsError, printable

HOSTILE_TEXTS = {
    "escape sequence": "\x1b[2J",
    "bidirectional override": "a\u202eb",
    "zero width": "a\u200bb",
    "lone surrogate": "a\ud800b",
    "line separators": "a\nb\rc\u2028d\u2029e\x85f\x0bg\x1cgh",
    "nul": "a\x00b",
    "private use beyond 16 bits": "\U000f0000",
}


@pytest.mark.parametrize("text", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS)
def test_what_a_terminal_obeys_or_does_not_show_is_escaped(text: str):
    for shown in (printable(text), printable([text]), str(SettingsError(text, text))):
        assert shown.isprintable() and len(shown.splitlines()) == 1
        shown.encode()


@pytest.mark.parametrize("size", [59, 60, 61, 80, 1000, 10**7])
@pytest.mark.parametrize("unit", ["x", "\x1b", "\U000f0000"])
def test_a_long_text_is_shortened_and_what_is_left_out_is_counted(size: int, unit: str):
    text = "start" + unit * size + "end"
    shown = printable(text, 60)
    assert len(shown) <= 60
    if "[..." not in shown:
        assert size < 60 and unit == "x"
        return
    start, rest = shown.split(" [...")
    count, end = rest.split(" characters...] ")
    visible = (start + end).replace("\\u001b", "?").replace("\\U000f0000", "?")
    assert start.startswith("start") and end.endswith("end")
    assert int(count.replace(",", "")) == len(text) - len(visible)


def bomb() -> list:
    """9^100 items, in 100 lists."""
    value: list = ["x"]
    for _ in range(100):
        value = [value] * 9
    return value


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [bomb(), nested(100_000), {"a": bomb()}, ["x" * 10**7], 10**100_000, b"x" * 10**7, {1: {2, 3}}],
    ids=["bomb", "deep", "mapping", "long item", "digits", "bytes", "small"],
)
def test_showing_a_huge_value_takes_time_by_what_is_shown(value: object):
    start = time.process_time()
    assert len(printable(value)) <= 200
    # 200 characters take below a millisecond; the whole of any of these takes seconds, or for ever.
    assert time.process_time() - start < 0.5


def test_a_short_value_is_shown_whole():
    assert (
        printable({"a": [1, 2.5, None, "é"], 3: ("b",)}) == "{'a': [1, 2.5, None, 'é'], 3: ('b')}"
    )
    assert printable(ValueError("no\nway")) == "no way"


def test_a_message_is_bounded_and_keeps_its_key_and_its_end():
    message = str(SettingsError("steps." + "k" * 10**6, "x" * 10**6 + " give a smaller one."))
    assert len(message) <= LONGEST_MESSAGE
    assert message.startswith("steps.kkk") and message.endswith("give a smaller one.")


@pytest.mark.parametrize("text", ["a\0", "\ud800", "\udfff/x"])
def test_text_that_neither_a_file_name_nor_a_tokenizer_takes_is_refused(text: str):
    with pytest.raises(SettingsError, match="output: must not hold a NUL character or half"):
        load_recipe("tiny", [f"output={json.dumps(text)}"])
