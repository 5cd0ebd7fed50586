"""The DeepSpeed engine around the objective: building it, one optimizer step, full weights."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import deepspeed
import deepspeed.comm
import deepspeed.ops
import torch
import torch.distributed as dist

from uno_ds.kernels.selection import KernelSettings
from uno_ds.kernels.transfer import upload
from uno_ds.model.precision import DTYPES
from uno_ds.ranges import Range, named_range
from uno_ds.sequence.batch import PackedBatch
from uno_ds.settings import SettingsError, printable, setting
from uno_ds.training.adapter_start import restore_adapter
from uno_ds.training.deepspeed_config import deepspeed_config
from uno_ds.training.loading import BatchPreparation
from uno_ds.training.placement import check_placement
from uno_ds.training.regression_identity import regression_identity
from uno_ds.training.sharded_objective import build_objective
from uno_ds.training.shards import is_zero3

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe


@dataclass(frozen=True)
class EngineSettings:
    deepspeed: str = setting(
        "zero3", doc="DeepSpeed configuration: a name in ds_configs/ or a JSON file."
    )
    precision: str = setting(
        "auto",
        choices=("auto", "fp32", "bf16"),
        doc="Precision of weights and activations; master weights and losses are always fp32. "
        "auto: bf16 on a GPU, fp32 on a CPU.",
    )
    packs_per_step: int | None = setting(
        1,
        minimum=1,
        doc="Micro-batches of one optimizer step over all ranks together; a multiple of the number "
        "of ranks. null: one for each rank, whatever their number.",
        maximum=65_536,
    )
    max_skipped_steps: int = setting(
        10,
        doc="Steps in a row with a non-finite loss or gradient after which the run stops; each one "
        "is skipped on all ranks.",
        minimum=1,
        maximum=10**6,
    )
    clip: float = setting(
        1.0,
        doc="Largest norm of the gradient; 0: no clipping.",
        minimum=1e-9,
        maximum=1e9,
        or_zero=True,
    )
    cpu_threads: int | None = setting(
        None,
        doc="Threads of a rank on a CPU; null: its share of the cores. For runs side by side.",
        minimum=1,
        maximum=65_536,
    )

    def resolved_precision(self) -> str:
        """bf16 or fp32."""
        if self.precision != "auto":
            return self.precision
        return "bf16" if torch.cuda.is_available() else "fp32"

    def resolved_packs_per_step(self) -> int:
        """A number, which `uno_ds.run.load` sets where the recipe leaves it to the number of
        ranks."""
        assert self.packs_per_step is not None, "set when the recipe is loaded"
        return self.packs_per_step


@dataclass(frozen=True)
class OptimizerSettings:
    lr: float = setting(
        2e-5,
        doc="Peak learning rate of AdamW.",
        minimum=1e-12,
        maximum=1e3,
    )
    betas: list[float] = setting(
        factory=lambda: [0.9, 0.95],
        doc="Decay of the gradient's first and second moment.",
        minimum=0,
        below=1,
    )
    eps: float = setting(
        1e-15,
        doc="Epsilon of AdamW.",
        minimum=1e-30,
        maximum=1,
    )
    weight_decay: float = setting(
        0.0,
        doc="Decoupled weight decay.",
        minimum=0,
        maximum=1e3,
    )
    warmup: int = setting(
        0,
        doc="Steps of linear warm-up.",
        minimum=0,
        maximum=10**9,
    )
    schedule: str = setting(
        "constant",
        choices=("constant", "cosine"),
        doc="After warm-up: constant, or a cosine down to `final_lr`.",
    )
    final_lr: float = setting(
        0.0, doc="Share of the peak at which the cosine ends.", minimum=0, maximum=1
    )
    ema: float = setting(
        0.9999,
        doc="Decay of the moving average of the trained weights, per step; 0: none.",
        minimum=0,
        below=1,
    )

    def __post_init__(self) -> None:
        if len(self.betas) != 2:
            raise SettingsError(
                "betas", f"must be two numbers below 1, got {printable(self.betas)}."
            )
        if self.lr * self.weight_decay >= 1:
            raise SettingsError(
                "weight_decay",
                f"times lr must be below 1, or a step overshoots 0; got {self.weight_decay:g} with "
                f"lr {self.lr:g}.",
            )

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of optimizer step `step`, counted from 1."""
        if step <= self.warmup:
            return self.lr * step / self.warmup
        match self.schedule:
            case "constant":
                return self.lr
            case "cosine":
                progress = min(1.0, (step - self.warmup) / max(1, steps - self.warmup))
                cosine = 0.5 * (1 + math.cos(math.pi * progress))
                return self.lr * (self.final_lr + (1 - self.final_lr) * cosine)
            case unknown:
                raise ValueError(f"Unknown schedule {unknown!r}; allowed are constant, cosine.")


