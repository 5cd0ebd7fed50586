"""DeepSpeed files of tutorials, files with a byte-order mark, and words of --set that YAML takes
for something else: each is read as meant, or refused in one line that names the key, in the dry run
too."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import tree

from uno_ds.recipe import Recipe, load_recipe
from uno_ds.settings import SettingsError, build
from uno_ds.training.deepspeed_config import deepspeed_config

# What the tutorials on ZeRO-3 with offload have in common.
ZERO3_OFFLOAD = {
    "stage": 3,
    "offload_optimizer": {"device": "cpu", "pin_memory": True},
    "offload_param": {"device": "cpu", "pin_memory": True},
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}
AUTO = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
}
ADAM = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}


def check(folder: Path, content: Any, **changes: Any) -> Recipe:
    """The recipe with that DeepSpeed file, checked as a dry run for one rank checks it."""
    file = folder / "ds.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    plain = tree(folder, ["scenes/t2i"], **changes)
    plain["engine"]["deepspeed"] = str(file)
    recipe = build(Recipe, plain)
    recipe.check_world(1)
    return recipe


@pytest.mark.parametrize("more", [{}, AUTO, {"zero_force_ds_cpu_optimizer": False}])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_tutorials_offload_file_trains_with_the_recipes_optimizer(
    tmp_path: Path, more: dict[str, Any], stage: int
):
    recipe = check(tmp_path, {"zero_optimization": ZERO3_OFFLOAD | {"stage": stage}, **more})
    config = deepspeed_config(recipe, 1)
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


@pytest.mark.parametrize(
    "content, named",
    [
        ({"zero_force_ds_cpu_optimizer": True}, "sets zero_force_ds_cpu_optimizer to true"),
        ({"optimizer": ADAM}, "sets optimizer to"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}, "scheduler"),
        ({"fp16": {"enabled": True}}, "sets fp16.enabled to true"),
        ({"bf16": {"enabled": True}}, "sets bf16.enabled to true"),
        ({"bf16": True}, "sets bf16.enabled to true"),
        ({"train_batch_size": 64}, "sets train_batch_size to 64"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "sets data_types.grad_accum_dtype"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "torch_autocast.enabled"),
        ({"amp": {"enabled": True}}, "asks for amp"),
        ({"prescale_gradients": True}, "asks for prescale_gradients"),
        ({"gradient_predivide_factor": 8}, "asks for gradient_predivide_factor"),
        ({"tensor_parallel": {"autotp_size": 8}}, "asks for tensor_parallel"),
        ({"curriculum_learning": {"enabled": True}}, "asks for curriculum_learning"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "zero_optimization.cpu_offload"),
        ({"zero_optimization": {"stage": 3, "bucket": 1}}, "bucket: Extra inputs"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "big"}}, "reduce_bucket_size"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}}, "device"),
        ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, "offload_param"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "NVMe"),
        ({"tensorboard": {"enabled": True, "path": "x"}}, "tensorboard.path"),
        ({"activation_checkpointing": 3}, "is refused by DeepSpeed"),
    ],
)
def test_a_deepspeed_file_that_asks_for_something_else_is_one_line_that_names_the_key(
    tmp_path: Path, content: dict[str, Any], named: str
):
    with pytest.raises(SettingsError) as raised:
        check(tmp_path, content)
    assert raised.value.key == "engine.deepspeed" and named in str(raised.value)
    assert "ds.json" in str(raised.value) and "\n" not in str(raised.value)


def test_switches_that_are_off_and_sections_that_only_report_are_taken(tmp_path: Path):
    off = {key: {"enabled": False} for key in ("hybrid_engine", "data_efficiency")}
    reports = {"flops_profiler": {"enabled": False}, "gradient_predivide_factor": 1.0}
    check(tmp_path, {"zero_optimization": {"stage": 3}, **off, **reports, "steps_per_print": 10})


@pytest.mark.parametrize("kind", ["recipe", "deepspeed"])
def test_a_byte_order_mark_at_the_start_of_a_file_is_no_part_of_it(tmp_path: Path, kind: str):
    content = json.dumps({"zero_optimization": {"stage": 2}})
    mark = "\ufeff"
    recipe = check(tmp_path, mark + content if kind == "deepspeed" else content)
    assert recipe.deepspeed_config()["zero_optimization"]["stage"] == 2
    plain = tree(tmp_path, ["scenes/t2i"])
    file = tmp_path / "recipe.yaml"
    file.write_text((mark if kind == "recipe" else "") + yaml.safe_dump(plain), "utf-8")
    assert load_recipe(str(file)).name == "small"


@pytest.fixture
def recipe_file(tmp_path: Path) -> str:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree(tmp_path, ["scenes/t2i"])))
    return str(file)


@pytest.mark.parametrize("word", ["off", "on", "No", "yes", "1e3"])
def test_set_takes_a_word_for_a_name(recipe_file: str, word: str):
    assert load_recipe(recipe_file, [f"name={word}"]).name == word


@pytest.mark.parametrize(
    "word, meant", [("off", False), ("on", True), ("NO", False), ("yes", True), ("false", False)]
)
def test_set_switches_a_boolean_by_the_words_of_yaml(recipe_file: str, word: str, meant: bool):
    assert load_recipe(recipe_file, [f"checkpoint.export={word}"]).checkpoint.export is meant


@pytest.mark.parametrize(
    "assignment, words",
    [
        ("name=123", "name: must be of type str, got 123; put it into quotes to have it as text."),
        ("name=true", "name: must be of type str, got true; put it into quotes"),
        ("name=2026-11-26", "name: must be of type str, got datetime.date(2026, 11, 26); put it"),
        ("output=null", "output: must be of type str, got null."),
        ("name=", "name: must be of type str, got null."),
        ("checkpoint.export=maybe", "checkpoint.export: must be of type bool, got 'maybe'."),
        ("steps=off", "steps: must be of type int, got 'off'."),
        ("optimizer.lr=off", "optimizer.lr: must be a finite number, got 'off'."),
    ],
)
def test_set_to_what_yaml_does_not_take_for_text_is_one_line(
    recipe_file: str, assignment: str, words: str
):
    with pytest.raises(SettingsError) as raised:
        load_recipe(recipe_file, [assignment])
    assert str(raised.value).startswith(words)


def test_quotes_make_text_of_anything(recipe_file: str):
    assert load_recipe(recipe_file, ['name="123"']).name == "123"
