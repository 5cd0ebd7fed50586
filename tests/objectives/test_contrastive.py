"""The contrastive regression loss in the objective: loss and gradient, negatives of other packs,
its cost, the kernel checks, and settings that contradict each other."""

import pytest
import torch
from dense import uno_loss
from dense_checks import assert_equal_gradients, gradients
from dense_comparison import check_against_dense
from tiny_objective import collate, loss_counts, make_composer, mixed_pack, tiny_objective
from torch.utils.flop_counter import FlopCounterMode

from uno_ds.cost.step_flops import step_flops
from uno_ds.cost.utilisation import plan_of
from uno_ds.cost.work import Work
from uno_ds.kernels.check_cases import case_of, small_plan
from uno_ds.kernels.comparison import compare
from uno_ds.recipe import load_recipe
from uno_ds.recipe_checks import warnings_of_recipe
from uno_ds.settings import SettingsError
from uno_ds.training.kernel_check import compare_contrast
from uno_ds.training.kernel_choice import shapes_of

LOSS = "objective.regression_loss=contrastive"


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("target", ["vit", "connector"])
def test_loss_and_gradient_equal_the_dense_implementation(target, temperature):
    check_against_dense(
        2,
        stop=True,
        grid=3,
        regression_target=target,
        regression_loss="contrastive",
        regression_temperature=temperature,
    )


def test_loss_and_gradient_over_the_rows_of_other_ranks_equal_the_dense_implementation():
    """Two ranks with a pack each are one process with the metaqueries of both packs: the dense
    implementation compares all rows that it is given."""
    settings = dict(regression_loss="contrastive", flow_weight=0, caption_weight=0, answer_weight=0)
    packs = [mixed_pack(seed, make_composer()) for seed in (0, 1)]
    objective = tiny_objective(**settings)
    batches = [collate(samples) for samples in packs]
    counts = sum(map(loss_counts, batches))
    dense_total, _ = uno_loss(objective, packs[0] + packs[1], counts, stop=True)
    wanted = gradients(objective, dense_total)

    targets: list[torch.Tensor] = []
    handle = objective.regression.register_forward_pre_hook(
        lambda _, arguments: targets.append(arguments[1].detach())
    )
    for batch in batches:
        objective(batch, counts)
    handle.remove()
    total = torch.zeros((), dtype=torch.float64)
    for batch, first in zip(batches, (0, len(targets[0])), strict=True):
        objective.regression.gather = lambda rows, first=first: (torch.cat(targets), first)
        total = total + objective(batch, counts)[0]
    torch.testing.assert_close(total, dense_total, rtol=1e-9, atol=0)
    got = gradients(objective, total)
    assert_equal_gradients(got, wanted)
    assert got["regression.weight"].abs().max() > 0
    assert got["model.vae2llm.weight"].abs().max() > 0


