"""Ranks whose machines have the run's folder on disks of their own, as two machines would see it:
each rank works in a folder of its own, with the same relative paths."""

import json
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_case import settings_of, start, write_base
from ranks import Ranks
from tiny import sharded_config

from uno_ds.settings import SettingsError
from uno_ds.training import checkpoint, saving
from uno_ds.training.checkpoint import CheckpointSettings
from uno_ds.training.folder_view import view_folder
from uno_ds.training.manifest import digest_of_manifest
from uno_ds.training.saving import Saver
from uno_ds.training.shards import TrainedState

CHECKPOINTS = Path("checkpoints")


def save_three(config: str, base: str, folder: str) -> dict[str, Any]:
    """Runs on every rank: saves after each of three steps, and keeps the last."""
    engine, ema, batches = start(settings_of(config, base))
    reported: list[str] = []
    home = Path(folder) / str(engine.rank)
    home.mkdir(exist_ok=True)
    with chdir(home):
        saver = Saver(CHECKPOINTS, CheckpointSettings(keep_last=1), engine, ema, reported.append)
        lanes = {str(engine.rank): {"of": engine.rank}}
        for step in (1, 2, 3):
            engine.train_step(batches, 1e-3)
            # Only rank 0 knows the id of a start.
            assert saver.save(step, lanes, {"run": {"id": str(engine.rank), "before": []}})
    state = TrainedState(engine)
    weights = {name: state.read("weight", name).clone() for name in state.pieces}
    engine.engine.destroy()
    return {"reported": reported, "weights": weights}


def load(config: str, base: str, folder: str, disks: list[int]) -> dict[str, Any]:
    """Runs on every rank, with the disk of `disks` at its place: the weights of --resume DIR, or
    what it says."""
    engine, ema, _ = start(settings_of(config, base, seed=4))
    reported: list[str] = []
    with chdir(Path(folder) / str(disks[engine.rank])):
        path, manifest = checkpoint._open_on_all_machines(CHECKPOINTS / "step_3")
        try:
            checkpoint.load(path, manifest, engine, ema)
        except SettingsError as error:
            reported.append(str(error))
    state = TrainedState(engine)
    weights = {name: state.read("weight", name).clone() for name in state.pieces}
    engine.engine.destroy()
    return {"reported": reported, "weights": weights}


def open_on_all(folder: str) -> str:
    """Runs on every rank: what opening the checkpoint says."""
    with chdir(Path(folder) / str(dist.get_rank())):
        try:
            checkpoint._open_on_all_machines(CHECKPOINTS / "step_3")
        except checkpoint.Damaged as error:
            return str(error)
    return ""


def fail_in_the_manifest(config: str, base: str, folder: str) -> list[str]:
    """Runs on every rank: rank 1's disk is full when the manifest is written."""
    engine, ema, _ = start(settings_of(config, base))
    reported: list[str] = []

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device", "there")

    kept = saving.write_manifest
    if engine.rank:
        saving.write_manifest = full
    home = Path(folder) / str(engine.rank)
    home.mkdir(exist_ok=True)
    try:
        with chdir(home):
            saver = Saver(CHECKPOINTS, CheckpointSettings(), engine, ema, reported.append)
            assert not saver.save(1, {}, {})
            return [path.name for path in CHECKPOINTS.iterdir()]
    finally:
        saving.write_manifest = kept
        engine.engine.destroy()


