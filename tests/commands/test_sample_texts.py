"""Files of prompts and edits as editors write them, and texts that no terminal should obey."""

import json
import os
from pathlib import Path

import pytest
from pictures import metadata
from small_runs import picture, random_base

from uno_ds.commands.sample import main

SIZE = ["--height", "16", "--width", "16", "--steps", "2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return random_base(tmp_path_factory.mktemp("base"))


def run(*words, capsys) -> list[str]:
    """Lines of the output."""
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out.split("\n")[:-1]


def test_prompts_are_parted_by_newlines_alone_and_begin_behind_a_byte_order_mark(
    base, tmp_path, capsys
):
    prompts = ["a cup", "a\u2028cup\x85with\x0ca lid", "two cups"]
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(prompts).encode())
    out = tmp_path / "out"
    lines = run(
        *("generate", "--checkpoint", base, "--prompts", tmp_path / "prompts.txt", "--out", out),
        *SIZE,
        capsys=capsys,
    )
    assert [metadata(path)["prompt"] for path in sorted(out.iterdir())] == prompts
    assert len(lines) == 3 and lines[1] == f"{out}/0001.png: a cup with a lid"


def test_edits_are_parted_by_newlines_alone_and_begin_behind_a_byte_order_mark(
    base, tmp_path, capsys
):
    picture(16, 16).save(tmp_path / "a.png")
    instructions = ["make it\u2028red", "turn it"]
    rows = [{"image": "a.png", "instruction": text} for text in instructions]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "edits.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    words = ("--edits", tmp_path / "edits.jsonl", "--out", tmp_path / "out", "--steps", 2)
    run("edit", "--checkpoint", base, *words, capsys=capsys)
    made = [metadata(path)["instruction"] for path in sorted((tmp_path / "out").iterdir())]
    assert made == instructions


@pytest.mark.parametrize("nested", ["[", '{"a":'])
def test_an_edit_nested_beyond_all_bounds_is_one_line(base, tmp_path, capsys, nested):
    (tmp_path / "edits.jsonl").write_text(nested * 100_000)
    words = ["edit", "--checkpoint", str(base), "--edits", str(tmp_path / "edits.jsonl")]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --edits: ") and 'line 1: must be {"image": FILE' in line


def test_a_prompt_that_is_no_utf_8_is_drawn_and_kept(base, tmp_path, capsys):
    """As Python hands on the bytes of a command line in another encoding."""
    out = tmp_path / "out"
    prompt = os.fsdecode(b"caf\xe9 \x1b[31m")
    words = ("generate", "--checkpoint", base, "--prompt", prompt, "--out", out)
    lines = run(*words, *SIZE, capsys=capsys)
    assert lines == [f"{out}/0000.png: caf\\udce9 \\u001b[31m"]
    assert metadata(out / "0000.png")["prompt"] == prompt


@pytest.mark.parametrize("how", [[], ["--json"]])
def test_a_caption_of_a_file_whose_name_is_no_utf_8_is_printed(base, tmp_path, capsys, how):
    path = tmp_path / os.fsdecode(b"caf\xe9\x9b\x1b[31m.png")
    picture(16, 16).save(path)
    words = ("caption", "--checkpoint", base, "--image", path, "--max-tokens", 4, *how)
    (line,) = run(*words, capsys=capsys)
    line.encode()
    assert line.isprintable()
    if how:
        assert json.loads(line)["image"] == str(path)
    else:
        assert line.startswith(f"{tmp_path}/caf\\udce9\\udc9b\\u001b[31m.png: ")
