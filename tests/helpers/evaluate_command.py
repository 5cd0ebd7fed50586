"""The command evaluate.py, called in this process with as few steps as there can be."""

import json
from pathlib import Path

from judge_server import JudgeServer

from uno_ds.commands.evaluate import main
from uno_ds.evaluation.benchmarks import BENCHMARKS

ROOT = Path(__file__).parents[2]
# As few steps as there can be: what is tested is where images go, not what they show.
FAST = ("--set", "samples.steps=1")
FAST_EDIT = ("--set", "samples.edit.steps=1")
JUDGED = ("geneval2", "dpg", "unigenbench", "gedit", "imgedit", "kris")


def run(*words, capsys=None) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    out, err = capsys.readouterr() if capsys else ("", "")
    return code, out, err


def generate(name: str, base: Path, data: Path | None, out: Path, *more) -> int:
    fast = FAST_EDIT if BENCHMARKS[name].is_edit else FAST
    source = [] if data is None else ["--data", data]
    words = ["--benchmark", name, "--checkpoint", base, "--out", out, "--batch", 40]
    return run("generate", *words, *source, *fast, *more)[0]


def score(name: str, out: Path, server: JudgeServer, *more) -> int:
    words = ["--benchmark", name, "--images", out, "--judge", server.url]
    return run("score", *words, "--judge-model", "rule/1", *more)[0]


def result(out: Path, name: str = "rule_1") -> dict:
    return json.loads((out / "scores" / f"{name}.json").read_text())


def values(out: Path, name: str = "rule_1") -> dict[str, float]:
    return {column: entry["value"] for column, entry in result(out, name)["estimates"].items()}