def views(folder: str, disks: list[int]) -> dict[str, Any]:
    """Runs on every rank: who sees its folder."""
    home = Path(folder) / str(disks[dist.get_rank()])
    home.mkdir(exist_ok=True)
    with chdir(home):
        view = view_folder(Path("runs"))
    return {"leads": view.leads, "shared": view.shared, "together": view.together()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sharded_config("zero3", tmp_path_factory.mktemp("configs"))


@pytest.fixture(scope="module")
def saved(
    ranks: Callable[[int], Ranks],
    base: Path,
    config: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("disks")
    arguments = {"config": config, "base": str(base), "folder": str(folder)}
    return folder, ranks(2).call(save_three, **arguments)


def test_each_disk_gets_its_ranks_files_and_one_manifest_and_loses_old_checkpoints(saved):
    folder, answers = saved
    texts = []
    for rank in (0, 1):
        place = folder / str(rank) / CHECKPOINTS
        assert sorted(path.name for path in place.iterdir()) == ["latest", "step_3"]
        files = sorted(path.name for path in (place / "step_3").iterdir())
        assert files == ["manifest.json", f"rank_{rank:05}.safetensors"]
        assert (place / "latest").read_text() == "step_3\n"
        texts.append((place / "step_3" / "manifest.json").read_text())
    assert texts[0] == texts[1]
    (note,) = answers[0]["reported"]
    assert note.startswith(f"note: the machines do not share {CHECKPOINTS}")
    assert answers[1]["reported"] == []


def test_the_same_ranks_load_their_own_files(ranks, base, config, saved):
    folder, answers = saved
    arguments = {"config": config, "base": str(base), "folder": str(folder), "disks": [0, 1]}
    for ours, theirs in zip(ranks(2).call(load, **arguments), answers, strict=True):
        assert ours["reported"] == [] and ours["weights"].keys() == theirs["weights"].keys()
        for name, weight in theirs["weights"].items():
            assert torch.equal(ours["weights"][name], weight)


def test_ranks_on_other_disks_are_refused_with_the_missing_file(ranks, base, config, saved):
    folder, _ = saved
    arguments = {"config": config, "base": str(base), "folder": str(folder), "disks": [1, 0]}
    for answer in ranks(2).call(load, **arguments):
        (line,) = answer["reported"]
        place = CHECKPOINTS / "step_3"
        assert line.startswith(f"{place}: lacks rank_00000.safetensors, on the disk of ")
        assert line.endswith(f"scripts/weights.py collect {place}")


def test_another_checkpoint_of_the_step_on_one_disk_is_refused(ranks, saved, tmp_path: Path):
    folder, _ = saved
    for rank in (0, 1):
        shutil.copytree(folder / str(rank), tmp_path / str(rank))
    assert ranks(2).call(open_on_all, folder=str(tmp_path)) == ["", ""]
    path = tmp_path / "1" / CHECKPOINTS / "step_3" / "manifest.json"
    manifest = json.loads(path.read_text()) | {"optimizer_steps": 4}
    path.write_text(json.dumps(manifest | {"hash": digest_of_manifest(manifest)}))
    for line in ranks(2).call(open_on_all, folder=str(tmp_path)):
        assert "is not the same checkpoint on all machines" in line
    path.unlink()
    for line in ranks(2).call(open_on_all, folder=str(tmp_path)):
        assert "the machine of rank 1: checkpoints/step_3 is not a complete checkpoint" in line


def test_a_disk_that_is_full_leaves_a_checkpoint_on_none(ranks, base, config, tmp_path: Path):
    arguments = {"config": config, "base": str(base), "folder": str(tmp_path)}
    assert ranks(2).call(fail_in_the_manifest, **arguments) == [[], []]


@pytest.mark.parametrize(
    ("disks", "leaders", "together"),
    [
        ([0, 0, 0], [0], [[0, 1, 2], [0, 1, 2], [0, 1, 2]]),
        ([0, 1, 1], [0, 1], [[0], [1, 2], [1, 2]]),
        ([0, 1, 0], [0, 1], [[0, 2], [1], [0, 2]]),
        ([0, 1, 2], [0, 1, 2], [[0], [1], [2]]),
    ],
)
def test_one_rank_of_each_disk_leads(ranks, tmp_path: Path, disks, leaders, together):
    answers = ranks(3).call(views, folder=str(tmp_path), disks=disks)
    assert [rank for rank, answer in enumerate(answers) if answer["leads"]] == leaders
    assert [answer["together"] for answer in answers] == together
    assert {answer["shared"] for answer in answers} == {len(leaders) == 1}
    assert not list(tmp_path.glob("*/runs/*"))
