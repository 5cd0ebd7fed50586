"""Reads rank and number of ranks from the environment variables that the launcher set. Needs
neither torch nor DeepSpeed.

The variables of deepspeed and torchrun (RANK, WORLD_SIZE, LOCAL_RANK, ...) take precedence. If RANK
is not set, mpirun or srun may have started the process: then rank and number of ranks are read from
their variables, and the address of rank 0 has to be given (MASTER_ADDR, MASTER_PORT) or is derived
from them.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

from uno_ds.settings import SettingsError

LOOPBACK = "127.0.0.1"
# Below the ephemeral ports, which operating systems assign themselves.
FIRST_PORT, PORTS = 20_000, 12_000
# From here on, Slurm numbers special job steps: the batch script, the interactive shell and others.
SLURM_OWN_STEPS = 2**32 - 16


@dataclass(frozen=True)
class Launch:
    """Rank of a process and address of rank 0. local_world_size: None if it is not known. port:
    None if any free port can be used. guessed: a line about what was not read from torch's
    variables; empty if nothing."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int | None
    address: str
    port: int | None
    guessed: str = ""

    def export(self, port: int) -> None:
        """Sets the variables that torch and DeepSpeed read, in this process."""
        os.environ |= {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(port),
        }
        if self.local_world_size is not None:
            os.environ["LOCAL_WORLD_SIZE"] = str(self.local_world_size)


@dataclass(frozen=True)
class _Mpi:
    """Names of the variables that an MPI launcher sets. job: those that hold the id of the job;
    flags: the options that set a variable for all ranks."""

    name: str
    rank: str
    size: str
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]
    job: tuple[str, ...]
    flags: str


MPI_LAUNCHERS = (
    _Mpi(
        "mpirun (Open MPI)",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
        "mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=20000",
    ),
    _Mpi(
        "mpirun (MVAPICH)",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
        ("PMI_JOBID",),
        "mpirun -genv MASTER_ADDR HOST -genv MASTER_PORT 20000",
    ),
    _Mpi(
        "mpiexec (PMI)",
        "PMI_RANK",
        "PMI_SIZE",
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE"),
        ("PMI_JOBID", "PALS_APID"),
        "mpiexec -genv MASTER_ADDR HOST -genv MASTER_PORT 20000",
    ),
)


def read_launch(environment: Mapping[str, str] | None = None, *, planning: bool = False) -> Launch:
    """The launch of this process. `planning`: nothing is started, so WORLD_SIZE alone gives the
    number of planned ranks, and the variables for address and local rank are not needed. Raises
    SettingsError for variables that are missing, no numbers, or contradict each other."""
    given = os.environ if environment is None else environment
    if planning:
        given = {"LOCAL_RANK": "0", "MASTER_ADDR": LOOPBACK, "MASTER_PORT": "0", **given}
    if "RANK" in given:
        return _of_torch(given)
    for launcher in MPI_LAUNCHERS:
        if launcher.rank in given and not _is_from_slurm(given, launcher):
            return _of_mpi(given, launcher)
    if _is_slurm_task(given):
        return _of_slurm(given)
    if "PMIX_RANK" in given:
        raise SettingsError(
            "PMIX_RANK",
            "is set, but the number of ranks is not known; set RANK, WORLD_SIZE, LOCAL_RANK, "
            "MASTER_ADDR and MASTER_PORT, or start with torchrun or deepspeed.",
        )
    world_size = _number(given, "WORLD_SIZE", 1) if "WORLD_SIZE" in given else 1
    if world_size > 1 and not planning:
        raise SettingsError(
            "WORLD_SIZE",
            f"is {world_size}, but RANK is not set: this would be a run of one rank; start with "
            "torchrun or deepspeed, set RANK too, or unset WORLD_SIZE.",
        )
    return Launch(0, world_size, 0, world_size, LOOPBACK, _port(given), _single_rank(given))


def names_its_ranks(environment: Mapping[str, str] | None = None) -> bool:
    """Whether the environment says how many ranks there are."""
    given = os.environ if environment is None else environment
    return (
        "WORLD_SIZE" in given
        or _is_slurm_task(given)
        or any(launcher.rank in given for launcher in MPI_LAUNCHERS)
    )


def is_first_here(environment: Mapping[str, str] | None = None) -> bool:
    """Whether this is the first rank of its machine, which prints for all of them. Checks nothing,
    so that it can be used before `read_launch`."""
    given = os.environ if environment is None else environment
    names = [name for name in ("LOCAL_RANK", *_other_local_ranks(given)) if name in given]
    return not names or given[names[0]] == "0"


def _other_local_ranks(given: Mapping[str, str]) -> list[str]:
    """Names of the variables that MPI launchers or Slurm set to the local rank."""
    of_mpi = chain.from_iterable(launcher.local_rank for launcher in MPI_LAUNCHERS)
    names = [name for name in of_mpi if name in given]
    if _is_slurm_task(given) and "SLURM_LOCALID" in given:
        names.append("SLURM_LOCALID")
    return names


