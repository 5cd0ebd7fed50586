"""Joins the ranks of a run into a process group."""

import os
import socket
import warnings

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist

from uno_ds.settings import SettingsError
from uno_ds.training.launch_environment import Launch, read_launch


def start_process_group(cpu_threads: int | None = None) -> torch.device:
    """Joins the ranks that a launcher started, or makes a group of one; returns this rank's device.
    `cpu_threads`: of this rank on a CPU; None: its share of the cores. Raises SettingsError if the
    environment contradicts itself or the ranks cannot meet."""
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
        share = max(1, (os.cpu_count() or 1) // local_ranks)
        torch.set_num_threads(cpu_threads or share)
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False
        )
    except dist.DistNetworkError as error:
        raise _unreachable(launch, port, error) from None
    return device


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _unreachable(launch: Launch, port: int, error: Exception) -> SettingsError:
    if "EADDRINUSE" in str(error):
        return SettingsError(
            "MASTER_PORT",
            f"port {port} of this machine is in use, by another run perhaps; give another one "
            "(deepspeed --master_port, torchrun --master-port, or MASTER_PORT).",
        )
    return SettingsError(
        "MASTER_ADDR",
        f"rank {launch.rank} of {launch.world_size} cannot meet the others at "
        f"{launch.address}:{port}: {str(error).splitlines()[0]}",
    )
