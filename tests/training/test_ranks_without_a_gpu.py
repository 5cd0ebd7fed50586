"""At the start a rank whose GPU is gone says so; a rank 0 that does not answer is no mistake."""

import threading
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from uno_ds.training import process_group
from uno_ds.training.failures import DeviceLost
from uno_ds.training.launch_environment import Launch


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], dict[int, str]]:
    """Errors by rank, of ranks with these devices."""

    def compare(devices: list[str]) -> dict[int, str]:
        store, ranks, errors = dist.HashStore(), threading.local(), {}
        monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
        monkeypatch.setattr(dist, "get_rank", lambda: ranks.own)
        monkeypatch.setattr(dist, "get_world_size", lambda: len(devices))

        def run(rank: int) -> None:
            ranks.own = rank
            try:
                process_group._compare_with_next_rank(torch.device(devices[rank]))
            except DeviceLost as error:
                errors[rank] = str(error)

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(devices))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        return errors

    return compare


def test_a_rank_without_a_gpu_fails_where_the_next_one_has_one(compare):
    assert compare(["cpu"]) == compare(["cpu"] * 3) == compare(["cuda:0", "cuda:1"]) == {}
    found = compare(["cuda:0", "cpu", "cpu", "cuda:1"])
    assert set(found) == {2}
    assert found[2].startswith("torch finds no GPU on this host, and rank 3 on host ")
    assert set(compare(["cuda:0", "cuda:0", "cpu"])) == {2}


@pytest.mark.parametrize(
    ("message", "key"),
    [
        ("The client socket has timed out after 60000ms while trying to connect to (a, 1).", None),
        ("connect() failed: Connection refused", None),
        ("The server socket has failed to listen: EADDRINUSE, address already in use", "PORT"),
        ("getaddrinfo failed: Name or service not known", "ADDR"),
    ],
)
def test_an_address_that_is_wrong_is_a_mistake_and_one_that_does_not_answer_is_not(
    message: str, key: str | None
):
    launch = Launch(1, 2, 0, 1, "node1", 29500)
    mistake = process_group._mistake(launch, 29500, dist.DistNetworkError(message))
    assert (mistake and mistake.key) == (f"MASTER_{key}" if key else None)
