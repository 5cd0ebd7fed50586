"""Result files: what every benchmark writes about its machine and its numbers, by benchmarks/result.schema.json."""

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from uno_ds.files_on_disk import replace_text
from uno_ds.settings import SettingsError
from uno_ds.training.report import environment

SCHEMA = Path(__file__).parent.parent / "result.schema.json"
_TYPES = {"object": Mapping, "array": list, "string": str, "boolean": bool, "null": type(None)}


def new_result(kind: str, recipe: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An empty result of this process on this machine."""
    smi = gpu_state()
    return {
        "schema": 1,
        "kind": kind,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *_relative(sys.argv)]),
        "complete": False,
        **environment(),
        "clocks": {
            "cpu_mhz": _cpu_mhz(),
            "gpus": [{name: row[name] for name in row if name != "driver"} for row in smi],
        },
        "driver": smi[0]["driver"] if smi else None,
        "load": {"start": os.getloadavg()[0], "end": None, "threads": torch.get_num_threads()},
        "recipe": recipe,
        "measurements": [],
        "unknown": [],
    }


def write_result(path: Path, result: dict[str, Any], complete: bool = False) -> None:
    """Validates and writes it, whole or not at all; to be called after every measurement, so that a run that is cut loses
    nothing. Raises ValueError for a result that the schema does not allow."""
    result |= {"complete": complete, "load": {**result["load"], "end": os.getloadavg()[0]}}
    problems = validate(result)
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems[:3])}")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(result, indent=1, allow_nan=False) + "\n")


def read_result(path: Path) -> dict[str, Any]:
    """Raises SettingsError, one line that names the file, for what is no result file."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(str(path), f"is not readable JSON: {error}") from None
    problems = validate(result)
    if problems:
        raise SettingsError(
            str(path), f"is not a result file of {SCHEMA.name}: {'; '.join(problems[:3])}"
        )
    return result


def validate(
    value: Any, schema: Mapping[str, Any] | None = None, where: str = "result"
) -> list[str]:
    """Sentences about what breaks the schema. Knows the words of JSON Schema that the schema uses."""
    schema = json.loads(SCHEMA.read_text()) if schema is None else schema
    problems = []
    if "const" in schema and value != schema["const"]:
        problems.append(f"{where} must be {schema['const']!r}, got {value!r}")
    if "enum" in schema and value not in schema["enum"]:
        problems.append(f"{where} must be one of {schema['enum']}, got {value!r}")
    if "type" in schema:
        allowed = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not any(_is(value, name) for name in allowed):
            return [
                *problems,
                f"{where} must be of type {' or '.join(allowed)}, got {type(value).__name__}",
            ]
    if isinstance(value, Mapping):
        problems += [
            f"{where} lacks {name}" for name in schema.get("required", ()) if name not in value
        ]
        inside = schema.get("properties", {})
        for name, item in value.items():
            rule = inside.get(name, schema.get("additionalProperties"))
            problems += validate(item, rule, f"{where}.{name}") if rule else []
    if isinstance(value, list) and "items" in schema:
        for number, item in enumerate(value):
            problems += validate(item, schema["items"], f"{where}[{number}]")
    for branch in schema.get("allOf", ()):
        if not validate(value, branch["if"], where):
            problems += validate(value, branch["then"], where)
    return problems


def gpu_state() -> list[dict[str, Any]]:
    """Clocks, power limit and driver of every GPU, by nvidia-smi; empty without one."""
    keys = {
        "name": "name",
        "driver": "driver_version",
        "sm_mhz": "clocks.sm",
        "sm_max_mhz": "clocks.max.sm",
        "memory_mhz": "clocks.mem",
        "power_limit_w": "power.limit",
        "temperature_c": "temperature.gpu",
    }
    try:
        answer = subprocess.run(
            [
                "nvidia-smi",
                f"--query-gpu={','.join(keys.values())}",
                "--format=csv,noheader,nounits",
            ],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [
        dict(zip(keys, map(_number, line.split(",")), strict=False))
        for line in answer.strip().splitlines()
    ]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text.strip()


def _is(value: Any, name: str) -> bool:
    if name in ("number", "integer"):
        return isinstance(value, int if name == "integer" else (int, float)) and not isinstance(
            value, bool
        )
    return isinstance(value, _TYPES[name])


def _cpu_mhz() -> float | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    clocks = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return sum(clocks) / len(clocks) if clocks else None


def _relative(words: list[str]) -> list[str]:
    """Without this machine's folders."""
    root = Path(__file__).resolve().parents[2]
    return [
        str(Path(word).resolve().relative_to(root))
        if Path(word).is_absolute() and Path(word).resolve().is_relative_to(root)
        else Path(word).name
        if Path(word).is_absolute()
        else word
        for word in words
    ]