def regression(objective, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the loss of a pack, gradient of the head)."""
    batch = collate(mixed_pack(seed, make_composer()))
    objective.zero_grad()
    _, losses = objective(batch, torch.ones(4))
    total, _ = objective(batch, torch.ones(4))
    total.backward()
    return losses[2], objective.regression.weight.grad.clone()


def test_targets_of_other_ranks_are_more_negatives():
    """Two packs that each compare with both: what one call over the rows of both gives."""
    objective = tiny_objective(regression_loss="contrastive", flow_weight=0, caption_weight=0)
    module, given = objective.regression, []
    handle = module.register_forward_pre_hook(lambda _, arguments: given.append(arguments))
    alone = [regression(objective, seed)[0] for seed in (0, 1)]
    handle.remove()
    (hidden, target), (other_hidden, other_target) = given[0], given[2]
    with torch.no_grad():
        wanted = module(torch.cat([hidden, other_hidden]), torch.cat([target, other_target]))
    every = torch.cat([target, other_target])
    sums = []
    for seed, first in ((0, 0), (1, len(target))):
        module.gather = lambda rows, first=first: (every, first)
        sums.append(regression(objective, seed)[0])
    torch.testing.assert_close(sums[0], wanted[: len(target)].sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(sums[1], wanted[len(target) :].sum(), rtol=1e-12, atol=0)
    assert all(more > less for more, less in zip(sums, alone, strict=True))


def test_the_cost_model_counts_the_products_that_run():
    counted = {}
    for kind in ("cosine", "contrastive"):
        objective = tiny_objective(regression_loss=kind, dtype=torch.float32)
        batch = collate(mixed_pack(0, make_composer()), dtype=torch.float32)
        with FlopCounterMode(display=False) as counter:
            objective(batch, loss_counts(batch))[0].backward()
        counted[kind] = counter.get_total_flops()
    shape, work = objective.model.shape, Work.of(batch)
    recipe = load_recipe("tiny", [LOSS])
    plan = plan_of(recipe, False)
    assert plan.contrastive and not plan_of(load_recipe("tiny"), False).contrastive
    parts = step_flops(recipe.architecture, work, plan)
    scores = 3 * 2 * work.metaqueries**2
    assert parts["contrastive scores"].total == scores * recipe.architecture.vit_hidden
    assert counted["contrastive"] - counted["cosine"] == scores * shape.vit_hidden


def test_the_start_check_compares_and_times_the_contrastive_function():
    shapes, _ = shapes_of(load_recipe("tiny", [LOSS]), ["t2i"])
    assert shapes.temperature == 0.07
    plain, _ = shapes_of(load_recipe("tiny"), ["t2i"])
    assert plain.temperature is None
    device = torch.device("cpu")
    losses = []
    for given in (shapes, plain):
        check = case_of("regression", given, small_plan(device), device).checks[0]
        for found in compare(check.names, check.outputs, "triton", torch.float32, 2.0):
            assert found.is_right, str(found)
        losses.append(check.outputs(torch.float64, "reference")[0])
    assert losses[0].mean() > 2 > losses[1].mean()
    case_of("regression", shapes, small_plan(device), device).timing("reference").both()


def test_the_check_during_training_finds_a_wrong_kernel(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, candidates = (
        torch.randn(shape, generator=generator) for shape in ((5, 8), (6, 8), (9, 6))
    )
    arguments = (hidden, weight, candidates, 2, 0.1, "triton", 2.0, 0)
    assert compare_contrast(*arguments) == []
    from uno_ds.kernels.metaquery_regression import triton_operator

    def wrong(*given):
        return 1.01 * right(*given)

    right = triton_operator.metaquery_contrast
    monkeypatch.setattr(triton_operator, "metaquery_contrast", wrong)
    assert "contrastive regression by triton" in compare_contrast(*arguments)[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([LOSS, "objective.regression_weight=0"], "objective.regression_loss: is contrastive, but"),
        ([LOSS, "objective.regression_temperature=0"], "must be at least 0.001, got 0"),
        (
            ["objective.regression_negatives=ranks"],
            "objective.regression_negatives: is ranks, but objective.regression_loss is cosine",
        ),
        ([LOSS, "objective.regression_negatives=all"], "must be one of pack, ranks; got 'all'"),
    ],
)
def test_contradictions_are_one_line(overrides, message):
    with pytest.raises(SettingsError) as raised:
        load_recipe("tiny", overrides)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_temperature_without_the_loss_is_a_warning():
    recipe = load_recipe("tiny", ["objective.regression_temperature=0.5"])
    assert any("regression_temperature is 0.5" in line for line in warnings_of_recipe(recipe))
    used = load_recipe("tiny", [LOSS, "objective.regression_temperature=0.5"])
    assert not any("regression_temperature" in line for line in warnings_of_recipe(used))


def test_one_metaquery_in_a_pack_has_nothing_to_be_contrasted_with():
    alone = [LOSS, "data.max_samples_per_pack=1", "sequence.metaquery_grid=1"]
    (line,) = warnings_of_recipe(load_recipe("tiny", alone))
    assert "nothing is contrasted, and the loss is 0" in line
    for more in (["sequence.metaquery_grid=2"], ["data.max_samples_per_pack=2"]):
        assert not warnings_of_recipe(load_recipe("tiny", [*alone, *more]))
    over_ranks = [*alone, "objective.regression_negatives=ranks"]
    assert not warnings_of_recipe(load_recipe("tiny", over_ranks))
