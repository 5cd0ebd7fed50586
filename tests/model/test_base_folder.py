"""Damaged and hostile bases: whatever lies in the place of their files, reading ends at once, well
or in one short line.
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_runs import random_base

from uno_ds.commands import weights
from uno_ds.model.base_folder import import_base
from uno_ds.model.inspection import inspect
from uno_ds.model.tensor_file import TensorFile
from uno_ds.model.weights import check_base_folder
from uno_ds.settings import SettingsError

CONFIGS = ("llm_config.json", "vit_config.json", "config.json")
INDEX = "ema.safetensors.index.json"
DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "9" * 5000
# What replaces a value somewhere in a JSON file; raw text, so that it may be what no JSON writer
# writes.
VALUES = (
    DEEP,
    DIGITS,
    f"-{DIGITS}",
    f"{DIGITS}.5",
    f"[{DIGITS}]",
    str(10**18),
    str(2**63),
    "-1",
    "-0.0",
    "1.5",
    "1e400",
    "NaN",
    "-Infinity",
    "true",
    "null",
    "[]",
    "{}",
    "[[]]",
    "[0, -4]",
    "[0.0, 8.0]",
    "[4611686018427387904, 4611686018427387904]",
    '""',
    '"F32"',
    '"\\ud800"',
    '"\\u001b[2J\\u0000\\n"',
    '"../../etc/passwd"',
    json.dumps("x" * 100_000),
    "'",
)
NAMES = ("", "\ud800", "\x1b[2J", "x" * 5000, "__metadata__")
MARK = "\x00here\x00"


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises in what is still going on after so long, also where it waits for input."""

    def out_of_time(*_: Any) -> None:
        raise TimeoutError(f"still reading after {seconds} s")

    before = signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ends_in_one_line_or_well(read: Callable[[], Any], what: str) -> bool:
    """Whether it ended in a refusal."""
    try:
        with at_most(30):
            read()
    except SettingsError as error:
        line = str(error)
        assert "\n" not in line and len(line) < 2000, what
        return True
    return False


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths of every value in a JSON document but the whole."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    found = []
    for key in keys:
        found += [(*path, key), *places(value[key], (*path, key))]
    return found


def mutated(document: dict[str, Any], rng: random.Random) -> str:
    """The document's text with one to three values or names replaced, a name repeated, or a
    character changed.
    """
    document, texts = json.loads(json.dumps(document)), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        *parents, last = rng.choice(places(document))
        parent = document
        for key in parents:
            parent = parent[key]
        if isinstance(parent, dict) and rng.random() < 0.15:
            parent[rng.choice(NAMES)] = parent.pop(last)
        else:
            parent[last] = f"{MARK}{len(texts)}"
            texts.append(rng.choice(VALUES))
    content = json.dumps(document)
    for number, text in enumerate(texts):
        content = content.replace(json.dumps(f"{MARK}{number}"), text)
    if rng.random() < 0.1:
        content = f"{content[:-1]}, {json.dumps(rng.choice(list(document)))}: 1}}"
    if rng.random() < 0.1:
        place = rng.randrange(len(content))
        content = content[:place] + rng.choice('\x00{}[],:"9e') + content[place + 1 :]
    return content


