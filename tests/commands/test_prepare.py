"""A preparation can be stopped, killed and shared by ranks, ends with the same files, and is not
mistaken for another one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from folders import contents
from preparation_case import LAYOUTS
from small_runs import ARCHITECTURE, t2i_row, write_t2i

from uno_ds.commands import prepare as command
from uno_ds.objectives.preparation import RowEncoder
from uno_ds.settings import SettingsError

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_data.py"


@pytest.mark.parametrize("after", [4, 6], ids=["at the end of a shard", "within a shard"])
def test_a_preparation_that_was_stopped_goes_on_and_finished_shards_are_not_redone(
    place, prepared, monkeypatch, after
):
    out = place.folder / f"stopped{after}"
    encode, calls = RowEncoder.__call__, []

    def stop(self: RowEncoder, layout: str, row: Any) -> dict[str, Any]:
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(row)
        return encode(self, layout, row)

    with monkeypatch.context() as patch:
        patch.setattr(RowEncoder, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            place.prepare(out.name)
    finished = out / "0_t2i" / "00000.parquet"
    assert sorted(path.name for path in (out / "0_t2i").glob("*.parquet")) == [finished.name]
    with pytest.raises(
        SettingsError, match=r"data\.sources\.0\.path: .* is incomplete: 00001\.parquet is missing"
    ):
        place.open({"t2i": out / "0_t2i"})
    before = finished.stat().st_mtime_ns
    assert place.prepare(out.name)
    assert finished.stat().st_mtime_ns == before
    assert contents(out) == contents(place.folder / "out")


def test_a_preparation_that_was_killed_goes_on_to_the_same_files(place, prepared):
    out = place.folder / "killed"
    flags = ["--recipe", place.recipe(place.paths), "--out", str(out), "--rows-per-shard", "4"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_DATASETS_CACHE": str(place.folder / "cache"),
    }
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *flags],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 400
    while (
        not (out / "0_t2i" / "00001.parquet").exists()
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / "0_t2i" / "00001.parquet").exists() and not (
        out / "2_vlm" / "00001.parquet"
    ).exists()
    assert command.main(flags) == 0
    assert contents(out) == contents(place.folder / "out")


def test_ranks_share_the_shards_without_talking_and_make_the_same_files(
    place, prepared, monkeypatch, capsys
):
    shards = {layout: len(list(prepared[layout].glob("*.parquet"))) for layout in LAYOUTS}
    counted = 0
    for rank in range(3):
        if rank < 2:
            flags = ["--rank", str(rank), "--world-size", "3"]
        else:
            with pytest.raises(SettingsError, match="incomplete"):
                place.open(place.prepared("shared"))
            monkeypatch.setenv("RANK", "2")
            monkeypatch.setenv("WORLD_SIZE", "3")
            flags = []
        capsys.readouterr()
        place.prepare("shared", *flags)
        said = capsys.readouterr().out
        counted += sum(
            int(line.split(" rows in ")[0].rsplit(" ", 1)[1])
            for line in said.splitlines()
            if " rows in " in line
        )
        own = [number for number in range(shards["t2i"]) if number % 3 == rank]
        there = {int(path.stem) for path in place.prepared("shared")["t2i"].glob("*.parquet")}
        assert (
            there == {number for number in range(shards["t2i"]) if number % 3 <= rank}
            and set(own) <= there
        )
        assert ("complete; train" in said) == (rank == 2)
    assert counted == sum(len(source) for source in place.open(place.paths).sources)
    assert contents(place.folder / "shared") == contents(place.folder / "out")


def said(capsys: pytest.CaptureFixture, arguments: list[str]) -> str:
    capsys.readouterr()
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--rows-per-shard", "5"], "rows_per_shard 4, this preparation has 5"),
        (["--dtype", "bfloat16"], 'dtype "float32", this preparation has "bfloat16"'),
        (
            ["--set", "sequence.metaquery_grid=2"],
            "sequence.metaquery_grid 3, this preparation has 2",
        ),
        (["--source", "3"], "--source"),
        (["--rank", "2", "--world-size", "2"], "--rank"),
        (["--rows-per-shard", "0"], "--rows-per-shard"),
        (["--set", "model.train=all"], "model.train"),
    ],
)
def test_a_preparation_that_does_not_belong_into_the_folder_is_refused_in_one_line(
    place, prepared, capsys, flags, named
):
    before = contents(place.folder / "out")
    assert named in said(
        capsys,
        [
            "--recipe",
            place.recipe(place.paths),
            "--out",
            str(place.folder / "out"),
            "--rows-per-shard",
            "4",
            *flags,
        ],
    )
    assert contents(place.folder / "out") == before


def test_other_rows_another_source_and_foreign_folders_are_refused_in_one_line(
    place, prepared, capsys, tmp_path
):
    out = str(place.folder / "out")
    other = write_t2i(tmp_path / "t2i/a.parquet", [t2i_row(seed=1)])
    flags = ["--source", "0", "--rows-per-shard", "4"]
    assert "prepared with source" in said(
        capsys, ["--recipe", place.recipe({"t2i": other}), "--out", out, *flags]
    )
    (tmp_path / "full/0_t2i").mkdir(parents=True)
    (tmp_path / "full/0_t2i/thesis.txt").write_text("")
    assert "thesis.txt" in said(
        capsys, ["--recipe", place.recipe(place.paths), "--out", str(tmp_path / "full"), *flags]
    )
    assert "is prepared already" in said(
        capsys, ["--recipe", place.recipe(prepared), "--out", str(tmp_path / "twice"), *flags]
    )
    scratch = [
        "--set",
        "model.base=",
        "--set",
        f"model.tokenizer={place.folder / 'base'}",
        "--set",
        f"model.architecture={json.dumps(ARCHITECTURE)}",
    ]
    assert "model.base" in said(
        capsys,
        [
            "--recipe",
            place.recipe(place.paths),
            "--out",
            str(tmp_path / "scratch"),
            *flags,
            *scratch,
        ],
    )
