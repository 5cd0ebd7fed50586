"""Counted operations of a step: also of operators that the first step of a process brings, and of
conversations in plain flow matching."""

import pytest
import torch
from tiny import SampleList, counts_of, recipe
from torch.utils.flop_counter import register_flop_formula

from benchmarks.suite.counting import counted_flops
from benchmarks.suite.models import build_objective
from benchmarks.suite.packs import as_mode
from uno_ds.cost.step_flops import attention_flops, step_flops, total
from uno_ds.cost.utilisation import plan_of
from uno_ds.cost.work import Work


@torch.library.custom_op("uno_ds_test::product", mutates_args=())
def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


def test_an_operator_whose_formula_the_first_step_registers_is_counted():
    """As of a kernel, whose module is imported when it is called first."""
    registered: list[bool] = []

    def step() -> None:
        if not registered:
            registered.append(True)

            @register_flop_formula(torch.ops.uno_ds_test.product)
            def _(a: torch.Size, b: torch.Size, *_: object, **__: object) -> int:
                return 2 * a[0] * a[1] * b[1]

        product(torch.ones(3, 5), torch.ones(5, 7))

    assert counted_flops(step) == 2 * 3 * 5 * 7


@pytest.mark.parametrize("mode", ["flow", "uno"])
@pytest.mark.parametrize("cross_entropy", ["chunked", "reference"])
def test_conversations_beside_images_are_counted_as_predicted(mode: str, cross_entropy: str):
    settings = recipe(kernels={"cross_entropy": cross_entropy})
    make = SampleList(settings)
    samples = [make.text_to_image(1), make.edit(2), make.conversation(4), make.conversation(5)]
    batch = make.collate(as_mode(samples, mode))
    work, plan = Work.of(batch), plan_of(settings, read_answers=True)
    assert work.answers and (work.captions > 0) == (mode == "uno")
    cpu, fp32 = torch.device("cpu"), torch.float32
    objective = build_objective(settings, cpu, fp32, random=True, read_answers=True)

    def step() -> None:
        loss, _ = objective(batch, counts_of([batch]))
        loss.backward()

    parts = step_flops(settings.architecture, work, plan)
    attention = attention_flops(parts, settings.architecture, work, plan).total
    assert counted_flops(step) + attention == total(parts).total
