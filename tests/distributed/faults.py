"""Faults that tests put into a run, from outside of the program: dying, stopping, a bad number at a
chosen place."""

import builtins
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import uno_ds.training.finish  # noqa: F401  a forked run imports nothing
from uno_ds.commands.train import main
from uno_ds.kernels.conditioning_attention import sdpa
from uno_ds.model import tensor_file
from uno_ds.objectives.uno import UnoObjective
from uno_ds.training import loop, saving
from uno_ds.training.engine import Engine

__all__ = ["install", "main"]

_step = 0


def install(kind: str = "none", rank: int | None = None, step: int = 1, **details: Any) -> None:
    """Puts fault `kind` of FAULTS into this process, if it is rank `rank` (None: on every rank): it
    happens in optimizer step `step`, counted in this process from 1."""
    if rank is None or int(os.environ["RANK"]) == rank:
        _count_steps()
        FAULTS[kind](lambda: _step == step, **details)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _count_steps() -> None:
    def counting(self: Engine, *arguments: Any, **options: Any) -> Any:
        global _step
        _step += 1
        return train_step(self, *arguments, **options)

    train_step, Engine.train_step = Engine.train_step, counting


def _in_forward(now: Callable[[], bool], do: Callable[[], None] = kill) -> None:
    def forward(self: UnoObjective, *arguments: Any) -> Any:
        result = before(self, *arguments)
        if now():
            do()
        return result

    before, UnoObjective.forward = UnoObjective.forward, forward


def _in_backward(now: Callable[[], bool]) -> None:
    """When half of the gradients of the model have been computed."""

    def forward(self: UnoObjective, *arguments: Any) -> Any:
        total, parts = before(self, *arguments)
        if now():
            middle = self.model.layers[len(self.model.layers) // 2].gen.q_proj.weight
            middle.register_hook(lambda gradient: kill())
        return total, parts

    before, UnoObjective.forward = UnoObjective.forward, forward


def _in_optimizer(now: Callable[[], bool]) -> None:
    """When AdamW has changed this rank's masters, before the other ranks hear of it."""

    def step(self: torch.optim.AdamW, *arguments: Any, **options: Any) -> Any:
        result = before(self, *arguments, **options)
        if now():
            kill()
        return result

    before, torch.optim.AdamW.step = torch.optim.AdamW.step, step


def _in_save(now: Callable[[], bool], operation: int = -1, record: str = "") -> None:
    """Before operation number `operation` of the saves of this process, counted from 0: an
    operation is a part of a save that may change the disk. `record`: a file to which all operations
    are written, a line each."""
    done = depth = 0

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            if depth or threading.current_thread().name == "checkpoint":
                if done == operation:
                    kill()
                done += 1
                if record:
                    with open(f"{record}{os.environ['RANK']}", "a") as file:
                        print(
                            function.__name__,
                            *(argument for argument in arguments if isinstance(argument, Path)),
                            file=file,
                        )
            return function(*arguments, **options)

        return counted

    def inside(method: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                return method(*arguments, **options)
            finally:
                depth -= 1

        return called

    for owner, name in (
        (os, "fsync"),
        (os, "replace"),
        (Path, "rename"),
        (Path, "mkdir"),
        (saving, "write_tensors"),
        (saving, "sync_folder"),
        (tensor_file, "_append"),
        (saving.shutil, "rmtree"),
    ):
        setattr(owner, name, counting(getattr(owner, name)))
    saving.Saver.save, saving.Saver.settle = inside(saving.Saver.save), inside(saving.Saver.settle)


def _blind(now: Callable[[], bool]) -> None:
    """The disk says that there is room, so that only the writing finds out."""
    saving.shutil.disk_usage = lambda path: SimpleNamespace(free=2**50)


def _stop(now: Callable[[], bool]) -> None:
    _in_forward(now, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def _nan(now: Callable[[], bool], steps: int = 1) -> None:
    """From that step on, `steps` of them have a loss that is not a number on this rank."""
    first = 0

    def forward(self: UnoObjective, *arguments: Any) -> Any:
        nonlocal first
        total, parts = before(self, *arguments)
        first = first or now() and _step
        return total * float("nan") if first and _step < first + steps else total, parts

    before, UnoObjective.forward = UnoObjective.forward, forward


def _spike(now: Callable[[], bool], factor: float) -> None:
    def forward(self: UnoObjective, *arguments: Any) -> Any:
        total, parts = before(self, *arguments)
        return total * factor if now() else total, parts

    before, UnoObjective.forward = UnoObjective.forward, forward


def _ruin(now: Callable[[], bool], factor: float) -> None:
    """The step is taken with so many times its learning rate."""

    def step(self: torch.optim.AdamW, *arguments: Any, **options: Any) -> Any:
        if now():
            for group in self.param_groups:
                group["lr"] *= factor
        return before(self, *arguments, **options)

    before, torch.optim.AdamW.step = torch.optim.AdamW.step, step


def _remove(now: Callable[[], bool], path: str, keep: int | None = None) -> None:
    """The file is gone, or cut to `keep` bytes, as the step begins."""

    def step(self: Engine, *arguments: Any, **options: Any) -> Any:
        if now():
            os.unlink(path) if keep is None else os.truncate(path, keep)
        return before(self, *arguments, **options)

    before, Engine.train_step = Engine.train_step, step


def _fill(now: Callable[[], bool], largest: int) -> None:
    """From that step on no file of this process may grow beyond `largest` bytes."""

    def step(self: torch.optim.AdamW, *arguments: Any, **options: Any) -> Any:
        if now():
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        return before(self, *arguments, **options)

    before, torch.optim.AdamW.step = torch.optim.AdamW.step, step


def _delete(now: Callable[[], bool], folder: str) -> None:
    _in_forward(now, lambda: shutil.rmtree(folder, ignore_errors=True))


def _slow(now: Callable[[], bool], seconds: float) -> None:
    """Every step takes so much longer on this rank."""
    _in_forward(lambda: True, lambda: time.sleep(seconds))


def _kernel(now: Callable[[], bool]) -> None:
    """From that step on, attention is wrong by one percent on this rank."""
    wrong = False

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any) -> torch.Tensor:
        nonlocal wrong
        wrong = wrong or now()
        out = before(q, k, v, plan)
        return out * 1.01 if wrong else out

    before, sdpa.conditioning_attention = sdpa.conditioning_attention, attention


def _raise(now: Callable[[], bool], error: str, message: str) -> None:
    """`error`: the name of an exception of torch, of torch.distributed, or of Python itself."""

    def do() -> None:
        places = (torch, torch.distributed, builtins)
        raise next(getattr(place, error) for place in places if hasattr(place, error))(message)

    _in_forward(now, do)


def _none(now: Callable[[], bool]) -> None:
    assert loop.train


FAULTS: dict[str, Callable[..., None]] = {
    "none": _none,
    "forward": _in_forward,
    "backward": _in_backward,
    "optimizer": _in_optimizer,
    "save": _in_save,
    "blind": _blind,
    "stop": _stop,
    "nan": _nan,
    "spike": _spike,
    "ruin": _ruin,
    "remove": _remove,
    "fill": _fill,
    "delete": _delete,
    "slow": _slow,
    "kernel": _kernel,
    "raise": _raise,
}
