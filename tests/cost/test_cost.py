"""The cost model: parameter counts of BAGEL-7B, state and traffic by hand, activations against what
autograd keeps."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from small_runs import ARCHITECTURE, tree

from uno_ds.cost.flops import flops
from uno_ds.cost.hardware import GPUS
from uno_ds.cost.memory import Memory, Sharding, kept_per_row, memory
from uno_ds.cost.parameters import Parameter, count_by_part, parameters_of
from uno_ds.cost.scenario import Scenario, fullest_packs, read_scenario
from uno_ds.cost.traffic import gathered, traffic
from uno_ds.model.architecture import Architecture, read_architecture
from uno_ds.model.bagel import Bagel
from uno_ds.model.weights import bagel_name
from uno_ds.recipe import RECIPES, Recipe, load_recipe
from uno_ds.settings import SettingsError, build

GOLDEN = Path(__file__).parents[1] / "goldens" / "bagel_7b_mot_shapes.json"
PACK = Scenario(prompt=200, latents=4096, caption=200, metaqueries=64, samples=6, target=4900)


@pytest.fixture(scope="module")
def bagel() -> Recipe:
    recipe = load_recipe("bagel_7b_uno", absent=[])
    return dataclasses.replace(recipe, engine=dataclasses.replace(recipe.engine, packs_per_step=8))


@pytest.fixture(scope="module")
def parameters(bagel: Recipe) -> list[Parameter]:
    return parameters_of(bagel)


def needs(
    bagel: Recipe,
    parameters: list[Parameter],
    ranks: int,
    config: str = "zero3",
    recompute: bool = True,
    average: bool = True,
    pack: Scenario = PACK,
) -> Memory:
    recipe = dataclasses.replace(bagel, engine=dataclasses.replace(bagel.engine, deepspeed=config))
    return memory(
        parameters,
        bagel.architecture,
        Sharding.of(recipe, ranks, "bf16"),
        pack,
        recompute,
        average,
        1024**2,
        4,
        "sdpa",
    )


def test_the_shape_that_ships_has_every_name_and_shape_of_the_published_model():
    published = {name: tuple(shape) for name, shape in json.loads(GOLDEN.read_text()).items()}
    with torch.device("meta"):
        model = Bagel(read_architecture(RECIPES / "bagel_7b"))
    ours = {
        bagel_name(name): tuple(tensor.shape)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    assert ours == published and len(ours) == 1223


def test_parameters_of_bagel_by_part(parameters: list[Parameter]):
    parts = count_by_part(parameters)
    expert = (
        28
        * (2 * 3584 * 3584 + 3584 + 2 * (512 * 3584 + 512) + 2 * 128 + 3 * 18944 * 3584 + 2 * 3584)
        + 3584
    )
    assert parts["generation expert"] == {"trainable": expert, "frozen": 0} and parts[
        "understanding expert"
    ] == {"trainable": 0, "frozen": expert}
    assert (
        parts["language head"]
        == parts["token embedding"]
        == {"trainable": 0, "frozen": 152064 * 3584}
    )
    assert parts["metaqueries and their head"] == {
        "trainable": 64 * 3584 + 1152 * 3584,
        "frozen": 0,
    }
    assert sum(part["frozen"] for part in parts.values()) == pytest.approx(8.04e9, rel=0.001)


def test_state_of_bagel_over_all_ranks(bagel: Recipe, parameters: list[Parameter]):
    """16 bytes of a trainable parameter with bf16 gradients, 2 of a frozen one: 120 GB; fp32
    accumulation adds 2; the average 4."""
    held = needs(bagel, parameters, 8).resident
    trainable = sum(p.numel for p in parameters if p.trainable)
    state = 8 * sum(
        held[name] for name in ("weights", "gradients", "fp32 master weights", "optimizer moments")
    )
    assert state - 2 * trainable == pytest.approx(120e9, rel=0.01)
    assert state == pytest.approx(
        18 * trainable + 2 * sum(p.numel for p in parameters if not p.trainable), rel=1e-4
    )
    assert 8 * held["moving average"] == pytest.approx(26e9, rel=0.01)
    everything = [dataclasses.replace(p, trainable=True) for p in parameters]
    held = needs(bagel, everything, 8).resident
    state = 8 * sum(
        held[name] for name in ("weights", "gradients", "fp32 master weights", "optimizer moments")
    )
    assert 8 * held["moving average"] == pytest.approx(57e9, rel=0.03) and state - 2 * sum(
        p.numel for p in parameters
    ) == pytest.approx(226e9, rel=0.04)


@pytest.mark.parametrize(
    ("config", "weights", "gradients", "optimizer"),
    [
        ("zero1", 2 * 1000, 6 * 600, 12 * 150),
        ("zero2", 2 * 1000, 4 * 150, 12 * 150),
        ("zero3", 2 * 250, 4 * 150, 12 * 150),
    ],
)
def test_stages_shard_what_they_are_said_to_shard(
    bagel: Recipe, config: str, weights: int, gradients: int, optimizer: int
):
    """1,000 parameters on 4 ranks, 600 of them trained."""
    held = needs(
        bagel,
        [
            Parameter("model.a.und.weight", "a", (400,), False),
            Parameter("model.a.gen.weight", "a", (600,), True),
        ],
        4,
        config,
    ).resident
    assert (
        held["weights"],
        held["gradients"],
        held["fp32 master weights"] + held["optimizer moments"],
    ) == (weights, gradients, optimizer)


def test_offload_moves_optimizer_and_gradients_to_main_memory(
    bagel: Recipe, parameters: list[Parameter]
):
    on, off = needs(bagel, parameters, 1), needs(bagel, parameters, 1, "zero3_offload")
    trainable = sum(p.numel for p in parameters if p.trainable)
    assert (
        sum(off.host.values())
        == 16 * trainable
        == sum(on.resident.values()) - sum(off.resident.values())
    )
    assert not on.host and off.peak < GPUS["H200-141GB"].memory < on.peak


def test_activations_without_recompute_are_what_autograd_keeps():
    """Bytes of tensors that the layers save, by torch's hooks, against the model; weights and index
    columns are not counted."""
    shape = build(
        Architecture,
        {**ARCHITECTURE, "hidden": 64, "mlp": 192, "layers": 3, "vit_side": 4, "latent_side": 16},
    )
    recipe = build(
        Recipe,
        tree(Path("x"), ["y"])
        | {"model": {"architecture": dict(vars(shape)), "tokenizer": "tiny_base"}},
    )
    batch, objective = _batch_and_objective(recipe)
    weights, kept = {parameter.data_ptr() for parameter in objective.parameters()}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    from uno_ds.objectives.flow_matching import noise_latents

    latents, _ = noise_latents(objective.latent_rows(batch), batch.latents)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = objective.model(batch, latents, objective.metaqueries(batch.metaqueries.index_M))
    rows = batch.understanding * kept_per_row(
        shape, False, 4, "sdpa"
    ) + batch.generation * kept_per_row(shape, True, 4, "sdpa")
    masks = 4 * (batch.understanding + batch.generation) * batch.tokens
    assert held[0].requires_grad and sum(kept.values()) == pytest.approx(
        shape.layers * (rows + masks), rel=0.15
    )


def _batch_and_objective(recipe: Recipe):
    from uno_ds.commands.fake_ranks import synthetic_batch
    from uno_ds.model.codec import PixelCodec
    from uno_ds.objectives.uno import UnoObjective

    objective = UnoObjective(
        Bagel(recipe.architecture),
        PixelCodec(2),
        recipe.objective,
        recipe.kernels.resolved(),
        recipe.sequence.metaqueries,
    )
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.normal_(0, 0.1)
    objective.set_trainable(everything=False)
    return synthetic_batch(recipe, ["t2i"]), objective


def test_recompute_keeps_one_row_of_the_residual_stream_per_token_and_layer(
    bagel: Recipe, parameters: list[Parameter]
):
    with_it, without = needs(bagel, parameters, 8), needs(bagel, parameters, 8, recompute=False)
    live, context = PACK.supervision + PACK.generation, PACK.context
    assert with_it.working["activations"] == 28 * 2 * (live * 3584 + 2 * context * 4 * 128)
    assert without.peak > GPUS["H200-141GB"].memory > GPUS["H100-80GB"].memory > with_it.peak


def test_more_ranks_and_shorter_packs_need_less(bagel: Recipe, parameters: list[Parameter]):
    peaks = [needs(bagel, parameters, ranks).peak for ranks in (1, 2, 8, 64, 1024)]
    assert peaks == sorted(peaks, reverse=True)
    assert needs(bagel, parameters, 8, pack=dataclasses.replace(PACK, samples=3)).peak < peaks[2]


def test_traffic_of_one_rank_is_none_and_of_stages_below_three_is_the_ring_of_the_trained_weights(
    bagel: Recipe, parameters: list[Parameter]
):
    """Of two micro-batches. DeepSpeed sums gradients by all-reduce under stages 1 and 2."""

    def sent(config: str, ranks: int):
        recipe = dataclasses.replace(
            bagel,
            engine=dataclasses.replace(bagel.engine, deepspeed=config, packs_per_step=2 * ranks),
        )
        return traffic(parameters, Sharding.of(recipe, ranks, "bf16"), recompute=True)

    trainable = 2 * sum(p.numel for p in parameters if p.trainable)
    assert sent("zero3", 1).total == 0
    assert sent("zero0", 8).total == pytest.approx(2 * 7 / 8 * trainable)
    assert sent("zero1", 8).total == pytest.approx(3 * 7 / 8 * trainable)
    assert sent("zero2", 8).total == pytest.approx(5 * 7 / 8 * trainable)
    assert sent("zero3", 8).reduce_gradients == pytest.approx(2 * 7 / 8 * trainable)


def test_hpz_gathers_trained_weights_once_a_step_over_all_ranks_and_all_else_within_nodes(
    bagel: Recipe, parameters: list[Parameter]
):
    engine = dataclasses.replace(bagel.engine, packs_per_step=32)
    sharding = Sharding.of(dataclasses.replace(bagel, engine=engine), 16, "bf16")
    sharding = dataclasses.replace(sharding, persistence=0)
    plain = traffic(parameters, sharding, recompute=True)
    inside = traffic(parameters, dataclasses.replace(sharding, secondary=8), recompute=True)
    trained = 2 * sum(p.numel for p in parameters if p.trainable)
    assert inside.gather_weights == pytest.approx(15 / 16 * trained)
    assert inside.reduce_gradients == plain.reduce_gradients
    elements = inside.gather_weights * 16 / 15 + inside.gather_within_node * 8 / 7
    assert elements == pytest.approx(plain.gather_weights * 16 / 15)


def test_every_weight_is_gathered_in_forward_and_those_on_the_way_back_again_in_backward(
    bagel: Recipe, parameters: list[Parameter]
):
    """With a reuse distance and room of one element, nothing survives its module: backward needs
    both experts and the heads."""
    eager = dataclasses.replace(
        Sharding.of(bagel, 8, "bf16"), persistence=0, max_reuse=0, prefetch=0, max_live=10**9
    )
    size: Counter[str] = Counter()
    for parameter in parameters:
        size[parameter.part] += parameter.numel
    forward, backward = gathered(parameters, eager, recompute=False)
    everything = sum(size.values())
    # The context rows use the understanding expert once more, but for the last layer's output half.
    assert (
        everything + 0.9 * size["understanding expert"]
        < forward
        < everything + 2 * size["understanding expert"]
    )
    on_the_way = size["generation expert"] + size["understanding expert"] + size["language head"]
    assert backward == pytest.approx(on_the_way, rel=0.01)
    generous = dataclasses.replace(eager, max_reuse=10**12)
    assert gathered(parameters, generous, recompute=False) == (everything, 0)


def test_the_fullest_pack_fills_the_budget_with_images_of_full_size(bagel: Recipe):
    packs = fullest_packs(bagel, ["t2i", "edit"])
    assert (
        packs["t2i"].latents == 64 * 64
        and packs["t2i"].samples == 7
        and 0.99 * 32768 < packs["t2i"].tokens <= 32768
    )
    assert (
        packs["edit"].clean == 64 * 64
        and packs["edit"].vit == 70 * 70
        and packs["edit"].samples == 2
        and packs["edit"].tokens <= 32768
    )
    flow = fullest_packs(load_recipe("bagel_7b_flow", absent=[]), ["t2i"])["t2i"]
    assert flow.caption == flow.metaqueries == flow.target == 0


def test_scenarios_are_read_and_refused_in_one_line():
    assert read_scenario("prompt=1, latents=2,caption=3,metaqueries=4,samples=5,vit=6") == Scenario(
        1, 2, 3, 4, 5, 6
    )
    for text in (
        "",
        "prompt=1",
        "prompt=1,prompt=2",
        "prompt=x",
        "depth=3",
        "prompt=1,latents=2,caption=3,metaqueries=4,samples=0",
    ):
        with pytest.raises(SettingsError, match="^--scenario: "):
            read_scenario(text)


def test_every_gpu_of_the_table_is_plausible():
    assert all(
        20e9 < gpu.memory < 200e9 and 150e12 <= gpu.matmul <= 2500e12 and 30e9 <= gpu.link <= 900e9
        for gpu in GPUS.values()
    )


# prompt, latents, caption, metaqueries, samples, vit; PFLOP of flow naive, flow structured, UNO
# naive, UNO structured
TABLE = {
    "A": ((200, 4096, 200, 256, 6, 0), (1.184, 1.124, 1.280, 1.215)),
    "B": ((200, 4096, 200, 1024, 5, 0), (0.987, 0.937, 1.204, 1.142)),
    "C": ((200, 1024, 200, 64, 22, 0), (1.047, 0.977, 1.220, 1.147)),
    "D": ((200, 1024, 200, 256, 19, 0), (0.905, 0.843, 1.158, 1.093)),
    "E": ((300, 1024, 300, 1024, 12, 0), (0.605, 0.550, 1.081, 1.014)),
    "F": ((100, 4096, 200, 256, 3, 4096), (1.087, 0.789, 1.134, 0.834)),
}


@pytest.mark.parametrize("row", TABLE)
def test_operations_of_bagel_are_those_computed_beforehand(bagel: Recipe, row: str):
    scenario, expected = TABLE[row]
    count = dataclasses.astuple(flops(bagel.architecture, Scenario(*scenario)))
    assert [value / 1e15 for value in count] == pytest.approx(expected, rel=0.01, abs=0.0006)


def test_linear_operations_are_what_torch_counts():
    """One latent token alone: three passes through one expert's matrices of every layer, by torch's
    own counter of one pass."""
    shape = build(Architecture, ARCHITECTURE)
    from torch.utils.flop_counter import FlopCounterMode

    from uno_ds.model.experts import Expert

    expert, x = Expert(shape), torch.randn(1, shape.hidden)
    with FlopCounterMode(display=False) as counter:
        q, *_ = expert.project(x)
        expert.finish(x, q)
    pairs = shape.layers * (2 + 5) * 2 * shape.heads * shape.head_dim
    assert (
        flops(shape, Scenario(0, 1, 0, 0, 1)).uno_structured - pairs
        == 3 * shape.layers * counter.get_total_flops()
    )
