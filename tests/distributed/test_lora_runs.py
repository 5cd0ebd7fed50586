"""Adapters train under every stage: the base keeps its bits, checkpoints and adapter folders give
back every number, and a merged export computes what was trained."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, RanksFailed
from safetensors.torch import load_file
from small_runs import random_base
from tiny import SampleList, counts_of, full_parameters, plain_objective, recipe, sharded_config

from uno_ds.commands import weights as weights_command
from uno_ds.generation.inference_model import open_model
from uno_ds.model.adapters import base_name, count_adapters
from uno_ds.model.weights import bagel_name
from uno_ds.recipe import Recipe
from uno_ds.settings import SettingsError
from uno_ds.training import checkpoint
from uno_ds.training.checkpoint import CheckpointSettings
from uno_ds.training.checkpoint_file import open_checkpoint
from uno_ds.training.ema import Ema
from uno_ds.training.engine import Engine
from uno_ds.training.export import export_adapter, export_checkpoint
from uno_ds.training.parameter_checksums import parameter_checksums
from uno_ds.training.saving import Saver
from uno_ds.training.shards import TrainedState, gather_shard, master_shard

PACKS, STEPS, DECAY, LR = 2, 3, 0.3, 1e-2
LORA = {"rank": 4, "alpha": 6.0}


def settings_of(
    config: str,
    base: str,
    precision: str = "fp32",
    lora: dict[str, Any] | None = None,
    **model: Any,
) -> Recipe:
    return recipe(
        model={"base": base, "architecture": None, "train": "lora", **model},
        lora=LORA | (lora or {}),
        engine={"deepspeed": config, "packs_per_step": PACKS, "precision": precision},
        optimizer={"lr": LR, "eps": 1e-3, "ema": DECAY},
    )


def start(settings: Recipe) -> tuple[Engine, Ema, list]:
    """Runs on every rank: engine, average, and this rank's micro-batches."""
    engine = Engine(settings, torch.device("cpu"), read_answers=True)
    make, share = SampleList(settings), PACKS // dist.get_world_size()
    first = dist.get_rank() * share
    batches = [
        make.collate([make.text_to_image(number), make.edit(number + 10)])
        for number in range(first, first + share)
    ]
    return engine, Ema(engine, DECAY), batches


def masters(engine: Engine) -> dict[str, torch.Tensor]:
    """fp32 master weights of everything that trains. Collective."""
    return {
        name: gather_shard(parameter, master_shard(parameter)).clone()
        for name, parameter in engine.named_parameters()
        if parameter.requires_grad
    }


