"""Which ranks see the same folder: machines may share the disk of a run's folder, or each have its
own under the same path."""

import re
import socket
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from uno_ds.training.collectives import gather_objects, raise_on_all_ranks


@dataclass(frozen=True)
class FolderView:
    """rank: this process's. leaders: for every rank the lowest one that sees the same folder; it
    does for all of them what is done once per folder. hosts: the name of every rank's machine."""

    rank: int
    leaders: tuple[int, ...]
    hosts: tuple[str, ...]

    @property
    def leads(self) -> bool:
        return self.leaders[self.rank] == self.rank

    @property
    def shared(self) -> bool:
        """Whether all ranks see one folder."""
        return not any(self.leaders)

    def together(self) -> list[int]:
        """The ranks that see this rank's folder, itself among them."""
        own = self.leaders[self.rank]
        return [rank for rank, leader in enumerate(self.leaders) if leader == own]


def view_folder(folder: Path) -> FolderView:
    """Makes the folder where it is missing and finds out who sees it. Collective; raises
    SettingsError on every rank if one cannot write there."""
    rank = dist.get_rank()
    # Not the same as in another start, which may have been killed and left its marks.
    token = gather_objects(uuid.uuid4().hex)[0]

    def mark(of_rank: int) -> Path:
        return folder / f".seen_{token}_{of_rank}"

    try:
        with raise_on_all_ranks():
            folder.mkdir(parents=True, exist_ok=True)
            mark(rank).touch()
        leader = next((other for other in range(rank) if mark(other).exists()), rank)
        found = gather_objects((leader, _host_name()))
    finally:
        with suppress(OSError):
            mark(rank).unlink()
    leaders, hosts = zip(*found)
    return FolderView(rank, leaders, hosts)


def _host_name() -> str:
    """As the manifest takes it."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())
    return name.lstrip("._-") or "unknown"
