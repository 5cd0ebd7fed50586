"""What one rank owns of the trained parameters under any ZeRO stage: a piece of each, in fp32, with
its optimizer state."""

from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

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


class Zero3Parameter(torch.nn.Parameter):
    """A type only: a parameter with the attributes that ZeRO-3 adds. Its own data are empty while
    it is partitioned.

    ds_tensor: this rank's partition in the model's dtype, flat and padded. ds_persist: whether the
    whole parameter stays on every rank."""

    ds_id: int
    ds_shape: torch.Size
    ds_numel: int
    ds_tensor: torch.Tensor
    ds_secondary_tensor: torch.Tensor | None
    ds_persist: bool
    ds_process_group: Any
    ds_zero_partition_rank: int

    if TYPE_CHECKING:

        def partition_numel(self) -> int:
            """Values of one rank's partition, with padding."""


class Zero12Parameter(torch.nn.Parameter):
    """A type only: a parameter with the attribute that ZeRO 1 and 2 add, where this rank's shard
    of the fp32 master lies; None if it has none."""

    _hp_mapping: Any


def is_zero3(parameter: torch.Tensor) -> TypeGuard[Zero3Parameter]:
    """Whether ZeRO-3 partitions the parameter."""
    return hasattr(parameter, "ds_id")


def is_zero12(parameter: torch.Tensor) -> TypeGuard[Zero12Parameter]:
    """Whether ZeRO 1 or 2 shards the parameter's master."""
    return hasattr(parameter, "_hp_mapping")


class Piece(NamedTuple):
    """Values [start, start + size) of a flattened parameter."""

    start: int
    size: int


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """Of the whole parameter, also while ZeRO-3 partitions it."""
    return parameter.ds_shape if is_zero3(parameter) else parameter.shape


