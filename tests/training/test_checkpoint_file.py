"""A checkpoint that was changed in any way is refused in one line by whoever opens it, and passed
over by --resume auto."""

import copy
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import trained_tensors, write_checkpoint
from small_runs import random_base

from uno_ds.commands import sample, weights
from uno_ds.model.tensor_file import TensorFile, write_tensors
from uno_ds.settings import SettingsError
from uno_ds.training import checkpoint, checkpoint_file
from uno_ds.training.checkpoint_file import complete_checkpoints, leftovers, mark_doubt
from uno_ds.training.manifest import digest_of_manifest

LANE = {"draws": 4, "positions": [3, 1], "waiting": [1, 0], "skipped": {"undecodable": 1}}
OF_A_RUN = {
    "skipped_steps": 0,
    "recent_losses": [1.5, 2],
    "frozen_checksum": "0",
    "rows": {"scenes": 9},
    "lanes": {"0": LANE, "1": LANE | {"waiting": None}},
}
HUGE = {"a": 10**4200}
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 6 and 7."""
    folder = tmp_path_factory.mktemp("good")
    base = random_base(folder / "base")
    trained = trained_tensors()
    before = {
        kind: {name: -tensor for name, tensor in tensors.items()}
        for kind, tensors in trained.items()
    }
    for step, tensors in ((6, before), (7, trained)):
        path = write_checkpoint(folder / "run", base, tensors, step)
        write_manifest(path, json.loads((path / "manifest.json").read_text()) | OF_A_RUN)
    return folder / "run"


@pytest.fixture
def run(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "run")


@pytest.fixture
def newest(run: Path) -> Path:
    return run / "checkpoints" / "step_7"


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    (path / "manifest.json").write_text(
        json.dumps(manifest | {"hash": digest_of_manifest(manifest)})
    )


def refused(capsys: pytest.CaptureFixture, main: Callable, *arguments: str | Path) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and len(error) < 1000
    return error


def refused_by_all(run: Path, newest: Path, capsys: pytest.CaptureFixture) -> str:
    """The line of every reader, which is the same."""
    out = run.parent / "out"
    drawn = run.parent / "drawn"
    lines = {
        refused(capsys, weights.main, "export", newest, out),
        refused(capsys, weights.main, "inspect", newest),
        refused(
            capsys, sample.main, "generate", "--checkpoint", newest, "--prompt", "a", "--out", drawn
        ),
    }
    assert not out.exists() and not list(run.parent.glob("drawn/*"))
    with pytest.raises(SettingsError) as error:
        checkpoint.find(run / "checkpoints", str(newest))
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    found = checkpoint.find(run / "checkpoints", "auto")
    assert [path.name for path, _ in found.candidates] == ["step_6"]
    (passed_over,) = found.skipped
    assert passed_over.startswith("step_7: ")
    (line,) = lines
    return line


def changed(manifest: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with another value at a dotted path; `*` is the first key or index, and `...`
    removes."""
    result = node = copy.deepcopy(manifest)
    *parents, last = path.split(".")
    for part in parents:
        node = node[_first(node) if part == "*" else part]
    key = _first(node) if last == "*" else last
    if value is ...:
        del node[key]
    else:
        node[key] = value
    return result


def _first(node: Any) -> Any:
    return 0 if isinstance(node, list) else next(iter(node))


OF_EVERY_CHECKPOINT = (
    *("step", "optimizer_steps", "world_size", "stage", "ema_updates", "base", "tokenizer"),
    *("architecture", "frozen", "files", "shapes", "lanes"),
)


@pytest.mark.parametrize("key", OF_EVERY_CHECKPOINT)
def test_a_manifest_with_a_key_missing_or_of_another_type_is_refused(
    run: Path, newest: Path, capsys, key: str
):
    manifest = json.loads((newest / "manifest.json").read_text())
    write_manifest(newest, changed(manifest, key, ...))
    assert f"manifest.json lacks {key}." in refused_by_all(run, newest, capsys)
    for value in (True, -1, 2.5, [], 10**18 * 10**6, *([] if key == "architecture" else [HUGE])):
        write_manifest(newest, changed(manifest, key, value))
        line = refused_by_all(run, newest, capsys)
        assert str(newest / "manifest.json") in line and key in line


