"""Guards of a run: what is a spike, when data is rubbish, and whether kernels agree with the
reference."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from uno_ds.kernels.conditioning_attention import sdpa as sdpa_module
from uno_ds.kernels.plan import CAUSAL, FULL, build_plan
from uno_ds.settings import SettingsError, build
from uno_ds.training.checkpoint import CheckpointSettings
from uno_ds.training.engine import StepResult
from uno_ds.training.health import Health, HealthSettings, RowGuard, SpikeGuard, TrainingStopped
from uno_ds.training.kernel_check import compare_attention, compare_regression
from uno_ds.training.saving import Saver


def spikes(losses: list[float], **settings: float) -> list[int]:
    guard = SpikeGuard(build(HealthSettings, {"spike_factor": 3.0, "spike_window": 4, **settings}))
    return [
        number
        for number, loss in enumerate(losses)
        if guard.observe(SimpleNamespace(loss_on_host=torch.tensor(loss)))
    ]


def test_a_spike_is_above_so_many_medians_and_does_not_move_the_median():
    assert spikes([1, 1, 1, 1, 3.01, 3.01, 2.99, 3.01]) == [4, 5, 7]
    assert spikes([100, 1, 1, 1, 3.01]) == [4]


def test_there_is_no_spike_before_the_window_is_full_or_with_the_guard_off_and_nan_does_not_count():
    assert spikes([1, 1, 1, 50, 1, 50]) == [5]
    assert spikes([1, 1, 1, math.nan, 50]) == []
    assert spikes([1, 1, 1, 1, 50], spike_factor=0) == []
    with pytest.raises(SettingsError, match="spike_factor"):
        build(HealthSettings, {"spike_factor": 0.5})


def test_the_guards_go_on_after_a_resume_where_they_were():
    settings = build(HealthSettings, {"spike_factor": 3.0, "spike_window": 2})
    before, after = Health(settings, 10), Health(settings, 10)
    for loss in (1.0, 2.0, 3.0):
        before.spikes.observe(SimpleNamespace(loss_on_host=torch.tensor(loss)))
    before.skips.skipped = 4
    after.restore(json.loads(json.dumps(before.state())) | {"step": 3})
    assert after.spikes.limit == before.spikes.limit == 7.5 and after.skips.skipped == 4
    assert (
        after.highest_loss == math.inf
        and Health(build(HealthSettings, {"spike_action": "skip"}), 1).highest_loss == math.inf
    )


def test_the_observers_of_a_step_read_what_is_on_the_host_and_wait_for_no_device(tmp_path):
    # A tensor on "meta" has no value: reading one raises, as reading one of a GPU would wait.
    device = {
        name: torch.empty((), device="meta")
        for name in ("loss", "losses", "counts", "tokens", "grad_norm", "finite_here")
    }
    result = StepResult(
        **device,
        skipped=False,
        signals=torch.tensor([0.0, 0.0, 4.0, 1.0]),
        loss_on_host=torch.tensor(0.5),
    )
    health = Health(build(HealthSettings, {"spike_factor": 3.0}), 10)
    assert health.observe(1, result, []) == []
    assert health.signals.drawn_rows == 4 and list(health.spikes.losses) == [0.5]
    recipe = SimpleNamespace(health=SimpleNamespace(spike_factor=0.0))
    saver = Saver(tmp_path, CheckpointSettings(), SimpleNamespace(rank=0, recipe=recipe), None)
    saver.observe(1, result)
    assert saver.retention.doubt is None


def stops(counts: list[tuple[int, int]], limit: float, window: int) -> int | None:
    guard = RowGuard(build(HealthSettings, {"max_bad_fraction": limit, "bad_rows_window": window}))
    for number, (drawn, bad) in enumerate(counts):
        try:
            guard.observe(drawn, bad)
        except TrainingStopped as stopped:
            assert "health.max_bad_fraction" in str(stopped)
            return number
    return None


def test_too_many_bad_rows_in_the_window_end_the_run_and_old_ones_are_forgotten():
    rotten = [(100 * step, 50 * step) for step in range(30)]
    assert stops(rotten, 0.5, 1000) == 10 and stops(rotten, 0.51, 1000) is None
    turning = [(100 * step, 100 * max(0, step - 20)) for step in range(60)]
    assert stops(turning, 0.5, 1000) == 25
    assert stops([(100, 100), (101, 100), (100_000, 40_000)], 0.5, 1000) is None
    assert stops([(0, 0), (1000, 1000)], 1.0, 1000) == 1


@pytest.fixture
def attention() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, object]:
    """Two samples: text that is causal, an image that sees it."""
    lengths = [50, 90, 30, 60]
    segment = np.repeat(np.arange(4), lengths)
    position = np.concatenate([np.arange(length) for length in lengths])
    relation = np.zeros((4, 4), dtype=np.int8)
    relation[0, 0] = relation[2, 2] = CAUSAL
    relation[1, 0] = relation[1, 1] = relation[3, 2] = relation[3, 3] = FULL
    plan = build_plan(segment, position, relation, np.array([0, 0, 1, 1]), (20, sum(lengths)))
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(plan.queries, 4, 16, generator=generator),
        torch.randn(plan.keys, 2, 16, generator=generator),
        torch.randn(plan.keys, 2, 16, generator=generator),
        plan,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_a_right_kernel_passes_whatever_queries_are_compared(attention, backend, dtype):
    q, k, v, plan = attention
    for seed in range(8):
        assert (
            compare_attention(q.to(dtype), k.to(dtype), v.to(dtype), plan, backend, 4.0, seed) == []
        )


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda out, q, k, v: out * 1.01, "the output is off"),
        (
            lambda out, q, k, v: out + (k.sum() - k.sum().detach()) * 0.01,
            "the gradient of k is off",
        ),
        (lambda out, q, k, v: out + (v[0] * 0).sum() / 0, "the output is off"),
        (
            lambda out, q, k, v: out.detach() + (q - q.detach()) + 0 * (k.sum() + v.sum()),
            "the gradient of q is off",
        ),
    ],
)
def test_a_kernel_that_is_wrong_forward_or_backward_is_named(attention, monkeypatch, wrong, named):
    q, k, v, plan = attention
    right = sdpa_module.conditioning_attention
    monkeypatch.setattr(
        sdpa_module,
        "conditioning_attention",
        lambda q, k, v, plan: wrong(right(q, k, v, plan), q, k, v),
    )
    assert any(named in line for line in compare_attention(q, k, v, plan, "sdpa", 4.0, 0))


def test_the_regression_agrees_with_itself_and_nothing_is_compared_where_there_is_nothing():
    generator = torch.Generator().manual_seed(1)
    hidden, weight, target = (
        torch.randn(*shape, generator=generator) for shape in ((9, 32), (24, 32), (9, 24))
    )
    assert compare_regression(hidden, weight, target, "cosine", "reference", 4.0, 0) == []
    assert compare_regression(hidden[:0], weight, target[:0], "cosine", "reference", 4.0, 0) == []
