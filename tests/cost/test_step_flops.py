"""Operations of a real step: what torch counts plus what the plan shows, exactly; and the naive
spelling is the same model."""

import dataclasses

import pytest
import torch
from rounding import assert_equal_up_to_rounding
from tiny import LOSS_ROUNDING, ROW_SUMS, SampleList, counts_of, recipe

from benchmarks.suite.counting import counted_flops
from benchmarks.suite.models import build_objective
from benchmarks.suite.naive import BLOCK, block_mask, naive_decoder
from uno_ds.cost.flops import flops
from uno_ds.cost.scenario import Scenario
from uno_ds.cost.step_flops import PASSES, Plan, attention_flops, codec_flops, step_flops, total
from uno_ds.cost.utilisation import plan_of
from uno_ds.cost.work import Work, visible_pairs
from uno_ds.kernels.backends import KERNELS
from uno_ds.recipe import Recipe, load_recipe
from uno_ds.sequence.batch import PackedBatch


def small_batch(settings: Recipe, answers: bool = False) -> PackedBatch:
    make = SampleList(settings)
    return make.collate(
        [
            make.text_to_image(1),
            make.edit(2),
            make.text_to_image(3, caption=False),
            *([make.conversation(4)] if answers else []),
        ]
    )


def step_of(settings: Recipe, batch: PackedBatch, answers: bool = False):
    # Fused losses of a head that trains recompute their logits.
    kernels = {name: kernel.reference for name, kernel in KERNELS.items()}
    if settings.kernels.experts != "auto":
        kernels["experts"] = settings.kernels.experts
    settings = dataclasses.replace(settings, kernels=settings.kernels.with_backends(kernels))
    objective = build_objective(
        settings, torch.device("cpu"), torch.float32, random=True, read_answers=answers
    )

    def step() -> torch.Tensor:
        objective.zero_grad()
        loss, _ = objective(batch, counts_of([batch]))
        loss.backward()
        return loss.detach()

    return objective, step


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": {"recompute": True}},
        {"model": {"train": "all"}},
        {"kernels": {"experts": "grouped"}},
        {"objective": {"regression_target": "connector"}},
        {"objective": {"regression_weight": 0}, "sequence": {"metaquery_grid": 0}},
        {"sequence": {"context_gradient": "flow"}},
        {"model": {"train": "lora"}, "lora": {"rank": 3}},
        {"model": {"train": "lora", "recompute": True}, "lora": {"rank": 3}},
        {"model": {"train": "lora", "recompute": True}, "lora": {"targets": "attention"}},
        {
            "model": {"train": "lora"},
            "lora": {"targets": ["layers.1.*_moe_gen"], "also_train": ["metaqueries"]},
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("spelling", ["structured", "naive"])
def test_a_step_does_what_torch_counts_and_the_attention_that_the_plan_shows(
    changes: dict, spelling: str
):
    settings = recipe(**changes)
    answers = settings.model.train == "all"
    batch = small_batch(settings, answers)
    objective, step = step_of(settings, batch, answers)
    work, plan = Work.of(batch), plan_of(settings, answers, spelling == "naive")
    parts = step_flops(settings.architecture, work, plan)
    if spelling == "naive":
        with naive_decoder(objective.model):
            counted = counted_flops(step)
    else:
        counted = counted_flops(step)
    assert (
        counted
        == total(parts).total - attention_flops(parts, settings.architecture, work, plan).total
    )


def test_pairs_and_rows_of_a_batch_are_those_of_its_dense_mask():
    batch = small_batch(recipe(), answers=True)
    work, context = Work.of(batch), batch.context
    dense = {"context": batch.context_plan.visible(), "live": batch.live_plan.visible()}
    assert (
        work.context_pairs == dense["context"].sum()
        and work.live_pairs == dense["live"][:, context:].sum()
    )
    assert work.constant_key_pairs == dense["live"][:, :context].sum() > 0
    assert visible_pairs(batch.live_plan, (3, 50)) == dense["live"][:, 3:50].sum()
    assert (
        work.rows == batch.tokens
        and work.noised == batch.loss_counts["flow"]
        and work.captions == batch.loss_counts["caption"]
    )
    doubled = work + work
    assert doubled.live_pairs == 2 * work.live_pairs and len(doubled.encoded_pixels) == 2 * len(
        work.encoded_pixels
    )


def test_naive_spelling_gives_the_losses_of_the_model_and_for_pictures_from_text_its_gradients():
    settings = recipe()
    make = SampleList(settings)
    batch = make.collate([make.text_to_image(1), make.text_to_image(2)])
    objective, step = step_of(settings, batch)
    results = []
    for naive in (False, True):
        if naive:
            with naive_decoder(objective.model):
                loss = step()
        else:
            loss = step()
        results.append(
            (
                loss,
                {
                    name: parameter.grad.clone()
                    for name, parameter in objective.named_parameters()
                    if parameter.requires_grad
                },
            )
        )
    assert results[0][0].item() == pytest.approx(results[1][0].item(), rel=LOSS_ROUNDING)
    for name, ours in results[0][1].items():
        assert_equal_up_to_rounding(results[1][1][name], ours, *ROW_SUMS, *ROW_SUMS, what=name)
    assert "forward" not in vars(objective.model)


def test_the_block_mask_of_the_naive_spelling_shows_what_the_plan_shows():
    """The mask that a GPU gets, read out on the CPU; rows of the padding see themselves."""
    batch = small_batch(recipe())
    plan, order, length = batch.live_plan, batch.order_T, batch.tokens
    segment, position = (
        torch.empty_like(order).index_copy(0, order, column.long())
        for column in (plan.segment_T, plan.position_T)
    )
    mask = block_mask(plan.relation_SS, segment, position, compiled=False)
    rows = length + -length % BLOCK
    every = torch.arange(rows)
    dense = mask.mask_mod(0, 0, every[:, None], every[None, :])
    both = torch.cat([batch.context_plan.visible(), plan.visible()])
    torch.testing.assert_close(dense[:length, :length][order][:, order], both)
    assert dense[length:].sum() == rows - length and not dense[:length, length:].any()


def test_a_batch_as_the_table_has_it_costs_what_the_table_says():
    """BAGEL-7B's decoder on a batch's rows without start and end tokens, all layers alike, against
    `flops` of the scenario."""
    shape = load_recipe("bagel_7b_uno", absent=[]).architecture
    pack = Scenario(prompt=200, latents=1024, caption=200, metaqueries=64, samples=22)
    latents, caption, queries = pack.latents, pack.caption, pack.metaqueries
    work = Work(
        context=pack.context,
        understanding=pack.supervision,
        generation=pack.generation,
        context_pairs=22 * 200 * 201 // 2,
        live_pairs=22
        * (latents**2 + caption * (caption + 1) // 2 + queries**2 + (caption + queries) * latents),
        constant_key_pairs=22 * latents * 200,
        patches=0,
        condition_patches=0,
        patch_pairs=0,
        noised=0,
        captions=22 * caption,
        answers=0,
        metaqueries=0,
        encoded_pixels=(),
    )
    table = flops(shape, pack)
    for spelling, expected in (("structured", table.uno_structured), ("naive", table.uno_naive)):
        parts = step_flops(shape, work, Plan(read_context=True, naive=spelling == "naive"))
        kept = total(
            {name: parts[name] for name in ("projections", "attention", "mlp", "language head")}
        )
        assert kept.total == expected and kept.recompute == 0


def test_recomputation_adds_nearly_one_forward_of_the_live_rows_and_no_operations_of_the_model():
    settings = recipe()
    work = Work.of(small_batch(settings))
    plain, again = (
        total(
            step_flops(
                settings.architecture, work, plan_of(recipe(model={"recompute": flag}), False)
            )
        )
        for flag in (False, True)
    )
    assert (
        plain.model == again.model
        and 0 < again.recompute < again.forward
        and set(vars(plain)) == set(PASSES)
    )


def test_operations_of_the_flux_autoencoder_grow_faster_than_the_picture():
    small, large = codec_flops("flux", 256, 256), codec_flops("flux", 512, 512)
    assert small > 1e11 and 4 * small < large < 6 * small and codec_flops("pixel", 512, 512) == 0


@pytest.mark.parametrize("train", ["generation", "all"])
def test_operations_of_interleaved_samples_are_those_that_torch_counts(train):
    settings = recipe(model={"train": train})
    make = SampleList(settings)
    batch = make.collate([make.interleaved(1), make.interleaved(2)])
    objective, step = step_of(settings, batch, answers=True)
    work, plan = Work.of(batch), plan_of(settings, True, False)
    parts = step_flops(settings.architecture, work, plan)
    attention = attention_flops(parts, settings.architecture, work, plan).total
    assert counted_flops(step) == total(parts).total - attention
    assert work.answers and work.noised > work.captions