@pytest.mark.parametrize("change", [{"hidden": None}, {"layers": "2"}, {"hidden": 33}, HUGE])
def test_an_architecture_that_is_none_is_refused_by_all_who_build_the_model(
    run: Path, newest: Path, capsys, change: dict[str, Any]
):
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["architecture"] |= change
    write_manifest(newest, manifest)
    drawn = run.parent / "drawn"
    sampling = ("generate", "--checkpoint", newest, "--prompt", "a", "--out", drawn)
    for main, arguments in (
        (weights.main, ("export", newest, run.parent / "out")),
        (sample.main, sampling),
        *([] if change == {"hidden": 33} else [(weights.main, ("inspect", newest))]),
    ):
        assert str(newest / "manifest.json") in refused(capsys, main, *arguments)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("shapes.*", 7),
        ("shapes.*.*", -1),
        ("shapes.*.*", 1.0),
        ("shapes.*.*", 2**62),
        ("frozen.*", 5),
        ("frozen.*", None),
        ("files.*", "x"),
        ("files.*.bytes", ...),
        ("files.*.bytes", 1e30),
        ("files.*.hash", None),
        ("files", {"../../../etc/passwd": {"bytes": 1, "hash": "0"}}),
        ("lanes.*", 5),
    ],
)
def test_what_lies_deep_in_a_manifest_is_looked_at_too(
    run: Path, newest: Path, capsys, path: str, value: Any
):
    manifest = json.loads((newest / "manifest.json").read_text())
    write_manifest(newest, changed(manifest, path, value))
    line = refused_by_all(run, newest, capsys)
    assert str(newest / "manifest.json") in line and "manifest.json holds no" in line.replace(
        "gives", "holds no"
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((key, ...) for key in OF_A_RUN if key != "lanes"),
        ("lanes", {"1": LANE}),
        ("lanes.*.draws", ...),
        ("lanes.*.draws", "4"),
        ("lanes.*.positions", None),
        ("lanes.*.positions.*", 1.5),
        ("lanes.*.waiting", [1]),
        ("lanes.*.waiting", [2, 0]),
        ("lanes.*.skipped", []),
        ("lanes.*.skipped.*", None),
        ("recent_losses", [math.nan]),
        ("recent_losses", ["1"]),
        ("rows", {"scenes": "9"}),
        ("rows", 5),
        ("skipped_steps", -1),
        ("frozen_checksum", 5),
    ],
)
def test_what_only_a_run_reads_is_looked_at_before_it_starts(
    run: Path, newest: Path, path: str, value: Any
):
    manifest = json.loads((newest / "manifest.json").read_text())
    write_manifest(newest, changed(manifest, path, value))
    with pytest.raises(SettingsError, match=path.split(".")[0]):
        checkpoint.find(run / "checkpoints", str(newest))
    found = checkpoint.find(run / "checkpoints", "auto")
    assert [path.name for path, _ in found.candidates] == ["step_6"] and len(found.skipped) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (DEEP, "it is nested too deep"),
        ('{"format": 1, "a": ' + DEEP + "}", "it is nested too deep"),
        ('{"format": ' + "9" * 5000 + "}", "is not readable JSON"),
        ("[]", "is not a mapping"),
        ('{"format": 2}', "has format 2; this version reads format 1"),
        ('{"format": {"a": [1, 2]}}', "has format {'a': [1, 2]}"),
        ("\ufeff{}", "has format None"),
        ("", "is not readable JSON"),
    ],
)
def test_a_manifest_that_is_none_is_refused(run: Path, newest: Path, capsys, text: str, words: str):
    (newest / "manifest.json").write_text(text)
    assert words in refused_by_all(run, newest, capsys)


def test_a_manifest_that_is_no_file_is_refused_and_not_waited_for(run: Path, newest: Path):
    (newest / "manifest.json").unlink()
    os.mkfifo(newest / "manifest.json")
    with pytest.raises(SettingsError, match="is no regular file"):
        checkpoint.find(run / "checkpoints", str(newest))
    (newest / "manifest.json").unlink()
    (newest / "manifest.json").mkdir()
    assert len(checkpoint.find(run / "checkpoints", "auto").candidates) == 1


@pytest.mark.parametrize("name", [".step_x.part", ".step_.part", ".step_7.backup", "step_٣"])
def test_a_stray_name_is_no_checkpoint_and_is_left_alone(run: Path, name: str):
    folder = run / "checkpoints"
    (folder / name).mkdir()
    (folder / name / "manifest.json").write_text("{}")
    assert [path.name for path in complete_checkpoints(folder)] == ["step_6", "step_7"]
    assert len(checkpoint.find(folder, "auto").candidates) == 2
    assert leftovers(folder) == []
    (folder / ".step_9.part").mkdir()
    (folder / ".step_8.old").mkdir()
    assert {path.name for path in leftovers(folder)} == {".step_9.part", ".step_8.old"}


@pytest.mark.parametrize(
    "starts", ["{}", "[]", "5", DEEP, "{NAME: -1}", "{NAME: 1.5}", "{NAME: 1e400}", '{NAME: "0"}']
)
def test_a_rank_file_that_says_nonsense_about_its_pieces_is_refused(
    run: Path, newest: Path, capsys, starts: str
):
    file = newest / "rank_00000.safetensors"
    found = TensorFile(file)
    name = next(iter(found.entries))
    metadata = {"starts": starts.replace("NAME", json.dumps(name.split("/", 1)[1]))}
    rewrite(newest, file, found, metadata)
    line = refused_by_all(run, newest, capsys)
    assert f"{file}: does not say where its pieces start" in line


