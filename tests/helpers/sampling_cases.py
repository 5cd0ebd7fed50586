"""Recorded cases of sampling, and their replay by `weights.py verify`."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from uno_ds.commands.weights import main

FOLDER = Path(__file__).parents[1] / "goldens" / "sampling"


def write(folder: Path, name: str, description: dict, tensors: dict) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(description | {"model": str(FOLDER / "base")}))
    save_file(
        {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()},
        folder / f"{name}.safetensors",
    )
    return path


def part(folder: Path, name: str, runs: list[int], change=None) -> Path:
    """A recorded case with some of its runs, which `change` may spoil."""
    description = json.loads((FOLDER / f"{name}.json").read_text())
    tensors = load_file(FOLDER / f"{name}.safetensors")
    kept = {key: value for key, value in tensors.items() if not key.startswith("run")}
    for number, run in enumerate(runs):
        for key, value in tensors.items():
            if key.startswith(f"run{run}."):
                kept[key.replace(f"run{run}.", f"run{number}.")] = value.clone()
    description["runs"] = [description["runs"][run] for run in runs]
    if change is not None:
        change(description, kept)
    return write(folder, name, description, kept)


def verify(path: Path, capsys, *flags: str) -> tuple[int, list[str], str]:
    """(exit code, lines, error)."""
    code = main(["verify", str(path), *flags])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def verdicts(lines: list[str], verdict: str) -> list[str]:
    return [line for line in lines if line.strip().startswith(verdict)]
