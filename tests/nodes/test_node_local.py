"""A run whose folder lies on a disk of each host."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from cluster import EVERY, STEPS, Cluster
from hosts import ROOT, Host
from safetensors.torch import load_file

BEFORE = STEPS - EVERY


@pytest.fixture(scope="module")
def disk(cluster: Cluster) -> Path:
    """A folder under whose path each host sees a disk of its own."""
    path = cluster.folder / "disk"
    path.mkdir()
    for host in cluster.hosts.hosts:
        own = host.folder / "disk"
        own.mkdir()
        host.mount(own, path)
    return path


@pytest.fixture(scope="module")
def whole(cluster: Cluster, disk: Path) -> str:
    """A run that nothing happens to."""
    output = cluster.train("whole", output=str(disk)).succeed()
    assert f"note: the machines do not share {disk}/whole/checkpoints" in output
    return "whole"


def checkpoints(host: Host, name: str) -> Path:
    return host.folder / "disk" / name / "checkpoints"


def interrupted(cluster: Cluster, name: str, whole: str) -> None:
    """A copy of the run as it was before its last checkpoint."""
    for host in cluster.hosts.hosts:
        shutil.copytree(host.folder / "disk" / whole, host.folder / "disk" / name)
        shutil.rmtree(checkpoints(host, name) / f"step_{STEPS}")
        (checkpoints(host, name) / "latest").write_text(f"step_{BEFORE}\n")


def last(host: Host, name: str) -> Path:
    return checkpoints(host, name) / f"step_{STEPS}"


def test_each_host_keeps_the_files_of_its_ranks_and_removes_old_ones(cluster: Cluster, whole: str):
    manifests = []
    for rank, host in enumerate(cluster.hosts.hosts):
        kept = sorted(path.name for path in checkpoints(host, whole).iterdir())
        assert kept == ["latest", f"step_{BEFORE}", f"step_{STEPS}"]
        files = {path.name for path in last(host, whole).glob("rank_*")}
        assert files == {f"rank_{rank:05}.safetensors"}
        manifests.append((last(host, whole) / "manifest.json").read_text())
    assert manifests[0] == manifests[1]
    hosts = json.loads(manifests[0])["hosts"]
    assert hosts == {"rank_00000.safetensors": "host0", "rank_00001.safetensors": "host1"}


def test_the_same_ranks_on_the_same_hosts_resume_from_their_own_files(
    cluster: Cluster, disk: Path, whole: str
):
    interrupted(cluster, "again", whole)
    output = cluster.train("again", "--resume", "auto", output=str(disk)).succeed()
    assert f"--resume: continues after step {BEFORE} from" in output
    for rank, host in enumerate(cluster.hosts.hosts):
        file = f"rank_{rank:05}.safetensors"
        ours, theirs = (load_file(last(host, name) / file) for name in ("again", whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_ranks_on_other_hosts_name_the_missing_files_and_resume_once_they_are_collected(
    cluster: Cluster, disk: Path, whole: str
):
    interrupted(cluster, "moved", whole)
    turned = cluster.folder / "turned"
    turned.write_text("host1 slots=1\nhost0 slots=1\n")
    run = cluster.train("moved", "--resume", "auto", hostfile=turned, output=str(disk))
    assert run.wait() == 2, run.output()
    folder = disk / "moved" / "checkpoints" / f"step_{BEFORE}"
    line = (
        f"{folder}: lacks rank_00000.safetensors, on the disk of host0; copy to every machine that "
        f"needs them: scripts/weights.py collect {folder}"
    )
    assert line in run.output() and "Traceback" not in run.output()
    for number, other in ((0, 1), (1, 0)):
        command = [f"{ROOT}/.venv/bin/python", "scripts/weights.py", "collect", str(folder)]
        said = cluster.hosts.start(*command, on=number).succeed()
        file = f"rank_{other:05}.safetensors"
        assert f"{folder}/{file}: from host{other}:{folder}/{file}".rpartition("/")[0] in said
        assert f"{folder}: complete, 1 file(s) copied" in said
    output = cluster.train("moved", "--resume", "auto", hostfile=turned, output=str(disk)).succeed()
    assert f"--resume: continues after step {BEFORE} from" in output
    for rank, host in enumerate(reversed(cluster.hosts.hosts)):
        file = f"rank_{rank:05}.safetensors"
        ours = load_file(last(host, "moved") / file)
        theirs = load_file(last(cluster.hosts.hosts[rank], whole) / file)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
