"""The gradient of UNO is right, reaches what it should train, and nothing else."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from dense_comparison import WEIGHTS, check_against_dense, gradients
from tiny_objective import (
    collate,
    edit,
    loss_counts,
    make_composer,
    mixed_pack,
    question_answer,
    random_ids,
    random_views,
    text_to_image,
    tiny_objective,
)

from uno_ds.data.layouts.conversation import conversation_sample
from uno_ds.data.layouts.text_to_image import text_to_image_sample
from uno_ds.data.text import Tokenizer
from uno_ds.kernels.plan import NONE
from uno_ds.objectives.uno import UnoObjective
from uno_ds.recipe import load_recipe
from uno_ds.sequence.batch import PackedBatch
from uno_ds.sequence.segments import CONTEXT_KINDS, SUPERVISION_KINDS, Kind, Sample, SegmentTable

# In the last layer these act on the latents' own rows only, which nothing but the velocity head
# reads.
FLOW_ONLY = ("q_proj", "q_norm", "o_proj", "post_norm", "gate_proj", "up_proj", "down_proj")


def random_numbers(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("everything", [False, True], ids=["generation", "all"])
@pytest.mark.parametrize("stop", [True, False], ids=["stop", "flow"])
def test_loss_and_every_gradient_equal_the_dense_implementation(
    stop, everything, backend, recompute
):
    check_against_dense(1, stop, everything, backend=backend, recompute=recompute)


@pytest.mark.parametrize("kind", ["cosine", "l2", "smooth_l1"])
@pytest.mark.parametrize("target", ["vit", "connector"])
def test_every_regression_loss_equals_the_dense_implementation(target, kind):
    check_against_dense(2, stop=True, grid=3, regression_target=target, regression_loss=kind)


@pytest.mark.parametrize("stop", [True, False], ids=["stop", "flow"])
@pytest.mark.parametrize("seed", range(3, 7))
def test_packs_of_other_sizes_equal_the_dense_implementation(seed, stop):
    check_against_dense(seed, stop, grid=2 + seed % 2)


def test_stopping_at_the_context_changes_an_edits_gradient_but_not_its_loss_nor_a_plain_prompt():
    for make, differs in ((edit, True), (text_to_image, False)):
        samples = [make(random_numbers(), make_composer())]
        objective = tiny_objective(**WEIGHTS)
        totals, grads = [], []
        for stop in (True, False):
            total, _ = objective(collate(samples, stop), torch.ones(4))
            totals.append(total.detach())
            grads.append(gradients(objective, total))
        torch.testing.assert_close(totals[0], totals[1], rtol=1e-12, atol=0)
        changed = [
            name
            for name, grad in grads[0].items()
            if grad is not None and (grad - grads[1][name]).abs().max() > 1e-6 * grad.abs().max()
        ]
        assert any(name.endswith("gen.v_proj.weight") for name in changed) == differs
        assert bool(changed) == differs


def is_generation(name: str) -> bool:
    """Stated again, so that the product's own list is tested too."""
    return ".gen." in name or name.split(".")[1] in (
        "vae2llm",
        "llm2vae",
        "time_embedder",
        "norm_gen",
    )


