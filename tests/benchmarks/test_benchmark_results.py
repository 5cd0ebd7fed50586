"""Result files: one schema for every command, checked on writing, on reading and for all that are
committed."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_case import overhead_result

from benchmarks import __main__ as command_line
from benchmarks.commands import checkpointing, loading
from benchmarks.suite.results import (
    ResultFile,
    new_result,
    read_result,
    validate,
    write_result,
)
from uno_ds.settings import SettingsError

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))


@pytest.fixture
def result() -> dict[str, Any]:
    return overhead_result()


def test_result_files_are_validated_on_writing_and_on_reading(
    result: dict[str, Any], tmp_path: Path
):
    path = tmp_path / "deep" / "result.json"
    write_result(path, result)
    assert (
        not read_result(path)["complete"]
        and read_result(path)["load"]["end"] is not None
        and not list(path.parent.glob("*.part"))
    )
    write_result(path, result, complete=True)
    assert read_result(path) == json.loads(json.dumps(result))
    for break_it, words in (
        (lambda r: r.pop("commit"), "lacks commit"),
        (lambda r: r["hardware"].pop("gpus"), "hardware lacks gpus"),
        (lambda r: r["measurements"][0].pop("stage"), "lacks stage"),
        (lambda r: r.update(kind="other"), "kind must be one of"),
        (
            lambda r: r["measurements"][0]["modes"]["uno"].update(step_seconds=["1"]),
            r"step_seconds\[0\] must be of type number",
        ),
        (
            lambda r: r["measurements"][0]["ratios"]["uno / flow"].pop("predicted"),
            "lacks predicted",
        ),
    ):
        broken = copy.deepcopy(result)
        break_it(broken)
        with pytest.raises(ValueError, match=words):
            write_result(path, broken)
        path.write_text(json.dumps(broken))
        with pytest.raises(SettingsError, match=f"result.json: .*{words}"):
            read_result(path)
    path.write_text("{")
    with pytest.raises(SettingsError, match="not readable JSON"):
        read_result(path)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_hold_to_the_schema(path: Path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert not validate(result)
    assert result["complete"] and result["measurements"] and result["hardware"]["cpu"]
    for name in ("created", "command", "clocks", "load"):
        sentences = " ".join(result["unknown"])
        assert result[name] is not None or name in sentences, f"{name} is missing without a word"


def test_results_of_every_kind_are_committed():
    kinds = {json.loads(path.read_text(encoding="utf-8"))["kind"] for path in RESULTS}
    assert kinds == {
        "overhead",
        "gain",
        "sweep",
        "scale",
        "kernels",
        "compile",
        "loading",
        "checkpointing",
        "preparation",
        "scenes",
        "quantisation",
        "adapters",
        "reading",
        "step time",
    }


@pytest.mark.parametrize(
    ("kind", "measurement", "words"),
    [
        ("sweep", {"name": "task"}, "lacks value"),
        ("scale", {"name": "tiny"}, "lacks measured"),
        ("compile", {"name": "forward"}, "lacks registers"),
        ("kernels", {"backend": "triton"}, "lacks name"),
        ("loading", {"name": 1}, "name must be of type string"),
        (
            "checkpointing",
            {"name": "save", "seconds": 1.0, "median_seconds": 1.0, "megabytes_per_second": None},
            "seconds must be of type array",
        ),
        ("preparation", {"name": "tiny"}, "lacks milliseconds"),
        ("scenes", {"name": "tiny_base"}, "lacks right"),
        ("guesses", {"name": "x"}, "kind must be one of"),
    ],
)
def test_a_measurement_has_what_its_kind_demands(
    kind: str, measurement: dict[str, Any], words: str
):
    result = new_result(kind)
    result["measurements"] = [measurement]
    problems = validate(result)
    assert len(problems) >= 1 and words in " ".join(problems)


def test_a_file_is_written_after_every_measurement_and_complete_at_the_end(tmp_path: Path):
    path = tmp_path / "result.json"
    result = ResultFile(path, "loading", details={"settings": {"ranks": 1}})
    result.add({"name": "rank 0"})
    first = read_result(path)
    assert not first["complete"] and [row["name"] for row in first["measurements"]] == ["rank 0"]
    result.add({"name": "export"})
    result.finish()
    last = read_result(path)
    assert last["complete"] and len(last["measurements"]) == 2
    assert last["details"] == {"settings": {"ranks": 1}}
    unwritten = ResultFile(None, "loading")
    unwritten.add({"name": "rank 0"})
    unwritten.finish()
    assert list(tmp_path.iterdir()) == [path]


def test_kernels_write_results_of_the_schema(tmp_path: Path):
    path = tmp_path / "plan.json"
    arguments = ["kernels", "--kernel", "plan", "--repeats", "1", "--json", str(path)]
    assert command_line.main(arguments) == 0
    result = read_result(path)
    assert result["kind"] == "kernels" and result["details"] == {"kernel": "plan"}
    scenarios = [row["scenario"] for row in result["measurements"]]
    assert scenarios == [*"ABCDEFG", "100 segments"]
    assert all(row["name"] == "plan" for row in result["measurements"])


def test_loading_and_checkpointing_write_results_of_the_schema(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """With the files that ranks leave, but no ranks."""
    growth = {"peak": 2_000_000, "after": 1_000_000, "seconds": 1.5}
    phases = {name: growth for name in loading.RANK_PHASES}
    rank = {"shard_bytes": 3_000_000, "whole_bytes": 6_000_000, **phases}
    seconds = {name: [1.0, 2.0, 4.0] for name in checkpointing.QUANTITIES}
    found = {"seconds": seconds, "bytes": 8_000_000, "trainable": 500_000}

    def leave_files(arguments: list[str], ranks: int) -> None:
        folder = Path(arguments[arguments.index("--folder") + 1])
        (folder / "found.json").write_text(json.dumps(found))
        (folder / "export.json").write_text(json.dumps({"export": growth}))
        for number in range(ranks):
            (folder / f"rank{number}.json").write_text(json.dumps(rank))

    for module in (loading, checkpointing):
        monkeypatch.setattr(module, "start_ranks", leave_files)
        monkeypatch.setattr(module, "write_base", lambda *_: 9_000_000)
    path = tmp_path / "loading.json"
    assert command_line.main(["loading", "--ranks", "2", "--json", str(path)]) == 0
    names = [row["name"] for row in read_result(path)["measurements"]]
    assert names == ["rank 0", "rank 1", "export"]
    path = tmp_path / "checkpointing.json"
    assert command_line.main(["checkpointing", "--json", str(path)]) == 0
    rows = {row["name"]: row for row in read_result(path)["measurements"]}
    assert list(rows) == list(checkpointing.QUANTITIES)
    assert rows["save"]["median_seconds"] == 2.0 and rows["save"]["megabytes_per_second"] == 4
    assert rows["save_blocked"]["megabytes_per_second"] is None
