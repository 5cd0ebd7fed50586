"""report.md of `make bench-gpu`, from whatever its parts have left in a folder."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.suite import targets

# By the name of the file.
Results = dict[str, dict[str, Any]]
PARTS = ("forward", "backward", "both")


def write(folder: Path, expected: list[str], notes: dict[str, str], rehearsed: bool) -> Path:
    """`expected`: names of all parts; `notes`: what the suite says of those that did not end
    well."""
    results = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
    lines = ["# GPU benchmarks", ""]
    if rehearsed:
        lines += ["**A rehearsal on a CPU: no time in it means anything.**", ""]
    lines += [*_machine(results), ""]
    for section in (_smoke, _attention, _overhead, _experts, _launch):
        lines += _of_section(section, results)
    lines += [*_last_lines(folder), *_missing(folder, results, expected, notes)]
    path = folder / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _of_section(section: Callable[[Results], list[str]], results: Results) -> list[str]:
    """Its lines. A row that it cannot read costs this section alone, and no part that follows."""
    try:
        return section(results)
    except Exception as error:
        name = section.__name__.removeprefix("_")
        return [f"The section {name} cannot be written: {type(error).__name__}: {error}", ""]


def read(path: Path) -> dict[str, Any]:
    """Empty for a file that is no result."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and "measurements" in found else {}


def _rows(results: Results, prefix: str) -> Iterator[dict[str, Any]]:
    for name, result in results.items():
        if name.startswith(prefix):
            yield from result.get("measurements", [])


def _machine(results: Results) -> list[str]:
    for result in results.values():
        if result:
            hardware, versions = result["hardware"], result["versions"]
            gpus = ", ".join(hardware["gpus"]) or "no GPU"
            named = ", ".join(f"{name} {version}" for name, version in versions.items())
            return [
                f"{gpus}; driver {result['driver'] or 'none'}; {hardware['cores']} cores; {named}; "
                f"commit {result['commit'] or 'unknown'}; {result['created']}"
            ]
    return ["No part has left a result."]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines] + [""]


def _smoke(results: Results) -> list[str]:
    rows = [
        [
            row["name"],
            row["backend"],
            "right" if row["reason"] is None else row["reason"].replace("|", "/"),
            _number(row["error"], ".1e"),
            _number(row["allowed"], ".1e"),
            _number(row["forward_ms"], ".3f"),
            _number(row["backward_ms"], ".3f"),
            _number(row["tflops"], ".0f"),
            _number(row["peak_mib"], ".0f"),
        ]
        for row in _rows(results, "smoke")
    ]
    head = ["kernel", "backend", "is", "error", "allowed", "forward ms", "backward ms"]
    table = _table([*head, "TFLOP/s", "peak MiB"], rows)
    return ["## Every backend at BAGEL-7B's shapes", "", *table] if table else []


def _attention(results: Results) -> list[str]:
    rows, totals = [], {}
    for row in _rows(results, "attention-"):
        cells = [row["scenario"], row["backend"]]
        for part in PARTS:
            found = row.get(part)
            cells.append(f"{found['ms']['50']:.3f} ms, {found['tflops']:.0f}" if found else "-")
        cells.append(row.get("error", ""))
        rows.append(cells)
        if row.get("both"):
            totals[row["scenario"], row["backend"]] = row["both"]["ms"]["50"]
    if not rows:
        return []
    head = ["scenario", "backend", *(f"{part} (TFLOP/s)" for part in PARTS), "failure"]
    lines = ["## Attention", "", *_table(head, rows)]
    for scenario, (forward, backward) in targets.ATTENTION_RATES.items():
        lines.append(
            f"- target of `triton` in {scenario}: {forward} forward, {backward} backward, "
            f"{targets.OVER_FLEX[scenario]} times the tuned `flex`"
        )
    for (scenario, backend), passed in totals.items():
        flex = totals.get((scenario, "flex"))
        if flex and backend != "flex":
            lines.append(
                f"- {scenario}: `{backend}` is {flex / passed:.2f} times as fast as `flex`"
            )
    published = [
        f"{name} {forward}/{backward}"
        for name, (forward, backward) in targets.PUBLISHED_ATTENTION.items()
    ]
    return [*lines, f"- published, forward/backward: {'; '.join(published)}", ""]


