"""The summary of a run, with the machine it ran on: summary.json and summary.md."""

import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

import uno_ds
from uno_ds.files_on_disk import replace_text
from uno_ds.settings import to_plain
from uno_ds.training.durations import clock
from uno_ds.training.metrics import LOSSES, MORE_LOSSES, Number, Row, read_metrics

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe

REQUIRED = (
    "hardware",
    "versions",
    "commit",
    "steps",
    "losses",
    "speed",
    "memory",
    "parameters",
    "checksums",
    "skipped_samples",
    "exit",
)
TITLES = {
    "loss": "total",
    "loss_flow": "flow matching",
    "loss_caption": "captioning",
    "loss_regression": "visual regression",
    "loss_answer": "answers",
    "loss_contrast": "flow contrast",
    "loss_negative": "negative captions",
}


def environment() -> dict[str, Any]:
    """{hardware, versions, commit} of this process: CPU, cores it may use, memory, GPUs; libraries;
    commit or None."""
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    versions = {"python": platform.python_version(), "uno_ds": uno_ds.__version__}
    # With its build, such as +cpu, which the version of the installed package may lack.
    versions["torch"] = str(torch.__version__)
    for package in ("deepspeed", "transformers", "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return {
        "hardware": {
            "cpu": _cpu_model(),
            "cores": cores,
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "gpus": [gpu.name for gpu in gpus],
            "gpu_memory_bytes": [gpu.total_memory for gpu in gpus],
        },
        "versions": versions,
        "commit": _commit(),
    }


