"""The step asks the device for nothing: no value is read back, no list is uploaded, and what the
backends derive from a batch is made by the loader's thread."""

import contextlib
import dataclasses
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_objective import (
    collate,
    edit,
    loss_counts,
    make_composer,
    text_to_image,
    tiny_objective,
)
from torch.utils._python_dispatch import TorchDispatchMode

from uno_ds.data.stream import Stream
from uno_ds.kernels.conditioning_attention import flash, flex, sdpa, triton_operator
from uno_ds.kernels.expert_products import expert_product
from uno_ds.kernels.transfer import map_tensors
from uno_ds.model import vision
from uno_ds.sequence.batch import PackedBatch
from uno_ds.training.loading import BatchPreparation

ROOT = Path(__file__).parents[2]
OURS = (str(ROOT / "uno_ds"), str(ROOT / "kernels"))
# Methods that wait for a device: they give its values to the host, or copy from pageable memory.
WAITING = (
    "item",
    "tolist",
    "new_tensor",
    "cpu",
    "nonzero",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
)


# Functions that make a tensor of numbers on the host: on a device that is a copy from pageable
# memory.
UPLOADING = ("tensor", "as_tensor", "from_numpy")


class DataDependentShapes(TorchDispatchMode):
    """Refuses operators whose result has a shape that the host has to wait for."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        assert name not in ("nonzero", "masked_select", "_unique2"), f"{name} waits for the device"
        if name in ("index", "index_put", "index_put_"):
            masks = [x for x in arguments[1] if x is not None and x.dtype == torch.bool]
            assert not masks, f"{name} with a mask waits for the device"
        return function(*arguments, **(options or {}))


@contextlib.contextmanager
def no_host_waits():
    """Within it, code of this project that calls one of WAITING or UPLOADING raises
    AssertionError."""
    with pytest.MonkeyPatch.context() as patch, DataDependentShapes():
        for name in WAITING:
            patch.setattr(torch.Tensor, name, _refusing(name, getattr(torch.Tensor, name)))
        for name in UPLOADING:
            patch.setattr(torch, name, _refusing(name, getattr(torch, name)))
        yield


def _refusing(name, original):
    def called(*arguments, **options):
        caller = sys._getframe(1).f_code
        assert not caller.co_filename.startswith(OURS), (
            f"{caller.co_filename}: {caller.co_name} calls {name}"
        )
        return original(*arguments, **options)

    return called


def mixed_batch() -> PackedBatch:
    rng = np.random.default_rng(0)
    composer = make_composer()
    return collate([text_to_image(rng, composer), edit(rng, composer)])


def as_on_a_gpu(monkeypatch) -> None:
    """The visual encoder computes all images of a pack in one call."""
    monkeypatch.setattr(vision, "_separate_lengths", lambda *_: contextlib.nullcontext(None))


def plain_varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, causal):
    """As many rows as a library gives, with a gradient for every input; values do not matter."""
    return q * (k.mean() + v.mean())


@pytest.mark.parametrize("backend", ["sdpa", "reference", "flash"])
def test_forward_and_backward_wait_for_nothing(backend, monkeypatch):
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(flash, "library", lambda: flash.Library("stand-in", plain_varlen))
    objective = tiny_objective(backend=backend, dtype=torch.float32)
    batch = mixed_batch().to("cpu")
    counts = loss_counts(batch)
    batch = BatchPreparation(backend, torch.device("cpu"), vision_plan=True)(batch)
    # The first micro-batch of a run uploads the weights of the losses.
    objective(batch, counts)
    with no_host_waits():
        total, _ = objective(batch, counts)
        total.backward()


def test_the_triton_operators_wait_for_nothing():
    batch = mixed_batch()
    plan = batch.live_plan
    q = torch.randn(plan.queries, 2, 16, requires_grad=True)
    k, v = (torch.randn(plan.keys, 1, 16, requires_grad=True) for _ in range(2))
    with no_host_waits():
        triton_operator.conditioning_attention(q, k, v, plan).sum().backward()
    assert q.grad is not None


def test_a_joint_product_of_both_experts_waits_for_nothing():
    x, first, second = torch.randn(9, 8), torch.randn(16, 8), torch.randn(16, 8)
    leaves = [x.requires_grad_(), second.requires_grad_()]
    with no_host_waits():
        expert_product(x, 4, (first, second), backend="grouped").sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)


@pytest.mark.parametrize(
    ("backend", "module", "builder"),
    [("sdpa", sdpa, "calls_of"), ("flash", flash, "compose"), ("flex", flex, "blocks")],
)
def test_forward_derives_nothing_from_a_batch_that_the_loader_prepared(
    backend, module, builder, monkeypatch
):
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(flash, "library", lambda: flash.Library("stand-in", plain_varlen))
    batch = BatchPreparation(backend, torch.device("cpu"), vision_plan=True)(mixed_batch())

    def fail(*_, **__):
        raise AssertionError(f"{builder} is called in forward")

    monkeypatch.setattr(module, builder, fail)
    objective = tiny_objective(backend=backend, dtype=torch.float32)
    with torch.no_grad():
        objective(batch.to("cpu"), loss_counts(batch))
    with pytest.raises(AssertionError, match="called in forward"), torch.no_grad():
        objective(mixed_batch(), loss_counts(batch))


def leaves(value) -> list[torch.Tensor]:
    """Every tensor of a batch that `to` uploads."""
    found: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor.clone()

    map_tensors(value, keep)
    return found


def test_what_is_uploaded_to_a_gpu_was_pinned_in_the_loaders_thread(monkeypatch):
    pinned: list[torch.Tensor] = []

    def pin_memory(tensor):
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    prepared = BatchPreparation("sdpa", torch.device("cuda", 1), vision_plan=True)(mixed_batch())
    uploaded = [tensor for tensor in leaves(prepared) if tensor.numel()]
    assert len(uploaded) > 30
    assert {id(tensor) for tensor in uploaded} <= {id(tensor) for tensor in pinned}
    # The masks of sdpa are among them.
    calls, _ = prepared.live_plan.cache["sdpa"]
    assert any(tensor is calls[-1].visible_BQT for tensor in uploaded)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_the_stream_finishes_batches_in_its_thread(prefetch):
    threads: list[str] = []

    class EndlessLane:
        number = 0

        def next_pack(self):
            return []

        def state(self):
            return {}

    def finish(batch):
        threads.append(threading.current_thread().name)
        return batch, "finished"

    stream = Stream([EndlessLane()], lambda samples: "batch", prefetch)
    stream.finish = finish
    assert next(iter(stream)) == [("batch", "finished")]
    stream.close()
    assert all(name.startswith("batches") == bool(prefetch) for name in threads)


def test_a_plan_on_the_current_gpu_is_not_copied_again(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    there = SimpleNamespace(device=torch.device("cuda", 0))
    plan = dataclasses.replace(mixed_batch().live_plan, tables=there)
    assert plan.to("cuda") is plan and plan.to("cuda:0") is plan


def test_a_plan_takes_along_what_was_derived_from_it():
    plan = mixed_batch().live_plan
    sdpa.prepare(plan)
    moved = plan.to("meta")
    calls, restore = moved.cache["sdpa"]
    assert moved.tables.is_meta and calls[0].visible_BQT.is_meta and restore.is_meta
    assert moved.cache["key_need"].is_meta and not plan.tables.is_meta
    assert plan.to("cpu") is plan


@pytest.mark.gpu
def test_forward_backward_and_adamw_wait_for_nothing_on_a_gpu():
    objective = tiny_objective(dtype=torch.float32).cuda()
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    # As the engine makes it on a GPU.
    optimizer = torch.optim.AdamW(trained, fused=True)
    device = torch.device("cuda", torch.cuda.current_device())
    prepare = BatchPreparation("sdpa", device, vision_plan=True)
    counts = loss_counts(mixed_batch()).to(device)
    objective(prepare(mixed_batch()).to(device), counts)[0].backward()
    optimizer.step()
    batch = prepare(mixed_batch())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        objective(batch.to(device), counts)[0].backward()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
