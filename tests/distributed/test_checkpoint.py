"""A checkpoint gives back every trained number to any number of ranks under any ZeRO stage, and
only to the model it belongs to."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_case import EPS, LR, STEPS, settings_of, start, write_base
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from ranks import Ranks
from safetensors.torch import load_file, save_file
from tiny import GRADIENT_ROUNDING, full_average, full_parameters, sharded_config

from uno_ds.settings import SettingsError
from uno_ds.training import checkpoint
from uno_ds.training.checkpoint import CheckpointSettings
from uno_ds.training.checkpoint_file import CheckpointTensors, open_checkpoint
from uno_ds.training.ema import Ema
from uno_ds.training.engine import Engine
from uno_ds.training.manifest import digest_of_manifest
from uno_ds.training.saving import Saver
from uno_ds.training.shards import TrainedState

KINDS = ("weight", "exp_avg", "exp_avg_sq", "average")


def everything(engine: Engine, ema: Ema) -> dict[str, Any]:
    """All trained numbers by DeepSpeed's own gathering, and the model's weights as the forward
    reads them."""
    average = {name: tensor.clone() for name, tensor in full_average(ema)}
    found: dict[str, Any] = {
        "weight": {},
        "exp_avg": {},
        "exp_avg_sq": {},
        "average": average,
        "model": dict(full_parameters(engine)),
    }
    moments = ("exp_avg", "exp_avg_sq") if engine.optimizer.state else ()
    if moments and engine.stage in (1, 2):
        # DeepSpeed's accessors find the moments after the first step only, when this was called.
        engine.engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.named_parameters():
        if parameter.requires_grad:
            found["weight"][name] = (
                safe_get_full_fp32_param(parameter) if engine.stage else parameter.detach()
            ).clone()
            for kind in moments:
                state = (
                    engine.optimizer.state[parameter][kind]
                    if engine.stage == 0
                    else safe_get_full_optimizer_state(parameter, kind)
                )
                found[kind][name] = state.clone()
    return {**found, "updates": TrainedState(engine).updates, "ema_updates": ema.updates}


def train_and_save(
    config: str, base: str, folder: str, steps: int = STEPS, precision: str = "fp32"
) -> dict[str, Any]:
    """Runs on every rank: what was saved, and what the next step gives."""
    engine, ema, batches = start(settings_of(config, base, precision))
    for _ in range(steps):
        assert not engine.train_step(batches, 1e-3).skipped
        ema.update()
    assert Saver(Path(folder), CheckpointSettings(), engine, ema).save(
        steps, {str(engine.rank): {}}, {"skipped_steps": 0}
    )
    saved = everything(engine, ema)
    return {"saved": saved, **_next_step(engine, ema, batches)}


def load_and_go_on(
    config: str, base: str, folder: str, precision: str = "fp32", steps: int = 0
) -> dict[str, Any]:
    """Runs on every rank: what was restored into an engine with other initial weights, after
    `steps` steps on other samples, and what the next step gives."""
    engine, ema, batches = start(settings_of(config, base, precision, seed=4))
    for _ in range(steps):
        engine.train_step(batches[:1] * len(batches), 1e-2)
    checkpoint.load(*open_checkpoint(Path(folder), "--resume"), engine, ema)
    restored = everything(engine, ema)
    return {"restored": restored, **_next_step(engine, ema, batches)}


def refusal(config: str, base: str, folder: str) -> str:
    """Runs on every rank: the error of loading."""
    engine, ema, _ = start(settings_of(config, base))
    try:
        checkpoint.load(*open_checkpoint(Path(folder), "--resume"), engine, ema)
    except SettingsError as error:
        return str(error)
    finally:
        engine.engine.destroy()
    return ""


def _next_step(engine: Engine, ema: Ema, batches: list) -> dict[str, Any]:
    result = engine.train_step(batches, 1e-3)
    ema.update()
    after = everything(engine, ema)
    engine.engine.destroy()
    return {"loss": result.loss, "after": after}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    folder = tmp_path_factory.mktemp("configs")
    return lambda name: sharded_config(name, folder)


@pytest.fixture(scope="module")
def two_ranks(
    ranks: Callable[[int], Ranks],
    configs: Callable[[str], str],
    base: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict]:
    """A checkpoint of two ranks under ZeRO-3, and what it should hold."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, ranks(2).call(
        train_and_save, config=configs("zero3"), base=str(base), folder=str(folder)
    )[0]


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any], kinds: tuple[str, ...]) -> None:
    assert (ours["updates"], ours["ema_updates"]) == (theirs["updates"], theirs["ema_updates"])
    for kind in kinds:
        assert ours[kind] and ours[kind].keys() == theirs[kind].keys(), kind
        for name, tensor in ours[kind].items():
            assert torch.equal(tensor, theirs[kind][name]), f"{kind} of {name}"