def with_header(path: Path, header: str, body: bytes) -> None:
    text = header.encode("utf-8", "surrogatepass")
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@pytest.mark.parametrize("count", [200, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mutated_headers_are_read_or_refused_in_one_line(tmp_path: Path, count: int):
    whole = tmp_path / "whole.safetensors"
    save_file(
        {"a": torch.zeros(3, 4), "b": torch.zeros(0, 2), "c": torch.zeros(5).bfloat16()},
        whole,
        {"format": "pt"},
    )
    header, body = header_of(whole)
    rng, refused = random.Random(0), 0
    path = tmp_path / "model.safetensors"

    def read() -> None:
        file = TensorFile(path)
        for name in file.entries:
            file.read(name)

    for number in range(count):
        text = mutated(header, rng)
        with_header(path, text, body)
        refused += ends_in_one_line_or_well(read, f"{number}: {text[:300]}")
        content = bytearray(whole.read_bytes())
        for _ in range(rng.choice((1, 3))):
            content[rng.randrange(len(content) - len(body))] = rng.randrange(256)
        path.write_bytes(content[: rng.choice((len(content), rng.randrange(len(content))))])
        refused += ends_in_one_line_or_well(read, f"{number}: {bytes(content[:300])}")
    assert refused > count


@pytest.mark.parametrize("count", [30, pytest.param(3000, marks=pytest.mark.slow)])
def test_mutated_configurations_and_indices_are_read_or_refused_in_one_line(
    tmp_path: Path, count: int
):
    base = tmp_path / "base"
    import_base(random_base(tmp_path / "one"), base, shard_bytes=20_000)
    kept = {name: (base / name).read_text() for name in (*CONFIGS, INDEX)}
    rng, refused = random.Random(1), 0

    def read() -> None:
        check_base_folder(base)
        inspect(base)

    for number in range(count):
        name = rng.choice((*CONFIGS, INDEX))
        text = mutated(json.loads(kept[name]), rng)
        (base / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        refused += ends_in_one_line_or_well(read, f"{number}: {name}: {text[:300]}")
        (base / name).write_text(kept[name])
    read()
    assert refused > count / 3


# (text of a header over 8 bytes of values, words of the refusal)
HEADERS = (
    ('{"a": ' + DEEP + "}", "it is nested too deep"),
    (
        f'{{"a": {{"dtype": "F32", "shape": [{DIGITS}], "data_offsets": [0, 8]}}}}',
        "5000 digits",
    ),
    ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]}}', "data_offsets of a"),
    ('{"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}', "the shape of a"),
    ('{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}', "the shape of a"),
    ('{"a": {"dtype": "F32", "shape": [true, 2], "data_offsets": [0, 8]}}', "the shape of a"),
    ('{"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}', "dtype of a is not a"),
    ('{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}}', "unknown dtype F4; known"),
    ('{"a": {"dtype": "F32", "shape": [2]}}', "a lacks one of dtype, shape, data_offsets"),
    ('{"a": [0, 8]}', "a lacks one of dtype, shape, data_offsets"),
    (
        f'{{"a": {{"dtype": "U8", "shape": [{10**18}], "data_offsets": [0, {10**18}]}}}}',
        "states",
    ),
    (
        f'{{"a": {{"dtype": "U8", "shape": [{2**64}], "data_offsets": [0, {2**64}]}}}}',
        "the shape",
    ),
    (
        f'{{"a": {{"dtype": "U8", "shape": [0, {2**62}, {2**62}], "data_offsets": [0, 0]}}}}',
        "bey",
    ),
    (
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
        '"b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        "the bytes of b do not begin where",
    ),
    (
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
        '"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        "the name 'a' occurs twice in it",
    ),
    ('{"__metadata__": {"format": 7}}', "__metadata__"),
    ('{"__metadata__": []}', "__metadata__"),
    (json.dumps({"x" * 10_000_000: 1}), "xxx... lacks one of"),
    (json.dumps({"\x1b[2J\ud800": 1}), "\\x1b[2J\\ud800 lacks one of"),
)


@pytest.mark.parametrize(("header", "words"), HEADERS, ids=[words for _, words in HEADERS])
def test_each_kind_of_hostile_header_says_what_is_wrong(tmp_path: Path, header: str, words: str):
    path = tmp_path / "model.safetensors"
    with_header(path, header, bytes(8))
    with at_most(30), pytest.raises(SettingsError) as refused:
        TensorFile(path)
    line = str(refused.value)
    assert line.startswith(f"{path}: is not a readable safetensors file: ") and words in line
    assert "\n" not in line and len(line) < 600


def put_pipe(path: Path) -> str:
    path.unlink()
    os.mkfifo(path)
    return "is a named pipe, not a regular file"


def put_folder(path: Path) -> str:
    path.unlink()
    path.mkdir()
    return "is a folder, not a regular file"


def put_device(path: Path) -> str:
    path.unlink()
    path.symlink_to("/dev/zero")
    return "is a character device, not a regular file"


@pytest.mark.parametrize("put", [put_pipe, put_folder, put_device])
@pytest.mark.parametrize("name", ["ema.safetensors", *CONFIGS, INDEX])
def test_nothing_but_a_regular_file_is_read_in_a_files_place(
    tmp_path: Path, capsys, put: Callable[[Path], str], name: str
):
    base = random_base(tmp_path / "base")
    (base / name).touch()
    words = put(base / name)
    with at_most(30):
        assert weights.main(["import", str(base), str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.strip()
    assert words in line and name in line and "\n" not in line


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_a_pipe_among_the_files_of_a_tokenizer_is_never_waited_for(tmp_path, capsys, name):
    base = random_base(tmp_path / "base")
    # Without its special tokens the first file alone will not do, and transformers reads the
    # others.
    state = json.loads((base / "tokenizer.json").read_text())
    state["added_tokens"] = []
    for token in ("<|im_start|>", "<|im_end|>"):
        state["model"]["vocab"][f"other {token}"] = state["model"]["vocab"].pop(token)
    (base / "tokenizer.json").write_text(json.dumps(state))
    (base / name).touch()
    put_pipe(base / name)
    with at_most(30):
        assert weights.main(["import", str(base), str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.strip()
    assert str(base) in line and "\n" not in line


def test_a_configuration_that_asks_for_too_much_is_refused_before_anything_is_made(tmp_path):
    base = random_base(tmp_path / "base")
    for file, key in (
        ("llm_config.json", "num_hidden_layers"),
        ("llm_config.json", "hidden_size"),
        ("llm_config.json", "vocab_size"),
        ("vit_config.json", "num_hidden_layers"),
        ("config.json", "vit_max_num_patch_per_side"),
        ("config.json", "max_latent_size"),
    ):
        kept = (base / file).read_text()
        (base / file).write_text(json.dumps(json.loads(kept) | {key: 4 * 10**9}))
        started = time.monotonic()
        with pytest.raises(SettingsError, match="must be at most"):
            check_base_folder(base)
        # Two hundred times what it takes; a layer for each of these would take months.
        assert time.monotonic() - started < 10
        (base / file).write_text(kept)