def _of_torch(given: Mapping[str, str]) -> Launch:
    if "WORLD_SIZE" not in given:
        raise SettingsError(
            "WORLD_SIZE", f"is not set, but RANK is {given['RANK']}; set the number of ranks."
        )
    world_size = _number(given, "WORLD_SIZE", 1)
    rank = _number(given, "RANK", 0, world_size)
    local_rank, guessed = _local_rank_of_torch(given, rank, world_size)
    local_world_size = None
    # deepspeed has a name of its own, and sets CROSS_SIZE beside it.
    name = "LOCAL_WORLD_SIZE"
    if name not in given and "CROSS_SIZE" in given:
        name = "LOCAL_SIZE"
    if name in given:
        local_world_size = _number(given, name, 1)
    if local_world_size is not None and local_rank >= local_world_size:
        raise SettingsError("LOCAL_RANK", f"is {local_rank}, but {name} is {local_world_size}.")
    if world_size == 1:
        address, port = given.get("MASTER_ADDR", LOOPBACK), _port(given)
        return Launch(rank, 1, local_rank, local_world_size, address, port, guessed)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not given.get(name):
            raise SettingsError(
                name,
                f"is not set, but RANK is {rank} and WORLD_SIZE is {world_size}; the ranks need "
                "the address and a free port of rank 0's machine to meet.",
            )
    address = given["MASTER_ADDR"]
    return Launch(rank, world_size, local_rank, local_world_size, address, _port(given), guessed)


def _local_rank_of_torch(given: Mapping[str, str], rank: int, world_size: int) -> tuple[int, str]:
    """(local rank, a line about what it was read from if not from LOCAL_RANK)."""
    if "LOCAL_RANK" in given:
        return _number(given, "LOCAL_RANK", 0), ""
    others = _other_local_ranks(given)
    if others:
        local_rank = _number(given, others[0], 0)
        return local_rank, f"LOCAL_RANK {local_rank} from {others[0]}"
    if world_size == 1:
        return 0, "LOCAL_RANK 0, as there is one rank"
    raise SettingsError(
        "LOCAL_RANK",
        f"is not set, but RANK is {rank}; set it to the number of the rank on its machine, "
        "from 0, or start with torchrun or deepspeed.",
    )


def _of_mpi(given: Mapping[str, str], launcher: _Mpi) -> Launch:
    if launcher.size not in given:
        raise SettingsError(
            launcher.size, f"is not set, but {launcher.rank} is {given[launcher.rank]}."
        )
    world_size = _number(given, launcher.size, 1)
    rank = _number(given, launcher.rank, 0, world_size)
    local_ranks = [name for name in (*launcher.local_rank, "LOCAL_RANK") if name in given]
    if world_size > 1 and not local_ranks:
        raise SettingsError(
            "LOCAL_RANK",
            f"is not set, and neither is {launcher.local_rank[0]}, but {launcher.rank} is {rank}; "
            "set RANK, WORLD_SIZE and LOCAL_RANK, or start with torchrun or deepspeed.",
        )
    local_rank = _number(given, local_ranks[0], 0) if local_ranks else 0
    local_sizes = [name for name in launcher.local_size if name in given]
    local_world_size = _number(given, local_sizes[0], 1) if local_sizes else None
    one_machine = local_world_size == world_size
    job = next((given[name] for name in launcher.job if given.get(name)), "")
    return _of_launcher(
        given,
        launcher.name,
        Launch(rank, world_size, local_rank, local_world_size, "", None),
        address=LOOPBACK if one_machine else "",
        port=_derived_port(job) if job else None,
        how=launcher.flags,
    )


def _of_slurm(given: Mapping[str, str]) -> Launch:
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in given else "SLURM_NTASKS"
    if size not in given:
        raise SettingsError(
            "SLURM_NTASKS", f"is not set, but SLURM_PROCID is {given['SLURM_PROCID']}."
        )
    world_size = _number(given, size, 1)
    rank = _number(given, "SLURM_PROCID", 0, world_size)
    local_ranks = [name for name in ("SLURM_LOCALID", "LOCAL_RANK") if name in given]
    if world_size > 1 and not local_ranks:
        raise SettingsError(
            "SLURM_LOCALID", f"is not set, but SLURM_PROCID is {rank}; set LOCAL_RANK and RANK."
        )
    local_rank = _number(given, local_ranks[0], 0) if local_ranks else 0
    nodes = given.get("SLURM_STEP_NUM_NODES", given.get("SLURM_NNODES", ""))
    hosts = given.get("SLURM_STEP_NODELIST", given.get("SLURM_JOB_NODELIST", ""))
    job = f"{given.get('SLURM_JOB_ID', '')}.{given['SLURM_STEP_ID']}"
    return _of_launcher(
        given,
        "srun",
        Launch(rank, world_size, local_rank, _slurm_local_size(given), "", None),
        address=LOOPBACK if nodes == "1" else first_host(hosts),
        port=_derived_port(job),
        how="export MASTER_ADDR=HOST MASTER_PORT=20000",
    )


