"""Metrics files of made-up runs."""

import json

import torch

from uno_ds.training.logging_settings import LoggingSettings
from uno_ds.training.metrics import FIELDS, Metrics

# What must repeat: everything but times, and memory.
REPEATED = tuple(
    field for field in FIELDS if field not in ("step_seconds", "tokens_per_second", "memory_bytes")
)
QUIET = {"tensorboard": False, "progress": "lines"}


def values_at(step: int) -> dict:
    return {
        "loss": torch.tensor(1 / step),
        "loss_flow": torch.tensor(2.0 / step),
        "loss_caption": None,
        "grad_norm": torch.tensor(0.5, dtype=torch.float64),
        "lr": 1e-3,
        "tokens": torch.tensor(100),
        "step_seconds": 0.25,
        "memory_bytes": 7,
        "skipped": 0,
    }


def run(folder, steps, *, every=3, start=0, total=20, values=values_at, **settings):
    with Metrics(
        folder, LoggingSettings(every=every, **{**QUIET, **settings}), 0, total, start_step=start
    ) as metrics:
        for step in steps:
            metrics.record(step, values(step))
    return folder / "metrics.jsonl"


def strict(line: str) -> dict:
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)
