"""What a run tells while it goes: metrics.jsonl, TensorBoard, Weights & Biases, and a bar or plain
lines."""

import importlib.util
import json
import math
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from uno_ds.files_on_disk import replace_text
from uno_ds.inspection.gradients import flattened
from uno_ds.settings import SettingsError, setting
from uno_ds.training.run_files import AppendFile, print_line

LOSSES = ("loss", "loss_flow", "loss_caption", "loss_regression", "loss_answer")
FIELDS = (
    "step",
    *LOSSES,
    "grad_norm",
    "lr",
    "tokens",
    "step_seconds",
    "tokens_per_second",
    "mfu",
    "memory_bytes",
    "skipped",
)
COUNTS = ("step", "tokens", "memory_bytes", "skipped")

# The first steps open files, and DeepSpeed plans its prefetching in them: seen on a CPU, they take
# up to twice a later one.
WARM_UP_STEPS, TIMED_STEPS = 2, 5

Value = torch.Tensor | float | int | None


@dataclass(frozen=True)
class LoggingSettings:
    every: int = setting(
        10,
        minimum=1,
        doc="Steps between two readings of the device's metrics; then the log line is printed and "
        "files are written.",
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

    def __post_init__(self) -> None:
        if self.wandb and not _installed("wandb"):
            raise SettingsError(
                "wandb",
                "is true, but the package wandb is not installed; run `pip install wandb` or set "
                "it to false.",
            )


class Metrics:
    """Made on every rank, active on rank 0 only.

    `record` keeps device tensors as they are, so that a step never waits for the device; every
    `settings.every` steps they come to the host in one transfer. Call `flush` before a checkpoint
    is written and `close` at the end.

    start_step: the last step that a resumed run already has. Lines of later steps are removed from
    metrics.jsonl. config: the recipe as plain values, for W&B. afterwards: what a run does after
    its last step, in words."""

    def __init__(
        self,
        folder: Path | str,
        settings: LoggingSettings,
        rank: int,
        total_steps: int,
        *,
        start_step: int = 0,
        config: Mapping[str, Any] | None = None,
        afterwards: str = "",
    ):
        self.settings, self.total_steps, self.active = settings, total_steps, rank == 0
        self._pending: list[dict[str, Value]] = []
        self._gradients: dict[int, Mapping[str, Any]] = {}
        self._afterwards, self._seconds = afterwards, []
        self._bar = self._file = None
        if not self.active:
            return
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        _truncate(path, start_step)
        self._file = AppendFile(path, self.note)
        self._board = self._open_board(start_step) if settings.tensorboard else None
        self._wandb = self._open_wandb(config) if settings.wandb else None
        bar = settings.progress == "bar" or settings.progress == "auto" and sys.stderr.isatty()
        self._bar = (
            tqdm(total=total_steps, initial=start_step, dynamic_ncols=True, unit="step")
            if bar
            else None
        )

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def record(
        self,
        step: int,
        values: Mapping[str, Value],
        gradients: Mapping[str, Any] | None = None,
    ) -> None:
        """Keeps one step's values. Tensors have one element, on any device; keys are those of
        FIELDS but `step`. What is missing, None or not finite is written as null. `skipped` counts
        the steps skipped so far. `gradients`: plain values, written under that name, as scalars
        named gradients/... to TensorBoard and W&B. Without `tokens_per_second` it is taken from
        `tokens` and `step_seconds`."""
        if not self.active:
            return
        assert set(values) < set(FIELDS), f"not metrics: {set(values) - set(FIELDS)}"
        # The caller may go on to overwrite its tensors, so the ones kept here are copies.
        kept = {
            name: value.detach().reshape(()).clone() if isinstance(value, torch.Tensor) else value
            for name, value in values.items()
        }
        self._pending.append({**kept, "step": step})
        if gradients is not None:
            self._gradients[step] = gradients
        if self._bar is not None:
            self._bar.update()
        self._foretell(step, values.get("step_seconds"))
        if len(self._pending) >= self.settings.every or step >= self.total_steps:
            self.flush()

    def flush(self) -> None:
        """Brings the kept values to the host, writes them, and reports their means to whoever
        watches."""
        if not self.active or not self._pending:
            return
        rows = [self._row(values) for values in _to_host(self._pending)]
        self._pending.clear()
        lines = "".join(json.dumps(self._line(row), allow_nan=False) + "\n" for row in rows)
        self._file.write(lines.encode())
        for row in rows:
            scalars = {
                _board_name(name): value
                for name, value in row.items()
                if value is not None and name != "step"
            }
            gradients = self._gradients.pop(row["step"], {})
            scalars |= {f"gradients/{name}": value for name, value in flattened(gradients)}
            if self._board is not None:
                self._board.add(row["step"], scalars)
            if self._wandb is not None:
                self._wandb.log(scalars, step=row["step"])
        self._report(rows)

    def note(self, *lines: str) -> None:
        """Prints lines on rank 0 without tearing the bar."""
        if self.active:
            for line in lines:
                (print_line if self._bar is None else tqdm.write)(line)

    @property
    def complete(self) -> bool:
        """Whether metrics.jsonl holds every line, on rank 0."""
        return self._file is None or self._file.complete

    def close(self) -> None:
        """Writes what is left and closes every file; what the disk still does not take is lost,
        with a warning before. May be called twice."""
        if not self.active:
            return
        self.flush()
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file.close()
        self.active = False

    def _foretell(self, step: int, seconds: Value) -> None:
        """Once, when steps have settled: how long those of this start take together, by the host's
        clock."""
        if seconds is None or len(self._seconds) == WARM_UP_STEPS + TIMED_STEPS:
            return
        self._seconds.append(float(seconds))
        left = self.total_steps - step
        if len(self._seconds) < WARM_UP_STEPS + TIMED_STEPS or not left:
            return
        usual = statistics.median(self._seconds[WARM_UP_STEPS:])
        whole = duration(sum(self._seconds) + usual * left)
        after = f", then {self._afterwards}" if self._afterwards else ""
        steps = len(self._seconds) + left
        self.note(f"{steps:,} steps at {usual:.3g} s: about {whole} for the training itself{after}")
        if self._bar is not None:
            self._bar.set_description(f"about {whole}", refresh=False)

    def _row(self, values: dict[str, float | int | None]) -> dict[str, float | int | None]:
        if (
            "tokens_per_second" not in values
            and values.get("tokens") is not None
            and values.get("step_seconds")
        ):
            values["tokens_per_second"] = values["tokens"] / values["step_seconds"]
        row: dict[str, float | int | None] = {}
        for name in FIELDS:
            value = values.get(name)
            if value is None or not math.isfinite(value):
                row[name] = None
            else:
                row[name] = int(value) if name in COUNTS else float(value)
        return row

    def _line(self, row: dict[str, float | int | None]) -> dict[str, Any]:
        gradients = self._gradients.get(row["step"])
        return row if gradients is None else {**row, "gradients": gradients}

    def _report(self, rows: list[dict[str, float | int | None]]) -> None:
        means = {name: _mean(row[name] for row in rows) for name in (*LOSSES, "step_seconds")}
        seconds = sum(row["step_seconds"] or 0 for row in rows)
        shown = {
            name.removeprefix("loss_"): f"{means[name]:.4f}"
            for name in LOSSES
            if means[name] is not None
        }
        if seconds and any(row["tokens"] for row in rows):
            shown["tokens/s"] = f"{sum(row['tokens'] or 0 for row in rows) / seconds:,.0f}"
        if rows[-1]["skipped"]:
            shown["skipped"] = str(rows[-1]["skipped"])
        if self._bar is not None:
            self._bar.set_postfix(shown)
            return
        step = rows[-1]["step"]
        if means["step_seconds"] is not None:
            shown["left"] = clock(means["step_seconds"] * (self.total_steps - step))
        print_line(
            f"step {step}/{self.total_steps}  "
            + "  ".join(f"{name} {value}" for name, value in shown.items())
        )

    def _open_board(self, start_step: int) -> Any:
        from uno_ds.training.board import Board

        return Board(self.folder / "tensorboard", start_step + 1, self.note)

    def _open_wandb(self, config: Mapping[str, Any] | None) -> Any:
        import wandb

        # The id lies in the run's folder, so that a resumed run goes on in the same W&B run.
        path = self.folder / "wandb_id"
        if not path.exists():
            path.write_text(wandb.util.generate_id(), encoding="utf-8")
        name = self.folder.name
        return wandb.init(
            project="uno_ds",
            name=name,
            id=path.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(self.folder),
            config=dict(config or {}),
        )


def read_metrics(path: Path | str) -> list[dict[str, float | int | None]]:
    """The lines of a metrics.jsonl in their order. A last line torn by a crash is left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from one hour on."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def duration(seconds: float) -> str:
    """Seconds in words: 50 s, 2 min 20 s, 3 h 10 min, 2 days 4 h."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    if seconds < 3600:
        return _two_units(10 * round(seconds / 10), 60, "min", "s")
    if seconds < 86400:
        return _two_units(10 * round(seconds / 600), 60, "h", "min")
    return _two_units(round(seconds / 3600), 24, "days", "h")


def _two_units(count: int, size: int, large: str, small: str) -> str:
    many, rest = divmod(count, size)
    return f"{many} {large} {rest} {small}" if rest else f"{many} {large}"


def _truncate(path: Path, last_step: int) -> None:
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if row["step"] <= last_step]
    replace_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def _to_host(pending: list[dict[str, Value]]) -> list[dict[str, float | int | None]]:
    places: dict[torch.device, list[tuple[int, str]]] = {}
    for index, values in enumerate(pending):
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                places.setdefault(value.device, []).append((index, name))
    host: list[dict[str, Any]] = [dict(values) for values in pending]
    for where in places.values():
        numbers = torch.stack([pending[index][name].double() for index, name in where]).tolist()
        for (index, name), number in zip(where, numbers, strict=True):
            host[index][name] = number
    return host


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _board_name(name: str) -> str:
    return f"loss/{name.removeprefix('loss_')}" if name in LOSSES else f"train/{name}"


def _installed(package: str) -> bool:
    # A folder of that name in the working directory, which W&B itself makes, is found too, but has
    # no file behind it.
    specification = importlib.util.find_spec(package)
    return specification is not None and specification.origin is not None