def _of_launcher(
    given: Mapping[str, str],
    launcher: str,
    ranks: Launch,
    address: str,
    port: int | None,
    how: str,
) -> Launch:
    """`ranks` with the address and port of MASTER_ADDR and MASTER_PORT, or else those derived from
    the launcher's variables (`address`, `port`; empty and None if they do not say). how: what sets
    the variables, for the message."""
    world_size = ranks.world_size
    if "WORLD_SIZE" in given and _number(given, "WORLD_SIZE", 1) != world_size:
        raise SettingsError(
            "WORLD_SIZE",
            f"is {given['WORLD_SIZE']}, but {launcher} started {world_size} rank(s); unset "
            "it, or set RANK and LOCAL_RANK too.",
        )
    if world_size == 1:
        address, port = address or LOOPBACK, None
    address = given.get("MASTER_ADDR") or address
    port = _port(given) or port
    if not address or port is None and world_size > 1:
        missing = "MASTER_PORT" if address else "MASTER_ADDR"
        raise SettingsError(
            missing,
            f"is not set, and {launcher} does not say where rank 0 of {world_size} runs; "
            f"give address and port: {how}.",
        )
    where = f", which meet at {address}:{port}" if world_size > 1 else ""
    guessed = f"started by {launcher}: rank {ranks.rank} of {world_size}{where}"
    return dataclasses.replace(ranks, address=address, port=port, guessed=guessed)


def first_host(hosts: str) -> str:
    """The first host of a Slurm node list, `gpu[07-09,12],login1` or `a-1,b`; empty if there is
    none."""
    prefix, opened, rest = hosts.partition("[")
    if not opened or "," in prefix:
        return hosts.split(",")[0].strip()
    inside, _, after = rest.partition("]")
    suffix = re.split(r"[,\[]", after)[0]
    return prefix + re.split(r"[-,]", inside)[0] + suffix


def _is_slurm_task(given: Mapping[str, str]) -> bool:
    """Whether srun started this process. Slurm also sets its variables in a batch script and in a
    shell of salloc."""
    step = given.get("SLURM_STEP_ID", "")
    return (
        "SLURM_PROCID" in given
        and step.isascii()
        and step.isdigit()
        and int(step) < SLURM_OWN_STEPS
    )


def _is_from_slurm(given: Mapping[str, str], launcher: _Mpi) -> bool:
    """Whether Slurm set the variables of this MPI launcher: it also sets those of PMI for its
    tasks."""
    if launcher.rank != "PMI_RANK" or not _is_slurm_task(given):
        return False
    size = given.get("SLURM_STEP_NUM_TASKS", given.get("SLURM_NTASKS"))
    return given["PMI_RANK"] == given["SLURM_PROCID"] and given.get("PMI_SIZE") == size


def _slurm_local_size(given: Mapping[str, str]) -> int | None:
    """Tasks of this node, from a list such as `2(x3),1`: three nodes with 2 tasks, one with 1."""
    text = given.get("SLURM_STEP_TASKS_PER_NODE", given.get("SLURM_TASKS_PER_NODE", ""))
    counts: list[int] = []
    for count, repeated in re.findall(r"(\d{1,6})(?:\(x(\d{1,6})\))?", text):
        counts += [int(count)] * int(repeated or 1)
    node = given.get("SLURM_NODEID", "0")
    if not (node.isascii() and node.isdigit()) or int(node) >= len(counts):
        return None
    return counts[int(node)]


def _single_rank(given: Mapping[str, str]) -> str:
    """A line if Slurm's variables let one expect more than one rank; else empty."""
    tasks = given.get("SLURM_NTASKS", "1")
    if tasks == "1":
        return ""
    return f"one rank: SLURM_NTASKS is {tasks}, but srun did not start this process"


def _derived_port(job: str) -> int:
    """A hash of the job's id: the same port on all ranks, and another one for most other jobs."""
    digest = hashlib.blake2b(job.encode(), digest_size=4).hexdigest()
    return FIRST_PORT + int(digest, 16) % PORTS


def _port(given: Mapping[str, str]) -> int | None:
    return _number(given, "MASTER_PORT", 0, 65_536) if given.get("MASTER_PORT") else None


def _number(given: Mapping[str, str], name: str, lowest: int, below: int | None = None) -> int:
    text = given[name].strip()
    valid = text.isascii() and text.isdigit() and len(text) < 10
    if valid and lowest <= int(text) and (below is None or int(text) < below):
        return int(text)
    bound = f" and below {below}" if below is not None else ""
    raise SettingsError(
        name,
        f"the environment variable must be a whole number, at least {lowest}{bound}, got '{text}'.",
    )
