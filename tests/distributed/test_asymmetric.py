"""Ranks whose batches lack a modality, a loss or every image, and ranks whose batch is broken: no
rank waits for ever, the losses are those of all ranks together, and a step is taken by all ranks or
by none."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Ranks
from tiny import (
    GRADIENT_ROUNDING,
    LOSS_ROUNDING,
    SampleList,
    assert_near,
    full_parameters,
    parameter_rounding,
    plain_adamw,
    plain_objective,
    plain_step,
    recipe,
    sharded_config,
)

from uno_ds.recipe import Recipe
from uno_ds.sequence.segments import Kind, Sample
from uno_ds.training.engine import Engine
from uno_ds.training.health import NonFiniteGuard

RANKS, LR, CLIP = 3, 1e-2, 0.4

# What each rank has in each step; every step but those of BROKEN is a good one.
ROLES = [
    ("everything", "everything", "everything"),
    ("everything", "no captions", "no images"),
    ("only text", "everything", "no captions"),
    ("no visual encoder", "only questions", "everything"),
    ("no noised latents", "no images", "no metaqueries"),
    ("no images", "only text", "only questions"),
    ("everything", "nan pixel", "no captions"),
    ("only text", "everything", "no visual encoder"),
    ("nan noise", "everything", "only text"),
    ("no captions", "no images", "everything"),
    ("interleaved", "only text", "no images"),
]
BROKEN = {
    step: rank
    for step, roles in enumerate(ROLES)
    for rank, role in enumerate(roles)
    if role.startswith("nan")
}

# (DeepSpeed configuration, what trains, whether answers are read)
CASES = [
    ("zero3", "generation", "answers"),
    ("zero3", "generation", "no-answers"),
    ("zero3", "all", "answers"),
    ("zero0", "generation", "answers"),
    ("zero2", "all", "no-answers"),
]
WITH_CAPTIONS = (
    "everything",
    "interleaved",
    "nan pixel",
    "nan noise",
    "no metaqueries",
    "no visual encoder",
)


def samples_of(make: SampleList, role: str, number: int) -> list[Sample]:
    """ "only text" has a prompt without an image beside answered questions, "only questions" has no
    loss at all."""
    t2i, edit, chat = make.text_to_image, make.edit, make.conversation
    if role == "no captions":
        return [t2i(number, caption=False), edit(number + 1, caption=False)]
    if role == "no metaqueries":
        return [t2i(number, metaqueries=False), edit(number + 1, metaqueries=False)]
    if role == "no visual encoder":
        return [t2i(number, metaqueries=False)]
    if role == "no noised latents":
        return [chat(number), chat(number + 1)]
    if role == "no images":
        return [chat(number, image=False)]
    if role == "only text":
        return [chat(number, image=False), chat(number + 1, image=False, answer=False)]
    if role == "interleaved":
        return [make.interleaved(number), make.interleaved(number + 1)]
    if role == "only questions":
        return [chat(number, image=False, answer=False)]
    samples = [t2i(number), edit(number + 1), chat(number + 2)]
    noised = next(segment for segment in samples[0].segments if segment.kind == Kind.NOISED)
    if role == "nan pixel":
        noised.pixels[0, 3, 5] = np.nan
    if role == "nan noise":
        noised.noise[2, 7] = np.nan
    return samples


def settings_of(config: str, train: str = "generation") -> Recipe:
    return recipe(
        optimizer={"lr": LR, "eps": 1e-3, "weight_decay": 0.1, "ema": 0},
        model={"train": train},
        engine={"deepspeed": config, "packs_per_step": RANKS, "clip": CLIP},
    )


def train_on_ranks(config: str, train: str, read_answers: bool) -> dict[str, Any]:
    """Runs on every rank: one step per row of ROLES."""
    rank, settings = torch.distributed.get_rank(), settings_of(config, train)
    engine, make, guard = (
        Engine(settings, torch.device("cpu"), read_answers),
        SampleList(settings),
        NonFiniteGuard(len(ROLES)),
    )
    steps = []
    for step, roles in enumerate(ROLES):
        batch = make.collate(samples_of(make, roles[rank], 10 * (RANKS * step + rank)))
        result = engine.train_step([batch], LR)
        digest = hashlib.sha256()
        for name, tensor in full_parameters(engine):
            digest.update(name.encode() + tensor.numpy().tobytes())
        steps.append(
            {
                "losses": torch.cat([result.loss[None], result.losses]),
                "norm": result.grad_norm,
                "skipped": result.skipped,
                "finite_here": bool(result.finite_here),
                "line": guard.observe(step, result, list(batch.keys)),
                "weights": digest.hexdigest(),
            }
        )
    parameters = dict(full_parameters(engine))
    engine.engine.destroy()
    return {"steps": steps, "parameters": parameters, "skipped": guard.skipped}


@dataclass(frozen=True)
class Outcome:
    """What each rank saw, and what one process that has the batches of all ranks saw in plain
    torch: (losses, norm) of every step that is not broken, and the parameters at the end."""

    ranks: list[dict[str, Any]]
    good: list[tuple[torch.Tensor, torch.Tensor] | None]
    parameters: dict[str, torch.Tensor]


def train_plainly(
    train: str, read_answers: bool
) -> tuple[list[tuple[torch.Tensor, torch.Tensor] | None], dict[str, torch.Tensor]]:
    settings = settings_of("zero0", train)
    make, objective = SampleList(settings), plain_objective(settings, read_answers)
    optimizer = plain_adamw(settings, objective)
    good: list[tuple[torch.Tensor, torch.Tensor] | None] = []
    for step, roles in enumerate(ROLES):
        batches = [
            make.collate(samples_of(make, role, 10 * (RANKS * step + rank)))
            for rank, role in enumerate(roles)
        ]
        good.append(None if step in BROKEN else plain_step(objective, optimizer, batches, CLIP))
    return good, {name: parameter.detach() for name, parameter in objective.named_parameters()}


@pytest.fixture(scope="module", params=CASES, ids=["-".join(map(str, case)) for case in CASES])
def outcome(
    request: pytest.FixtureRequest,
    ranks: Callable[[int], Ranks],
    tmp_path_factory: pytest.TempPathFactory,
) -> Outcome:
    config, train, answers = request.param
    path = sharded_config(config, tmp_path_factory.mktemp("configs"))
    seen = ranks(RANKS).call(
        train_on_ranks, config=path, train=train, read_answers=answers == "answers"
    )
    return Outcome(seen, *train_plainly(train, answers == "answers"))


def test_roles_lack_what_their_names_say():
    make = SampleList(settings_of("zero0"))
    batches = {role: make.collate(samples_of(make, role, 0)) for roles in ROLES for role in roles}
    for role, batch in batches.items():
        counts = batch.loss_counts
        assert (counts["caption"] > 0) == (role in WITH_CAPTIONS), role
        if role in ("no images", "only text", "only questions"):
            assert (
                not batch.generation
                and not len(batch.vision.patches_PC)
                and not batch.latents.images
            ), role
    assert (
        not len(batches["no visual encoder"].vision.patches_PC)
        and batches["no visual encoder"].generation
    )
    assert not batches["no noised latents"].generation and len(
        batches["no noised latents"].vision.patches_PC
    )
    assert not any(batches["only questions"].loss_counts.values())


def test_losses_and_gradient_norm_are_counted_over_all_ranks(outcome: Outcome):
    for step, expected in enumerate(outcome.good):
        if expected is None:
            continue
        for answer in outcome.ranks:
            row = answer["steps"][step]
            assert_near(
                row["losses"], expected[0], LOSS_ROUNDING, f"losses of step {step}, {ROLES[step]}"
            )
            assert_near(
                row["norm"],
                expected[1],
                GRADIENT_ROUNDING,
                f"gradient norm of step {step}, {ROLES[step]}",
            )


def test_a_nan_on_one_rank_skips_the_step_on_all_ranks_and_leaves_the_weights_bit_for_bit(
    outcome: Outcome,
):
    for step in range(len(ROLES)):
        rows = [answer["steps"][step] for answer in outcome.ranks]
        assert len({row["weights"] for row in rows}) == 1, (
            f"ranks have other weights than each other after step {step}"
        )
        assert [row["skipped"] for row in rows] == [step in BROKEN] * RANKS
        before = outcome.ranks[0]["steps"][step - 1]["weights"] if step else None
        assert (rows[0]["weights"] == before) == (step in BROKEN), f"step {step}"
    assert [answer["skipped"] for answer in outcome.ranks] == [len(BROKEN)] * RANKS


def test_a_skipped_step_names_the_samples_of_the_rank_whose_loss_was_not_finite(outcome: Outcome):
    for step, culprit in BROKEN.items():
        for rank, answer in enumerate(outcome.ranks):
            row = answer["steps"][step]
            assert row["finite_here"] == (rank != culprit)
            # Every rank says the same, so that rank 0, which logs, names the samples of the culprit
            # and no others.
            assert (
                f"the loss is not finite; samples of rank {culprit}: "
                f"t2i:{10 * (RANKS * step + culprit)}" in row["line"]
            )
            assert row["line"].count("of rank") == 1


def test_training_goes_on_after_skipped_steps_as_if_they_had_not_been(outcome: Outcome):
    for answer in outcome.ranks:
        for name, parameter in outcome.parameters.items():
            error = (answer["parameters"][name] - parameter).abs().max()
            assert error <= parameter_rounding(len(ROLES), LR), f"{name} is off by {error:.1e}"