def test_two_pieces_with_the_same_values_are_refused(run: Path, newest: Path, capsys):
    """Another piece is then missing, though as many values are there as there should be."""
    file = newest / "rank_00002.safetensors"
    found = TensorFile(file)
    starts = json.loads(found.metadata["starts"])
    moved = {name: max(0, start - 1) for name, start in starts.items()}
    rewrite(newest, file, found, {"starts": json.dumps(moved)})
    assert "that another piece holds too" in refused_by_all(run, newest, capsys)


def rewrite(path: Path, file: Path, found: TensorFile, metadata: dict[str, str]) -> None:
    """The same tensors with other metadata, and a manifest that says so."""
    layout = {name: (entry.dtype, entry.shape) for name, entry in found.entries.items()}
    values = [found.read(name) for name in layout]
    write_tensors(file, layout, values, metadata)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][file.name] = {
        "bytes": file.stat().st_size,
        "hash": checkpoint_file.digest_of(file),
    }
    write_manifest(path, manifest)


@pytest.mark.parametrize("damage", ["a flipped byte", "another step's file", "a hidden flip"])
def test_no_reader_uses_a_rank_file_that_does_not_hold_what_was_written(
    run: Path, newest: Path, capsys, damage: str
):
    file = newest / "rank_00001.safetensors"
    # All that a flip could hide behind is known: the file was found good before.
    assert weights.main(["inspect", str(newest)]) == 0
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    if damage == "another step's file":
        shutil.copy2(run / "checkpoints" / "step_6" / file.name, file)
    else:
        file.write_bytes(content)
    if damage == "a hidden flip":
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    out = run.parent / "out"
    for main, arguments in (
        (
            sample.main,
            ("generate", "--checkpoint", newest, "--prompt", "a", "--out", run.parent / "drawn"),
        ),
        (weights.main, ("export", newest, out)),
        (weights.main, ("inspect", newest)),
    ):
        capsys.readouterr()
        assert f"{file}: does not hold what was written" in refused(capsys, main, *arguments)
    assert not out.exists() and not list(run.parent.glob("drawn/*"))


def test_a_checkpoint_is_hashed_once_and_again_when_a_file_was_touched(
    run: Path, newest: Path, monkeypatch
):
    hashed: list[str] = []
    digest_of = checkpoint_file.digest_of
    monkeypatch.setattr(
        checkpoint_file, "digest_of", lambda path: hashed.append(path.name) or digest_of(path)
    )
    for _ in range(2):
        assert weights.main(["inspect", str(newest)]) == 0
    names = [f"rank_{rank:05}.safetensors" for rank in range(3)]
    assert hashed == names
    os.utime(newest / names[1])
    assert weights.main(["inspect", str(newest)]) == 0
    assert hashed == [*names, names[1]]
    # A copy is another file; and a record that is none, or cannot be written, costs the time only.
    copied = shutil.copytree(newest, run / "copied")
    (newest / "verified.json").write_text(DEEP)
    for path in (copied, newest):
        hashed.clear()
        assert weights.main(["inspect", str(path)]) == 0 and hashed == names
    shutil.rmtree(newest / "verified.json", ignore_errors=True)
    (newest / "verified.json").unlink()
    (newest / "verified.json").mkdir()
    for _ in range(2):
        hashed.clear()
        assert weights.main(["inspect", str(newest)]) == 0 and hashed == names


def test_a_checkpoint_in_doubt_is_passed_over_and_named_by_all_that_read_it(
    run: Path, newest: Path, capsys
):
    mark_doubt(newest, "step 8 was\nskipped")
    found = checkpoint.find(run / "checkpoints", "auto")
    assert [path.name for path, _ in found.candidates] == ["step_6", "step_7"]
    assert found.skipped == [
        "step_7: its weights are in doubt: step 8 was skipped. To continue from it anyway, give "
        f"--resume {newest}."
    ]
    assert weights.main(["inspect", str(newest)]) == 0
    assert "its weights are in doubt: step 8 was skipped" in capsys.readouterr().out
    assert weights.main(["export", str(run), str(run.parent / "out")]) == 0
    assert f"{newest} are in doubt: step 8 was skipped." in capsys.readouterr().err
    # Where all are in doubt, the oldest was followed by the most sound steps.
    mark_doubt(run / "checkpoints" / "step_6", "step 8 was skipped")
    found = checkpoint.find(run / "checkpoints", "auto")
    assert [path.name for path, _ in found.candidates] == ["step_6", "step_7"]