def train_and_save(
    config: str, base: str, folder: str, precision: str = "fp32", lora: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Runs on every rank: what was trained and saved, and what the next step gives."""
    settings = settings_of(config, base, precision, lora)
    engine, ema, batches = start(settings)
    initial, before = masters(engine), parameter_checksums(engine)
    weights = dict(full_parameters(engine))
    for _ in range(STEPS):
        assert not engine.train_step(batches, LR).skipped
        ema.update()
    assert Saver(Path(folder), CheckpointSettings(), engine, ema).save(
        STEPS, {str(engine.rank): {}}, {}
    )
    after = parameter_checksums(engine)
    frozen = [
        name
        for name, tensor in full_parameters(engine)
        if name not in initial and not torch.equal(tensor, weights[name])
    ]
    trained = masters(engine)
    answer = {
        "initial": initial,
        "trained": trained,
        "average": {name: ema.gather(name) for name in trained},
        "frozen_changed": frozen,
        "checksums": [before.frozen_checksum, after.frozen_checksum],
        "counts": [after.trainable, after.frozen],
        "adapters": json.dumps(count_adapters(engine.objective.model, settings.lora)),
        "loss": engine.train_step(batches, LR).loss,
        "next": masters(engine),
    }
    engine.engine.destroy()
    return answer


def go_on(
    config: str,
    base: str,
    folder: str,
    adapter: str = "",
    precision: str = "fp32",
    lora: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Runs on every rank: the weights of an engine that goes on from a checkpoint or an adapter,
    and its next step."""
    settings = settings_of(
        config, base, precision, lora, **({"adapter": adapter} if adapter else {})
    )
    engine, ema, batches = start(settings)
    if not adapter:
        path, manifest = open_checkpoint(Path(folder), "--resume")
        checkpoint.load(path, manifest, engine, ema)
    restored = masters(engine)
    answer = {
        "restored": restored,
        "average": {name: ema.gather(name) for name in restored},
        "updates": TrainedState(engine).updates,
        "model": dict(full_parameters(engine)),
        "loss": engine.train_step(batches, LR).loss,
        "next": masters(engine),
    }
    engine.engine.destroy()
    return answer


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours and ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    folder = tmp_path_factory.mktemp("configs")
    return lambda name: sharded_config(name, folder)


@pytest.fixture(scope="module")
def trained(
    ranks: Callable[[int], Ranks],
    configs: Callable[[str], str],
    base: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of two ranks under ZeRO-3, and what it should hold."""
    folder = tmp_path_factory.mktemp("trained")
    answers = ranks(2).call(
        train_and_save, config=configs("zero3"), base=str(base), folder=str(folder)
    )
    return folder / f"step_{STEPS}", answers[0]


@pytest.fixture(scope="module")
def adapter(trained: tuple[Path, dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    export_adapter(trained[0], folder, average=False)
    return folder


def test_adapters_and_what_is_beside_them_train_and_the_base_keeps_its_bits(trained: tuple):
    _, answer = trained
    assert not answer["frozen_changed"]
    first, last = answer["checksums"]
    assert first == last
    for name, tensor in answer["trained"].items():
        assert not torch.equal(tensor, answer["initial"][name]), f"{name} did not move"
        if ".lora_B." in name:
            assert not answer["initial"][name].any(), f"{name} does not start at 0"
    assert json.loads(answer["adapters"])["modules"] == 2 * 7
    adapters = sum(t.numel() for n, t in answer["trained"].items() if ".lora_" in n)
    # Rank 4 times inputs and outputs of q, k, v, o and the MLP of two layers.
    widths = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
    assert adapters == 2 * 4 * sum(map(sum, widths))
    assert answer["counts"][0] == sum(tensor.numel() for tensor in answer["trained"].values())


@pytest.mark.parametrize(
    ("size", "config"),
    [
        (2, "zero3"),
        (1, "zero3"),
        (2, "zero2"),
        (1, "zero1"),
        (2, "zero0"),
        pytest.param(2, "zero3_offload", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_of_adapters_gives_back_every_number_on_other_ranks_and_stages(
    ranks: Callable[[int], Ranks],
    configs: Callable[[str], str],
    base: Path,
    trained: tuple[Path, dict],
    size: int,
    config: str,
):
    path, expected = trained
    for answer in ranks(size).call(go_on, config=configs(config), base=str(base), folder=str(path)):
        assert_equal(answer["restored"], expected["trained"])
        assert_equal(answer["average"], expected["average"])
        assert answer["updates"] == STEPS
        if (size, config) == (2, "zero3"):
            assert torch.equal(answer["loss"], expected["loss"])
            assert_equal(answer["next"], expected["next"])


@pytest.mark.parametrize(("size", "config"), [(2, "zero3"), (1, "zero2")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_going_on_from_an_exported_adapter_starts_from_its_master_weights_bit_for_bit(
    ranks: Callable[[int], Ranks],
    configs: Callable[[str], str],
    base: Path,
    trained: tuple[Path, dict],
    adapter: Path,
    precision: str,
    size: int,
    config: str,
):
    for answer in ranks(size).call(
        go_on,
        config=configs(config),
        base=str(base),
        folder="",
        adapter=str(adapter),
        precision=precision,
    ):
        assert_equal(answer["restored"], trained[1]["trained"])
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        for name, master in trained[1]["trained"].items():
            assert torch.equal(answer["model"][name], master.to(dtype)), name


def test_the_merged_export_computes_what_the_adapters_compute(
    base: Path, trained: tuple[Path, dict], adapter: Path, tmp_path: Path
):
    path, answer = trained
    settings = settings_of("zero0", str(base))
    objective = plain_objective(settings)
    base_weights = load_file(base / "ema.safetensors")
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if name in answer["trained"]:
                parameter.copy_(answer["trained"][name])
            else:
                parameter.copy_(base_weights[bagel_name(name.removeprefix("model."))])
    make = SampleList(settings)
    batch = make.collate([make.text_to_image(1), make.edit(2)])
    expected, losses = objective(batch, counts_of([batch]))

    export_checkpoint(path, tmp_path / "merged", average=False)
    assert (
        weights_command.main(
            ["merge", str(base), str(tmp_path / "again"), "--adapter", str(adapter)]
        )
        == 0
    )
    for file in ("ema.safetensors", "uno.safetensors"):
        merged, again = load_file(tmp_path / "merged" / file), load_file(tmp_path / "again" / file)
        assert_equal(merged, again)
    exported = load_file(tmp_path / "merged" / "ema.safetensors")
    extra = load_file(tmp_path / "merged" / "uno.safetensors")
    plain = plain_objective(recipe(model={"base": str(base), "architecture": None}))
    largest = 0.0
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            theirs = exported[bagel_name(name[6:])] if name.startswith("model.") else extra[name]
            parameter.copy_(theirs)
            ours = dict(objective.named_parameters()).get(name)
            if ours is None:
                module = objective.get_submodule(name.rpartition(".")[0])
                if name.endswith("weight"):
                    ours = module.base_layer.weight + module.get_delta_weight("default")
                else:
                    ours = module.base_layer.bias
            # One rounding to bf16.
            error = ((parameter - ours).abs() / ours.abs().clamp(min=1e-30)).max()
            assert error <= 2**-8, name
            largest = max(largest, float(error))
    assert largest > 0, "nothing was rounded, so nothing was compared"
    total, parts = plain(batch, counts_of([batch]))
    # Losses are smooth in the weights, whose relative change is at most 2^-8 each and random in
    # sign.
    torch.testing.assert_close(total, expected, rtol=2**-8, atol=0)
    torch.testing.assert_close(parts, losses, rtol=2**-7, atol=1e-6)


def test_a_model_opened_with_an_adapter_is_the_merged_one_and_shares_add_up(
    base: Path, adapter: Path
):
    alone = open_model(base).model.state_dict()
    once = open_model(base, adapters=[(adapter, 1.0)]).model.state_dict()
    twice = open_model(base, adapters=[(adapter, 0.25), (adapter, 0.75)]).model.state_dict()
    changed = {name for name in alone if not torch.equal(alone[name], once[name])}
    assert {name.split(".")[0] for name in changed} == {
        "layers",
        "vae2llm",
        "llm2vae",
        "time_embedder",
    }
    assert all(".gen." in name for name in changed if name.startswith("layers."))
    for name, tensor in twice.items():
        torch.testing.assert_close(tensor, once[name], rtol=1e-5, atol=1e-6, msg=name)


def test_peft_itself_reads_the_folder(adapter: Path):
    import peft

    with pytest.warns(UserWarning, match="uno_ds"):
        config = peft.LoraConfig.from_pretrained(str(adapter))
    assert (config.r, config.lora_alpha, config.use_dora) == (4, 6, False)
    names = load_file(adapter / "adapter_model.safetensors")
    first = "base_model.model.bagel.language_model.model.layers.0.self_attn.q_proj_moe_gen"
    assert {f"{first}.lora_A.weight", f"{first}.lora_B.weight"} <= names.keys()
    assert len(names) == 2 * 2 * 7
    leaves = {name.split(".")[-3] for name in names}
    assert leaves == set(config.target_modules)


def test_an_adapter_of_another_base_or_of_other_settings_does_not_start_a_run(
    ranks: Callable[[int], Ranks],
    configs: Callable[[str], str],
    base: Path,
    adapter: Path,
    tmp_path: Path,
):
    with pytest.raises(SettingsError, match="rank 4, and lora.rank is 8; set lora.rank=4"):
        settings_of("zero0", str(base), lora={"rank": 8}, adapter=str(adapter))
    with pytest.raises(SettingsError, match="adapts 14 modules, and lora.targets names 8"):
        settings_of("zero0", str(base), lora={"targets": "attention"}, adapter=str(adapter))
    folder = tmp_path / "other"
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["uno_ds"]["hash_of_base"] = "0" * 32
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(RanksFailed, match="model.adapter: .* was trained on another base"):
        ranks(1).call(
            go_on, config=configs("zero2"), base=str(base), folder="", adapter=str(folder)
        )


@pytest.mark.parametrize("lora", [{"dora": True}, {"rslora": True}], ids=str)
def test_variants_train_and_their_export_is_their_forward(
    ranks: Callable[[int], Ranks],
    configs: Callable[[str], str],
    base: Path,
    tmp_path: Path,
    lora: dict[str, Any],
):
    answer = ranks(2).call(
        train_and_save, config=configs("zero2"), base=str(base), folder=str(tmp_path), lora=lora
    )[0]
    assert not answer["frozen_changed"]
    for name, tensor in answer["trained"].items():
        assert not torch.equal(tensor, answer["initial"][name]), f"{name} did not move"
    export_adapter(tmp_path / f"step_{STEPS}", tmp_path / "adapter", average=False)
    settings = settings_of("zero2", str(base), lora=lora)
    objective = plain_objective(settings).double()
    merged = open_model(base, adapters=[(tmp_path / "adapter", 1.0)]).model.double()
    plain = open_model(base).model.double()
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if name in answer["trained"]:
                parameter.copy_(answer["trained"][name])
            elif name.startswith("model."):
                parameter.copy_(plain.get_parameter(base_name(name)[6:]))
    generator = torch.Generator().manual_seed(0)
    for module in ("q_proj", "k_proj", "o_proj", "down_proj"):
        ours = objective.model.layers[1].gen.get_submodule(module)
        theirs = merged.layers[1].gen.get_submodule(module)
        x = torch.randn(5, theirs.in_features, generator=generator, dtype=torch.float64)
        # The merged weight was computed in fp32.
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