def _overhead(results: Results) -> list[str]:
    rows, ratios = [], []
    for prefix in ("overhead-", "naive-"):
        named: list[tuple[str, dict[str, Any]]] = []
        for name in results:
            if name.startswith(prefix):
                named += [(name, entry) for entry in _rows(results, name)]
        for name, entry in named:
            # A rehearsal gives the shape in place of the letter.
            scenario = name.rsplit("-", 1)[-1]
            for mode, numbers in entry.get("modes", {}).items():
                seconds = sorted(numbers["step_seconds"])
                rows.append(
                    [
                        entry["stage"],
                        scenario,
                        str(entry["layers"]),
                        mode,
                        f"{seconds[len(seconds) // 2]:.4f} (n {len(seconds)})",
                        _number(numbers["mfu"], ".1%"),
                        _number((numbers["peak_memory_bytes"] or 0) / 2**30, ".1f"),
                    ]
                )
            for ratio, found in entry.get("ratios", {}).items():
                text = (
                    f"- {entry['stage']}, {scenario}: {ratio} {found['median']:.3f}, by operations "
                    f"of these layers {found['predicted']:.3f}"
                )
                of_table = {
                    "uno / flow": targets.UNO_OVER_FLOW,
                    "uno / naive flow": targets.UNO_OVER_NAIVE_FLOW,
                }.get(ratio, {})
                if scenario in of_table:
                    text += f", of 28 layers {of_table[scenario]}"
                ratios.append(text)
            if entry.get("skipped"):
                ratios.append(f"- {entry['stage']}, {scenario}: {entry['skipped']}")
    if not rows and not ratios:
        return []
    head = ["stage", "scenario", "layers", "mode", "seconds a step", "MFU", "peak GiB"]
    published = "; ".join(f"{name} {mfu}" for name, mfu in targets.PUBLISHED_MFU.items())
    return [
        "## UNO against flow",
        "",
        *_table(head, rows),
        *ratios,
        f"- MFU of others: {published}",
        "",
    ]


def _experts(results: Results) -> list[str]:
    rows = []
    for row in _rows(results, "experts"):
        times = [_number(row[part]["50"], ".3f") if part in row else "-" for part in PARTS[::2]]
        failure = row.get("skipped") or row.get("error") or ""
        peak = row.get("peak_bytes")
        rows.append(
            [
                row["projection"],
                row["trains"],
                row["backend"],
                *times,
                _number(row.get("tflops"), ".0f"),
                _number(None if peak is None else peak / 2**20, ".0f"),
                failure.replace("|", "/"),
            ]
        )
    head = ["projection", "trains", "backend", "forward ms", "both ms", "TFLOP/s", "peak MiB", ""]
    table = _table(head, rows)
    return ["## Projections of both experts", "", *table] if table else []


def _launch(results: Results) -> list[str]:
    rows = [
        [
            row["name"],
            row["precision"],
            str(row["dim"]),
            ", ".join(f"{key} {value}" for key, value in row["parameters"].items()),
            _number(row.get("ms"), ".3f") if "ms" in row else row.get("error", "-"),
        ]
        for row in _rows(results, "launch-table")
    ]
    head = ["kernel", "precision", "head dim", "parameters", "ms over A and D"]
    table = _table(head, rows)
    return ["## Launch parameters (launch.json)", "", *table] if table else []


def _last_lines(folder: Path) -> list[str]:
    lines = []
    for name, title in (("gpu-tests", "GPU tests"), ("training", "The tiny recipe under `auto`")):
        log = folder / f"{name}.log"
        if log.exists():
            shown = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            wanted = [line for line in shown if line.startswith(("kernels.", "FAILED", "ERROR"))]
            lines += [f"## {title}", "", "```", *wanted[:40], *shown[-3:], "```", ""]
    return lines


def _missing(
    folder: Path, results: Results, expected: list[str], notes: dict[str, str]
) -> list[str]:
    lines = []
    for name in expected:
        has_log = (folder / f"{name}.log").exists()
        if name in notes:
            lines.append(f"- {name}: {notes[name]}")
        elif name in results and not results[name].get("complete"):
            lines.append(f"- {name}: incomplete")
        elif name not in results and not has_log:
            lines.append(f"- {name}: not run")
    return ["## What is missing", "", *(lines or ["- nothing"])]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