def adamw(
    parameters: list[torch.nn.Parameter], settings: OptimizerSettings, device: torch.device
) -> torch.optim.AdamW:
    """Fused on a GPU, where the other implementations hold temporaries as large as the state while
    they step."""
    return torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True if device.type == "cuda" else None,
    )


class Signals(NamedTuple):
    """What each rank reports at the start of a step, in the reduction that counts the tokens:
    whether it was asked to stop, whether its part of a checkpoint is written, and how many rows it
    has drawn and found unusable so far; from rank 0, for how many steps a trace was asked for.
    Summed over the ranks."""

    stop: float = 0
    saved: float = 0
    drawn_rows: float = 0
    bad_rows: float = 0
    traced_steps: float = 0


NO_SIGNALS = Signals()


@dataclass(frozen=True)
class StepResult:
    """Sums over all ranks. `losses` and `counts` in the order of the objective's `losses`: each
    loss, and the tokens that have it. Reading the tensors synchronises with the device, except for
    `signals` (in the order of Signals) and `loss_on_host`, the value of `loss`, which are in host
    memory."""

    loss: torch.Tensor
    losses: torch.Tensor
    counts: torch.Tensor
    tokens: torch.Tensor
    grad_norm: torch.Tensor
    skipped: bool
    finite_here: torch.Tensor
    signals: torch.Tensor
    loss_on_host: torch.Tensor


