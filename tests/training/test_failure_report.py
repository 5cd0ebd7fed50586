"""The one line of a failed rank, its files and its exit code, without a run."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from uno_ds.recipe import load_recipe
from uno_ds.settings import SettingsError
from uno_ds.training.failure_report import FailureReport

MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")
LOST = RuntimeError("[pair.cc:534] Connection closed by peer [10.0.0.2]:48911")


def fail(tmp_path: Path, error: Exception, *overrides: str) -> tuple[list[int], Path]:
    """(codes with which the process would have ended, the run's folder)."""
    recipe = load_recipe("tiny", [f"output={tmp_path}", *overrides])
    run: Any = SimpleNamespace(
        recipe=recipe, sources=[SimpleNamespace(layout="t2i")], exit_file=tmp_path / "exit"
    )
    ends: list[int] = []
    with pytest.raises(type(error)), FailureReport(run, ends.append) as report:
        report.device = torch.device("cpu")
        report.progress = lambda: "in step 7"
        raise error
    return ends, recipe.folder


def test_out_of_memory_names_the_budget_that_needs_less(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    held = [torch.ones(123, 7) for _ in range(2)]
    ends, folder = fail(tmp_path, MEMORY, "sequence.token_budget=200000")
    (line,) = capsys.readouterr().err.splitlines()
    assert ends == [4] and "out of memory in step 7: CUDA out of memory." in line
    budget = int(line.partition("--set sequence.token_budget=")[2].split()[0])
    assert 0 < budget < 200_000 and "--set model.recompute=true (" in line
    assert line.endswith(f"Exit code 4. Traceback: {folder / 'failure_rank0.txt'}.")
    tensors = json.loads((folder / "memory_rank0.json").read_text())["tensors"]
    size = sum(tensor.nbytes for tensor in held)
    assert {"dtype": "float32", "shape": [123, 7], "count": 2, "bytes": size} in tensors
    text = (folder / "failure_rank0.txt").read_text()
    assert text.startswith("host ") and "Traceback (most recent call last)" in text


def test_a_lost_connection_does_not_replace_what_its_cause_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    ends, _ = fail(tmp_path, LOST)
    first = (tmp_path / "exit").read_text()
    assert ends == [76] and first.startswith("76 host ") and "[10.0.0.2]:48911" in first
    fail(tmp_path, torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"))
    cause = (tmp_path / "exit").read_text()
    assert cause.startswith("77 host ") and "without this host" in cause
    fail(tmp_path, LOST)
    assert (tmp_path / "exit").read_text() == cause


@pytest.mark.parametrize("error", [KeyError("a mistake of ours"), SettingsError("key", "wrong.")])
def test_another_error_passes_without_a_line_or_a_file(
    tmp_path: Path, error: Exception, capsys: pytest.CaptureFixture
):
    ends, folder = fail(tmp_path, error)
    assert not ends and not capsys.readouterr().err
    assert not folder.exists() and not (tmp_path / "exit").exists()


def test_a_report_that_cannot_be_written_is_still_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    (tmp_path / "tiny").write_text("a file where the folder should be")
    ends, _ = fail(tmp_path, MEMORY)
    printed = capsys.readouterr().err
    assert ends == [4] and "Traceback (most recent call last)" in printed
    last = printed.splitlines()[-1]
    assert "No snapshot of memory could be written: " in last and last.endswith("Exit code 4.")