def summarise(metrics_jsonl: Path | str) -> dict[str, Any]:
    """{steps, skipped_steps, losses, speed, memory} of a run, from its metrics.

    `losses.first` and `losses.last` are means over the first and the last tenth of the steps (at
    least one step), without the steps that have no value; a loss that the run does not have is
    None. Speed is that of the median step, which a slow first step or a checkpoint does not
    change."""
    rows = read_metrics(metrics_jsonl)
    tenth = max(1, len(rows) // 10)
    return {
        "steps": rows[-1]["step"] if rows else 0,
        "skipped_steps": max((row["skipped"] or 0 for row in rows), default=0),
        "losses": {
            "averaged_steps": min(tenth, len(rows)),
            "first": _mean_losses(rows[:tenth]),
            "last": _mean_losses(rows[-tenth:]),
        },
        "speed": {
            "step_seconds": _median(row["step_seconds"] for row in rows),
            "tokens_per_second": _median(row["tokens_per_second"] for row in rows),
            "mfu": _median(row["mfu"] for row in rows),
            "total_step_seconds": sum(row["step_seconds"] or 0 for row in rows),
        },
        "memory": {"peak_bytes": max((row["memory_bytes"] or 0 for row in rows), default=0)},
    }


def _mean_losses(rows: list[Row]) -> dict[str, float | None]:
    means: dict[str, float | None] = {}
    for name in (*LOSSES, *MORE_LOSSES):
        if name in LOSSES or any(name in row for row in rows):
            means[name] = _mean(row.get(name) for row in rows)
    return means


def write_recipe(recipe: "Recipe") -> None:
    """Writes the resolved recipe, which can be used as a recipe, into the run's folder, unless it
    is there already."""
    recipe.folder.mkdir(parents=True, exist_ok=True)
    plain = to_plain(recipe)
    plain.pop("architecture")
    text = yaml.safe_dump(plain, sort_keys=False)
    path = recipe.folder / "recipe.yaml"
    if not path.exists() or path.read_text() != text:
        replace_text(path, text)


def write_summary(folder: Path | str, summary: Mapping[str, Any]) -> None:
    """Writes summary.json and a readable summary.md.

    summary: {**environment(), **summarise(metrics_jsonl)} with `parameters: {trainable, frozen}`,
    `checksums: {frozen_start, frozen_end}`, `skipped_samples: {cause: count}` and `exit`; more keys
    are written too. `skipped_examples: {cause: {source, file, row, detail}}` is shown with the
    counts.
    """
    missing = [key for key in REQUIRED if key not in summary]
    assert not missing, f"summary lacks {missing}"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    finite = _finite(summary)
    text = json.dumps(finite, indent=2, allow_nan=False) + "\n"
    replace_text(folder / "summary.json", text)
    replace_text(folder / "summary.md", _markdown(folder, finite))


def _markdown(folder: Path, summary: Mapping[str, Any]) -> str:
    pictures = [f"{name}.png" for name in ("curves", "samples")]
    lines = [
        f"# Run {folder.resolve().name}: {summary['exit']}",
        "",
        _steps_line(summary),
        "",
        "## Losses",
        "",
        *_losses_table(summary["losses"]),
        "",
        *[
            f"![{name.removesuffix('.png')}]({name})"
            for name in pictures
            if (folder / name).exists()
        ],
        "",
        "## Speed, memory, weights",
        "",
        *_speed_lines(summary),
        "",
        "## Skipped samples",
        "",
        *_skipped_lines(summary["skipped_samples"], summary.get("skipped_examples", {})),
        "",
        "## Where it ran",
        "",
        *_machine_lines(summary),
    ]
    shown = (*REQUIRED, "skipped_steps", "skipped_examples")
    others = [key for key in summary if key not in shown]
    if others:
        lines += ["", "## More", "", *(f"- {key}: {_plain(summary[key])}" for key in others)]
    text = "\n".join(lines) + "\n"
    # A command or a file name may hold surrogates, which UTF-8 cannot encode.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _steps_line(summary: Mapping[str, Any]) -> str:
    line = f"{summary['steps']:,} steps"
    seconds = summary["speed"].get("total_step_seconds")
    skipped = summary.get("skipped_steps")
    if seconds:
        line += f", {clock(seconds)} in steps"
    if skipped:
        line += f", {skipped} of them skipped as not finite"
    return line + "."


def _losses_table(losses: Mapping[str, Any]) -> list[str]:
    count = losses.get("averaged_steps", 1)
    steps = "step" if count == 1 else f"{count} steps"
    lines = [f"| loss | first {steps} | last {steps} | change |", "|---|---:|---:|---:|"]
    for name in (*LOSSES, *MORE_LOSSES):
        first, last = losses["first"].get(name), losses["last"].get(name)
        if first is not None and last is not None:
            change = f"{100 * (last - first) / abs(first):+.1f} %" if first else ""
            lines.append(f"| {TITLES[name]} | {first:.4f} | {last:.4f} | {change} |")
    return lines


def _speed_lines(summary: Mapping[str, Any]) -> list[str]:
    speed, parameters = summary["speed"], summary["parameters"]
    peak_bytes = summary["memory"].get("peak_bytes")
    lines = []
    if speed.get("step_seconds") is not None:
        lines.append(f"- step (median): {speed['step_seconds']:.3f} s")
    if speed.get("tokens_per_second") is not None:
        lines.append(f"- tokens per second (median): {speed['tokens_per_second']:,.0f}")
    if speed.get("mfu") is not None:
        lines.append(f"- model FLOP utilisation: {100 * speed['mfu']:.1f} %")
    if peak_bytes:
        lines.append(f"- peak memory per rank: {_bytes(peak_bytes)}")
    return [
        *lines,
        f"- trainable parameters: {parameters['trainable']:,}",
        f"- frozen parameters: {parameters['frozen']:,}",
        _frozen_line(summary["checksums"]),
    ]


def _frozen_line(checksums: Mapping[str, Any]) -> str:
    start, end = checksums["frozen_start"], checksums["frozen_end"]
    if end is None:
        return f"- frozen weights: not checked, the run was interrupted (checksum {start})"
    if start == end:
        return f"- frozen weights: unchanged (checksum {start})"
    return f"- frozen weights: **CHANGED** (checksum {start} at the start, {end} at the end)"


def _skipped_lines(skipped: Mapping[str, int], examples: Mapping[str, Any]) -> list[str]:
    """A line for each cause, the most frequent one first."""
    if not skipped:
        return ["None."]
    causes = sorted(skipped, key=lambda cause: -skipped[cause])
    return [f"- {cause}: {skipped[cause]:,}{_example(examples.get(cause))}" for cause in causes]


def _machine_lines(summary: Mapping[str, Any]) -> list[str]:
    hardware = summary["hardware"]
    memory = _bytes(hardware["memory_bytes"])
    gpus = [
        f"{name} ({_bytes(size)})"
        for name, size in zip(hardware["gpus"], hardware["gpu_memory_bytes"], strict=True)
    ]
    versions = [f"{name} {version}" for name, version in summary["versions"].items()]
    return [
        f"- {hardware['cpu']}, {hardware['cores']} cores, {memory} memory",
        f"- GPUs: {', '.join(gpus) or 'none'}",
        f"- {', '.join(versions)}",
        f"- commit {summary['commit'] or 'unknown'}",
    ]


def _example(example: Mapping[str, Any] | None) -> str:
    """The end of a line of `_skipped_lines`. File and detail are formatted as code, so that
    Markdown does not interpret their characters."""
    if example is None:
        return ""
    file, detail = (example[name].replace("`", "'") for name in ("file", "detail"))
    reason = f": `{detail}`" if detail else ""
    return f"; one is row {example['row']} of `{file}`{reason}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mean(values: Iterable[Number]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _median(values: Iterable[Number]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the git checkout that contains this package, with `+changes` if files differ;
    None outside of a checkout."""
    root = Path(uno_ds.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changes else "")


def _git(root: Path, *arguments: str) -> str:
    output = subprocess.check_output(
        ["git", *arguments], cwd=root, stderr=subprocess.DEVNULL, text=True, timeout=10
    )
    return output.strip()