def master_shard(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """Flat fp32 view of this rank's shard of the parameter's master, with ZeRO-3's padding; None
    where this rank has none (ZeRO 1 and 2)."""
    if is_zero3(parameter):
        return safe_get_local_fp32_param(parameter)
    if is_zero12(parameter):
        # DeepSpeed has no public function for the shards of ZeRO 1 and 2; its own
        # tensor_fragment.py reads this.
        return parameter._hp_mapping.get_hp_fragment() if parameter._hp_mapping else None
    return parameter.data.view(-1)


def own_shard(parameter: torch.nn.Parameter) -> torch.Tensor:
    """As `master_shard`, of a parameter of which this rank has a shard."""
    shard = master_shard(parameter)
    assert shard is not None, "this rank has no shard of the parameter"
    return shard


def gather_shard(parameter: torch.nn.Parameter, shard: torch.Tensor | None) -> torch.Tensor:
    """The full tensor of a parameter's shape whose pieces lie on the ranks as its master's do.
    shard: this rank's; None where it has none (ZeRO 1 and 2). Collective."""
    if is_zero12(parameter) and not is_zero3(parameter):
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if shard is not None:
            start = parameter._hp_mapping.lp_fragment_address.start
            whole[start : start + shard.numel()] = shard.detach()
        dist.all_reduce(whole)
        return whole.view(parameter.shape)
    assert shard is not None, "only ZeRO 1 and 2 leave a rank without a shard"
    shard = shard.detach()
    if is_zero3(parameter):
        padded_size = dist.get_world_size() * shard.numel()
        whole = torch.empty(padded_size, dtype=shard.dtype, device=shard.device)
        dist.all_gather_into_tensor(whole, shard.contiguous())
        return whole[: parameter.ds_numel].view(parameter.ds_shape)
    return shard.view(parameter.shape)


def piece_of(parameter: torch.nn.Parameter) -> Piece:
    """The values of the flattened parameter that this rank owns, without padding. Stage 0: every
    rank owns all."""
    if is_zero3(parameter):
        size = parameter.partition_numel()
        start = min(size * parameter.ds_zero_partition_rank, parameter.ds_numel)
        return Piece(start, min(size, parameter.ds_numel - start))
    if is_zero12(parameter):
        address = parameter._hp_mapping.lp_fragment_address if parameter._hp_mapping else None
        return Piece(address.start, address.numel) if address else Piece(0, 0)
    return Piece(0, parameter.numel())


class TrainedState:
    """Reads and writes this rank's pieces of master weights and of AdamW's moments."""

    def __init__(self, engine: "Engine"):
        # DeepSpeed's optimizer around AdamW, and AdamW.
        self._zero, self._adamw = engine.engine.optimizer, engine.optimizer
        self._stage = engine.stage
        self.parameters = {
            name: parameter
            for name, parameter in engine.named_parameters()
            if parameter.requires_grad
        }
        pieces = {name: piece_of(parameter) for name, parameter in self.parameters.items()}
        self.pieces = {name: piece for name, piece in pieces.items() if piece.size}

    @property
    def updates(self) -> int:
        """AdamW's own count of steps, which skipped steps do not advance; 0: there are no moments
        yet."""
        counts = {int(state["step"]) for state in self._adamw.state.values()}
        assert len(counts) <= 1, counts
        return counts.pop() if counts else 0

    def read(self, kind: str, name: str) -> torch.Tensor:
        """Flat fp32 values of this rank's piece; `kind` is WEIGHT or one of MOMENTS."""
        parameter, size = self.parameters[name], self.pieces[name].size
        if kind == WEIGHT:
            return own_shard(parameter).detach()[:size]
        if self._stage == 3:
            return safe_get_local_optimizer_state(parameter, kind)[:size]
        return self._moment(parameter, kind)

    def write(self, kind: str, name: str, values: torch.Tensor) -> None:
        """Sets this rank's piece. To be called between `begin_restore` and `end_restore`."""
        parameter = self.parameters[name]
        if is_zero3(parameter):
            padded = values.new_zeros(parameter.partition_numel())
            padded[: len(values)] = values
            if kind == WEIGHT:
                safe_set_local_fp32_param(parameter, padded)
            else:
                safe_set_local_optimizer_state(parameter, padded, kind)
        elif kind == WEIGHT:
            own_shard(parameter).data.copy_(values)
        else:
            self._moment(parameter, kind).copy_(values)

    def begin_restore(self, updates: int) -> None:
        """Before the writes: allocates the moments and sets AdamW's count of steps."""
        if not updates:
            return
        for flat in self._optimized_tensors():
            state = self._adamw.state[flat]
            for kind in MOMENTS:
                if kind not in state:
                    state[kind] = torch.zeros_like(flat)
            # A fused AdamW counts on the device of its parameters, others on the host.
            fused = self._adamw.defaults["fused"]
            state["step"] = torch.tensor(float(updates), device=flat.device if fused else "cpu")

    def end_restore(self) -> None:
        """After the writes, which change only the masters: copies them to the weights that the
        forward pass reads. Collective."""
        if self._stage == 3:
            # Parameters that a forward pass has left whole would keep their values.
            self._zero._partition_all_parameters()
            for number in range(len(self._optimized_tensors())):
                self._zero._reassign_or_swap_out_partitioned_parameters(number)
            self._zero.checkpoint_event_epilogue()
        elif self._stage:
            self._zero.update_lp_params()

    def _optimized_tensors(self) -> list[torch.Tensor]:
        """The tensors that AdamW updates: flat masters of many parameters each (ZeRO), or the
        parameters themselves (stage 0)."""
        # ZeRO-3 puts them into AdamW's groups only during its step.
        if self._stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        return list(chain.from_iterable(group["params"] for group in self._adamw.param_groups))

    def _moment(self, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor:
        if not is_zero12(parameter):
            return self._adamw.state[parameter][kind].view(-1)
        mapping = parameter._hp_mapping
        flat = self._adamw.param_groups[mapping.param_group_index]["params"][0]
        return self._adamw.state[flat][kind].narrow(
            0, mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
        )
