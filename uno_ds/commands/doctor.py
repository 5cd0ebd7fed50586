"""`doctor.py`: this machine, which kernel backends run on it, and on a GPU whether they are right
and how fast they are at a recipe's shapes. It starts no ranks and writes nothing.

What cannot be imported is reported, not raised: only Python, torch and this package are needed."""

import argparse
import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from uno_ds.commands.flags import Parser
from uno_ds.commands.json_output import write_json
from uno_ds.data.files import one_line
from uno_ds.kernels.backends import KERNELS, unavailable_reason
from uno_ds.kernels.self_check import Finding, fastest
from uno_ds.settings import SettingsError

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe

DEFAULT_RECIPE = "bagel_7b_uno"
# What a training run imports, by the name that is installed.
NEEDED = {
    "deepspeed": "deepspeed",
    "transformers": "transformers",
    "safetensors": "safetensors",
    "pyarrow": "pyarrow",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
    "tensorboard": "tensorboard",
}
FAILED = 1


@dataclass
class Examination:
    """What was found. backends: {kernel: {backend: why it cannot run here, or None}}. chosen: by
    kernel, what the recipe's run would use. findings: of the check, by kernel. problems: why the
    recipe cannot run."""

    recipe: str
    machine: dict[str, Any]
    backends: dict[str, dict[str, str | None]]
    chosen: dict[str, str] = field(default_factory=dict)
    findings: dict[str, list[Finding]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        from uno_ds.training.kernel_choice import finite

        findings = {
            kernel: [finite(finding.plain()) for finding in found]
            for kernel, found in self.findings.items()
        }
        return {**vars(self), "findings": findings}


def main(arguments: Sequence[str] | None = None) -> int:
    from uno_ds.commands.runner import REFUSED, print_error

    try:
        options = _parse(arguments)
        examination = examine(options.recipe, options.set or [], options.check)
    except SettingsError as error:
        print_error(error)
        return REFUSED
    if options.json:
        write_json(examination.plain())
    else:
        _print(examination)
    return FAILED if examination.problems else 0


def examine(name: str, overrides: Sequence[str], check: bool | None = None) -> Examination:
    """`check`: None: on a GPU only. Raises SettingsError for a mistake in the recipe."""
    found = Examination(name, machine_facts(), _availability())
    for module, package in NEEDED.items():
        if importlib.util.find_spec(module) is None:
            found.problems.append(f"the package {package} is not installed, which training needs.")
    try:
        from uno_ds.recipe import load_recipe

        recipe = load_recipe(name, list(overrides), absent=[])
    except ModuleNotFoundError as error:
        found.problems.append(f"the recipe cannot be read: {one_line(error)}.")
        return found
    demands = recipe.kernel_demands
    try:
        settings = recipe.kernels.resolved(demands)
        settings.check(demands)
    except SettingsError as error:
        found.problems.append(str(error))
        return found
    found.chosen = settings.backends
    on_gpu = torch.cuda.is_available()
    automatic = [
        kernel
        for kernel, given in recipe.kernels.backends.items()
        if given == "auto" and KERNELS[kernel].chosen_by_check
    ]
    if check if check is not None else on_gpu:
        found.findings = _check(recipe)
        for kernel in automatic if on_gpu and recipe.kernels.self_check else ():
            found.chosen[kernel] = fastest(kernel, found.findings[kernel]) or found.chosen[kernel]
        found.problems += _failed(found)
    return found


def machine_facts() -> dict[str, Any]:
    """Processor, memory, disk, GPUs, versions."""
    from uno_ds.training.gpu_machine import driver_version
    from uno_ds.training.report import environment

    facts = environment()
    hardware: dict[str, Any] = facts["hardware"]
    hardware["free_disk_bytes"] = shutil.disk_usage(Path.cwd()).free
    hardware["bf16"] = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    hardware["capabilities"] = [
        "{}.{}".format(*torch.cuda.get_device_capability(number))
        for number in range(torch.cuda.device_count())
    ]
    versions: dict[str, str] = facts["versions"]
    if torch.cuda.is_available():
        versions["driver"] = driver_version()
        if torch.distributed.is_nccl_available():
            versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return {"hardware": hardware, "versions": versions, "commit": facts["commit"]}


def _availability() -> dict[str, dict[str, str | None]]:
    return {
        kernel: {name: unavailable_reason(kernel, name) for name in KERNELS[kernel].backends}
        for kernel in KERNELS
    }


def _check(recipe: "Recipe") -> dict[str, list[Finding]]:
    from uno_ds.commands.estimate import layouts_without_data
    from uno_ds.training import kernel_choice
    from uno_ds.training.check_processes import check

    shapes, pack = kernel_choice.shapes_of(recipe, layouts_without_data(recipe))
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return check(list(KERNELS), shapes, pack, device)


def _failed(found: Examination) -> list[str]:
    """Sentences about backends that the run would use and the check found not to be right."""
    sentences = []
    for kernel, findings in found.findings.items():
        reasons = {finding.backend: finding.reason for finding in findings}
        name = found.chosen[kernel]
        reason = reasons.get(name)
        if reason is not None and not reason.startswith(("was not checked", "was stopped")):
            sentences.append(f"kernels.{kernel}: '{name}' {reason}.")
    return sentences


def _print(found: Examination) -> None:
    hardware, versions = found.machine["hardware"], found.machine["versions"]
    gigabyte = 10**9
    print(f"processor  {hardware['cpu']}, {hardware['cores']} cores")
    print(f"memory     {hardware['memory_bytes'] / gigabyte:.0f} GB")
    print(f"disk       {hardware['free_disk_bytes'] / gigabyte:.0f} GB free here")
    for name, size, capability in zip(
        hardware["gpus"], hardware["gpu_memory_bytes"], hardware["capabilities"]
    ):
        print(f"gpu        {name}, {size / gigabyte:.0f} GB, compute capability {capability}")
    if hardware["gpus"]:
        print(f"bf16       {'yes' if hardware['bf16'] else 'no'}")
    else:
        print("gpu        none: training runs on the processor, in fp32 and by its backends")
    print(f"versions   {', '.join(f'{name} {version}' for name, version in versions.items())}")
    print(f"\n{'kernel':<14} {'backend':<10} runs here")
    for kernel, backends in found.backends.items():
        for name, reason in backends.items():
            used = " (this recipe)" if found.chosen.get(kernel) == name else ""
            print(f"{kernel:<14} {name:<10} {'yes' if reason is None else f'no: {reason}'}{used}")
    for kernel, findings in found.findings.items():
        print(f"\n{kernel:<10} {'error/allowed':>15} {'forward':>9} {'backward':>9}", end=" ")
        print(f"{'TFLOP/s':>8} {'MiB':>8}")
        for finding in findings:
            print(_row(finding))
    print()
    for problem in found.problems:
        print(f"problem: {problem}")
    if not found.problems:
        names = ", ".join(f"{kernel} {name}" for kernel, name in found.chosen.items())
        print(f"{found.recipe} can run here with {names}")
        print("(whether its memory, base and data are here: scripts/train.py --dry-run)")


def _row(finding: Finding) -> str:
    if finding.reason is not None:
        return f"{finding.backend:<10} {finding.reason}"
    rate = "" if finding.tflops is None else f"{finding.tflops:.1f}"
    peak = "" if finding.peak_mib is None else f"{finding.peak_mib:.0f}"
    error = f"{finding.error:.1e}/{finding.allowed:.1e}"
    return (
        f"{finding.backend:<10} {error:>15} {finding.forward_ms:>6.2f} ms "
        f"{finding.backward_ms:>6.2f} ms {rate:>8} {peak:>8}"
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="doctor.py",
        description="Says what this machine is, which kernel backends run on it, and on a GPU "
        "whether they are right and how fast they are at the recipe's shapes.",
        epilog="exit codes: 0 what the recipe asks for can run; 1 it cannot; 2 a mistake in the "
        "recipe or a flag",
    )
    parser.add_argument(
        "--recipe",
        default=DEFAULT_RECIPE,
        metavar="NAME_OR_FILE",
        help=f"whose shapes and backends are meant (default {DEFAULT_RECIPE}); neither its base "
        "nor its data need be here",
    )
    parser.add_argument(
        "--set", action="append", metavar="KEY=VALUE", help="overrides one key of the recipe"
    )
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        help="compare and time the backends, at most 30 s (default: on a GPU)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )
    return parser.parse_args(arguments)
