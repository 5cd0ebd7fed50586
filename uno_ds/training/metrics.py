"""Metrics of a run while it trains: metrics.jsonl, TensorBoard, Weights & Biases, and a progress
bar or plain lines."""

import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from uno_ds.files_on_disk import replace_text
from uno_ds.inspection.gradients import flattened
from uno_ds.training.durations import clock, duration
from uno_ds.training.logging_settings import LoggingSettings
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
# Losses, and then values, of runs that have them only.
MORE_LOSSES = ("loss_contrast", "loss_negative")
MORE = (*MORE_LOSSES, "understanding_scale")
COUNTS = ("step", "tokens", "memory_bytes", "skipped")

EVALUATIONS = "evaluations.jsonl"

# The first steps open files, and DeepSpeed plans its prefetching in them: on a CPU they took up to
# twice as long as later ones.
WARM_UP_STEPS, TIMED_STEPS = 2, 5

Number = float | int | None
Value = torch.Tensor | Number
# A line of metrics.jsonl.
Row = dict[str, Number]


class Metrics:
    """Created on every rank, active on rank 0 only.

    `record` keeps copies of device tensors on the device, so that a step never waits for it; every
    `settings.every` steps they are copied to the host in one transfer. Call `flush` before a
    checkpoint is written and `close` at the end.

    start_step: the step that the run was resumed after; lines of later steps are removed from
    metrics.jsonl. config: the recipe as plain values, for W&B. after_training: what the run does
    after its last step, for the estimate of its time."""

    def __init__(
        self,
        folder: Path | str,
        settings: LoggingSettings,
        rank: int,
        total_steps: int,
        *,
        start_step: int = 0,
        config: Mapping[str, Any] | None = None,
        after_training: str = "",
    ):
        self.folder, self.settings, self.total_steps = Path(folder), settings, total_steps
        self._pending: list[dict[str, Value]] = []
        self._gradients: dict[int, Mapping[str, Any]] = {}
        self._after_training = after_training
        self._step_seconds: list[float] = []
        self._bar = self._board = self._wandb = None
        # Both are None on ranks other than 0, and once closed.
        self._file: AppendFile | None = None
        self._evaluations: AppendFile | None = None
        self._is_complete = True
        # Steps whose evaluation is recorded, on rank 0.
        self.evaluated: set[int] = set()
        if rank != 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        _truncate(path, start_step)
        _truncate(self.folder / EVALUATIONS, start_step)
        if (self.folder / EVALUATIONS).exists():
            rows = read_metrics(self.folder / EVALUATIONS)
            self.evaluated = {_step_of(row) for row in rows}
        self._file = AppendFile(path, self.note)
        if settings.tensorboard:
            self._board = self._open_board(start_step)
        if settings.wandb:
            self._wandb = self._open_wandb(config)
        shows_bar = {"auto": sys.stderr.isatty(), "bar": True, "lines": False}
        if shows_bar[settings.progress]:
            self._bar = tqdm(total=total_steps, initial=start_step, dynamic_ncols=True, unit="step")

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
        """Keeps the values of one step. Tensors have one element, on any device; keys are those of
        FIELDS except `step`, and of MORE. A value of FIELDS that is missing, and any that is None
        or not finite, is written as null. `skipped` counts the steps skipped so far. If
        `tokens_per_second` is missing, it is computed from `tokens` and `step_seconds`.
        `gradients`: plain values, written under that name, and as scalars named gradients/... to
        TensorBoard and W&B."""
        if self._file is None:
            return
        unknown = set(values) - set(FIELDS) - set(MORE)
        assert not unknown, f"not metrics: {unknown}"
        # Copies, since the caller may overwrite its tensors.
        kept: dict[str, Value] = {
            name: value.detach().reshape(()).clone() if isinstance(value, torch.Tensor) else value
            for name, value in values.items()
        }
        self._pending.append({**kept, "step": step})
        if gradients is not None:
            self._gradients[step] = gradients
        if self._bar is not None:
            self._bar.update()
        self._estimate_time(step, values.get("step_seconds"))
        if len(self._pending) >= self.settings.every or step >= self.total_steps:
            self.flush()

    def flush(self) -> None:
        """Copies the kept values to the host, writes them, and prints or shows their means."""
        if self._file is None or not self._pending:
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
            gradients = self._gradients.pop(_step_of(row), {})
            scalars |= {f"gradients/{name}": value for name, value in flattened(gradients)}
            if self._board is not None:
                self._board.add(row["step"], scalars)
            if self._wandb is not None:
                self._wandb.log(scalars, step=row["step"])
        self._report(rows)

    def evaluation(
        self,
        step: int,
        values: Mapping[str, float],
        pictures: Sequence[bytes] = (),
        weights: str = "trained",
    ) -> None:
        """Records what an evaluation found after a step: a line of evaluations.jsonl, and scalars
        and images (PNG) of TensorBoard and W&B. `weights`: which were evaluated."""
        if self._file is None:
            return
        # The steps before come first: W&B takes no step that is older than its last.
        self.flush()
        known = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps({"step": step, "weights": weights, **known}, allow_nan=False)
        if self._evaluations is None:
            self._evaluations = AppendFile(self.folder / EVALUATIONS, self.note)
        self._evaluations.write(f"{line}\n".encode())
        named = {f"evaluation/{name}": v for name, v in known.items() if v is not None}
        if self._board is not None:
            self._board.add(step, named)
            for number, picture in enumerate(pictures):
                self._board.add_image(step, f"evaluation/picture_{number}", picture)
        if self._wandb is not None:
            self._wandb.log(named, step=step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.note(f"evaluation after step {step} ({weights} weights)  {shown}")

    def note(self, *lines: str) -> None:
        """Prints lines on rank 0, above the progress bar if there is one."""
        if self._file is None:
            return
        for line in lines:
            if self._bar is None:
                print_line(line)
            else:
                tqdm.write(line)

    @property
    def complete(self) -> bool:
        """Whether metrics.jsonl holds every line, on rank 0."""
        return self._is_complete if self._file is None else self._file.complete

    def close(self) -> None:
        """Writes what is left and closes every file; lines that still cannot be written are lost,
        after a warning. May be called twice."""
        if self._file is None:
            return
        self.flush()
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file.close()
        self._is_complete = self._file.complete
        self._file = None
        if self._evaluations is not None:
            self._evaluations.close()
            self._evaluations = None

    def _estimate_time(self, step: int, seconds: Value) -> None:
        """Prints once, after the first steps, how long all steps of this start take."""
        if seconds is None or len(self._step_seconds) == WARM_UP_STEPS + TIMED_STEPS:
            return
        self._step_seconds.append(float(seconds))
        left = self.total_steps - step
        if len(self._step_seconds) < WARM_UP_STEPS + TIMED_STEPS or not left:
            return
        median = statistics.median(self._step_seconds[WARM_UP_STEPS:])
        total = duration(sum(self._step_seconds) + median * left)
        after = f", then {self._after_training}" if self._after_training else ""
        steps = len(self._step_seconds) + left
        self.note(f"{steps:,} steps at {median:.3g} s: about {total} of training{after}")
        if self._bar is not None:
            self._bar.set_description(f"about {total}", refresh=False)

    def _row(self, values: Row) -> Row:
        tokens, seconds = values.get("tokens"), values.get("step_seconds")
        if "tokens_per_second" not in values and tokens is not None and seconds:
            values["tokens_per_second"] = tokens / seconds
        row: Row = {}
        for name in [*FIELDS, *(name for name in MORE if name in values)]:
            value = values.get(name)
            if value is None or not math.isfinite(value):
                row[name] = None
            else:
                row[name] = int(value) if name in COUNTS else float(value)
        return row

    def _line(self, row: Row) -> dict[str, Any]:
        gradients = self._gradients.get(_step_of(row))
        return row if gradients is None else {**row, "gradients": gradients}

    def _report(self, rows: list[Row]) -> None:
        """Shows the means of the rows in the bar, or prints them as one line."""
        shown: dict[str, str] = {}
        for name in (*LOSSES, *MORE_LOSSES):
            mean = _mean(row.get(name) for row in rows)
            if mean is not None:
                shown[name.removeprefix("loss_")] = f"{mean:.4f}"
        seconds = sum(row["step_seconds"] or 0 for row in rows)
        tokens = sum(row["tokens"] or 0 for row in rows)
        if seconds and tokens:
            shown["tokens/s"] = f"{tokens / seconds:,.0f}"
        if rows[-1]["skipped"]:
            shown["skipped"] = str(rows[-1]["skipped"])
        if self._bar is not None:
            self._bar.set_postfix(shown)
            return
        step = _step_of(rows[-1])
        seconds_per_step = _mean(row["step_seconds"] for row in rows)
        if seconds_per_step is not None:
            shown["left"] = clock(seconds_per_step * (self.total_steps - step))
        values = "  ".join(f"{name} {value}" for name, value in shown.items())
        print_line(f"step {step}/{self.total_steps}  {values}")

    def _open_board(self, start_step: int) -> Any:
        from uno_ds.training.board import Board

        return Board(self.folder / "tensorboard", start_step + 1, self.note)

    def _open_wandb(self, config: Mapping[str, Any] | None) -> Any:
        import wandb

        # Kept in the run's folder, so that a resumed run continues the same W&B run.
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


def read_metrics(path: Path | str) -> list[Row]:
    """The lines of a metrics.jsonl in their order. A line truncated by a crash is skipped."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _truncate(path: Path, last_step: int) -> None:
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if _step_of(row) <= last_step]
    replace_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def _to_host(pending: list[dict[str, Value]]) -> list[Row]:
    """The values as numbers, in one transfer per device."""
    rows: list[Row] = []
    tensors: dict[torch.device, list[torch.Tensor]] = {}
    places: dict[torch.device, list[tuple[Row, str]]] = {}
    for values in pending:
        row: Row = {}
        rows.append(row)
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors.setdefault(value.device, []).append(value.double())
                places.setdefault(value.device, []).append((row, name))
            else:
                row[name] = value
    for device, on_device in tensors.items():
        numbers = torch.stack(on_device).tolist()
        for (row, name), number in zip(places[device], numbers, strict=True):
            row[name] = number
    return rows


def _mean(values: Iterable[Number]) -> float | None:
    """Of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _step_of(row: Row) -> int:
    step = row["step"]
    assert step is not None, "every line has a step"
    return int(step)


def _board_name(name: str) -> str:
    return f"loss/{name.removeprefix('loss_')}" if name.startswith("loss") else f"train/{name}"
