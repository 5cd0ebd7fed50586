"""The place of a process is that of its launcher, or the variables are refused in one line; never
two runs of one rank each."""

import pytest

from uno_ds.recipe import world_size_of_environment
from uno_ds.settings import SettingsError
from uno_ds.training.launch_environment import (
    Launch,
    first_host,
    is_first_here,
    names_its_ranks,
    read_launch,
)

TORCH = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "gpu7",
    "MASTER_PORT": "29500",
}
TORCH_ALONE = {key: value for key, value in TORCH.items() if key != "LOCAL_WORLD_SIZE"}
# As deepspeed.launcher.launch sets them on the second of two hosts.
DEEPSPEED = TORCH_ALONE | {"LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
# As srun sets them for the fifth of five tasks on three nodes.
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-a-1@1",
}
HYDRA = {
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
    "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "2",
    "PMI_JOBID": "9",
}
MEETING = {"MASTER_ADDR": "gpu7", "MASTER_PORT": "4000"}
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "77",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "8",
}


def place(launch: Launch) -> tuple[int, int, int, int | None]:
    return launch.rank, launch.world_size, launch.local_rank, launch.local_world_size


@pytest.mark.parametrize(
    "environment, expected, address",
    [
        ({}, (0, 1, 0, 1), "127.0.0.1"),
        (TORCH, (3, 4, 1, 2), "gpu7"),
        # The launcher's own variables win over those of a job that it runs in.
        (SRUN | MPIRUN | TORCH, (3, 4, 1, 2), "gpu7"),
        (SRUN, (4, 5, 0, 1), "gpu07"),
        (SRUN | MEETING, (4, 5, 0, 1), "gpu7"),
        (SRUN | {"SLURM_NODEID": "1", "SLURM_PROCID": "3"}, (3, 5, 0, 2), "gpu07"),
        (SRUN | {"SLURM_STEP_NUM_NODES": "1"}, (4, 5, 0, 1), "127.0.0.1"),
        # Slurm sets the variables of PMI for its tasks too.
        (SRUN | {"PMI_RANK": "4", "PMI_SIZE": "5"}, (4, 5, 0, 1), "gpu07"),
        # mpirun starts its own helpers by srun, one on each node.
        (SRUN | MPIRUN, (1, 2, 1, 2), "127.0.0.1"),
        (SRUN | HYDRA, (1, 2, 1, 2), "127.0.0.1"),
        (MPIRUN, (1, 2, 1, 2), "127.0.0.1"),
        (HYDRA, (1, 2, 1, 2), "127.0.0.1"),
        (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"} | MEETING, (1, 2, 1, 1), "gpu7"),
        # A batch script, a shell of salloc and an interactive step are no tasks.
        (BATCH_SCRIPT, (0, 1, 0, 1), "127.0.0.1"),
        (BATCH_SCRIPT | {"SLURM_STEP_ID": "4294967291"}, (0, 1, 0, 1), "127.0.0.1"),
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8"}, (0, 1, 0, 1), "127.0.0.1"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0, None), "127.0.0.1"),
        (TORCH | {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}, (3, 4, 2, 4), "gpu7"),
        # deepspeed has names of its own; other programs may use one of them for something else.
        (DEEPSPEED, (3, 4, 1, 2), "gpu7"),
        (DEEPSPEED | {"LOCAL_WORLD_SIZE": "4"}, (3, 4, 1, 4), "gpu7"),
        ({**TORCH_ALONE, "LOCAL_SIZE": "2"}, (3, 4, 1, None), "gpu7"),
    ],
)
def test_rank_and_number_of_ranks_are_those_of_the_launcher(environment, expected, address):
    launch = read_launch(environment)
    assert place(launch) == expected and launch.address == address
    assert launch.port is not None or launch.world_size == 1


def test_local_rank_is_taken_from_the_launcher_of_the_tasks_where_the_job_sets_rank_alone():
    environment = {key: value for key, value in TORCH.items() if not key.startswith("LOCAL")}
    launch = read_launch(environment | SRUN | {"SLURM_LOCALID": "1"})
    assert launch.local_rank == 1 and launch.guessed == "LOCAL_RANK 1 from SLURM_LOCALID"


def test_all_ranks_of_a_job_meet_at_one_port_and_another_step_at_another():
    ports = [
        read_launch(SRUN | {"SLURM_PROCID": str(rank), "SLURM_STEP_ID": step}).port
        for rank, step in ((0, "0"), (4, "0"), (4, "1"))
    ]
    assert ports[0] == ports[1] != ports[2] and all(20_000 <= port < 32_000 for port in ports)
    other = read_launch(MPIRUN | {"PMIX_NAMESPACE": "prterun-a-2@1"})
    assert other.port != read_launch(MPIRUN).port


def test_what_was_derived_is_printed():
    launch = read_launch(SRUN)
    assert launch.guessed == (f"started by srun: rank 4 of 5, which meet at gpu07:{launch.port}")
    assert read_launch(BATCH_SCRIPT).guessed == (
        "one rank: SLURM_NTASKS is 8, but srun did not start this process"
    )
    assert not read_launch(TORCH).guessed and not read_launch({}).guessed


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key not in names}


