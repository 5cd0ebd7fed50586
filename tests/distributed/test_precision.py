"""Weights have the precision, stage and device that the recipe asks for on processors with and
without fp16, and a run says what it found in them."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from ranks import Ranks, free_port, run_command
from tiny import SampleList, full_parameters, recipe, sharded_config

from uno_ds.settings import SettingsError
from uno_ds.training import run_start, sharded_objective
from uno_ds.training.engine import Engine
from uno_ds.training.parameter_checksums import parameter_checksums
from uno_ds.training.placement import Placement, check_placement

CPU = torch.device("cpu")
TURNED_FP16 = Path(__file__).parents[1] / "turned_fp16"
FROZEN, TRAINED = "model.layers.1.und.q_proj.weight", "model.layers.1.gen.q_proj.weight"


@contextlib.contextmanager
def processor(with_fp16: bool) -> Iterator[None]:
    """DeepSpeed's accelerator answers as on a processor with or without fp16: True or, as on a real
    one, None."""
    answer = True if with_fp16 else None
    with mock.patch.object(type(get_accelerator()), "is_fp16_supported", lambda _: answer):
        yield


def make_engine(config: str, precision: str) -> tuple[Engine, SampleList]:
    settings = recipe(
        engine={
            "deepspeed": config,
            "precision": precision,
            "packs_per_step": torch.distributed.get_world_size(),
        }
    )
    return Engine(settings, CPU, read_answers=True), SampleList(settings)


def announced(engine: Engine) -> str:
    """The first line of a run with this engine."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run_start.announce(engine.recipe, engine, parameter_checksums(engine))
    return printed.getvalue()


def train_one_step(config: str, precision: str, with_fp16: bool) -> dict[str, Any]:
    """Runs on every rank: what the tensors of the engine are, its own account of them, and a step's
    losses."""
    with processor(with_fp16):
        engine, make = make_engine(config, precision)
        tensors = {
            name: parameter.ds_tensor if hasattr(parameter, "ds_id") else parameter.data
            for name, parameter in engine.named_parameters()
        }
        first_line = announced(engine)
        found, engine.placement = engine.placement, Placement("fp8", 9, "elsewhere")
        other_line, engine.placement = announced(engine), found
        rank = torch.distributed.get_rank()
        result = engine.train_step([make.collate([make.text_to_image(rank), make.edit(9)])], 1e-2)
        answer = {
            "dtypes": sorted({str(tensor.dtype) for tensor in tensors.values()}),
            "values": {name: tensor.numel() for name, tensor in tensors.items()},
            "placement": list(engine.placement),
            "lines": [first_line, other_line],
            "losses": result.losses,
            "moments": sorted(
                {
                    str(moment.dtype)
                    for state in engine.optimizer.state.values()
                    for moment in state.values()
                }
            ),
            "parameters": dict(full_parameters(engine)),
        }
        engine.engine.destroy()
    return answer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", ["zero2", "zero3"])