@pytest.mark.parametrize(
    ("size", "config"),
    [
        (2, "zero3"),
        (1, "zero3"),
        (3, "zero3"),
        (2, "zero2"),
        (1, "zero1"),
        (2, "zero0"),
        (2, "zero3_offload"),
        (2, "zero3_multinode"),
    ],
)
def test_two_ranks_of_zero3_load_bit_for_bit_elsewhere_and_go_on(
    ranks: Callable[[int], Ranks],
    configs: Callable[[str], str],
    base: Path,
    two_ranks: tuple[Path, dict],
    size: int,
    config: str,
):
    folder, expected = two_ranks
    for answer in ranks(size).call(
        load_and_go_on, config=configs(config), base=str(base), folder=str(folder / f"step_{STEPS}")
    ):
        assert_equal(answer["restored"], expected["saved"], (*KINDS, "model"))
        assert (answer["after"]["updates"], answer["after"]["ema_updates"]) == (
            STEPS + 1,
            STEPS + 1,
        )
        if size == 2 and config.startswith("zero3"):
            assert_equal(answer["after"], expected["after"], (*KINDS, "model"))
            assert torch.equal(answer["loss"], expected["loss"])
        else:
            # One more step needs the moments and AdamW's count, and adds up in another order.
            moments = expected["after"]["exp_avg"]
            largest = max(moment.abs().max() for moment in moments.values())
            # Rounding of the gradient moves a weight by up to its share of lr, divided by at least
            # eps.
            allowed = {
                "exp_avg": GRADIENT_ROUNDING * largest,
                "weight": LR * GRADIENT_ROUNDING * largest / EPS,
            }
            for kind, bound in allowed.items():
                for name, tensor in answer["after"][kind].items():
                    error = (tensor - expected["after"][kind][name]).abs().max()
                    assert error <= bound, f"{kind} of {name} is off by {error:.1e}"


@pytest.mark.parametrize(
    ("written", "read"),
    [((2, "zero2"), (1, "zero3")), ((2, "zero0"), (2, "zero1")), ((1, "zero3"), (2, "zero3"))],
)
def test_other_stages_and_ranks_write_what_any_reads(
    ranks: Callable[[int], Ranks],
    configs: Callable[[str], str],
    base: Path,
    tmp_path: Path,
    written: tuple[int, str],
    read: tuple[int, str],
):
    saved = ranks(written[0]).call(
        train_and_save, config=configs(written[1]), base=str(base), folder=str(tmp_path)
    )[0]["saved"]
    tensors = CheckpointTensors(*open_checkpoint(tmp_path / "latest", "checkpoint"))
    tensors.verify()
    assert sum(record["bytes"] for record in tensors.manifest["files"].values()) == sum(
        file.stat().st_size for file in tensors.folder.glob("*.safetensors")
    )
    for kind in KINDS:
        assert all(
            torch.equal(tensors.read(kind, name), tensor) for name, tensor in saved[kind].items()
        ), f"{kind} offline"
    answer = ranks(read[0]).call(
        load_and_go_on,
        config=configs(read[1]),
        base=str(base),
        folder=str(tmp_path / f"step_{STEPS}"),
    )[0]
    assert_equal(answer["restored"], saved, (*KINDS, "model"))


