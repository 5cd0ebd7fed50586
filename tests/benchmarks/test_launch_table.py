"""The launch table takes the first candidate that fits, also by two versions of the compiler. The
compiler is replaced: what fits is said by the tests."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.commands import launch_table
from uno_ds.settings import SettingsError

FLAGS = ["--capability", "80", "--precision", "half", "--dims", "64"]


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch):
    """Call it with a function that says of (kernel, row) whether it fits; it gives the rows that
    were compiled."""
    compiled: list[tuple[str, dict]] = []

    def use(right) -> list[tuple[str, dict]]:
        compiled.clear()

        def fits(case, row) -> bool:
            compiled.append((case[0], row))
            return right(case[0], row)

        monkeypatch.setattr(launch_table, "fits", fits)
        return compiled

    monkeypatch.setattr(launch_table, "INTERPRETED", False)
    monkeypatch.setattr(
        launch_table, "ProcessPoolExecutor", lambda workers, _: ThreadPoolExecutor(1)
    )
    return use


def run(tmp_path: Path, *more: str) -> dict[str, dict]:
    """The rows for the kernels at head dim 64."""
    table = tmp_path / "table.json"
    assert launch_table.main([*FLAGS, "--out", str(table), *more]) == 0
    return json.loads(table.read_text())["sm_80"]["half"]["64"]


def test_the_first_candidate_that_fits_is_taken_and_none_after_it_is_compiled(tmp_path, compiler):
    compiled = compiler(lambda kernel, row: row["BLOCK_N"] <= 64)
    rows = run(tmp_path)
    assert rows["forward"] == {
        "BLOCK_M": 128,
        "BLOCK_N": 64,
        "STAGES": 3,
        "warps": 8,
        "DESCRIPTORS": False,
    }
    tried = [row for kernel, row in compiled if kernel == "forward"]
    assert tried[-1] == rows["forward"] and all(row["BLOCK_N"] > 64 for row in tried[:-1])
    assert not any(row["DESCRIPTORS"] for _, row in compiled), "sm_80 has none"


def test_what_fits_by_two_versions_is_the_first_that_both_have(tmp_path, compiler):
    file = tmp_path / "every.json"
    compiler(lambda kernel, row: row["STAGES"] == 2 and row["warps"] == 8)
    assert launch_table.main([*FLAGS, "--every", "--json", str(file)]) == 0
    assert len(json.loads(file.read_text())["measurements"]) > 3
    compiler(lambda kernel, row: row["BLOCK_M"] <= 64 or kernel == "forward")
    with pytest.raises(
        SettingsError, match="^--among: .* no candidate of backward_queries in half"
    ):
        run(tmp_path, "--among", str(file))
    compiler(lambda kernel, row: row["BLOCK_M"] != 64)
    rows = run(tmp_path, "--among", str(file))
    assert (rows["backward_keys"]["BLOCK_M"], rows["backward_keys"]["warps"]) == (32, 8)


def test_every_candidate_without_a_file_for_them_is_refused(compiler):
    compiled = compiler(lambda kernel, row: True)
    with pytest.raises(SettingsError, match="^--every: needs --json FILE"):
        launch_table.main([*FLAGS, "--every"])
    assert not compiled


def test_an_architecture_that_nothing_fits_is_named(tmp_path, compiler):
    compiler(lambda kernel, row: kernel != "forward")
    with pytest.raises(SettingsError, match="^--capability: no candidate of forward fits sm_80"):
        run(tmp_path)
