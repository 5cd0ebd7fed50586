"""The DeepSpeed engine around the objective: building the model, one optimizer step, full weights when they are asked for."""

import logging
import math
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import deepspeed
import deepspeed.comm
import deepspeed.ops
import pydantic
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig

from uno_ds.data.files import one_line
from uno_ds.objectives.uno import LOSSES
from uno_ds.sequence.batch import PackedBatch
from uno_ds.settings import SettingsError, printable, setting
from uno_ds.training.launch_environment import Launch, read_launch
from uno_ds.training.placement import check_placement
from uno_ds.training.sharded_objective import build_objective

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe


# Sections and switches of a DeepSpeed file that change how the model, its data or its gradients are
# treated.
UNSUPPORTED = (
    "amp",
    "autotuning",
    "compression_training",
    "curriculum_learning",
    "data_efficiency",
    "elasticity",
    "gradient_predivide_factor",
    "hybrid_engine",
    "prescale_gradients",
    "progressive_layer_drop",
    "sequence_parallel_size",
    "sparse_attention",
    "sparse_gradients",
    "tensor_parallel",
)
# Names that DeepSpeed gave up, and reads without saying what they mean to memory.
OLD = ("cpu_offload", "cpu_offload_params", "cpu_offload_use_pin_memory")


@dataclass(frozen=True)
class EngineSettings:
    deepspeed: str = setting(
        "zero3", doc="DeepSpeed configuration: a name in ds_configs/ or a JSON file."
    )
    precision: str = setting(
        "auto",
        choices=("auto", "fp32", "bf16"),
        doc="Weights and activations; masters and losses are fp32 always. auto: bf16 on a GPU, fp32 on a CPU.",
    )
    packs_per_step: int | None = setting(
        1,
        minimum=1,
        doc="Micro-batches of one optimizer step over all ranks together; a multiple of the number of "
        "ranks. null: one for each rank, whatever their number.",
        maximum=65_536,
    )
    max_skipped_steps: int = setting(
        10,
        doc="Steps in a row with a non-finite loss or gradient after which the run stops; each one is "
        "skipped on all ranks.",
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

    def resolved_precision(self) -> str:
        return (
            self.precision
            if self.precision != "auto"
            else "bf16"
            if torch.cuda.is_available()
            else "fp32"
        )


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
                f"times lr must be below 1, or a step overshoots 0; got {self.weight_decay:g} with lr "
                f"{self.lr:g}.",
            )

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of optimizer step `step`, counted from 1."""
        if step <= self.warmup:
            return self.lr * step / self.warmup
        if self.schedule == "constant":
            return self.lr
        progress = (step - self.warmup) / max(1, steps - self.warmup)
        return self.lr * (
            self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        )


def start_process_group() -> torch.device:
    """Joins the ranks that a launcher started, or makes a group of one; returns this rank's device.
    Raises SettingsError if the environment contradicts itself or the ranks cannot meet."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Its first use on a CPU machine compiles for a minute without a word, and a killed compilation blocks later runs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    launch = read_launch()
    port = _free_port() if launch.port is None else launch.port
    launch.export(port)
    if launch.rank == 0 and launch.guessed:
        print(launch.guessed, flush=True)
    local_rank = launch.local_rank
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise SettingsError(
                "LOCAL_RANK",
                f"is {local_rank}, but this process sees {torch.cuda.device_count()} GPU(s); start "
                "as many ranks on a machine as it has "
                "GPUs, and show each rank all of them.",
            )
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(
            max(1, (os.cpu_count() or 1) // (launch.local_world_size or launch.world_size))
        )
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False
        )
    except dist.DistNetworkError as error:
        raise _unreachable(launch, port, error) from None
    return device


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _unreachable(launch: Launch, port: int, error: Exception) -> SettingsError:
    if "EADDRINUSE" in str(error):
        return SettingsError(
            "MASTER_PORT",
            f"port {port} of this machine is in use, by another run perhaps; give another one "
            "(deepspeed --master_port, torchrun "
            "--master-port, or MASTER_PORT).",
        )
    return SettingsError(
        "MASTER_ADDR",
        f"rank {launch.rank} of {launch.world_size} cannot meet the others at "
        f"{launch.address}:{port}: {str(error).splitlines()[0]}",
    )