class Engine:
    """Builds the objective under ZeRO, loads its weights, and trains it step by step."""

    def __init__(
        self,
        recipe: "Recipe",
        device: torch.device,
        read_answers: bool,
        kernels: KernelSettings | None = None,
    ):
        """`read_answers`: whether some source has answers, which need the outputs of context rows;
        the same on all ranks. `kernels`: resolved; None: by the fixed order."""
        self.recipe, self.device = recipe, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        config = deepspeed_config(recipe, self.world_size)
        self.stage = config["zero_optimization"]["stage"]
        dtype = DTYPES[recipe.engine.resolved_precision()]
        self.kernels = kernels or recipe.kernels.resolved(recipe.kernel_demands)
        objective, self.frozen_hashes = build_objective(
            recipe, self.kernels, config, dtype, device, read_answers
        )
        self.regression = regression_identity(recipe)
        vision_plan = device.type != "cpu" or recipe.model.train == "all"
        self.batch_preparation = BatchPreparation(self.kernels.attention, device, vision_plan)
        trainable = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        optimizer = adamw(trainable, recipe.optimizer, device)
        self.engine, *_ = deepspeed.initialize(
            model=objective, optimizer=optimizer, model_parameters=trainable, config=config
        )
        self.objective, self.optimizer = objective, optimizer
        self.placement = check_placement(self, dtype, config["zero_optimization"], device)
        if recipe.model.adapter is not None:
            restore_adapter(self)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return self.objective.named_parameters()

    def train_step(
        self,
        batches: list[PackedBatch],
        lr: float,
        signals: Signals = NO_SIGNALS,
        highest_loss: float = math.inf,
    ) -> StepResult:
        """One optimizer step on this rank's micro-batches. Every rank calls it with equally many.

        All ranks skip the step if the loss or a gradient of any rank is not finite, or if the loss
        over all ranks is above `highest_loss`.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        counts, tokens, global_signals = self._sum_over_ranks(batches, signals)
        # Asynchronous copies to the host, also that of the loss below. They are complete after the
        # optimizer step, which waits for the device to check whether the gradients are finite.
        signals_on_host = global_signals.to("cpu", non_blocking=True)
        losses = torch.zeros(
            len(self.objective.losses) + 1, dtype=torch.float64, device=self.device
        )
        finite_here = torch.ones((), dtype=torch.bool, device=self.device)
        for number, batch in enumerate(batches, start=1):
            is_last = number == len(batches)
            total, parts = self.engine(self._on_device(batch), counts)
            is_usable = torch.isfinite(total.detach())
            finite_here = finite_here & is_usable
            losses += torch.cat([total.detach()[None], parts]).double()
            if is_last:
                # Before the last backward pass, in which a gradient that is not finite makes all
                # ranks skip the step.
                deepspeed.comm.all_reduce(losses)
                loss_on_host = losses[0].to("cpu", non_blocking=True)
                is_usable = is_usable & ~(losses[0] > highest_loss)
            with named_range(Range.BACKWARD):
                self._backward(total, is_usable)
            with named_range(Range.OPTIMIZER):
                if is_last and self.stage == 0:
                    norm = self._clip_stage0()
                self.engine.step()
        if self.stage > 0:
            norm = self._global_norm()
            skipped = not self.engine.was_step_applied()
        else:
            skipped = not bool(torch.isfinite(norm))
        return StepResult(
            loss=losses[0],
            losses=losses[1:],
            counts=counts,
            tokens=tokens,
            grad_norm=norm,
            skipped=skipped,
            finite_here=finite_here,
            signals=signals_on_host,
            loss_on_host=loss_on_host,
        )

    def _on_device(self, batch: PackedBatch) -> PackedBatch:
        with named_range(Range.DATA, "to the device"):
            return batch.to(self.device)

    def _sum_over_ranks(
        self, batches: list[PackedBatch], signals: Signals
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(tokens that have each loss, all tokens, signals), in one reduction."""
        local_counts: list[float] = []
        for name in self.objective.losses:
            local_counts.append(sum(batch.loss_counts[name] for batch in batches))
        local_counts.append(sum(batch.tokens for batch in batches))
        local_counts += signals
        global_counts = upload(torch.tensor(local_counts, dtype=torch.float64), self.device)
        deepspeed.comm.all_reduce(global_counts)
        losses = len(self.objective.losses)
        return (
            global_counts[:losses],
            global_counts[losses],
            global_counts[losses + 1 :],
        )

    def _backward(self, loss: torch.Tensor, is_usable: torch.Tensor) -> None:
        # DeepSpeed checks only gradients, and an infinite loss can have finite ones. It also
        # divides by the number of ranks, but the loss is already normalised over all of them.
        scale = torch.where(is_usable, float(self.world_size), float("nan"))
        self.engine.backward(loss * scale, scale_wrt_gas=False)

    def _global_norm(self) -> torch.Tensor:
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(math.inf if norm is None else norm, dtype=torch.float32)

    def full_parameter(
        self, parameter: torch.Tensor, rank: int | None = None
    ) -> torch.Tensor | None:
        """The full tensor of one parameter or buffer, on the CPU of every rank, or of `rank` alone
        (None elsewhere). Collective."""
        gathered = nullcontext()
        if is_zero3(parameter):
            gathered = deepspeed.zero.GatheredParameters([parameter])
        with gathered:
            if rank not in (None, self.rank):
                return None
            return parameter.detach().cpu().clone()

    def _clip_stage0(self) -> torch.Tensor:
        """Returns the norm before clipping. Also drops gradients that are not finite, which
        DeepSpeed does not check at stage 0 in fp32."""
        trainable = [
            parameter for parameter in self.objective.parameters() if parameter.requires_grad
        ]
        norm = torch.nn.utils.clip_grad_norm_(trainable, self.recipe.engine.clip or math.inf)
        if not torch.isfinite(norm):
            for parameter in trainable:
                parameter.grad = None
        return norm.float()
