"""Exponential moving average of the trained weights, on each rank's own fp32 shards, without a
gather."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from uno_ds.training.checkpoint_file import WEIGHT
from uno_ds.training.engine import Engine
from uno_ds.training.shards import TrainedState, gather_shard, master_shard

# Where the optimizer is offloaded to the CPU, each master that is read is a copy on the GPU: at
# most 1 GiB of them at a time.
VALUES_AT_ONCE = 1 << 28


class Ema:
    """average = decay * average + (1 - decay) * weight, over the master shards that this rank owns.

    The decay is warmed up as min(decay, (1 + n) / (10 + n)) over updates n, so that the average of
    a short run is not dominated by its initial weights."""

    def __init__(self, engine: Engine, decay: float):
        self.engine, self.decay, self.updates = engine, decay, 0
        self.parameters = {
            name: parameter
            for name, parameter in engine.named_parameters()
            if parameter.requires_grad
        }
        self.shards = {name: shard.detach().float().clone() for name, shard in self._masters()}

    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        with torch.no_grad():
            for name, master in self._masters():
                pending.append((self.shards[name], master.detach().float()))
                if sum(shard.numel() for shard, _ in pending) >= VALUES_AT_ONCE:
                    _lerp(pending, 1 - decay)
            _lerp(pending, 1 - decay)
        self.updates += 1

    def gather(self, name: str) -> torch.Tensor:
        """Full fp32 average of one parameter, on the CPU. Collective."""
        return gather_shard(self.parameters[name], self.shards.get(name)).cpu()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While entered, the model computes with the average; then with the trained weights again,
        bit for bit. Each rank keeps its own shards of them in host memory meanwhile. No step may be
        taken inside, and an exception inside has to end the run. Collective at both ends."""
        state = TrainedState(self.engine)
        trained = {name: state.read(WEIGHT, name).to("cpu", copy=True) for name in state.pieces}
        _write(state, lambda name, size: self.shards[name][:size])
        # Not after an exception, which other ranks may not have: writing is collective.
        yield
        _write(state, lambda name, size: trained[name])

    def _masters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.parameters.items():
            shard = master_shard(parameter)
            if shard is not None:
                yield name, shard


def _write(state: TrainedState, values: Callable[[str, int], torch.Tensor]) -> None:
    """Sets this rank's master shards, and from them the weights that forward passes read. `values`:
    of a parameter, as many as this rank's shard has. Collective."""
    with torch.no_grad():
        for name, piece in state.pieces.items():
            state.write(WEIGHT, name, values(name, piece.size))
        state.end_restore()


def _lerp(pending: list[tuple[torch.Tensor, torch.Tensor]], weight: float) -> None:
    """Moves each average towards its master, and empties the list."""
    if not pending:
        return
    averages = [shard for shard, _ in pending]
    masters = [master for _, master in pending]
    torch._foreach_lerp_(averages, masters, weight)
    pending.clear()