@pytest.mark.parametrize("config", ["zero1", "zero2", "zero3"])
def test_the_bf16_copy_follows_the_restored_masters_also_in_an_engine_that_has_trained(
    ranks: Callable[[int], Ranks],
    configs: Callable[[str], str],
    base: Path,
    tmp_path: Path,
    config: str,
):
    arguments = {"config": configs(config), "base": str(base), "precision": "bf16"}
    before = ranks(2).call(train_and_save, folder=str(tmp_path), **arguments)
    after = ranks(2).call(
        load_and_go_on, folder=str(tmp_path / f"step_{STEPS}"), steps=1, **arguments
    )
    for ours, theirs in zip(after, before, strict=True):
        assert any(tensor.dtype == torch.bfloat16 for tensor in theirs["saved"]["model"].values())
        assert_equal(ours["restored"], theirs["saved"], (*KINDS, "model"))
        assert torch.equal(ours["loss"], theirs["loss"])
        assert_equal(ours["after"], theirs["after"], (*KINDS, "model"))


def test_a_checkpoint_from_before_the_first_step_has_no_moments_and_loads(
    ranks: Callable[[int], Ranks], configs: Callable[[str], str], base: Path, tmp_path: Path
):
    before = ranks(2).call(
        train_and_save, config=configs("zero3"), base=str(base), folder=str(tmp_path), steps=0
    )[0]
    assert not CheckpointTensors(*open_checkpoint(tmp_path / "step_0", "checkpoint")).holds(
        "exp_avg"
    )
    after = ranks(2).call(
        load_and_go_on, config=configs("zero3"), base=str(base), folder=str(tmp_path / "step_0")
    )[0]
    assert_equal(after["restored"], before["saved"], ("weight", "average", "model"))
    assert_equal(after["after"], before["after"], (*KINDS, "model"))


def test_a_base_that_changed_since_is_refused_with_the_tensors_name(
    ranks: Callable[[int], Ranks],
    configs: Callable[[str], str],
    base: Path,
    two_ranks: tuple[Path, dict],
    tmp_path: Path,
):
    changed = tmp_path / "changed"
    shutil.copytree(base, changed)
    tensors = load_file(changed / "ema.safetensors")
    tensors["connector.fc1.weight"].view(-1)[5] += 1e-6
    tensors["vae2llm.weight"] += 1
    save_file(tensors, changed / "ema.safetensors")
    lines = ranks(2).call(
        refusal,
        config=configs("zero3"),
        base=str(changed),
        folder=str(two_ranks[0] / f"step_{STEPS}"),
    )
    assert (
        lines[0] == lines[1]
        and "connector.fc1.weight differs" in lines[0]
        and str(changed) in lines[0]
    )


@pytest.mark.parametrize("damage", ["byte", "cut", "gone", "renamed"])
def test_a_damaged_checkpoint_is_refused_by_every_rank_in_one_line(
    ranks: Callable[[int], Ranks],
    configs: Callable[[str], str],
    base: Path,
    two_ranks: tuple[Path, dict],
    tmp_path: Path,
    damage: str,
):
    folder = tmp_path / "damaged"
    shutil.copytree(two_ranks[0] / f"step_{STEPS}", folder)
    file = folder / "rank_00001.safetensors"
    content, named = bytearray(file.read_bytes()), "rank_00001.safetensors"
    content[-3] ^= 1
    if damage == "gone":
        file.unlink()
    elif damage == "renamed":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["shapes"]["model.other.weight"] = manifest["shapes"].pop("model.vae2llm.weight")
        (folder / "manifest.json").write_text(
            json.dumps(manifest | {"hash": digest_of_manifest(manifest)})
        )
        named = "model.vae2llm.weight does not train there"
    else:
        file.write_bytes(content if damage == "byte" else content[:-10])
    lines = ranks(2).call(refusal, config=configs("zero3"), base=str(base), folder=str(folder))
    assert lines[0] == lines[1] and named in lines[0] and "\n" not in lines[0]


def test_older_checkpoints_go_and_latest_names_the_newest(
    ranks: Callable[[int], Ranks], configs: Callable[[str], str], base: Path, tmp_path: Path
):
    for steps in (0, 1, 2):
        ranks(1).call(
            train_and_save,
            config=configs("zero3"),
            base=str(base),
            folder=str(tmp_path),
            steps=steps,
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_1", "step_2"]
    assert open_checkpoint(tmp_path / "latest", "")[1]["step"] == 2
    with pytest.raises(SettingsError, match="not a complete checkpoint"):
        open_checkpoint(tmp_path / "step_0", "--resume")
