"""What evaluate.py refuses or leaves out: one line each, and nothing is taken as 0."""

import json

import pytest
from benchmark_files import WRITERS, rule
from evaluate_command import generate, result, run, score, values
from judge_server import JudgeServer
from random_adapter import random_adapter
from small_runs import picture, random_base

from uno_ds.commands.evaluate import label_of

REFUSED = [
    (["--benchmark", "genevil"], "--benchmark: 'genevil' is no benchmark; allowed are scenes, "),
    (["--benchmark", "dpg"], "--data: is required for dpg; fetch dpg_bench/ "),
    (["--benchmark", "dpg", "--data", "nowhere"], "--data: nowhere does not exist; fetch dpg_"),
    (["--benchmark", "dpg", "--data", "."], "--data: dpg_bench.csv does not exist; fetch dpg_"),
    (["--benchmark", "scenes", "--data", "x"], "--data: does not go with scenes"),
    (
        ["--benchmark", "gedit", "--variant", "de"],
        "--variant: 'de' is no set of prompts of gedit; ",
    ),
    (
        ["--benchmark", "scenes", "--variant", "en"],
        "--variant: 'en' is no set of prompts of scenes",
    ),
    (
        ["--benchmark", "scenes", "--shard", "0/4"],
        "--shard: must be 1/N to N/N, as 2/4, got '0/4'.",
    ),
    (["--benchmark", "scenes", "--set", "steps=3"], "--set: 'steps' is no setting of the sampler"),
    (
        ["--benchmark", "scenes", "--set", "samples.step=3"],
        "samples.step: unknown key; did you mean",
    ),
    (
        ["--benchmark", "scenes", "--set", "samples.edit.steps=3"],
        "--set: 'samples.edit.steps' has no effect on scenes; its settings are samples.*.",
    ),
    (["--benchmark", "scenes", "--limit", "0"], "--limit: must be at least 1"),
    (["--benchmark", "scenes", "--set", "samples.height=1000"], "samples.height: height and width"),
]


