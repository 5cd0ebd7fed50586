"""The diagnosis with a judge model behind an endpoint: its verdicts make the cells, answers are
kept, and what it does not answer is counted and never a verdict."""

import json
from pathlib import Path

import pytest
from judge_server import JudgeServer
from small_runs import random_base

from uno_ds.commands.inspect_judge import DRAWN, READ
from uno_ds.commands.inspect_model import main

LINES = [
    {"prompt": "a red cup."},
    {"prompt": "two dogs.", "questions": [["how many?", "three"]]},
    {"prompt": "a boat.", "drawn_right": {"base": True}},
]
SEES, SAYS = DRAWN.partition("?")[0], READ.partition(",")[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("OPENAI_API_KEY", "UNO_DS_JUDGE_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("uno_ds.evaluation.judge.FIRST_PAUSE", 0.01)
    monkeypatch.chdir(tmp_path)


def words(base: Path, *more: object) -> list[str]:
    flags = ["--checkpoint", base, "--out", "out", "--images", 20, "--batch", 8, "--steps", 1]
    flags += ["--max-tokens", 4, "--only", "diagnosis"]
    return [str(word) for word in [*flags, *more]]


def with_prompts(*more: object) -> list[object]:
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    return ["--prompts", "prompts.jsonl", *more]


def judged_by(server: JudgeServer, *more: object) -> list[object]:
    return ["--judge", server.url, "--judge-model", "rule/1", "--parallel", 2, *more]


def rule(text: str, images: list[bytes]) -> str:
    """Cups are drawn, dogs are not; no caption says anything."""
    assert len(images) == text.startswith(SEES)
    return "Yes." if text.startswith(SEES) and "cup" in text else "no"


def test_a_judge_fills_the_cells_where_no_program_can(base: Path, monkeypatch, capsys):
    key = "sk-very-secret-4711"
    monkeypatch.setenv("UNO_DS_JUDGE_KEY", key)
    with JudgeServer(rule) as server:
        assert main(words(base, *with_prompts(*judged_by(server)))) == 0, capsys.readouterr().err
        texts = server.texts()
        # One picture has a verdict in the file, one caption is judged by its answer.
        assert sorted(text.startswith(SEES) for text in texts) == [False, False, True, True]
        assert sum(text.startswith(SAYS) for text in texts) == 2
        assert main(words(base, *with_prompts(*judged_by(server)))) == 0
        assert len(server.seen) == 4, "answers are kept"
        assert set(server.keys) == {f"Bearer {key}"}
    output = capsys.readouterr()
    assert key not in output.out + output.err
    assert not any(key.encode() in path.read_bytes() for path in Path("out").rglob("*.*"))
    results = json.loads(Path("out/results.json").read_text())
    found = results["diagnosis"]["base"]
    assert [record["judge"]["drawn"] for record in found["records"]] == [True, False, None]
    # The cup is drawn and not read; the dogs are not drawn, and three are not read; the boat is
    # drawn by the file and not read.
    assert [record["cell"] for record in found["records"]] == [
        "drawn right, read wrong",
        "drawn wrong, read right",
        "drawn right, read wrong",
    ]
    assert (found["judged"], found["not_judged"]) == (3, 0)
    judge = results["judge"]
    assert (judge["name"], judge["kept"], judge["asked"], judge["failures"]) == ("rule/1", 4, 0, {})
    assert "Judged by rule/1 at 127.0.0.1:" in Path("out/report.html").read_text()


def test_a_judge_overrules_the_program_and_is_asked_about_scenes_once_each(base: Path, capsys):
    with JudgeServer(lambda text, images: "yes") as server:
        flags = ("--scene-prompts", 3, *judged_by(server))
        assert main(words(base, *flags)) == 0, capsys.readouterr().err
        assert len(server.seen) == 3, "captions of scenes are judged by program"
    found = json.loads(Path("out/results.json").read_text())["diagnosis"]["base"]
    assert all(record["cell"].startswith("drawn right") for record in found["records"])
    assert not all(record["drawn"]["all"] for record in found["records"]), "noise"


def test_what_the_judge_does_not_answer_is_counted_and_no_verdict(base: Path, capsys):
    def picky(text: str, images: list[bytes]) -> str:
        return "It depends." if "dogs" in text else rule(text, images)

    with JudgeServer(picky) as server:
        flags = with_prompts(*judged_by(server, "--retries", 1))
        assert main(words(base, *flags)) == 0, capsys.readouterr().err
    results = json.loads(Path("out/results.json").read_text())
    found = results["diagnosis"]["base"]
    assert found["records"][1]["cell"] is None and found["not_judged"] == 1
    assert results["judge"]["failures"] == {"unparsable": 1}
    assert "without a usable answer: unparsable 1" in Path("out/report.html").read_text()


def test_a_judge_that_answers_nothing_ends_the_call_in_one_line_and_nothing_is_drawn_again(
    base: Path, capsys
):
    with JudgeServer(rule, lambda number: "401") as server:
        assert main(words(base, *with_prompts(*judged_by(server)))) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: --judge: 127.0.0.1:") and "refuses the key" in err
    drawn = {path: path.stat().st_mtime_ns for path in Path("out/work/base").iterdir()}
    with JudgeServer(rule) as server:
        assert main(words(base, *with_prompts(*judged_by(server)))) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in drawn.items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--judge", "http://localhost:1/v1"], "--judge-model: is missing: a judge is --judge URL"),
        (["--judge-model", "m"], "--judge: is missing"),
        (["--judge", "nowhere", "--judge-model", "m"], "--judge: 'nowhere' is not a URL"),
        (
            ["--only", "reading", "--judge", "http://localhost:1/v1", "--judge-model", "m"],
            "--judge: goes with the part diagnosis, which is not made here.",
        ),
        (["--parallel", "0"], "--parallel: must be at least 1"),
        (["--timeout", "0"], "--timeout: must be above 0"),
    ],
)
def test_a_mistake_is_one_line(base: Path, capsys, flags: list[str], message: str):
    assert main(words(base, *flags)) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
    assert not list(Path(".").glob("out/work/*/*"))
