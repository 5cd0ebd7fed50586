"""Training with quantised frozen weights on real ranks: they keep their bytes, take the memory that
is predicted, and leave checkpoints and exports as they are."""

import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from safetensors.torch import load_file
from small_runs import random_base
from test_lora_runs import DECAY, LR, STEPS, assert_equal, masters
from tiny import SampleList, recipe, sharded_config

from uno_ds.cost.memory import Sharding, memory
from uno_ds.cost.parameters import parameters_of
from uno_ds.cost.scenario import Scenario
from uno_ds.model.quantisation import quantised_weights
from uno_ds.model.weights import WeightsFile, bagel_name
from uno_ds.recipe import Recipe
from uno_ds.settings import SettingsError
from uno_ds.training import checkpoint
from uno_ds.training.checkpoint import CheckpointSettings
from uno_ds.training.checkpoint_file import open_checkpoint
from uno_ds.training.ema import Ema
from uno_ds.training.engine import Engine
from uno_ds.training.export import export_checkpoint
from uno_ds.training.finish import export
from uno_ds.training.parameter_checksums import parameter_checksums
from uno_ds.training.saving import Saver

PACKS = 2
PACK = Scenario(prompt=8, latents=64, caption=8, metaqueries=4, samples=2)


def settings_of(config: str, base: str, kind: str, train: str, precision: str = "fp32") -> Recipe:
    return recipe(
        model={"base": base, "architecture": None, "train": train, "frozen_precision": kind},
        lora={"rank": 4},
        engine={"deepspeed": config, "packs_per_step": PACKS, "precision": precision},
        optimizer={"lr": LR, "eps": 1e-3, "ema": DECAY},
    )


def held_bytes(engine: Engine, average: Ema) -> dict[str, int]:
    """What the tensors of the engine take on this rank."""
    optimizer = engine.engine.optimizer
    plain = sum(parameter.data.nbytes for _, parameter in engine.named_parameters())
    codes = sum(module.nbytes for _, module in quantised_weights(engine.objective))
    return {
        "weights": plain + codes,
        "fp32 master weights": sum(
            group.nbytes for group in optimizer.single_partition_of_fp32_groups
        ),
        "optimizer moments": sum(
            value.nbytes
            for values in optimizer.optimizer.state.values()
            for name, value in values.items()
            if name.startswith("exp_")
        ),
        "moving average": sum(shard.nbytes for shard in average.shards.values()),
    }


def train_quantised(
    config: str, base: str, folder: str, kind: str, train: str, precision: str
) -> dict[str, Any]:
    """Runs on every rank. At the end one code is changed by hand, to see whether the census would
    notice."""
    settings = settings_of(config, base, kind, train, precision)
    read, given, alive = WeightsFile.read, [], []

    def noted(file: WeightsFile, *arguments: Any) -> torch.Tensor:
        alive.append(sum(tensor() is not None for tensor in given))
        tensor = read(file, *arguments)
        given.append(weakref.ref(tensor))
        return tensor

    with mock.patch.object(WeightsFile, "read", noted):
        engine = Engine(settings, torch.device("cpu"), read_answers=True)
    make = SampleList(settings)
    ema, rank = Ema(engine, DECAY), dist.get_rank()
    share = PACKS // dist.get_world_size()
    batches = [
        make.collate([make.text_to_image(number), make.edit(number + 10)])
        for number in range(rank * share, (rank + 1) * share)
    ]
    before, initial = parameter_checksums(engine), masters(engine)
    losses = []
    for _ in range(STEPS):
        result = engine.train_step(batches, LR)
        assert not result.skipped
        losses.append(result.loss)
        ema.update()
    assert Saver(Path(folder), CheckpointSettings(), engine, ema).save(STEPS, {str(rank): {}}, {})
    export(SimpleNamespace(recipe=settings), engine, ema, Path(folder) / "model")
    after, trained = parameter_checksums(engine), masters(engine)
    path, manifest = open_checkpoint(Path(folder) / f"step_{STEPS}", "--resume")
    checkpoint.load(path, manifest, engine, ema)
    answer = {
        "losses": torch.stack(losses),
        "alive": alive,
        "initial": initial,
        "trained": trained,
        "restored": masters(engine),
        "held": held_bytes(engine, ema),
        "counts": [after.trainable, after.frozen],
        "checksums": [before.frozen_checksum, after.frozen_checksum],
        "quantised": [name for name, _ in quantised_weights(engine.objective.model)],
        "dequantised": dict(engine.objective.model.layers[0].und.q_proj.state_dict()),
    }
    next(iter(quantised_weights(engine.objective)))[1].codes.view(-1)[0] += 1
    answer["checksums"].append(parameter_checksums(engine).frozen_checksum)
    engine.engine.destroy()
    return answer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 64 wide, so that nf4 takes the embedding too.
    return random_base(tmp_path_factory.mktemp("base"), hidden=64)


