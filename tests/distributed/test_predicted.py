"""What the cost model says of one rank, against two real ranks: bytes of state and elements that
are gathered and reduced, exactly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.comm import comm
from deepspeed.utils import groups
from ranks import Ranks
from tiny import SampleList, recipe, sharded_config

from uno_ds.cost.memory import Sharding, memory
from uno_ds.cost.parameters import parameters_of
from uno_ds.cost.scenario import Scenario
from uno_ds.cost.traffic import gathered, traffic_by_phase
from uno_ds.recipe import Recipe
from uno_ds.training.ema import Ema
from uno_ds.training.engine import Engine

RANKS = 2
# Token counts, losses and norms are summed in tensors of no more elements.
FEW = 32


def settings_of(
    config: str, precision: str, recompute: bool, train: str = "generation", packs: int = 1
) -> Recipe:
    """`packs`: of each rank."""
    return recipe(
        model={"recompute": recompute, "train": train},
        lora={"rank": 4},
        engine={"deepspeed": config, "packs_per_step": packs * RANKS, "precision": precision},
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


def measure_sent(config: str, packs: int) -> dict[str, int]:
    """Runs on every rank: elements that the collectives of the third step move."""
    # An earlier engine of this process may have left its groups of hpZ.
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    settings = settings_of(config, "fp32", True, packs=packs)
    engine, make = Engine(settings, torch.device("cpu"), read_answers=False), SampleList(settings)
    rank = torch.distributed.get_rank()
    samples = [make.text_to_image(rank), make.edit(rank + 10)]
    batches = [make.collate(samples) for _ in range(packs)]
    for _ in range(2):
        engine.train_step(batches, 1e-3)
    with counted() as moved:
        engine.train_step(batches, 1e-3)
    engine.engine.destroy()
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    return moved


class counted:
    """Counts the elements of the whole tensors in DeepSpeed's gathers over all ranks ("gather") and
    over those of hpZ's second copy ("within"), in its reduce-scatters ("reduce") and in its
    all-reduces ("sum")."""

    # Function of the backend: (what it counts as, the position of the whole tensor).
    FUNCTIONS = {
        "all_gather_function": ("gather", 0),
        "reduce_scatter_function": ("reduce", 1),
        "all_reduce": ("sum", 0),
    }

    def __enter__(self) -> dict[str, int]:
        self.moved, self.backend = {"gather": 0, "within": 0, "reduce": 0, "sum": 0}, comm.cdb
        self.of_backend = {name: getattr(self.backend, name) for name in self.FUNCTIONS}
        for name in self.FUNCTIONS:
            setattr(self.backend, name, self._counting(name))
        return self.moved

    def _counting(self, name: str) -> Callable:
        kind, place = self.FUNCTIONS[name]
        secondary = groups._get_zero_param_intra_parallel_group()

        def call(*given, **options):
            values = (*given, *options.values())
            whole = [value for value in values if isinstance(value, torch.Tensor)][place]
            is_within = secondary is not None and any(value is secondary for value in values)
            if kind != "sum" or whole.numel() > FEW:
                self.moved["within" if is_within else kind] += whole.numel()
            return self.of_backend[name](*given, **options)

        return call

    def __exit__(self, *_: object) -> None:
        for name, function in self.of_backend.items():
            setattr(self.backend, name, function)


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


@pytest.mark.parametrize(
    ("name", "packs", "changes"),
    [
        ("zero1", 2, {}),
        ("zero2", 2, {}),
        ("zero3", 1, {"reduce_scatter": False}),
        ("zero3_multinode", 2, {"zero_hpz_partition_size": RANKS}),
    ],
)
def test_what_is_sent_in_a_step_is_what_was_predicted(
    ranks: Callable[[int], Ranks], tmp_path: Path, name: str, packs: int, changes: dict[str, Any]
):
    path = Path(sharded_config(name, tmp_path))
    config = json.loads(path.read_text())
    config["zero_optimization"] |= changes
    path.write_text(json.dumps(config))
    settings = settings_of(str(path), "fp32", True, packs=packs)
    sharding = Sharding.of(settings, RANKS, "fp32")
    moved = traffic_by_phase(parameters_of(settings), sharding, recompute=True)
    phases = (moved.forward, moved.backward, moved.update)
    for answer in ranks(RANKS).call(measure_sent, config=str(path), packs=packs):
        assert answer["within"] == sum(phase.within_node for phase in phases)
        assert answer["reduce"] + 2 * answer["sum"] == sum(phase.gradients for phase in phases)
        # Stages 1 and 2 pad the weights to a multiple of two values for each rank.
        padding = answer["gather"] - sum(phase.weights for phase in phases)
        assert 0 <= padding < (1 if sharding.stage == 3 else 2 * RANKS)
    assert bool(answer["within"]) == (sharding.secondary > 1)


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
