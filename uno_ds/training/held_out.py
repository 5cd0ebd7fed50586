"""Losses on held-out rows: fixed rows, conditions, noise and noise levels, so that only the weights
make a difference."""

import dataclasses
from collections.abc import Iterator, Sequence

import deepspeed.comm
import numpy as np
import torch

from uno_ds.data.images import BadRow
from uno_ds.data.samples import SampleMaker
from uno_ds.data.sources import Source
from uno_ds.objectives.uno import UnoObjective
from uno_ds.sequence.packing import Collator, Packer
from uno_ds.sequence.segments import Kind, Sample
from uno_ds.training.collectives import gather_objects
from uno_ds.training.engine import Engine


class HeldOutLosses:
    """`rows` rows of each source, evenly spaced over it. Nothing is dropped from a sample, and all
    of them have their supervision at every noise level."""

    def __init__(
        self,
        sources: Sequence[Source],
        make_sample: SampleMaker,
        collate: Collator,
        rows: int,
        times: Sequence[float],
        seed: int,
    ):
        self.sources, self.make_sample, self.collate = sources, make_sample, collate
        self.rows, self.times, self.seed = rows, times, seed

    def __call__(self, engine: Engine) -> dict[str, float]:
        """{"SOURCE/LOSS/t=T": mean over the loss's tokens in all rows}, and without a level for
        answers, which have none. Collective: every rank computes its share of the rows."""
        found: dict[str, float] = {}
        for number, source in enumerate(self.sources):
            samples = list(self._samples(number, source, engine.rank, engine.world_size))
            for place, t in enumerate(self.times):
                means = self._means(engine, [at_level(sample, t) for sample in samples])
                for loss, mean in means.items():
                    if loss != "answer":
                        found[f"{source.name}/{loss}/t={t:g}"] = mean
                    elif not place:
                        found[f"{source.name}/answer"] = mean
        return found

    def _samples(self, number: int, source: Source, rank: int, world_size: int) -> Iterator[Sample]:
        """This rank's samples; a row that cannot be used is passed over."""
        count = min(self.rows, len(source))
        rows = np.linspace(0, len(source) - 1, count).round().astype(int)
        for row in rows[rank::world_size].tolist():
            rng = np.random.default_rng([self.seed, number, row])
            try:
                yield self.make_sample(source.read(row, rng), rng)
            except BadRow:
                continue

    @torch.no_grad()
    def _means(self, engine: Engine, samples: Sequence[Sample]) -> dict[str, float]:
        packs = packed(samples, self.make_sample.token_budget)
        # Under ZeRO-3 all ranks call the modules equally often: those with fewer packs, on nothing.
        most = max(gather_objects(len(packs)))
        packs += [[] for _ in range(most - len(packs))]
        losses = engine.objective.losses
        # How samples are packed differs with the number of ranks and the token budget.
        of_packs = engine.objective.settings.depending_on_packs
        totals = loss_totals(engine.objective, self.collate, packs, engine.device)
        deepspeed.comm.all_reduce(totals)
        sums_of, counts_of = totals.tolist()
        has_answers = engine.objective.model.read_context
        return {
            name: total / count
            for name, total, count in zip(losses, sums_of, counts_of, strict=True)
            if count and name not in of_packs and (name != "answer" or has_answers)
        }


def packed(samples: Sequence[Sample], token_budget: int) -> list[list[Sample]]:
    """The samples in their order, as many to a pack as the budget holds."""
    packs: list[list[Sample]] = []
    packer = Packer(token_budget)
    for sample in samples:
        if not packer.offer(sample):
            packs.append(packer.samples)
            packer = Packer(token_budget)
            packer.offer(sample)
    return [*packs, packer.samples] if packer.samples else packs


@torch.no_grad()
def loss_totals(
    objective: UnoObjective,
    collate: Collator,
    packs: Sequence[Sequence[Sample]],
    device: torch.device,
) -> torch.Tensor:
    """[2, losses], fp64: the sum of each loss over its tokens, in the order of `losses` of the
    objective, and their number."""
    losses = objective.losses
    totals = torch.zeros(2, len(losses), dtype=torch.float64, device=device)
    ones = torch.ones(len(losses), dtype=torch.float64, device=device)
    for pack in packs:
        batch = collate(list(pack))
        # Divided by one, a loss is the sum over its tokens.
        _, sums = objective(batch.to(device), ones)
        counts = [batch.loss_counts[name] for name in losses]
        totals[0] += sums.double()
        totals[1] += torch.tensor(counts, dtype=torch.float64, device=device)
    return totals


def at_level(sample: Sample, t: float) -> Sample:
    """The sample with its noised images at noise level t, with the same noise."""
    segments = [
        dataclasses.replace(segment, timestep=t) if segment.kind == Kind.NOISED else segment
        for segment in sample.segments
    ]
    return dataclasses.replace(sample, segments=segments)