def deepspeed_config(recipe: "Recipe", world_size: int) -> dict[str, Any]:
    """The file's sharding settings with what the recipe decides."""
    engine, config = recipe.engine, recipe.deepspeed_config()
    stage = config["zero_optimization"]["stage"]
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": engine.packs_per_step // world_size,
        "gradient_clipping": engine.clip if stage else 0.0,
        # DeepSpeed's own CPU Adam, which it asks for where the optimizer is offloaded, has to be
        # compiled.
        "zero_force_ds_cpu_optimizer": False,
        "timers": {"throughput": {"enabled": False}},
    }
    if engine.resolved_precision() == "bf16":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return config


def check_deepspeed(recipe: "Recipe", world_size: int) -> None:
    """Raises SettingsError for what the recipe's DeepSpeed file asks for and this project does not
    do, and for what DeepSpeed itself would refuse as the engine starts."""
    file, config = recipe.engine.deepspeed, deepspeed_config(recipe, world_size)
    sections = [(key, config.get(key)) for key in UNSUPPORTED]
    sections += [(f"zero_optimization.{key}", config["zero_optimization"].get(key)) for key in OLD]
    for key, section in sections:
        if _switches_on(section):
            raise SettingsError(
                "engine.deepspeed",
                f"{file} asks for {key}, which is not supported; remove it from the file.",
            )
    # With the number of ranks that DeepSpeed would take before they have met, this one cannot be
    # right.
    config.pop("train_batch_size", None)
    logger, level = deepspeed.utils.logger, deepspeed.utils.logger.level
    logger.setLevel(logging.ERROR)
    try:
        DeepSpeedConfig(config)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise SettingsError(
            "engine.deepspeed",
            f"{file} is refused by DeepSpeed: {key}: {first['msg']}, got {first['input']!r:.80}.",
        ) from None
    except Exception as error:  # whatever its checks raise
        raise SettingsError(
            "engine.deepspeed", f"{file} is refused by DeepSpeed: {one_line(error)}"
        ) from None
    finally:
        logger.setLevel(level)
    for key in ("offload_param", "offload_optimizer"):
        if (config["zero_optimization"].get(key) or {}).get("device") == "nvme":
            raise SettingsError(
                "engine.deepspeed",
                f"{file} offloads to NVMe ({key}), which is not supported; use cpu.",
            )


def _switches_on(section: Any) -> bool:
    """Whether a section or switch does something; a factor or a size of 1 does nothing."""
    if isinstance(section, dict) and "enabled" in section:
        return bool(section["enabled"])
    return section is True or section not in (None, False, {}, 1)


class Signals(NamedTuple):
    """What a rank tells the others as a step begins, in the reduction that counts the tokens: whether it was asked to stop,
    whether its part of a checkpoint is written, and rows drawn and unusable ones so far."""

    stop: float = 0
    saved: float = 0
    drawn_rows: float = 0
    bad_rows: float = 0


SILENT = Signals()


@dataclass(frozen=True)
class StepResult:
    """Sums over all ranks, as device tensors that have not been waited for. `losses` and `counts` [4] in the order of
    LOSSES: each loss, and the tokens that have it. `signals`, in the order of Signals, are on the host already."""

    loss: torch.Tensor
    losses: torch.Tensor
    counts: torch.Tensor
    tokens: torch.Tensor
    grad_norm: torch.Tensor
    skipped: bool
    finite_here: torch.Tensor
    signals: torch.Tensor


