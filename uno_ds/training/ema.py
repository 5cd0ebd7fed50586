"""Exponential moving average of the trained weights, on each rank's own fp32 shards, without a
gather."""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from uno_ds.training.engine import Engine
from uno_ds.training.shards import is_zero3, is_zero12, master_shard

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
        self.shards = {name: shard.detach().clone() for name, shard in self._masters()}

    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        with torch.no_grad():
            for name, master in self._masters():
                pending.append((self.shards[name], master.detach()))
                if sum(shard.numel() for shard, _ in pending) >= VALUES_AT_ONCE:
                    _lerp(pending, 1 - decay)
            _lerp(pending, 1 - decay)
        self.updates += 1

    def gather(self, name: str) -> torch.Tensor:
        """Full fp32 average of one parameter, on the CPU. Collective."""
        return self._gather(self.parameters[name], self.shards.get(name)).cpu()

    def _masters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.parameters.items():
            shard = master_shard(parameter)
            if shard is not None:
                yield name, shard

    def _gather(self, parameter: torch.nn.Parameter, shard: torch.Tensor | None) -> torch.Tensor:
        """shard: this rank's; None where it has none (ZeRO 1 and 2)."""
        if is_zero12(parameter) and not is_zero3(parameter):
            whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
            if shard is not None:
                start = parameter._hp_mapping.lp_fragment_address.start
                whole[start : start + shard.numel()] = shard
            dist.all_reduce(whole)
            return whole.view(parameter.shape)
        assert shard is not None, "only ZeRO 1 and 2 leave a rank without a shard"
        if is_zero3(parameter):
            padded_size = dist.get_world_size() * shard.numel()
            whole = torch.empty(padded_size, dtype=shard.dtype, device=shard.device)
            dist.all_gather_into_tensor(whole, shard.contiguous())
            return whole[: parameter.ds_numel].view(parameter.ds_shape)
        return shard.view(parameter.shape)


def _lerp(pending: list[tuple[torch.Tensor, torch.Tensor]], weight: float) -> None:
    """Moves each average towards its master, and empties the list."""
    if not pending:
        return
    averages = [shard for shard, _ in pending]
    masters = [master for _, master in pending]
    torch._foreach_lerp_(averages, masters, weight)
    pending.clear()
