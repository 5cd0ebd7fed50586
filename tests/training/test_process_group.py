"""The network device that gloo is told to use, and the threads of a rank on a CPU."""

import os
import socket
from types import SimpleNamespace

import deepspeed
import psutil
import pytest
import torch

from uno_ds.training import process_group
from uno_ds.training.launch_environment import Launch
from uno_ds.training.process_group import gloo_interface

NAME = "node-a"
LAUNCH = Launch(1, 2, 0, 1, "10.0.0.1", 29500)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch):
    """node-a, with two network devices, which knows its name as 127.0.1.1 and reaches 10.0.0.1 by
    the second."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: NAME)
    monkeypatch.setattr(socket, "gethostbyname", {NAME: "127.0.1.1"}.__getitem__)
    devices = {"lo": "127.0.0.1", "eth0": "192.168.0.7", "ib0": "10.0.0.7"}
    found = {
        name: [SimpleNamespace(family=socket.AF_INET, address=address)]
        for name, address in devices.items()
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(process_group, "_address_towards", {"10.0.0.1": "10.0.0.7"}.get)


def test_a_name_that_is_a_loopback_address_is_replaced_by_the_device_towards_rank_0():
    assert gloo_interface(LAUNCH) == "ib0"


@pytest.mark.parametrize("address", ["192.168.0.7", "10.0.0.7"])
def test_a_name_that_other_machines_reach_is_left_to_gloo(monkeypatch, address):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: address)
    assert gloo_interface(LAUNCH) is None


def test_a_name_that_is_unknown_is_as_bad_as_a_loopback_address(monkeypatch):
    def unknown(name: str) -> str:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "gethostbyname", unknown)
    assert gloo_interface(LAUNCH) == "ib0"


@pytest.mark.parametrize(
    "launch",
    [
        Launch(0, 2, 0, 2, "10.0.0.1", 29500),
        Launch(0, 2, 0, None, "127.0.0.1", 29500),
        Launch(0, 2, 0, None, "localhost", 29500),
    ],
)
def test_ranks_of_one_machine_are_left_alone(launch):
    assert gloo_interface(launch) is None


def test_a_device_that_was_given_is_kept(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert gloo_interface(LAUNCH) is None


def test_on_the_machine_of_rank_0_that_resolves_to_itself_one_device_is_taken_and_two_are_not(
    monkeypatch,
):
    monkeypatch.setattr(process_group, "_address_towards", lambda address: "127.0.0.1")
    here = Launch(0, 2, 0, 1, NAME, 29500)
    assert gloo_interface(here) is None
    devices = psutil.net_if_addrs()
    del devices["eth0"]
    assert gloo_interface(here) == "ib0"


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a rank on a CPU")
@pytest.mark.parametrize(("given", "expected"), [(None, 3), (1, 1), (5, 5)])
def test_a_rank_has_the_threads_that_its_recipe_asks_for(monkeypatch, given, expected):
    """Else its share of the cores."""
    launch = Launch(rank=1, world_size=2, local_rank=1, local_world_size=2, address="a", port=1)
    chosen: list[int] = []
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setattr(process_group, "read_launch", lambda: launch)
    monkeypatch.setattr(Launch, "export", lambda self, port: None)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **options: None)
    monkeypatch.setattr(process_group, "_compare_with_next_rank", lambda device: None)
    assert process_group.start_process_group(given) == torch.device("cpu")
    assert chosen == [expected]
