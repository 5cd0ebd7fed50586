"""Threads of a rank on a CPU."""

import os

import deepspeed
import pytest
import torch

from uno_ds.training import process_group
from uno_ds.training.launch_environment import Launch


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a rank on a CPU")
@pytest.mark.parametrize(("given", "expected"), [(None, 3), (1, 1), (5, 5)])
def test_a_rank_has_the_threads_that_its_recipe_asks_for(monkeypatch, given, expected):
    """Else its share of the cores."""
    launch = Launch(rank=1, world_size=2, local_rank=1, local_world_size=2, address="a", port=1)
    chosen: list[int] = []
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(process_group, "read_launch", lambda: launch)
    monkeypatch.setattr(Launch, "export", lambda self, port: None)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **options: None)
    assert process_group.start_process_group(given) == torch.device("cpu")
    assert chosen == [expected]