@pytest.mark.parametrize(
    ("size", "config", "kind", "train", "precision"),
    [
        (2, "zero2", "nf4", "lora", "bf16"),
        (2, "zero1", "int8", "lora", "fp32"),
        (1, "zero2", "nf4", "generation", "fp32"),
        (2, "zero2", "int8", "generation", "bf16"),
    ],
)
def test_quantised_weights_keep_their_bytes_and_take_the_predicted_memory(
    ranks: Callable[[int], Ranks],
    base: Path,
    tmp_path: Path,
    size: int,
    config: str,
    kind: str,
    train: str,
    precision: str,
):
    path = sharded_config(config, tmp_path)
    answers = ranks(size).call(
        train_quantised,
        config=path,
        base=str(base),
        folder=str(tmp_path / "run"),
        kind=kind,
        train=train,
        precision=precision,
    )
    settings = settings_of(path, str(base), kind, train, precision)
    parameters, sharding = parameters_of(settings), Sharding.of(settings, size, precision)
    predicted = memory(
        parameters, settings.architecture, sharding, PACK, False, True, 1024, 4, "sdpa"
    ).resident
    stored = load_file(base / "ema.safetensors")
    for answer in answers:
        # One tensor of the base at a time was in memory as the base has it.
        assert len(answer["alive"]) > len(answer["quantised"]) and not any(answer["alive"])
        first, last, touched = answer["checksums"]
        assert first == last != touched
        assert_equal(answer["restored"], answer["trained"])
        for name, tensor in answer["trained"].items():
            assert not torch.equal(tensor, answer["initial"][name]), f"{name} did not move"
        has_generation = any(".gen." in name for name in answer["quantised"])
        assert has_generation == (train == "lora")
        assert "token_embedding.weight" in answer["quantised"]
        assert answer["counts"] == [
            sum(p.numel for p in parameters if p.trainable),
            sum(p.numel for p in parameters if not p.trainable),
        ]
        assert answer["held"]["weights"] == predicted["weights"]
        trainable = answer["counts"][0]
        for name, each in (("fp32 master weights", 4), ("optimizer moments", 8)):
            # ZeRO pads its flat groups to a few values for each rank.
            assert 0 <= answer["held"][name] - predicted[name] <= each * 16, name
        assert trainable * 4 >= answer["held"]["moving average"] > 0
        weight = stored[bagel_name("layers.0.und.q_proj.weight")]
        assert answer["dequantised"]["codes"].dtype in (torch.int8, torch.uint8)
        assert answer["dequantised"]["codes"].numel() == weight.numel() // (1 + (kind == "nf4"))
    export_checkpoint(tmp_path / f"run/step_{STEPS}", tmp_path / "out", average=True)
    exported = load_file(tmp_path / "out/ema.safetensors")
    assert_equal(load_file(tmp_path / "run/model/ema.safetensors"), exported)
    for name in answers[0]["quantised"]:
        if ".gen." not in name:
            assert torch.equal(exported[bagel_name(name)], stored[bagel_name(name)]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"engine": {"deepspeed": "zero3"}},
            "model.frozen_precision: is nf4, but zero3 is ZeRO stage 3, which cannot shard",
        ),
        (
            {"model": {"train": "all"}},
            "model.frozen_precision: is nf4, but with model.train = all no weight is frozen.",
        ),
    ],
)
def test_what_cannot_hold_quantised_weights_is_refused_in_one_line(changes: dict, message: str):
    model = {"frozen_precision": "nf4"} | changes.get("model", {})
    engine = {"deepspeed": "zero2"} | changes.get("engine", {})
    with pytest.raises(SettingsError) as raised:
        recipe(model=model, engine=engine)
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


def test_the_summary_of_a_quantised_model_counts_what_the_base_holds(base: Path):
    plain = recipe(model={"base": str(base), "architecture": None, "train": "lora"})
    quantised = settings_of("zero2", str(base), "nf4", "lora")
    sizes = [sum(p.numel for p in parameters_of(settings)) for settings in (plain, quantised)]
    adapters = [
        sum(p.numel for p in parameters_of(settings) if ".lora_" in p.name)
        for settings in (plain, quantised)
    ]
    assert sizes[0] - adapters[0] == sizes[1] - adapters[1]
    held = sum(p.nbytes(2) for p in parameters_of(quantised))
    assert held < sum(p.nbytes(2) for p in parameters_of(plain))
