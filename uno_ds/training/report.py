"""What a run leaves behind in words: summary.json and summary.md, with the machine it ran on."""

import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

import uno_ds
from uno_ds.files_on_disk import replace_text
from uno_ds.settings import to_plain
from uno_ds.training.metrics import LOSSES, clock, read_metrics

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
}


def environment() -> dict[str, Any]:
    """{hardware, versions, commit} of this process: CPU, cores it may use, memory, GPUs; libraries;
    commit or None."""
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    versions = {"python": platform.python_version(), "uno_ds": uno_ds.__version__}
    for package in ("torch", "deepspeed", "transformers", "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return {
        "hardware": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "gpus": [gpu.name for gpu in gpus],
            "gpu_memory_bytes": [gpu.total_memory for gpu in gpus],
        },
        "versions": versions,
        "commit": _commit(),
    }


def summarise(metrics_jsonl: Path | str) -> dict[str, Any]:
    """{steps, skipped_steps, losses, speed, memory} of a run, from its metrics.

    `losses.first` and `losses.last` are means over the first and the last tenth of the steps, at
    least one; steps without a value do not count, and a loss that the run does not have is None.
    Speed is the median step, which a slow first step or a checkpoint does not move."""
    rows = read_metrics(metrics_jsonl)
    tenth = max(1, len(rows) // 10)
    return {
        "steps": rows[-1]["step"] if rows else 0,
        "skipped_steps": max((row["skipped"] or 0 for row in rows), default=0),
        "losses": {
            "averaged_steps": min(tenth, len(rows)),
            "first": {name: _mean(row[name] for row in rows[:tenth]) for name in LOSSES},
            "last": {name: _mean(row[name] for row in rows[-tenth:]) for name in LOSSES},
        },
        "speed": {
            "step_seconds": _median(row["step_seconds"] for row in rows),
            "tokens_per_second": _median(row["tokens_per_second"] for row in rows),
            "mfu": _median(row["mfu"] for row in rows),
            "total_step_seconds": sum(row["step_seconds"] or 0 for row in rows),
        },
        "memory": {"peak_bytes": max((row["memory_bytes"] or 0 for row in rows), default=0)},
    }


def write_recipe(recipe: "Recipe") -> None:
    """Writes the resolved recipe, usable as one, into the run's folder, unless it is there
    already."""
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
    are kept. `skipped_examples: {cause: {source, file, row, detail}}` is shown with the counts.
    """
    missing = [key for key in REQUIRED if key not in summary]
    assert not missing, f"summary lacks {missing}"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(
        folder / "summary.json", json.dumps(_finite(summary), indent=2, allow_nan=False) + "\n"
    )
    replace_text(folder / "summary.md", _markdown(folder, _finite(summary)))


def _markdown(folder: Path, summary: Mapping[str, Any]) -> str:
    losses, speed, hardware = summary["losses"], summary["speed"], summary["hardware"]
    count = losses.get("averaged_steps", 1)
    steps = "step" if count == 1 else f"{count} steps"
    lines = [
        f"# Run {folder.resolve().name}: {summary['exit']}",
        "",
        f"{summary['steps']:,} steps"
        + (
            f", {clock(speed['total_step_seconds'])} in steps"
            if speed.get("total_step_seconds")
            else ""
        )
        + (
            f", {summary['skipped_steps']} of them skipped as not finite"
            if summary.get("skipped_steps")
            else ""
        )
        + ".",
        "",
        "## Losses",
        "",
        f"| loss | first {steps} | last {steps} | change |",
        "|---|---:|---:|---:|",
    ]
    for name in LOSSES:
        first, last = losses["first"].get(name), losses["last"].get(name)
        if first is not None and last is not None:
            change = f"{100 * (last - first) / abs(first):+.1f} %" if first else ""
            lines.append(f"| {TITLES[name]} | {first:.4f} | {last:.4f} | {change} |")
    lines += [
        "",
        *(
            f"![{name}]({name}.png)"
            for name in ("curves", "samples")
            if (folder / f"{name}.png").exists()
        ),
    ]

    frozen = summary["checksums"]
    end = frozen["frozen_end"]
    held = (
        "not looked at again, the run was interrupted"
        if end is None
        else "unchanged"
        if frozen["frozen_start"] == end
        else "**CHANGED**"
    )
    parameters = summary["parameters"]
    lines += [
        "",
        "## Speed, memory, weights",
        "",
        _item("step (median)", speed.get("step_seconds"), "{:.3f} s"),
        _item("tokens per second (median)", speed.get("tokens_per_second"), "{:,.0f}"),
        _item("model FLOP utilisation", speed.get("mfu") and 100 * speed["mfu"], "{:.1f} %"),
        _item("peak memory per rank", summary["memory"].get("peak_bytes") or None, "{}", _bytes),
        _item("trainable parameters", parameters["trainable"], "{:,}"),
        _item("frozen parameters", parameters["frozen"], "{:,}"),
        f"- frozen weights: {held} (checksum {frozen['frozen_start']}"
        + ("" if end in (None, frozen["frozen_start"]) else f" at the start, {end} at the end")
        + ")",
        "",
        "## Skipped samples",
        "",
    ]
    skipped, examples = summary["skipped_samples"], summary.get("skipped_examples", {})
    lines += [
        f"- {cause}: {number:,}{_example(examples.get(cause))}"
        for cause, number in sorted(skipped.items(), key=lambda item: -item[1])
    ] or ["None."]
    gpus = [
        f"{name} ({_bytes(size)})"
        for name, size in zip(hardware["gpus"], hardware["gpu_memory_bytes"], strict=True)
    ]
    lines += [
        "",
        "## Where it ran",
        "",
        f"- {hardware['cpu']}, {hardware['cores']} cores, {_bytes(hardware['memory_bytes'])} "
        "memory",
        f"- GPUs: {', '.join(gpus) or 'none'}",
        "- " + ", ".join(f"{name} {version}" for name, version in summary["versions"].items()),
        f"- commit {summary['commit'] or 'unknown'}",
    ]
    shown = (*REQUIRED, "skipped_steps", "skipped_examples")
    others = [key for key in summary if key not in shown]
    if others:
        lines += ["", "## More", "", *(f"- {key}: {_plain(summary[key])}" for key in others)]
    text = "\n".join(line for line in lines if line is not None) + "\n"
    # A command or a file name may hold what no UTF-8 can.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _example(example: Mapping[str, Any] | None) -> str:
    """The end of a line of counts; the text is code, so that no character of it is formatting."""
    if example is None:
        return ""
    file, detail = (example[name].replace("`", "'") for name in ("file", "detail"))
    said = f": `{detail}`" if detail else ""
    return f"; one is row {example['row']} of `{file}`{said}"


def _item(title: str, value: Any, form: str, convert: Any = None) -> str | None:
    return (
        None if value is None else f"- {title}: {form.format(convert(value) if convert else value)}"
    )


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


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _median(values: Any) -> float | None:
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
    """The commit of the checkout that this package lies in, with `+changes` if files differ; None
    outside of one."""
    root = Path(uno_ds.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.check_output(
            ["git", "rev-parse", "HEAD"], cwd=root, stderr=subprocess.DEVNULL, text=True, timeout=10
        ).strip()
        changes = subprocess.check_output(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            text=True,
            timeout=10,
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changes else "")