@pytest.mark.parametrize("size", [1, 2])
def test_precision_and_stage_are_those_of_the_recipe_with_and_without_fp16(
    ranks: Callable[[int], Ranks], tmp_path: Path, size: int, config: str, precision: str
):
    path, stage = sharded_config(config, tmp_path), int(config[-1])
    with_fp16, without = (
        ranks(size).call(train_one_step, config=path, precision=precision, with_fp16=answer)
        for answer in (True, False)
    )
    sizes = {name: tensor.numel() for name, tensor in with_fp16[0]["parameters"].items()}
    for answer in [*with_fp16, *without]:
        assert answer["dtypes"] == [{"fp32": "torch.float32", "bf16": "torch.bfloat16"}[precision]]
        assert answer["moments"] == ["torch.float32"]
        assert answer["placement"] == [precision, stage, "cpu"]
        kept = size if stage == 3 else 1
        assert answer["values"] == {name: -(-sizes[name] // kept) for name in answer["values"]}
    for answer in (with_fp16[0], without[0]):
        first, other = answer["lines"]
        assert f"{size} rank(s), ZeRO stage {stage}, {precision} on cpu; " in first
        assert f"{size} rank(s), ZeRO stage 9, fp8 on elsewhere; " in other, "not what was found"
    # The same operations in the same processes.
    for one, other in zip(with_fp16, without, strict=True):
        assert torch.equal(one["losses"], other["losses"])
        for name, tensor in one["parameters"].items():
            assert torch.equal(tensor, other["parameters"][name]), name


def build_as_before(config: str, precision: str, with_fp16: bool, dtype: str) -> str:
    """Runs on every rank: the refusal of an engine whose weights are made with a `dtype` argument,
    which DeepSpeed passes over on a processor without fp16; or nothing."""
    init = partial(deepspeed.zero.Init, dtype=getattr(torch, dtype))
    with processor(with_fp16), mock.patch.object(sharded_objective.deepspeed.zero, "Init", init):
        try:
            make_engine(config, precision)
        except SettingsError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("size", [1, 2])
def test_weights_in_another_precision_end_the_start_of_a_run_in_one_line(
    ranks: Callable[[int], Ranks], tmp_path: Path, size: int
):
    config = sharded_config("zero3", tmp_path)
    call = partial(ranks(size).call, build_as_before, config=config)
    for rank, line in enumerate(call(precision="fp32", with_fp16=False, dtype="float32")):
        assert line.startswith(
            "engine.precision: the precision of model.token_embedding.weight should be fp32 and is "
            f"bf16 on rank {rank}, and that of "
        )
        assert line.endswith(
            f"more: DeepSpeed {deepspeed.__version__} deviates from its configuration; install the "
            f"versions of constraints.txt, or remove what overrides it from {config}."
        )
        assert "\n" not in line
    assert call(precision="fp32", with_fp16=True, dtype="float32") == [""] * size


def spoil(config: str, kind: str) -> list[str]:
    """Runs on every rank: what is said of a whole engine, and of one in which a single tensor is
    otherwise."""
    engine, _ = make_engine(config, "fp32")
    parameters, stage = dict(engine.named_parameters()), engine.stage
    frozen, trained = parameters[FROZEN], parameters[TRAINED]

    def said(zero: dict[str, Any], device: torch.device = CPU) -> str:
        try:
            check_placement(engine, torch.float32, zero, device)
        except SettingsError as error:
            return str(error)
        return ""

    whole = said({"stage": stage})
    kept = frozen.ds_tensor if stage == 3 else frozen
    asked, device = {"stage": stage}, CPU
    if kind == "weight":
        kept.data = kept.data.bfloat16()
    elif kind == "partition":
        kept.data = torch.cat([kept.data, kept.data])
    elif kind == "stage":
        asked = {"stage": (stage + 1) % 4}
    elif kind == "device":
        device = torch.device("meta")
    elif kind == "offload":
        asked, device = {"stage": stage, "offload_param": {"device": "cpu"}}, torch.device("meta")
    elif kind == "master":
        flat = engine.engine.optimizer.fp32_partitioned_groups_flat[0]
        flat.data = flat.data.bfloat16()
    line = said(asked, device)
    if kind not in ("weight", "partition", "master"):
        engine.engine.destroy()
    assert trained.requires_grad and not frozen.requires_grad
    return [whole, line]


@pytest.mark.parametrize(
    ("config", "kind", "line"),
    [
        (
            "zero3",
            "weight",
            f"engine.precision: the precision of {FROZEN} should be fp32 and is bf16 on",
        ),
        (
            "zero2",
            "weight",
            f"engine.precision: the precision of {FROZEN} should be fp32 and is bf16 on",
        ),
        (
            "zero3",
            "partition",
            f"engine.deepspeed: the partition of {FROZEN} should be 512 values and",
        ),
        ("zero3", "stage", "should be ZeRO stage 0 and is ZeRO stage 3 on rank"),
        ("zero2", "stage", "should be ZeRO stage 3 and is ZeRO stage 0 on rank"),
        ("zero1", "stage", "should be ZeRO stage 2 and is ZeRO stage 1 on rank"),
        ("zero0", "stage", "should be ZeRO stage 1 and is ZeRO stage 0 on rank"),
        (
            "zero3",
            "device",
            "engine.deepspeed: the device of model.token_embedding.weight should be",
        ),
        ("zero2", "device", "and is cpu on rank"),
        # The small weights are kept on the device by every rank.
        ("zero3", "offload", "bias should be meta and is cpu on rank"),
        ("zero3", "master", "engine.deepspeed: the precision of the master weights of "),
    ],
)
def test_one_tensor_that_is_otherwise_is_found_and_named(
    ranks: Callable[[int], Ranks], tmp_path: Path, config: str, kind: str, line: str
):
    for rank, (whole, spoilt) in enumerate(
        ranks(2).call(spoil, config=sharded_config(config, tmp_path), kind=kind)
    ):
        assert whole == "" and line in spoilt and f"on rank {rank}" in spoilt, spoilt


ANSWER = """
from deepspeed.accelerator import get_accelerator
print("fp16 is", bool(get_accelerator().is_fp16_supported()), flush=True)
"""


@pytest.mark.slow
def test_the_answer_about_fp16_is_turned_round_in_every_process_that_a_launcher_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    script = tmp_path / "answer.py"
    script.write_text(ANSWER)
    launcher = str(Path(sys.executable).parent / "deepspeed")
    command = [launcher, "--num_gpus", "2", "--master_port", str(free_port()), str(script)]
    counts = []
    for search_path in ("", str(TURNED_FP16)):
        monkeypatch.setenv("PYTHONPATH", search_path)
        code, output = run_command(command, tmp_path, 240)
        assert code == 0, output
        counts.append([output.count("fp16 is True"), output.count("fp16 is False")])
    assert sorted(counts) == [[0, 2], [2, 0]]
