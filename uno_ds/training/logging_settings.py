"""Settings of metrics, TensorBoard, Weights & Biases and traces."""

import importlib.util
from dataclasses import dataclass

from uno_ds.settings import SettingsError, setting
from uno_ds.training.trace_settings import TraceSettings


@dataclass(frozen=True)
class LoggingSettings:
    every: int = setting(
        10,
        minimum=1,
        doc="Steps after which metrics are copied from the device, written to files, and printed "
        "as one line.",
        maximum=100_000,
    )
    gradients_every: int = setting(
        0,
        minimum=0,
        doc="Steps between two measurements of each loss's gradient: norms, cosines between losses "
        "and shares of the update, by layer and noise level, in metrics.jsonl and TensorBoard. "
        "Each takes a forward and backward pass for every loss. 0: none.",
        maximum=10**9,
    )
    progress: str = setting(
        "auto",
        doc="bar: tqdm; lines: plain text; auto: a bar on a terminal, lines elsewhere.",
        choices=("auto", "bar", "lines"),
    )
    tensorboard: bool = setting(True, doc="Write TensorBoard scalars into the run's folder.")
    wandb: bool = setting(
        False, doc="Log to Weights & Biases too; needs the package wandb and a login."
    )
    trace: TraceSettings = setting(factory=TraceSettings, doc="Traces of torch's profiler.")

    def __post_init__(self) -> None:
        if self.wandb and not _installed("wandb"):
            raise SettingsError(
                "wandb",
                "is true, but the package wandb is not installed; run `pip install wandb` or set "
                "it to false.",
            )


def _installed(package: str) -> bool:
    # W&B creates a folder of its name in the working directory, which is found as a package too,
    # but without a file.
    specification = importlib.util.find_spec(package)
    return specification is not None and specification.origin is not None
