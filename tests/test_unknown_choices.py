"""A name that is added to the choices of a setting alone raises where the setting is read: it is
never computed as another choice."""

import dataclasses
import typing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from composed_samples import make_composer
from tiny_objective import tiny_objective

from uno_ds.cost.hardware import GPUS
from uno_ds.cost.memory import Sharding
from uno_ds.data.layouts.conversation import conversation_views, stored_views
from uno_ds.evaluation.benchmarks import get_benchmark
from uno_ds.model.adapters import LoraSettings
from uno_ds.model.quantisation import QuantisedLinear, quantise_frozen
from uno_ds.objectives.negatives import NEGATIVE_FORMS
from uno_ds.objectives.regression_target import normalised
from uno_ds.recipe import Recipe, load_recipe
from uno_ds.sequence.composition import SpecialTokens
from uno_ds.training.balance import LossBalance
from uno_ds.training.health import Health
from uno_ds.training.kernel_check import KernelCheck
from uno_ds.training.metrics import Metrics

ROOT = Path(__file__).parent
OTHER = "nobody"


def with_other(key: str) -> Recipe:
    """The shipped recipe with a name at `key` that its settings class would refuse."""
    section, name = key.split(".")
    recipe = load_recipe("tiny", ["objective.supervise_until=0.5", "objective.negative_weight=1"])
    changed = dataclasses.replace(getattr(recipe, section), **{name: OTHER})
    # Recipe's own checks would be the first to read it.
    object.__setattr__(recipe, section, changed)
    return recipe


def set_up_quantised(recipe: Recipe) -> None:
    QuantisedLinear(2, 2).requires_grad_(False).set_up(recipe.model.frozen_precision)


def normalise(recipe: Recipe) -> None:
    normalised(torch.ones(4, 2), [4], recipe.objective)


# Where the setting of each key is read.
READERS: dict[str, list[Callable[[Recipe], object]]] = {
    "engine.precision": [lambda recipe: Sharding.of(recipe, 1, recipe.engine.precision)],
    "evaluate.weights": [lambda recipe: recipe.evaluate.uses_average(0.9)],
    "hardware.gpu": [lambda recipe: GPUS[recipe.hardware.gpu]],
    "health.kernel_check_action": [lambda recipe: KernelCheck(recipe.health, None)],
    "health.spike_action": [lambda recipe: Health(recipe.health, 1).highest_loss],
    "model.codec_precision": [lambda recipe: recipe.model.codec_dtype],
    "model.frozen_precision": [set_up_quantised],
    "model.train": [
        lambda recipe: recipe.collator(SpecialTokens(0, 0, 0, 0)),
        lambda recipe: tiny_objective().choose_trainable(recipe.model.train, LoraSettings()),
    ],
    "objective.balance": [lambda recipe: LossBalance(recipe, None)],
    "objective.negative_form": [lambda recipe: NEGATIVE_FORMS[recipe.objective.negative_form]],
    "objective.negative_source": [lambda recipe: recipe.composer(None).negatives()],
    "objective.regression_negatives": [lambda recipe: recipe.objective.gathers_negatives],
    "objective.regression_target_norm": [normalise],
    "objective.supervision_decay": [lambda recipe: recipe.supervision_schedule],
    "optimizer.schedule": [lambda recipe: recipe.optimizer.lr_at(10**6, 10**6)],
    "sequence.context_gradient": [lambda recipe: recipe.collator(SpecialTokens(0, 0, 0, 0))],
    "sequence.conversation_images": [
        lambda recipe: stored_views(recipe.sequence),
        lambda recipe: conversation_views(recipe.sequence, None),
    ],
}
# Of the others, the test of this file or the test file that has it.
ELSEWHERE = {
    "logging.progress": "test_unknown_choices.py",
    "evaluate.benchmarks": "test_unknown_choices.py",
    "lora.also_train": "test_unknown_choices.py",
    "model.keep_bf16": "test_unknown_choices.py",
    "model.architecture.codec": "objectives/test_objective_registries.py",
    "objective.regression_loss": "kernels/test_kernel_registries.py",
    "objective.regression_target": "objectives/test_objective_registries.py",
    "samples.renormalise": "objectives/test_objective_registries.py",
    "samples.edit.renormalise": "objectives/test_objective_registries.py",
    "data.sources.layout": "data/test_layout_registry.py",
    "evaluate.sources.layout": "data/test_layout_registry.py",
}
KERNELS = "kernels/test_kernel_registries.py"


@pytest.mark.parametrize("key", READERS)
def test_a_choice_that_no_branch_knows_raises(key: str):
    recipe = with_other(key)
    for read in READERS[key]:
        with pytest.raises((ValueError, KeyError), match=OTHER):
            read(recipe)


def test_a_choice_of_a_list_or_of_the_log_that_no_branch_knows_raises(tmp_path: Path):
    places = [
        lambda: Metrics(tmp_path, with_other("logging.progress").logging, 0, 1),
        lambda: get_benchmark(OTHER),
        lambda: LoraSettings(also_train=[OTHER]).trains("model.norm"),
        lambda: quantise_frozen(torch.nn.Module(), "int8", torch.float32, [OTHER]),
    ]
    for place in places:
        with pytest.raises((ValueError, KeyError), match=OTHER):
            place()


def keys_with_choices(cls: type, path: str = "") -> set[str]:
    found = set()
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        key = f"{path}{field.name}"
        if field.metadata.get("choices"):
            found.add(key)
        kind = hints[field.name]
        for inner in (kind, *typing.get_args(kind)):
            if dataclasses.is_dataclass(inner):
                found |= keys_with_choices(inner, f"{key}.")
    return found


def test_every_setting_with_choices_is_in_one_of_the_tables():
    keys = keys_with_choices(Recipe)
    kernels = {key for key in keys if key.startswith("kernels.")}
    assert kernels and len(keys) > 25
    assert keys - kernels == set(READERS) | set(ELSEWHERE)
    assert all((ROOT / file).is_file() for file in (*ELSEWHERE.values(), KERNELS))


def test_a_composer_without_negative_captions_asks_for_none():
    assert make_composer().negatives(has_column=True) == 0
