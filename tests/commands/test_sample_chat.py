"""sample.py chat: requests of a file and lines at a prompt; every mistake one line."""

import json
from pathlib import Path

import pytest
from PIL import Image
from small_runs import picture, random_base

from uno_ds.commands.sample import main


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return random_base(tmp_path_factory.mktemp("base"))


def words(base: Path, folder: Path, *more: str) -> list[str]:
    quick = ["--steps", "1", "--max-tokens", "3", "--height", "16", "--width", "24"]
    return ["chat", "--checkpoint", str(base), "--out", str(folder / "out"), *quick, *more]


def write_requests(folder: Path, rows: list) -> str:
    picture(seed=1).save(folder / "a.png")
    path = folder / "requests.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_requests_of_a_file(base, tmp_path, capsys):
    rows = [
        {"parts": [{"text": "a cup"}]},
        {"parts": [{"image": "a.png"}, {"text": "and"}, {"image": "a.png"}], "think": True},
        {"parts": [{"image": "a.png"}, {"text": "what is it?"}], "output": "text"},
    ]
    assert main(words(base, tmp_path, "--file", write_requests(tmp_path, rows))) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    facts = [json.loads(line) for line in lines]
    assert [fact["request"] for fact in facts] == [0, 1, 2]
    assert "thought" not in facts[0] and isinstance(facts[1]["thought"], str)
    assert isinstance(facts[2]["text"], str) and "image" not in facts[2]
    for number in (0, 1):
        path = tmp_path / f"out/{number:04d}.png"
        assert facts[number]["image"] == str(path) and Image.open(path).size == (24, 16)


def test_lines_at_a_prompt_and_a_mistake_does_not_end_the_conversation(
    base, tmp_path, capsys, monkeypatch
):
    picture(seed=1).save(tmp_path / "a.png")
    typed = [f"/image {tmp_path}/a.png", "what is it?", "/nothing", "/image no.png"]
    typed += ["/draw a cup", "/think again", "/new", "/draw a cup", "/quit", "/draw never"]
    monkeypatch.setattr("sys.stdin", [line + "\n" for line in typed])
    assert main(words(base, tmp_path)) == 0
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "/nothing: is no command" in errors[0] and "no.png cannot be read" in errors[1]
    assert len(errors) == 2 and len(list((tmp_path / "out").glob("*.png"))) == 3


@pytest.mark.parametrize(
    "row",
    [
        {"parts": []},
        {"parts": [{"text": 5}]},
        {"parts": [{"video": "a"}]},
        {"parts": [{"text": "a"}], "output": "sound"},
        {"parts": [{"text": "a"}], "thinks": True},
        ["a"],
    ],
)
def test_requests_of_another_form_are_refused_before_the_model_is_read(tmp_path, row, capsys):
    path = write_requests(tmp_path, [row])
    assert main(words(tmp_path / "nowhere", tmp_path, "--file", path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f'--file: {path}, line 1: must be {{"parts": [' in line