@pytest.mark.parametrize("stop", [True, False], ids=["stop", "flow"])
@pytest.mark.parametrize("make", [text_to_image, edit])
@pytest.mark.parametrize("loss", ["caption", "regression"])
def test_one_understanding_loss_alone_reaches_every_generation_weight_but_the_velocity_heads_own(
    loss, make, stop
):
    objective = tiny_objective(
        **dict(flow_weight=0, caption_weight=0, regression_weight=0, answer_weight=0)
        | {f"{loss}_weight": 1.0}
    )
    samples = [
        make(
            random_numbers(seed),
            make_composer(captions=loss == "caption", metaqueries=loss == "regression"),
        )
        for seed in range(2)
    ]
    total, _ = objective(collate(samples, stop), torch.ones(4))
    last = f"model.layers.{objective.model.shape.layers - 1}.gen."
    reached = set()
    for name, grad in gradients(objective, total).items():
        if not is_generation(name) and name.startswith("model."):
            assert grad is None, f"{name} is frozen and has a gradient"
        elif name.startswith(
            ("model.norm_gen", "model.llm2vae", *(last + module for module in FLOW_ONLY))
        ):
            assert grad is None or not grad.any(), (
                f"{name} feeds the velocity head only and has a gradient"
            )
        else:
            assert grad.abs().max() > 1e-9, f"{name} gets no gradient"
            reached.add(name)
    # 3 layers of 14 tensors, less those of FLOW_ONLY with their one bias, vae2llm's 2 and the time
    # embedder's 4.
    assert (
        len([name for name in reached if name.startswith("model.")])
        == 3 * 14 - len(FLOW_ONLY) - 1 + 2 + 4
    )
    others = {"metaqueries.weight", "regression.weight"} if loss == "regression" else set()
    assert {name for name in reached if not name.startswith("model.")} == others


