"""Full disks, damaged checkpoints, changed bases and lost data files: a run goes on with what is
whole, and its numbers are right, or it is refused in one line."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_table import TABLE, Survived
from ranks import SECRET
from runs import EVERY, GO_ON, STEPS, Place, go_on, slow_unless
from small_runs import write_vlm

from uno_ds.training.finish import STOPPED


@pytest.fixture
def small_disk(place: Place) -> Iterator[Callable[[str, int], None]]:
    """small_disk(name, bytes): the checkpoints of that run lie on a disk of that size."""
    mounted = []

    def mount(name: str, size: int) -> None:
        folder = place.of(name) / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        options = f"size={size}" if folder not in mounted else f"remount,size={size}"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(f"this user may not mount a small disk: {done.stderr.strip()}")
        mounted.append(folder)

    yield mount
    for folder in set(mounted):
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("noticed", "background"),
    slow_unless(
        ("while writing", False),
        [
            (noticed, background)
            for noticed in ("beforehand", "while writing")
            for background in (False, True)
        ],
    ),
)
def test_a_full_disk_costs_checkpoints_but_not_the_run(
    place: Place, whole: str, small_disk: Callable, noticed: str, background: bool
):
    name = f"full_{noticed.split()[0]}{background}"
    needed = sum(
        file.stat().st_size
        for file in (place.of(whole) / "checkpoints" / f"step_{STEPS}").iterdir()
    )
    small_disk(name, int(1.7 * needed))
    run = place.start(
        name,
        fault={"kind": "blind"} if noticed == "while writing" else None,
        checkpoint={"asynchronous": background, "keep_last": 1},
    )
    assert run.wait() == [1, 1], run.output()
    assert place.steps(name) == list(range(1, STEPS + 1))
    output = run.logs[0].read_text()
    words = (
        "No space left on device"
        if noticed == "while writing"
        else "bytes left, and the checkpoint takes"
    )
    assert (
        output.count("WARNING: the checkpoint of step") == 2 == output.count(words)
        and "The newest one is step_2." in output
    )
    summary = place.summary(name)
    assert (summary["checkpoints"]["saved"], summary["checkpoints"]["failed"]) == (
        1,
        2,
    ) and "could not be saved" in summary["exit"]
    assert sorted(path.name for path in (place.of(name) / "checkpoints").iterdir()) == [
        "latest",
        "step_2",
    ]
    small_disk(name, 10 * needed)
    go_on(
        place,
        name,
        whole,
        f"disk full, found {noticed}{', in the background' if background else ''}",
    )


def flip(file: Path, place_in_file: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(place_in_file * (len(content) - 1))] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        "flipped byte of a tensor",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in (
                "flipped byte of a header",
                "flipped byte of the manifest",
                "truncated file",
                "missing file",
                "missing manifest",
                "truncated manifest",
            )
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_older_one_is_used(
    place: Place, whole: str, damage: str
):
    name = damage.replace(" ", "_")
    shutil.copytree(place.of(whole), place.of(name))
    newest = place.of(name) / "checkpoints" / f"step_{STEPS}"
    file = newest / ("manifest.json" if "manifest" in damage else "rank_00001.safetensors")
    if damage.startswith("flipped"):
        flip(file, {"tensor": 1.0, "header": 0.001, "manifest": 0.5}[damage.split()[-1]])
    elif damage.startswith("truncated"):
        file.write_bytes(file.read_bytes()[:-20])
    else:
        file.unlink()
    output = go_on(place, name, whole, f"checkpoint with a {damage}")
    (passed_over,) = [line for line in output.splitlines() if line.startswith("--resume skips")]
    assert (
        newest.name in passed_over
        and ("interrupted" if damage == "missing manifest" else file.name) in passed_over
    )
    assert f"continues after step {STEPS - EVERY}" in output


def test_a_checkpoint_that_was_asked_for_by_name_is_not_replaced_by_an_older_one(
    place: Place, whole: str
):
    shutil.copytree(place.of(whole), place.of("named"))
    newest = place.of("named") / "checkpoints" / f"step_{STEPS}"
    flip(newest / "rank_00000.safetensors", 1.0)
    run = place.start("named", "--resume", str(newest))
    assert (
        run.wait()[0] == 2
        and "rank_00000.safetensors: does not hold what was written" in run.output()
    )


def test_a_base_that_changed_or_moved_is_refused_in_one_line(place: Place, whole: str):
    for name in ("changed", "moved"):
        shutil.copytree(place.of(whole), place.of(name))
    other = place.folder / "other_base"
    shutil.copytree(place.base, other)
    run = place.start("moved", *GO_ON, model={"base": str(place.folder / "gone")})
    assert run.wait()[0] == 2
    assert [
        line
        for line in run.logs[0].read_text().splitlines()
        if line.startswith("error: ") and str(place.folder / "gone") in line
    ]
    flip(other / "ema.safetensors", 0.9)
    run = place.start("changed", *GO_ON, model={"base": str(other)})
    assert run.wait()[0] == 2
    (error,) = [line for line in run.logs[0].read_text().splitlines() if line.startswith("error: ")]
    assert "was trained on other frozen weights" in error and str(other) in error
    TABLE.append(Survived("frozen weights changed on disk: refused", True))


def test_no_secret_of_the_environment_is_left_in_a_run(place: Place, whole: str):
    files = [
        path
        for folder in (place.of(whole), place.folder / f"home_{whole}")
        for path in folder.rglob("*")
        if path.is_file()
    ]
    assert {
        "recipe.yaml",
        "metrics.jsonl",
        "summary.json",
        "summary.md",
        "rank0.log",
        "manifest.json",
    } <= {path.name for path in files}
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize("keep", [None, 100])
def test_a_data_file_lost_in_mid_run_costs_its_rows_is_named_and_too_many_of_them_end_the_run(
    place: Place, keep: int | None
):
    """Half of the rows are gone: that is survived, unless the recipe says otherwise."""
    name = f"lost{keep}"
    paths = [
        write_vlm(
            place.folder / f"data_{name}" / str(part), [f"{part}{row}.jpg" for row in range(4)]
        )
        for part in range(2)
    ]
    data = {
        "sources": [{"path": str(place.folder / f"data_{name}")}, {"path": "scenes/t2i"}],
        "prefetch": 0,
    }
    lost = {"kind": "remove", "path": str(paths[0]), "keep": keep, "step": 2, "rank": 1}
    run = place.run(name, fault=lost, data=data)
    summary, output = place.summary(name), run.logs[0].read_text()
    assert summary["skipped_samples"]["lost_file"] > 0 and list(summary["lost_files"]) == [
        str(paths[0])
    ]
    assert output.count(f"warning: the data file {paths[0]} is lost: ") == 1
    TABLE.append(Survived(f"data file {'gone' if keep is None else 'cut'} in mid-run", True, 0))
    if keep is None:
        shutil.copy(paths[1], paths[0])
        strict = f"{name}_strict"
        run = place.start(
            strict, fault=lost, data=data, health={"max_bad_fraction": 0.05, "bad_rows_window": 10}
        )
        assert run.wait() == [STOPPED, STOPPED], run.output()
        assert (
            "rows could not be used (health.max_bad_fraction = 0.05)"
            in place.summary(strict)["exit"]
        )
        step = place.steps(strict)[-1]
        assert (
            2 <= step < STEPS
            and (place.of(strict) / "checkpoints" / "latest").read_text() == f"step_{step}\n"
        )
