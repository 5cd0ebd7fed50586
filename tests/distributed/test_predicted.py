"""What the cost model says of one rank, against two real ranks: bytes of state and elements that
are gathered and reduced, exactly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.comm import comm
from ranks import Ranks
from tiny import SampleList, recipe, sharded_config

from uno_ds.cost.memory import Sharding, memory
from uno_ds.cost.parameters import parameters_of
from uno_ds.cost.scenario import Scenario
from uno_ds.cost.traffic import gathered
from uno_ds.recipe import Recipe
from uno_ds.training.ema import Ema
from uno_ds.training.engine import Engine

RANKS = 2


def settings_of(config: str, precision: str, recompute: bool, train: str = "generation") -> Recipe:
    return recipe(
        model={"recompute": recompute, "train": train},
        lora={"rank": 4},
        engine={"deepspeed": config, "packs_per_step": RANKS, "precision": precision},
    )


def measure(config: str, precision: str, recompute: bool, train: str) -> dict[str, Any]:
    """Runs on every rank: bytes of what the engine holds, and elements that its collectives move in
    the third step."""
    settings = settings_of(config, precision, recompute, train)
    engine, make = Engine(settings, torch.device("cpu"), read_answers=False), SampleList(settings)
    average, rank = Ema(engine, 0.9), torch.distributed.get_rank()
    batches = [make.collate([make.text_to_image(rank), make.edit(rank + 10)])]
    for _ in range(2):
        engine.train_step(batches, 1e-3)
    with counted() as moved:
        engine.train_step(batches, 1e-3)
    optimizer = engine.engine.optimizer
    parameters = [parameter for _, parameter in engine.named_parameters()]
    moments: list[torch.Tensor] = []
    for state in optimizer.optimizer.state.values():
        moments += [value for name, value in state.items() if name.startswith("exp_")]
    held = {
        "weights": sum(parameter.ds_tensor.nbytes for parameter in parameters),
        "weights kept whole": sum(parameter.data.nbytes for parameter in parameters),
        "gradients": optimizer.grad_partitions_flat_buffer.nbytes,
        "fp32 master weights": sum(
            group.nbytes for group in optimizer.fp32_partitioned_groups_flat
        ),
        "optimizer moments": sum(moment.nbytes for moment in moments),
        "moving average": sum(shard.nbytes for shard in average.shards.values()),
    }
    engine.engine.destroy()
    return {"held": held, **moved}


class counted:
    """Counts the elements of the whole tensors in DeepSpeed's gathers and reductions."""

    def __enter__(self) -> dict[str, int]:
        self.moved, self.backend = {"gather": 0, "reduce": 0}, comm.cdb
        self.of_backend = {
            "gather": self.backend.all_gather_function,
            "reduce": self.backend.reduce_scatter_function,
        }
        self.backend.all_gather_function = self._counting("gather", 0)
        self.backend.reduce_scatter_function = self._counting("reduce", 1)
        return self.moved

    def _counting(self, kind: str, place: int) -> Callable:
        def call(*tensors, **options):
            whole = (
                *tensors,
                *(value for value in options.values() if isinstance(value, torch.Tensor)),
            )[place]
            self.moved[kind] += whole.numel()
            return self.of_backend[kind](*tensors, **options)

        return call

    def __exit__(self, *_: object) -> None:
        self.backend.all_gather_function, self.backend.reduce_scatter_function = (
            self.of_backend["gather"],
            self.of_backend["reduce"],
        )


def scaled_config(folder: Path, reuse: int, live: int, prefetch: int) -> str:
    """zero3.json with its limits on elements in about the proportion to this model that they have
    to BAGEL-7B."""
    path = Path(sharded_config("zero3", folder))
    config = json.loads(path.read_text())
    config["zero_optimization"] |= {
        "stage3_max_reuse_distance": reuse,
        "stage3_max_live_parameters": live,
        "stage3_prefetch_bucket_size": prefetch,
    }
    path.write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize(
    ("precision", "recompute", "limits", "train"),
    [
        ("bf16", True, (20_000, 40_000, 4_000), "generation"),
        ("bf16", False, (20_000, 40_000, 4_000), "generation"),
        ("fp32", True, (10**9, 10**9, 10**9), "generation"),
        ("bf16", True, (20_000, 40_000, 4_000), "lora"),
        ("fp32", False, (20_000, 40_000, 4_000), "lora"),
    ],
)
def test_state_and_traffic_of_zero3_are_what_was_predicted(
    ranks: Callable[[int], Ranks],
    tmp_path: Path,
    precision: str,
    recompute: bool,
    limits: tuple,
    train: str,
):
    config = scaled_config(tmp_path, *limits)
    settings = settings_of(config, precision, recompute, train)
    parameters, sharding = parameters_of(settings), Sharding.of(settings, RANKS, precision)
    pack = Scenario(prompt=8, latents=64, caption=8, metaqueries=4, samples=2)
    predicted = memory(
        parameters, settings.architecture, sharding, pack, recompute, True, 1024, 4, "sdpa"
    ).resident
    kept_whole = sum(parameter.numel for parameter in parameters if sharding.persistent(parameter))
    for answer in ranks(RANKS).call(
        measure, config=config, precision=precision, recompute=recompute, train=train
    ):
        assert answer["held"] == {name: predicted[name] for name in answer["held"]}
        assert answer["gather"] == sum(gathered(parameters, sharding, recompute)) + kept_whole
        assert answer["reduce"] == sum(
            parameter.numel for parameter in parameters if parameter.trainable
        )
        assert answer["held"]["gradients"] and answer["gather"] > sum(
            parameter.numel for parameter in parameters
        )


def test_bf16_states_take_what_was_predicted_and_the_average_stays_fp32(
    ranks: Callable[[int], Ranks], tmp_path: Path
):
    config = sharded_config("zero3_bf16_states", tmp_path)
    settings = settings_of(config, "bf16", recompute=True)
    parameters, sharding = parameters_of(settings), Sharding.of(settings, RANKS, "bf16")
    pack = Scenario(prompt=8, latents=64, caption=8, metaqueries=4, samples=2)
    predicted = memory(
        parameters, settings.architecture, sharding, pack, True, True, 1024, 4, "sdpa"
    ).resident
    predicted["fp32 master weights"] = predicted.pop("bf16 master weights")
    owned = sum(sharding.shard(p.numel) for p in parameters if p.trainable)
    assert predicted["optimizer moments"] == 4 * owned == predicted["moving average"]
    for answer in ranks(RANKS).call(
        measure, config=config, precision="bf16", recompute=True, train="generation"
    ):
        assert answer["held"] == {name: predicted[name] for name in answer["held"]}