class Engine:
    """Builds the objective under ZeRO, loads its weights, and trains it step by step."""

    def __init__(self, recipe: "Recipe", device: torch.device, read_answers: bool):
        """`read_answers`: some source has answers, so the outputs of context rows are wanted; the same on all ranks."""
        self.recipe, self.device = recipe, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        config = deepspeed_config(recipe, self.world_size)
        self.stage = config["zero_optimization"]["stage"]
        dtype = torch.bfloat16 if recipe.engine.resolved_precision() == "bf16" else torch.float32
        objective, self.frozen_hashes = build_objective(recipe, config, dtype, device, read_answers)
        trainable = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        settings = recipe.optimizer
        optimizer = torch.optim.AdamW(
            trainable,
            lr=settings.lr,
            betas=tuple(settings.betas),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        self.engine, *_ = deepspeed.initialize(
            model=objective, optimizer=optimizer, model_parameters=trainable, config=config
        )
        self.objective, self.optimizer = objective, optimizer
        self.placement = check_placement(self, dtype, config["zero_optimization"], device)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return self.objective.named_parameters()

    def train_step(
        self,
        batches: list[PackedBatch],
        lr: float,
        signals: Signals = SILENT,
        highest_loss: float = math.inf,
    ) -> StepResult:
        """One optimizer step on this rank's micro-batches. Every rank calls it with equally many.

        A loss or gradient that is not finite on any rank, or a loss over all ranks above `highest_loss`, makes all ranks
        skip the step alike.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        own = [
            *(sum(batch.loss_counts[name] for batch in batches) for name in LOSSES),
            sum(batch.tokens for batch in batches),
            *signals,
        ]
        told = torch.tensor(own, dtype=torch.float64).to(self.device, non_blocking=True)
        deepspeed.comm.all_reduce(told)
        counts, tokens = told[: len(LOSSES)], told[len(LOSSES)]
        # On its way to the host now, there when the step has asked the device whether its gradients are finite.
        heard = told[len(LOSSES) + 1 :].to("cpu", non_blocking=True)
        losses = torch.zeros(len(LOSSES) + 1, dtype=torch.float64, device=self.device)
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for number, batch in enumerate(batches, start=1):
            total, parts = self.engine(batch.to(self.device), counts)
            finite = finite & torch.isfinite(total.detach())
            losses += torch.cat([total.detach()[None], parts]).double()
            usable = torch.isfinite(total.detach())
            if number == len(batches):
                # Before the last backward, where one gradient that is not finite can still make all of the step be skipped.
                deepspeed.comm.all_reduce(losses)
                usable = usable & ~(losses[0] > highest_loss)
            # DeepSpeed checks gradients only, and an infinite loss can have finite ones. It also divides by the number
            # of ranks, where the counts have already normalised over all of them.
            total = total * torch.where(usable, float(self.world_size), float("nan"))
            self.engine.backward(total, scale_wrt_gas=False)
            norm = self._clip_stage0() if self.stage == 0 and number == len(batches) else None
            self.engine.step()
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        norm = torch.as_tensor(float("inf") if norm is None else norm, dtype=torch.float32)
        skipped = (
            not self.engine.was_step_applied() if self.stage else not bool(torch.isfinite(norm))
        )
        return StepResult(losses[0], losses[1:], counts, tokens, norm, skipped, finite, heard)

    def full_parameter(
        self, parameter: torch.Tensor, rank: int | None = None
    ) -> torch.Tensor | None:
        """The full tensor of one parameter or buffer, on the CPU of every rank, or of `rank` alone (None elsewhere).
        Collective."""
        with (
            deepspeed.zero.GatheredParameters([parameter])
            if hasattr(parameter, "ds_id")
            else nullcontext()
        ):
            return parameter.detach().cpu().clone() if rank in (None, self.rank) else None

    def _clip_stage0(self) -> torch.Tensor:
        """DeepSpeed's stage 0 in fp32 checks nothing, so clipping and the check for non-finite gradients are done here."""
        trainable = [
            parameter for parameter in self.objective.parameters() if parameter.requires_grad
        ]
        norm = torch.nn.utils.clip_grad_norm_(trainable, self.recipe.engine.clip or float("inf"))
        if not torch.isfinite(norm):
            for parameter in trainable:
                parameter.grad = None
        return norm
