"""The stream of a run whose supervision ends: the step at which a batch is used is known when it is
made, later batches are those of flow matching, and a restart in the middle changes nothing."""

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from equal_batches import alike, same, take
from small_runs import edit_row, t2i_row, tree, write_edit, write_t2i

from uno_ds.cost.step_flops import step_flops
from uno_ds.cost.utilisation import plan_of
from uno_ds.cost.work import Work
from uno_ds.run import Run, prepare
from uno_ds.sequence.batch import PackedBatch

STEPS, LAST, LANES = 10, 4, 2
FLOW = {"caption_weight": 0, "regression_weight": 0}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Run]]:
    folder = tmp_path_factory.mktemp("ending")
    paths = [
        write_t2i(folder / "t2i/a.parquet", [t2i_row(seed=seed) for seed in range(23)]),
        write_edit(folder / "edit/a.parquet", [edit_row(seed=seed) for seed in range(9)]),
    ]

    def made(prefetch: int = 2, workers: int = 2, **objective: Any) -> Run:
        changes = {
            "steps": STEPS,
            "engine": {"packs_per_step": LANES},
            "data": {"prefetch": prefetch, "workers": workers},
            "objective": objective,
        }
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree(folder, paths, **changes)))
        return prepare(str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        yield made


def supervised(batch: PackedBatch) -> bool:
    return bool(batch.loss_counts["caption"] or batch.loss_counts["regression"])


@pytest.mark.parametrize("prefetch, workers", [(0, 1), (2, 1), (3, 4)])
def test_after_the_end_batches_are_those_of_flow_matching(make, prefetch, workers):
    run = make(prefetch, workers, supervise_until=LAST / STEPS)
    stream = run.stream(0, 1)
    batches = iter(stream)
    first = list(itertools.islice(batches, LAST))
    middle = stream.state
    rest = list(itertools.islice(batches, STEPS - LAST))
    stream.close()
    assert all(supervised(batch) for packs in first for batch in packs)
    assert not any(supervised(batch) for packs in rest for batch in packs)
    # Until the end nothing differs from a run whose supervision does not end.
    assert alike(first, take(make().stream(0, 1), LAST))
    # Some sample waited for room at the end.
    assert any(state["waiting"] for state in middle.values())

    flow = make(**FLOW)
    other = flow.stream(0, 1)
    other.restore(json.loads(json.dumps(middle)))
    expected = take(other, STEPS - LAST)
    assert alike(rest, expected)

    def flop(run: Run, packs: list[PackedBatch]) -> list[Any]:
        plan, shape = plan_of(run.recipe, False), run.recipe.architecture
        return [step_flops(shape, Work.of(batch), plan) for batch in packs]

    assert flop(run, rest[0]) == flop(flow, expected[0])
    assert flop(run, rest[0]) != flop(run, first[0])


@pytest.mark.parametrize("step", [1, LAST - 1, LAST, LAST + 1, STEPS - 1])
def test_a_restart_before_at_and_after_the_end_goes_on_with_the_same_batches(make, step):
    settings = {"supervise_until": LAST / STEPS, "supervision_decay": "cosine"}
    run = make(**settings)
    whole = take(run.stream(0, 1), STEPS)
    first, second = run.stream(0, 1), run.stream(0, 1)
    assert alike(take(first, step), whole[:step])
    second.restore(json.loads(json.dumps(first.state)), step)
    assert alike(take(second, STEPS - step), whole[step:])


def test_any_number_of_ranks_ends_at_the_same_step(make):
    run = make(supervise_until=LAST / STEPS, supervision_decay="cosine")
    alone = take(run.stream(0, 1), LAST + 2)
    shared = [take(run.stream(rank, 2), LAST + 2) for rank in range(2)]
    for step, packs in enumerate(alone):
        assert all(map(same, packs, [shared[0][step][0], shared[1][step][0]]))


def test_the_factor_of_a_decay_is_that_of_the_step_that_uses_the_batch(make):
    run = make(supervise_until=LAST / STEPS, supervision_decay="cosine")
    schedule = run.recipe.supervision_schedule
    assert schedule is not None
    for step, packs in enumerate(take(run.stream(0, 1), STEPS), start=1):
        for batch in packs:
            for weights in (batch.captions.weights_Y, batch.metaqueries.weights_M):
                if step == 1 or step > LAST:
                    assert weights is None
                else:
                    assert weights.tolist() == pytest.approx([schedule.weight(step)] * len(weights))