def outputs(objective: UnoObjective, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden states that caption and regression read, hidden states of the noised latents)."""
    with torch.no_grad():
        latents = objective.latent_rows(batch)
        understanding, generation, _ = objective.model(
            batch, latents, objective.metaqueries(batch.metaqueries.index_M)
        )
    return understanding[torch.cat([batch.captions.rows_Y, batch.metaqueries.rows_M])], generation[
        batch.latents.noised_X
    ]


def with_another_prompt(sample: Sample) -> Sample:
    """The same sample with other words of the same number in its prompt or instruction."""

    def reworded(ids: np.ndarray) -> np.ndarray:
        return np.concatenate([ids[:1], (ids[1:-1] + 2) % 19 + 5, ids[-1:]])

    return Sample(
        sample.key,
        [
            dataclasses.replace(segment, token_ids=reworded(segment.token_ids))
            if segment.kind == Kind.TEXT
            else segment
            for segment in sample.segments
        ],
    )


def blind(relation: Callable[[SegmentTable], np.ndarray]) -> Callable[[SegmentTable], np.ndarray]:
    def without_prompts(table: SegmentTable) -> np.ndarray:
        seen = relation(table)
        seen[
            (table.kind_S == Kind.NOISED)[:, None] & np.isin(table.kind_S, CONTEXT_KINDS)[None, :]
        ] = NONE
        return seen

    return without_prompts


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("make", [text_to_image, edit])
def test_the_prompt_reaches_supervision_only_through_the_noised_latents(make, backend, monkeypatch):
    """One layer: not at all. More layers: it does, unless the noised segment is blind to it."""
    sample = make(random_numbers(), make_composer())
    pair = [collate([version]) for version in (sample, with_another_prompt(sample))]
    assert not torch.equal(pair[0].text_ids, pair[1].text_ids)

    shallow, deep = (tiny_objective(layers, backend=backend, **WEIGHTS) for layers in (1, 3))
    (read, latents), (read_other, latents_other) = (outputs(shallow, batch) for batch in pair)
    assert len(read) and torch.equal(read, read_other)
    assert not torch.allclose(latents, latents_other), "the latents do not see the prompt either"
    read, read_other = (outputs(deep, batch)[0] for batch in pair)
    assert ((read - read_other).abs().amax(dim=1) > 1e-9).all()

    monkeypatch.setattr(SegmentTable, "relation", blind(SegmentTable.relation))
    pair = [collate([version]) for version in (sample, with_another_prompt(sample))]
    (read, latents), (read_other, latents_other) = (outputs(deep, batch) for batch in pair)
    assert torch.equal(read, read_other) and torch.equal(latents, latents_other)


@pytest.mark.parametrize(
    "caption_weight, regression_weight", [(0, 0), (0.1, 0), (0, 0.5), (0.1, 0.5)]
)
def test_a_loss_of_weight_0_lays_out_no_token(caption_weight, regression_weight):
    recipe = load_recipe(
        "tiny_base",
        [
            f"objective.caption_weight={caption_weight}",
            f"objective.regression_weight={regression_weight}",
            "sequence.supervised_fraction=1",
            "sequence.supervision_window=[0,1]",
            "sequence.metaquery_grid=2",
        ],
    )
    composer, rng = recipe.composer(Tokenizer(recipe.tokenizer_folder)), random_numbers()
    kinds = set()
    for _ in range(10):
        sample = text_to_image_sample(
            composer, "t2i", random_ids(rng), random_ids(rng), random_views(rng), rng
        )
        kinds |= {segment.kind for segment in sample.segments if segment.kind in SUPERVISION_KINDS}
    assert kinds == {
        kind
        for kind, weight in ((Kind.CAPTION, caption_weight), (Kind.METAQUERY, regression_weight))
        if weight
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_understanding_losses_it_is_plain_flow_matching_bit_for_bit(dtype):
    objective = tiny_objective(caption_weight=0, regression_weight=0, answer_weight=0, dtype=dtype)
    assert objective.metaqueries is None and objective.regression is None
    samples = mixed_pack(0, make_composer(captions=False, metaqueries=False))
    assert not {segment.kind for sample in samples for segment in sample.segments} & set(
        SUPERVISION_KINDS
    )
    batch = collate(samples, dtype=dtype)
    total, _ = objective(batch, loss_counts(batch))
    got = gradients(objective, total)

    with torch.no_grad():
        clean = objective.latent_rows(batch)
        x, eps, t = (
            clean[batch.latents.noised_X],
            batch.latents.noise_XC,
            batch.latents.timestep_G[batch.latents.noised_X][:, None],
        )
        shown = clean.clone()
        shown[batch.latents.noised_X] = (1 - t) * x + t * eps
    _, generation, _ = objective.model(
        batch, shown, torch.zeros(0, objective.model.shape.hidden, dtype=dtype)
    )
    flow = ((objective.model.llm2vae(generation[batch.latents.noised_X]) - (eps - x)) ** 2).mean(
        dim=1
    ).sum() / len(batch.latents.noised_X)
    assert torch.equal(total, flow)
    plain = gradients(objective, flow)
    assert any(grad is not None and grad.any() for grad in plain.values())
    for name, grad in got.items():
        assert (grad is None and plain[name] is None) or torch.equal(grad, plain[name]), name


def nothing() -> list[Sample]:
    return []


def text_only() -> list[Sample]:
    rng = random_numbers()
    return [
        conversation_sample(
            make_composer(), "text", [(False, [random_ids(rng)]), (True, [random_ids(rng)])]
        )
    ]


def without_noised_latents() -> list[Sample]:
    return [question_answer(random_numbers(), make_composer())]


def without_caption() -> list[Sample]:
    return [text_to_image(random_numbers(), make_composer(), caption=False)]


def without_supervision() -> list[Sample]:
    return [edit(random_numbers(), make_composer(supervised_fraction=0.0))]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("everything", [False, True], ids=["generation", "all"])
@pytest.mark.parametrize(
    "make", [nothing, text_only, without_noised_latents, without_caption, without_supervision]
)
def test_a_pack_that_lacks_something_has_a_finite_loss_and_a_gradient_for_every_trainable_weight(
    make, everything, backend, recompute
):
    """A rank that skipped a weight in backward would leave the other ranks waiting for it."""
    objective = tiny_objective(
        backend=backend, recompute=recompute, everything=everything, **WEIGHTS
    )
    total, losses = objective(collate(make(), everything=everything), torch.ones(4))
    assert total.isfinite() and losses.isfinite().all()
    for name, grad in gradients(objective, total).items():
        if everything or is_generation(name) or not name.startswith("model."):
            assert grad is not None and grad.isfinite().all(), name
        else:
            assert grad is None, name
