"""AdamW is fused on a GPU, from the first step and after it was restored."""

from types import SimpleNamespace

import pytest
import torch

from uno_ds.training.engine import OptimizerSettings, adamw
from uno_ds.training.shards import TrainedState


def test_adamw_is_fused_on_a_gpu_alone():
    parameter = torch.nn.Parameter(torch.ones(2))
    settings = OptimizerSettings()
    assert adamw([parameter], settings, torch.device("cuda")).defaults["fused"] is True
    assert adamw([parameter], settings, torch.device("cpu")).defaults["fused"] is None


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (None, "cpu")])
def test_a_restored_fused_adamw_counts_on_its_parameters_device(fused, device):
    flat = torch.empty(3, device="meta")
    state = object.__new__(TrainedState)
    state._stage = 0
    state._adamw = SimpleNamespace(
        defaults={"fused": fused}, state={flat: {}}, param_groups=[{"params": [flat]}]
    )
    state.begin_restore(7)
    assert state._adamw.state[flat]["step"].device.type == device
