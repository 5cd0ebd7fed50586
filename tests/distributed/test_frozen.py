"""Frozen weights keep their bits, trained weights all move, and the moving average on shards is the
average of the whole."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from ranks import Ranks
from tiny import SampleList, full_average, full_parameters, recipe, sharded_config

from uno_ds.recipe import Recipe
from uno_ds.training.ema import Ema
from uno_ds.training.engine import Engine
from uno_ds.training.parameter_checksums import parameter_checksums

RANKS, STEPS, EMA_STEPS, DECAY = 2, 20, 6, 0.3
FROZEN = (
    "model.token_embedding.",
    "model.lm_head.",
    "model.vit.",
    "model.connector.",
    "model.norm.",
    ".und.",
)
TRAINED = (
    "model.vae2llm.",
    "model.llm2vae.",
    "model.time_embedder.",
    "model.norm_gen.",
    ".gen.",
    "metaqueries.",
    "regression.",
)


def settings_of(config: str, **model: Any) -> Recipe:
    return recipe(
        optimizer={"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.1, "ema": DECAY},
        model=model,
        engine={"deepspeed": config, "packs_per_step": RANKS},
    )


def start(config: str, **model: Any) -> tuple[Engine, list]:
    """Runs on every rank: the engine and this rank's batch."""
    settings, rank = settings_of(config, **model), torch.distributed.get_rank()
    engine, make = Engine(settings, torch.device("cpu"), read_answers=True), SampleList(settings)
    return engine, [
        make.collate([make.text_to_image(rank), make.edit(rank + 10), make.conversation(rank + 20)])
    ]


def train_twenty_steps(config: str) -> dict[str, Any]:
    """Runs on every rank. At the end one frozen value is changed by hand, to see whether the
    checksums would notice."""
    engine, batches = start(config)
    before, first = dict(full_parameters(engine)), parameter_checksums(engine)
    for _ in range(STEPS):
        assert not engine.train_step(batches, 1e-3).skipped
    after, last = dict(full_parameters(engine)), parameter_checksums(engine)
    victim = dict(engine.named_parameters())["model.layers.1.und.down_proj.weight"]
    with deepspeed.zero.GatheredParameters([victim], modifier_rank=0), torch.no_grad():
        victim.view(-1)[:1].add_(1e-3)
    touched = parameter_checksums(engine)
    trainable = [name for name, parameter in engine.named_parameters() if parameter.requires_grad]
    engine.engine.destroy()
    return {
        "before": before,
        "after": after,
        "trainable": trainable,
        "checksums": [vars(checksums) for checksums in (first, last, touched)],
    }


def average_twice(config: str, train: str) -> dict[str, Any]:
    """Runs on every rank: the average on shards, and one of gathered fp32 weights, over the same
    steps."""
    engine, batches = start(config, train=train)
    ema, parameters = (
        Ema(engine, DECAY),
        {
            name: parameter
            for name, parameter in engine.named_parameters()
            if parameter.requires_grad
        },
    )

    def gathered() -> dict[str, torch.Tensor]:
        full = safe_get_full_fp32_param if engine.stage else torch.Tensor.detach
        return {name: full(parameter).clone() for name, parameter in parameters.items()}

    initial = gathered()
    average = {name: tensor.clone() for name, tensor in initial.items()}
    for number in range(EMA_STEPS):
        assert not engine.train_step(batches, 1e-3).skipped
        ema.update()
        decay = min(DECAY, (1 + number) / (10 + number))
        for name, tensor in gathered().items():
            average[name].lerp_(tensor, 1 - decay)
    owned = sum(shard.numel() for shard in ema.shards.values())
    full, last = {name: tensor.clone() for name, tensor in full_average(ema)}, gathered()
    engine.engine.destroy()
    return {"full": full, "average": average, "initial": initial, "last": last, "owned": owned}


@pytest.fixture(scope="module")
def trained(
    ranks: Callable[[int], Ranks], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    return ranks(RANKS).call(
        train_twenty_steps, config=sharded_config("zero3", tmp_path_factory.mktemp("configs"))
    )


def _is_part(name: str, parts: Sequence[str]) -> bool:
    return any(part in name for part in parts)


def test_understanding_embeddings_head_and_visual_encoder_keep_their_bits_over_20_steps_of_zero3(
    trained: list[dict],
):
    for answer in trained:
        frozen = [name for name in answer["before"] if _is_part(name, FROZEN)]
        assert {part for part in FROZEN for name in frozen if part in name} == set(FROZEN)
        assert not set(frozen) & set(answer["trainable"])
        for name in frozen:
            assert torch.equal(answer["before"][name], answer["after"][name]), f"{name} changed"


def test_every_trained_weight_changes(trained: list[dict]):
    for answer in trained:
        assert {part for part in TRAINED for name in answer["trainable"] if part in name} == set(
            TRAINED
        )
        assert all(_is_part(name, TRAINED) for name in answer["trainable"])
        for name in answer["trainable"]:
            assert not torch.equal(answer["before"][name], answer["after"][name]), (
                f"{name} did not change"
            )


def test_both_sets_are_counted_and_the_checksum_of_the_frozen_one_changes_with_it(
    trained: list[dict],
):
    for answer in trained:
        first, last, touched = answer["checksums"]
        sizes = {
            name: tensor.numel()
            for name, tensor in answer["before"].items()
            if not name.endswith("_positions")
        }
        trainable = sum(sizes[name] for name in answer["trainable"])
        assert (first["trainable"], first["frozen"]) == (trainable, sum(sizes.values()) - trainable)
        assert first["frozen_checksum"] == last["frozen_checksum"] != touched["frozen_checksum"]
    assert trained[0]["checksums"] == trained[1]["checksums"], "ranks disagree"


@pytest.mark.parametrize(
    ("config", "train"),
    [
        ("zero0", "generation"),
        ("zero1", "all"),
        ("zero2", "generation"),
        ("zero3", "generation"),
        ("zero3_offload", "generation"),
    ],
)
def test_average_on_shards_equals_the_average_of_gathered_weights_bit_for_bit(
    ranks: Callable[[int], Ranks], tmp_path: Path, config: str, train: str
):
    answers = ranks(RANKS).call(average_twice, config=sharded_config(config, tmp_path), train=train)
    whole = sum(tensor.numel() for tensor in answers[0]["initial"].values())
    for answer in answers:
        assert answer["full"].keys() == answer["average"].keys() == answer["initial"].keys()
        for name, average in answer["average"].items():
            assert torch.equal(answer["full"][name], average), name
            for end in ("initial", "last"):
                assert not torch.equal(average, answer[end][name]), (
                    f"{name} is the {end} weight and no average"
                )
        # ZeRO-3 pads every parameter to a multiple of the number of ranks.
        assert answer["owned"] == whole if config == "zero0" else answer["owned"] < 0.6 * whole, (
            "a rank averages more than its share"
        )