@pytest.mark.parametrize("words, message", REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_a_mistake_is_one_line(words, message, base, capsys):
    code, out, err = run("generate", "--checkpoint", base, *words, capsys=capsys)
    assert code == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1


def test_images_of_other_settings_or_weights_are_not_mixed(base, tmp_path, capsys):
    out = tmp_path / "out"
    assert generate("scenes", base, None, out, "--limit", 2) == 0
    assert generate("scenes", base, None, out, "--limit", 2, "--set", "samples.shift=2") == 2
    err = capsys.readouterr().err
    assert "drawn with another settings.shift: 3.0 there, 2.0 now; give another folder, or " in err
    other = random_base(tmp_path / "other", layers=1)
    assert generate("scenes", other, None, out, "--limit", 2) == 2
    assert "drawn with another checkpoint." in capsys.readouterr().err


def test_images_of_a_model_with_an_adapter_are_not_taken_for_those_without(
    base, tmp_path, monkeypatch, capsys
):
    adapter, out = random_adapter(tmp_path / "style", base, side=2), tmp_path / "out"
    assert generate("scenes", base, None, out, "--limit", 2) == 0
    for words in (("--adapter", adapter), ("--quantise", "int8")):
        assert generate("scenes", base, None, out, "--limit", 2, *words) == 2
        assert "drawn with another checkpoint." in capsys.readouterr().err
    merged = tmp_path / "merged"
    assert generate("scenes", base, None, merged, "--limit", 2, "--adapter", adapter) == 0
    assert generate("scenes", base, None, merged, "--limit", 2, "--adapter", f"{adapter}:0.5") == 2
    assert "drawn with another checkpoint." in capsys.readouterr().err
    random_adapter(adapter, base, side=2, seed=1)
    assert generate("scenes", base, None, merged, "--limit", 2, "--adapter", adapter) == 2
    assert "drawn with another checkpoint.adapters" in capsys.readouterr().err
    # Without --out they have folders of their own.
    words = [
        "--benchmark",
        "scenes",
        "--checkpoint",
        base,
        "--limit",
        2,
        "--set",
        "samples.steps=1",
    ]
    for more in ((), ("--adapter", adapter), ("--adapter", f"{adapter}:0.5")):
        assert run("generate", *words, *more)[0] == 0
    folders = sorted(path.name for path in (tmp_path / "evaluations").iterdir())
    assert folders == sorted([base.name, f"{base.name}+style", f"{base.name}+stylex0.5"])


def test_scoring_refuses_what_does_not_fit(base, tmp_path, capsys):
    data, out = WRITERS["geneval2"](tmp_path), tmp_path / "out"
    assert generate("geneval2", base, data, out) == 0
    for words, message in (
        (["geneval2", "--local"], "--local: does not go with geneval2, which is scored by a judge"),
        (["geneval2"], "--judge: is required for geneval2"),
        (["scenes"], "holds images of benchmark 'geneval2', not 'scenes'."),
        (["scenes", "--judge", "http://x"], "--judge: does not go with scenes"),
        (["geneval2", "--judge", "ftp://x", "--judge-model", "m"], "is not a URL; give it as"),
        (["geneval2", "--judge", "http://u:p@x", "--judge-model", "m"], "must hold no key"),
    ):
        capsys.readouterr()
        name, *more = words
        code, _, err = run("score", "--images", out, "--benchmark", name, *more, capsys=capsys)
        assert code == 2 and message in err and err.count("\n") == 1, err


def test_images_that_another_program_drew_are_scored_in_their_layout(tmp_path, capsys):
    data = WRITERS["imgedit"](tmp_path)
    drawn = tmp_path / "theirs"
    drawn.mkdir()
    for number in range(100, 110):
        picture(seed=number).save(drawn / f"{number}.png")
    with JudgeServer(rule) as server:
        assert score("imgedit", drawn, server, "--data", data) == 0, capsys.readouterr().err
    assert values(tmp_path / "theirs-evaluation")["overall"] == pytest.approx(4.0)
    assert len(list(drawn.iterdir())) == 10


def test_a_prompt_file_that_changed_is_refused(base, tmp_path, capsys):
    data, out = WRITERS["geneval2"](tmp_path), tmp_path / "out"
    assert generate("geneval2", base, data, out) == 0
    data.write_text(data.read_text().replace("green", "blue"))
    capsys.readouterr()
    words = ["--benchmark", "geneval2", "--images", out, "--judge", "http://localhost:9/v1"]
    code, _, err = run("score", *words, "--judge-model", "m", capsys=capsys)
    assert code == 2 and "is not what the images of" in err
    assert generate("geneval2", base, data, out) == 2
    assert "drawn with another data.sha256" in capsys.readouterr().err


def test_results_over_different_prompts_are_not_paired(base, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        data = WRITERS["geneval2"](tmp_path / name)
        if name == "b":
            data.write_text(data.read_text().replace("green", "blue"))
        assert generate("geneval2", base, data, tmp_path / name / "out") == 0
        with JudgeServer(lambda text, images: {"Yes": -0.1, "two": -1.0}) as server:
            assert score("geneval2", tmp_path / name / "out", server) == 0
    folders = [tmp_path / "a/out", tmp_path / "b/out", tmp_path]
    assert run("report", *folders, "--out", tmp_path / "report")[0] == 0
    (section,) = json.loads((tmp_path / "report/report.json").read_text())
    assert len(section["results"]) == 2 and section["differences"] == []


def test_what_a_judge_refuses_is_left_out_and_counted_and_never_zero(base, tmp_path, capsys):
    data, out = WRITERS["imgedit"](tmp_path), tmp_path / "out"
    assert generate("imgedit", base, data, out) == 0

    def picky(text: str, images: list[bytes]) -> str:
        return "I cannot say." if text.endswith("edit 3") else rule(text, images)

    with JudgeServer(picky) as server:
        assert score("imgedit", out, server, "--retries", 1) == 0
        assert "not scored: unparsable (images left out) 1" in capsys.readouterr().out
        # "add" has edits 0, 6 and 9 left.
        assert values(out)["add"] == values(out)["overall"] == 4.0
        assert result(out)["counts"]["images_left_out"] == 1 and len(result(out)["rows"]) == 9
    assert run("report", out, "--out", tmp_path / "report")[0] == 0
    assert "(1 images left out)" in (tmp_path / "report/report.md").read_text()
    with JudgeServer(lambda text, images: "I cannot say.") as server:
        (out / "answers/rule_1.jsonl").unlink()
        assert score("imgedit", out, server, "--retries", 0) == 2
    assert "answered nothing that could be used (unparsable 10)" in capsys.readouterr().err


def test_a_key_is_in_no_file_and_no_message(base, tmp_path, monkeypatch, capsys):
    """The server repeats it in its error messages."""
    key = "sk-very-secret-4711"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    data, out = WRITERS["imgedit"](tmp_path), tmp_path / "out"
    assert generate("imgedit", base, data, out) == 0
    faults = ("500", "400", None, None)
    with JudgeServer(rule, lambda number: faults[number % 4]) as server:
        assert score("imgedit", out, server, "--retries", 0) == 0
        assert set(server.keys) == {f"Bearer {key}"}
        assert {"server_error (images left out)", "rejected (images left out)"} <= set(
            result(out)["failures"]
        )
    with JudgeServer(rule, lambda number: "401") as server:
        assert score("imgedit", out, server) == 2
    assert run("report", out, "--out", tmp_path / "report")[0] == 0
    output = capsys.readouterr()
    assert "not with Bearer ***" in output.err and key not in output.out + output.err
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes(), path


def test_names_of_checkpoints(tmp_path):
    (tmp_path / "runs/tiny/model").mkdir(parents=True)
    (tmp_path / "runs/tiny/recipe.yaml").write_text("")
    names = {
        "runs/tiny": "tiny",
        "runs/tiny/model": "tiny",
        "runs/tiny/checkpoints/step_20": "tiny_step_20",
        "tiny_base": "tiny_base",
        "somewhere/BAGEL-7B-MoT": "BAGEL-7B-MoT",
    }
    assert {path: label_of(path) for path in names} == names