@pytest.mark.parametrize(
    "environment, key",
    [
        (without(TORCH, "LOCAL_RANK"), "LOCAL_RANK"),
        (without(TORCH, "WORLD_SIZE"), "WORLD_SIZE"),
        (without(TORCH, "MASTER_ADDR"), "MASTER_ADDR"),
        (without(TORCH, "MASTER_PORT"), "MASTER_PORT"),
        (without(TORCH, "RANK"), "WORLD_SIZE"),
        (TORCH | {"RANK": "4"}, "RANK"),
        (TORCH | {"RANK": "-1"}, "RANK"),
        (TORCH | {"RANK": "one"}, "RANK"),
        (TORCH | {"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE"),
        (TORCH | {"LOCAL_RANK": "2"}, "LOCAL_RANK"),
        (TORCH | {"MASTER_PORT": "70000"}, "MASTER_PORT"),
        (SRUN | {"WORLD_SIZE": "4"}, "WORLD_SIZE"),
        (MPIRUN | {"WORLD_SIZE": "4"}, "WORLD_SIZE"),
        (without(SRUN, "SLURM_STEP_NODELIST"), "MASTER_ADDR"),
        (SRUN | {"SLURM_PROCID": "5"}, "SLURM_PROCID"),
        (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "MASTER_ADDR"),
        (without(MPIRUN, "PMIX_NAMESPACE"), "MASTER_PORT"),
        (without(MPIRUN, "OMPI_COMM_WORLD_LOCAL_RANK"), "LOCAL_RANK"),
        (without(MPIRUN, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK"),
    ],
)
def test_what_is_missing_or_contradicts_itself_is_one_line_that_names_the_variable(
    environment, key
):
    with pytest.raises(SettingsError) as raised:
        read_launch(environment)
    assert raised.value.key == key and len(str(raised.value)) < 6000


def test_a_plan_may_name_the_number_of_ranks_alone_and_agrees_with_the_launcher(monkeypatch):
    assert read_launch({"WORLD_SIZE": "6"}, planning=True).world_size == 6
    assert names_its_ranks({"WORLD_SIZE": "6"}) and names_its_ranks(SRUN)
    assert not names_its_ranks(BATCH_SCRIPT)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in MPIRUN.items():
        monkeypatch.setenv(name, value)
    assert world_size_of_environment() == 2


def test_ranks_that_need_not_meet_are_distinguished_by_their_launcher_alone(monkeypatch):
    from uno_ds.commands import prepare

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}).items():
        monkeypatch.setenv(name, value)
    options = prepare.parse(["--recipe", "tiny", "--out", "x"])
    assert (options.rank, options.world_size) == (1, 2)


def test_one_rank_of_a_machine_prints():
    assert is_first_here({}) and is_first_here(SRUN) and is_first_here(BATCH_SCRIPT)
    assert not is_first_here(MPIRUN) and not is_first_here(TORCH)
    assert not is_first_here(SRUN | {"SLURM_LOCALID": "1"})


@pytest.mark.parametrize(
    "hosts, first",
    [
        ("gpu7", "gpu7"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("login1,gpu[07-09]", "login1"),
        ("rack2-gpu[3,5].local", "rack2-gpu3.local"),
        ("a-1,b", "a-1"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_node_list(hosts, first):
    assert first_host(hosts) == first
