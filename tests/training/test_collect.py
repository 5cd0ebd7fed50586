"""Files of a checkpoint that machines wrote to their own disks are named where they are missing,
and `weights.py collect` copies them from there."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import trained_tensors, write_checkpoint
from small_runs import random_base

from uno_ds.commands import weights
from uno_ds.settings import SettingsError
from uno_ds.training.checkpoint_file import CheckpointTensors, open_checkpoint
from uno_ds.training.manifest import digest_of_manifest

FILES = [f"rank_{rank:05}.safetensors" for rank in range(3)]
# Rank 0 ran on the first machine, the others on the second.
HOSTS = dict(zip(FILES, ("node-a", "node-b", "node-b")))
# scp that finds each machine's disk in a folder of its name.
SCP = """#!/usr/bin/env bash
printf '%s ' "$@" >> {disks}/calls; echo >> {disks}/calls
source="${{@: -2:1}}" target="${{@: -1}}"
exec cp "{disks}/${{source%%:*}}/${{source##*/}}" "$target"
"""


def write_hosts(folder: Path, hosts: dict[str, Any]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | {"hosts": hosts}
    path.write_text(json.dumps(manifest | {"hash": digest_of_manifest(manifest)}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    base = random_base(folder / "base")
    checkpoint = write_checkpoint(folder, base, trained_tensors())
    write_hosts(checkpoint, HOSTS)
    return checkpoint


@pytest.fixture
def disks(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for each machine, and an scp that reaches them."""
    for host in sorted(set(HOSTS.values())):
        (tmp_path / host).mkdir()
        shutil.copy(whole / "manifest.json", tmp_path / host)
    for file, host in HOSTS.items():
        shutil.copy(whole / file, tmp_path / host)
    scp = tmp_path / "bin" / "scp"
    scp.parent.mkdir()
    scp.write_text(SCP.format(disks=tmp_path))
    scp.chmod(0o755)
    monkeypatch.setenv("PATH", str(scp.parent), prepend=":")
    return tmp_path


@pytest.fixture
def here(disks: Path) -> Path:
    """The checkpoint on this machine, node-a."""
    return shutil.copytree(disks / "node-a", disks / "run" / "checkpoints" / "step_7")


def refused(capsys: pytest.CaptureFixture, *arguments: str | Path) -> str:
    assert weights.main([str(word) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "Traceback" not in error
    return error


def test_whoever_needs_all_of_it_names_what_is_missing_where_it_is_and_the_command(here, capsys):
    line = refused(capsys, "inspect", here)
    assert f"{here}: lacks {FILES[1]}, {FILES[2]}, on the disk of node-b;" in line
    assert f"scripts/weights.py collect {here}" in line


def test_what_this_machine_has_is_read_without_the_rest(here):
    tensors = CheckpointTensors(*open_checkpoint(here, "--resume"), of_this_machine=True)
    assert tensors.files == FILES[:1]
    tensors.verify()
    name = next(iter(tensors.shapes))
    with pytest.raises(SettingsError, match=f"lacks {FILES[1]}"):
        tensors.read("weight", name)


def test_a_file_that_this_machine_never_shared_and_lost_is_an_error_as_before(here, disks):
    write_hosts(here, {})
    with pytest.raises(SettingsError, match=f"{FILES[1]}: is missing"):
        CheckpointTensors(*open_checkpoint(here, "--resume"), of_this_machine=True)


def test_collect_copies_from_the_machines_that_the_manifest_names(here, disks, whole, capsys):
    assert weights.main(["collect", str(here)]) == 0
    said = capsys.readouterr().out
    assert f"{here / FILES[1]}: from node-b:{here}, " in said
    assert f"{here}: complete, 2 file(s) copied" in said
    assert {path.name for path in here.iterdir()} == {"manifest.json", *FILES}
    for file in FILES:
        assert (here / file).read_bytes() == (whole / file).read_bytes()
    calls = (disks / "calls").read_text().splitlines()
    assert len(calls) == 2 and all("-o BatchMode=yes" in call for call in calls)
    assert f" -- node-b:{here / FILES[1]} " in calls[0]
    assert weights.main(["inspect", str(here)]) == 0
    # Again: there is nothing to do.
    assert weights.main(["collect", str(here.parent.parent)]) == 0
    assert "complete, 0 file(s) copied" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["{disks}/node-b", "node-b", "node-b:/elsewhere/step_7"])
def test_collect_takes_folders_and_machines(here, disks, capsys, place):
    place = place.format(disks=disks)
    assert weights.main(["collect", str(here), "--from", place]) == 0
    assert "complete, 2 file(s) copied" in capsys.readouterr().out


def test_a_machine_that_has_nothing_gets_everything(here, disks, whole, capsys):
    shutil.rmtree(here)
    places = [str(disks / "node-a"), str(disks / "node-b")]
    assert weights.main(["collect", str(here), "--from", *places]) == 0
    assert "complete, 3 file(s) copied" in capsys.readouterr().out
    assert weights.main(["inspect", str(here)]) == 0


def test_a_damaged_copy_is_not_taken(here, disks, capsys):
    other = shutil.copytree(disks / "node-b", disks / "spare")
    damaged = bytearray((other / FILES[1]).read_bytes())
    damaged[-1] ^= 1
    (disks / "node-b" / FILES[1]).write_bytes(damaged)
    line = refused(capsys, "collect", here)
    assert f"{here / FILES[1]}: was found nowhere (node-b:{here}: does not hold what was" in line
    assert {path.name for path in here.iterdir()} == {"manifest.json", FILES[0]}
    assert weights.main(["collect", str(here), "--from", "node-b", str(other)]) == 0


def test_a_machine_that_does_not_answer_is_named_with_what_ssh_said(here, disks, capsys):
    shutil.rmtree(disks / "node-b")
    line = refused(capsys, "collect", here)
    assert f"{FILES[1]}: was found nowhere (node-b:{here}: cp: cannot stat" in line
    assert "name with --from the machine or folder that has it." in line


@pytest.mark.parametrize("place", ["-oProxyCommand=x", "no/such/folder", "a b", ""])
def test_what_is_no_place_is_refused(here, capsys, place):
    line = refused(capsys, "collect", here, f"--from={place}")
    assert f"--from: '{place}' is neither a folder nor a machine" in line


@pytest.mark.parametrize("hosts", [{FILES[1]: "-oProxyCommand=x"}, {FILES[1]: 7}, [], "node-b"])
def test_a_manifest_whose_machines_are_no_names_is_refused(here, capsys, hosts):
    write_hosts(here, hosts)
    assert "holds no names of machines as hosts" in refused(capsys, "collect", here)


def test_a_folder_that_is_no_checkpoint_is_refused(disks, capsys):
    assert "is not a complete checkpoint" in refused(capsys, "collect", disks / "nothing")
    line = refused(capsys, "collect", disks / "step_9", "--from", disks / "bin")
    assert f"--from: {disks / 'bin'} gave no manifest.json: No such file" in line
