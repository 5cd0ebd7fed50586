"""Joins the ranks of a run into a process group."""

import os
import socket
import warnings

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist

from uno_ds.settings import SettingsError
from uno_ds.training.failures import DeviceLost
from uno_ds.training.launch_environment import Launch, read_launch


def start_process_group() -> torch.device:
    """Joins the ranks that a launcher started, or makes a group of one; returns this rank's device.
    Raises SettingsError if the environment contradicts itself or the ranks cannot meet."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # On a CPU, its first use would silently compile for a minute, and a killed compilation blocks
    # later runs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    launch = read_launch()
    port = _free_port() if launch.port is None else launch.port
    launch.export(port)
    if launch.rank == 0 and launch.guessed:
        print(launch.guessed, flush=True)
    local_rank = launch.local_rank
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise SettingsError(
                "LOCAL_RANK",
                f"is {local_rank}, but this process sees {torch.cuda.device_count()} GPU(s); start "
                "as many ranks on a machine as it has GPUs, and make all of them visible to each "
                "rank.",
            )
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
        local_ranks = launch.local_world_size or launch.world_size
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False
        )
    except dist.DistNetworkError as error:
        mistake = _mistake(launch, port, error)
        if mistake is None:
            raise
        raise mistake from None
    _compare_with_next_rank(device)
    return device


def _compare_with_next_rank(device: torch.device) -> None:
    """Raises DeviceLost where this rank sees no GPU and the next one has one: where a driver or GPU
    failed, torch reports none, and the ranks would wait for each other in different backends."""
    store = dist.distributed_c10d._get_default_store()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size == 1:
        return
    following = (rank + 1) % world_size
    store.set(f"uno_ds/device/{rank}", f"{device.type} {socket.gethostname()}")
    other, host = store.get(f"uno_ds/device/{following}").decode().split(" ", 1)
    if device.type == "cpu" and other != "cpu":
        raise DeviceLost(
            f"torch finds no GPU on this host, and rank {following} on host {host} has one"
        )


# Of torch's store, when rank 0 does not answer.
_NOBODY_THERE = ("timed out", "Connection refused", "No route to host", "Network is unreachable")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _mistake(launch: Launch, port: int, error: Exception) -> SettingsError | None:
    """None where the other ranks may be there later: nothing answers yet, or their host is down."""
    text = str(error)
    if any(part in text for part in _NOBODY_THERE):
        return None
    if "EADDRINUSE" in text:
        return SettingsError(
            "MASTER_PORT",
            f"port {port} of this machine is in use, by another run perhaps; give another one "
            "(deepspeed --master_port, torchrun --master-port, or MASTER_PORT).",
        )
    return SettingsError(
        "MASTER_ADDR",
        f"rank {launch.rank} of {launch.world_size} cannot meet the others at "
        f"{launch.address}:{port}: {text.splitlines()[0]}",
    )
