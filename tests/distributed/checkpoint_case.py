"""A base, and an engine on it with its average and batches, for tests of checkpoints."""

from pathlib import Path

import torch
import torch.distributed as dist
from tiny import ARCHITECTURE, SampleList, recipe

from uno_ds.model.architecture import Architecture, write_architecture
from uno_ds.model.bagel import Bagel
from uno_ds.model.weights import write_weights
from uno_ds.recipe import Recipe
from uno_ds.settings import build
from uno_ds.training.ema import Ema
from uno_ds.training.engine import Engine

PACKS, STEPS, DECAY = 6, 3, 0.3
# As in test_parity: under a small eps a gradient that is zero but for rounding becomes a whole
# step.
LR, EPS = 1e-3, 1e-3


def settings_of(config: str, base: str, precision: str = "fp32", seed: int = 3) -> Recipe:
    return recipe(
        seed=seed,
        model={"base": base, "architecture": None},
        engine={"deepspeed": config, "packs_per_step": PACKS, "precision": precision},
        optimizer={"lr": LR, "eps": EPS, "weight_decay": 0.1, "ema": DECAY},
    )


def start(settings: Recipe) -> tuple[Engine, Ema, list]:
    """Runs on every rank: engine, average, and this rank's micro-batches, the same over all ranks
    whatever their number."""
    engine = Engine(settings, torch.device("cpu"), read_answers=True)
    make, share = SampleList(settings), PACKS // dist.get_world_size()
    numbers = range(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    batches = [
        make.collate(
            [make.text_to_image(number), make.edit(number + 10), make.conversation(number + 20)]
        )
        for number in numbers
    ]
    return engine, Ema(engine, DECAY), batches


def write_base(folder: Path) -> Path:
    """A base of random fp32 weights, without a tokenizer."""
    shape = build(Architecture, ARCHITECTURE)
    torch.manual_seed(0)
    parameters = dict(Bagel(shape).named_parameters())
    write_weights(folder, parameters, parameters.__getitem__, torch.float32)
    write_architecture(shape, folder)
    return folder
