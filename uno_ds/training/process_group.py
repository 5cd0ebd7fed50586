"""Joins the ranks of a run into a process group."""

import ipaddress
import os
import socket
import warnings
from socket import AF_INET

import deepspeed
import deepspeed.ops
import psutil
import torch
import torch.distributed as dist

from uno_ds.data.stream import cores_of_rank
from uno_ds.settings import SettingsError
from uno_ds.training.failures import DeviceLost
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
        torch.set_num_threads(cpu_threads or cores_of_rank(local_ranks))
        interface = gloo_interface(launch)
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
            print(
                f"rank {launch.rank}: {socket.gethostname()} resolves to no address that other "
                f"machines reach; gloo uses {interface} (GLOO_SOCKET_IFNAME)",
                flush=True,
            )
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


def gloo_interface(launch: Launch) -> str | None:
    """The network device by which other machines reach this one, if gloo would choose another: it
    takes the address of the machine's own name, which installers of Debian and Ubuntu enter as
    127.0.1.1 into /etc/hosts. None if gloo chooses well, if the variable GLOO_SOCKET_IFNAME chooses
    for it, or if several devices could be meant."""
    if "GLOO_SOCKET_IFNAME" in os.environ or launch.local_world_size == launch.world_size:
        return None
    if launch.address == "localhost" or _is_loopback(launch.address):
        return None
    try:
        if not _is_loopback(socket.gethostbyname(socket.gethostname())):
            return None
    except OSError:
        pass  # gloo takes the loopback device then
    own = _address_towards(launch.address)
    devices: list[str] = []
    for device, addresses in psutil.net_if_addrs().items():
        of_ipv4 = [found.address for found in addresses if found.family == AF_INET]
        if any(_is_meant(address, own) for address in of_ipv4):
            devices.append(device)
    return devices[0] if len(devices) == 1 else None


def _address_towards(address: str) -> str:
    """This machine's address in packets to `address`; empty if there is no route."""
    try:
        with socket.socket(AF_INET, socket.SOCK_DGRAM) as route:
            route.connect((address, 1))  # sends nothing
            return route.getsockname()[0]
    except OSError:
        return ""


def _is_meant(found: str, own: str) -> bool:
    """On rank 0's machine `own` may be a loopback address too, as that of its own name."""
    if own and not _is_loopback(own):
        return found == own
    return not _is_loopback(found)


def _is_loopback(address: str) -> bool:
    """False for a name."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


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
