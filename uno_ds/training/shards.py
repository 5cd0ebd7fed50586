"""What one rank owns of the trained parameters under any ZeRO stage: a piece of each, in fp32, with
its optimizer state."""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from uno_ds.training.checkpoint_file import MOMENTS, WEIGHT

if TYPE_CHECKING:
    from uno_ds.training.engine import Engine


class Piece(NamedTuple):
    """Values [start, start + count) of a flattened parameter."""

    start: int
    count: int


def shape_of(parameter: torch.nn.Parameter) -> torch.Size:
    """Of the whole parameter, also while ZeRO-3 keeps it in pieces."""
    return parameter.ds_shape if hasattr(parameter, "ds_id") else parameter.shape


def master_shard(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """Flat fp32 view of what this rank owns of the parameter, with ZeRO-3's padding; None if that
    is nothing (ZeRO 1 and 2)."""
    if hasattr(parameter, "ds_id"):
        return safe_get_local_fp32_param(parameter)
    if hasattr(parameter, "_hp_mapping"):
        # DeepSpeed has no public function for the shards of ZeRO 1 and 2; its own
        # tensor_fragment.py reads this.
        return parameter._hp_mapping.get_hp_fragment() if parameter._hp_mapping else None
    return parameter.data.view(-1)


def gather_shard(parameter: torch.nn.Parameter, shard: torch.Tensor | None) -> torch.Tensor:
    """The full tensor whose pieces, of a parameter's shape, are laid out over the ranks as its
    master weights are; `shard`: as `master_shard` returns it. Collective."""
    shard = None if shard is None else shard.detach()
    if hasattr(parameter, "ds_id"):
        whole = torch.empty(
            dist.get_world_size() * shard.numel(), dtype=shard.dtype, device=shard.device
        )
        dist.all_gather_into_tensor(whole, shard.contiguous())
        return whole[: parameter.ds_numel].view(parameter.ds_shape)
    if not hasattr(parameter, "_hp_mapping"):
        return shard.view(parameter.shape)
    whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    if shard is not None:
        start = parameter._hp_mapping.lp_fragment_address.start
        whole[start : start + shard.numel()] = shard
    dist.all_reduce(whole)
    return whole.view(parameter.shape)


def piece_of(parameter: torch.nn.Parameter) -> Piece:
    """Which values of the flattened parameter this rank owns; padding is none of them. Stage 0:
    every rank owns all."""
    if hasattr(parameter, "ds_id"):
        size = parameter.partition_numel()
        start = min(size * parameter.ds_zero_partition_rank, parameter.ds_numel)
        return Piece(start, min(size, parameter.ds_numel - start))
    if hasattr(parameter, "_hp_mapping"):
        address = parameter._hp_mapping.lp_fragment_address if parameter._hp_mapping else None
        return Piece(address.start, address.numel) if address else Piece(0, 0)
    return Piece(0, parameter.numel())


class TrainedState:
    """Reads and writes this rank's pieces of master weights and of AdamW's moments."""

    def __init__(self, engine: "Engine"):
        self._engine, self._adamw = engine.engine.optimizer, engine.optimizer
        self._stage = engine.stage
        self.parameters = {
            name: parameter
            for name, parameter in engine.named_parameters()
            if parameter.requires_grad
        }
        self.pieces = {
            name: piece
            for name, parameter in self.parameters.items()
            if (piece := piece_of(parameter)).count
        }

    @property
    def updates(self) -> int:
        """AdamW's own count of steps, which skipped steps do not advance; without one there are no
        moments yet."""
        counts = {int(state["step"]) for state in self._adamw.state.values()}
        assert len(counts) <= 1, counts
        return counts.pop() if counts else 0

    def read(self, kind: str, name: str) -> torch.Tensor:
        """Flat fp32 values of this rank's piece; `kind` is WEIGHT or one of MOMENTS."""
        parameter, count = self.parameters[name], self.pieces[name].count
        if kind == WEIGHT:
            return master_shard(parameter).detach()[:count]
        if self._stage == 3:
            return safe_get_local_optimizer_state(parameter, kind)[:count]
        return self._moment(parameter, kind)

    def write(self, kind: str, name: str, values: torch.Tensor) -> None:
        """Sets this rank's piece. To be called between `begin_restore` and `end_restore`."""
        parameter = self.parameters[name]
        if self._stage == 3:
            padded = values.new_zeros(parameter.partition_numel())
            padded[: len(values)] = values
            if kind == WEIGHT:
                safe_set_local_fp32_param(parameter, padded)
            else:
                safe_set_local_optimizer_state(parameter, padded, kind)
        else:
            (
                master_shard(parameter).data if kind == WEIGHT else self._moment(parameter, kind)
            ).copy_(values)

    def begin_restore(self, updates: int) -> None:
        """Before the writes: makes room for the moments and sets AdamW's count."""
        for flat in self._flats() if updates else ():
            state = self._adamw.state[flat]
            for kind in MOMENTS:
                if kind not in state:
                    state[kind] = torch.zeros_like(flat)
            state["step"] = torch.tensor(float(updates))

    def end_restore(self) -> None:
        """After the writes, which changed the masters alone: the next forward reads the model's own
        copy. Collective."""
        if self._stage == 3:
            for number in range(len(self._flats())):
                self._engine._reassign_or_swap_out_partitioned_parameters(number)
            whole = self._engine.persistent_parameters
            if whole:
                whole[0].partition(whole)
            self._engine.checkpoint_event_epilogue()
        elif self._stage:
            self._engine.update_lp_params()

    def _flats(self) -> list[torch.Tensor]:
        """The tensors that AdamW knows: the masters of many parameters each (ZeRO), or the
        parameters (stage 0)."""
        # ZeRO-3 shows them to AdamW during its step only.
        return (
            self._engine.fp32_partitioned_groups_flat
            if self._stage == 3
            else [flat for group in self._adamw.param_groups for flat in group["params"]]
        )

    def _moment(self, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor:
        if self._stage == 0:
            return self._adamw.state[parameter][kind].view(-1)
        mapping = parameter._hp_mapping
        flat = self._adamw.param_groups[mapping.param_group_index]["params"][0]
        return self._adamw.state[flat][kind].narrow(
            0, mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
        )
