"""How much adapters learn of what the whole generation expert learns in as many steps.

python -m benchmarks adapters [--steps 40] [--rank 8] [--lr 1e-3] [--json FILE]

The tiny recipe's model is trained on the same packs, one a step, with plain AdamW: the whole
generation expert, the same with frozen weights in nf4, adapters, and adapters on nf4. Losses are
those of other packs, which keep their noise, before and after; the share is the drop of a loss over
that of the whole expert."""

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.commands.quantisation import quantise
from benchmarks.suite.command_line import Parser
from benchmarks.suite.models import build_objective, with_adapters
from benchmarks.suite.packs import packs_of_data
from benchmarks.suite.results import ResultFile
from uno_ds.generation.inference import special_tokens
from uno_ds.model.adapters import LoraSettings
from uno_ds.objectives.uno import UnoObjective
from uno_ds.run import Run, prepare
from uno_ds.sequence.batch import PackedBatch
from uno_ds.training.sharded_objective import initialise

HELD_OUT = 6
WARMUP = 5


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    result = ResultFile(options.json, "adapters", details={"steps": options.steps})
    given = [f"data.folder={options.data}"] if options.data else []
    run = prepare("tiny", given, reads_only=True)
    assert run.tokenizer is not None
    collate = run.recipe.collator(special_tokens(run.tokenizer))
    packs = packs_of_data(run, 0, 1)
    held_out = [collate(pack) for pack in itertools.islice(packs, HELD_OUT)]
    batches = [collate(pack) for pack in itertools.islice(packs, options.steps)]
    whole: dict[str, float] = {}
    for name, lora, kind in (
        ("whole expert", False, None),
        ("whole expert, nf4", False, "nf4"),
        ("adapters", True, None),
        ("adapters, nf4", True, "nf4"),
    ):
        lr = options.lr if lora else run.recipe.optimizer.lr
        objective = objective_of(run, options.rank if lora else None, kind)
        before = losses_of(objective, held_out)
        curve = train(objective, batches, lr)
        after = losses_of(objective, held_out)
        drops = {loss: before[loss] - after[loss] for loss in before}
        whole = whole or drops
        shares = {loss: drop / whole[loss] for loss, drop in drops.items()}
        measurement = {"name": name, "lr": lr, "rank": options.rank if lora else None}
        measurement |= {"before": before, "after": after, "shares": shares, "curve": curve}
        result.add(measurement)
        print(json.dumps({key: value for key, value in measurement.items() if key != "curve"}))
        sys.stdout.flush()
    result.finish()
    return 0


def objective_of(run: Run, rank: int | None, kind: str | None) -> UnoObjective:
    """The tiny base, with new adapters of `rank` where it is given."""
    recipe = run.recipe
    if rank is not None:
        lora = LoraSettings(rank=rank, alpha=2.0 * rank)
        recipe = dataclasses.replace(with_adapters(recipe), lora=lora)
    objective = build_objective(recipe, torch.device("cpu"), torch.float32, random=False)
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if ".lora_" in name:
                initialise(name, parameter, recipe.seed)
    if kind is not None:
        quantise(objective.model, kind)
    return objective


def losses_of(objective: UnoObjective, batches: Sequence[PackedBatch]) -> dict[str, float]:
    """Mean over packs of each loss that the recipe has."""
    sums = torch.zeros(len(objective.losses), dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            sums += objective(batch, counts_of(objective, batch))[1].double()
    means = dict(zip(objective.losses, (sums / len(batches)).tolist(), strict=True))
    return {name: mean for name, mean in means.items() if mean}


def counts_of(objective: UnoObjective, batch: PackedBatch) -> torch.Tensor:
    tokens = [batch.loss_counts[name] for name in objective.losses]
    return torch.tensor(tokens, dtype=torch.float64)


def train(objective: UnoObjective, batches: Sequence[PackedBatch], lr: float) -> list[float]:
    """The total loss of each step."""
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    curve = []
    for number, batch in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, number / WARMUP)
        optimizer.zero_grad()
        total, _ = objective(batch, counts_of(objective, batch))
        total.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        curve.append(round(float(total.detach()), 5))
    return curve


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="adapters", description="What adapters learn of the whole expert's drop.")
    parser.add_argument("--steps", type=int, default=40, help="steps of each run (default 40)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (default 8)")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the adapters (default 1e-3)")
    parser.add_argument("--data", metavar="DIR", help="folder of the drawn scenes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file")
    return parser.parse_args(arguments)
