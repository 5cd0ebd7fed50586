"""Registers, shared memory and instructions of the Triton kernels, compiled without a GPU."""

import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

from benchmarks.suite.results import ResultFile
from uno_ds.kernels.compiled import Compiled, compile_kernel
from uno_ds.kernels.conditioning_attention.launch import KERNELS, signature, table, with_defaults
from uno_ds.kernels.launch import INTERPRETED
from uno_ds.settings import SettingsError

# Of BAGEL-7B: query heads, and query heads per key head.
HEADS, GROUP = 28, 7
# Kernels with a module compile_cases of their own.
WITH_CASES = ("metaquery_regression", "qk_norm_rope")
# Rows of the launch table by the type of elements.
PRECISIONS = {"fp32": "single", "bf16": "half", "fp16": "half"}


def variants(kernel: str) -> tuple[dict[str, bool], ...]:
    """Constants that a kernel is compiled with in addition to those of the table: keys with and
    without dq."""
    if kernel == "backward_keys":
        return {"WITH_QUERIES": True}, {"WITH_QUERIES": False, "REDUCE": False}
    return ({},)


def compiled(
    kernel: str, dtype: str, dim: int, chosen: dict[str, Any], capability: int
) -> Iterator[Compiled]:
    of_table = with_defaults(kernel, chosen)
    of_table = {name: value for name, value in of_table.items() if name != "warps"}
    for variant in variants(kernel):
        constants = of_table | variant | {"HEADS": HEADS, "GROUP": GROUP, "D": dim}
        yield compile_kernel(
            KERNELS[kernel],
            signature(kernel, dtype, dim, constants),
            constants,
            capability,
            chosen["warps"],
            chosen["STAGES"],
        )


def report(
    kernel: str, capability: int, dtype: str | None, head_dim: int | None, result: ResultFile
) -> None:
    """Compiles the kernels of `kernel` for sm_CAPABILITY, prints their figures and adds them to the
    result. `dtype`, `head_dim`: of the launch table, bf16 and fp32 and all if None. Raises
    SettingsError."""
    if INTERPRETED:
        raise SettingsError("TRITON_INTERPRET", "1 compiles nothing; unset it.")
    result.details["architecture"] = f"sm_{capability}"
    if kernel in WITH_CASES:
        result.details["kernel"] = f"compile report of {kernel}"
        _report_cases(kernel, capability, result)
    elif kernel == "conditioning_attention":
        result.details["kernel"] = "compile report"
        dtypes = [dtype] if dtype else ["bf16", "fp32"]
        _report_launch_table(capability, dtypes, head_dim, result)
    else:
        allowed = ", ".join(("conditioning_attention", *WITH_CASES))
        message = f"there is no compile report of {kernel}; allowed are {allowed}."
        raise SettingsError("--kernel", message)


def _report_launch_table(
    capability: int, dtypes: list[str], head_dim: int | None, result: ResultFile
) -> None:
    rows = table().get(f"sm_{capability}")
    if rows is None:
        allowed = ", ".join(name.removeprefix("sm_") for name in table() if name[:3] == "sm_")
        message = f"the launch table does not hold {capability}; allowed are {allowed}."
        raise SettingsError("--capability", message)
    print(f"{'kernel':<36} {'D':>4} {'registers':>9} {'stack':>5} {'shared':>7}  instructions")
    for dtype in dtypes:
        for dim, kernels in rows[PRECISIONS[dtype]].items():
            if head_dim not in (None, int(dim)):
                continue
            for kernel, chosen in kernels.items():
                found = compiled(kernel, dtype, int(dim), chosen, capability)
                for variant, figures in zip(variants(kernel), found, strict=True):
                    title = f"{kernel}, {dtype}"
                    if variant.get("WITH_QUERIES") is False:
                        title = f"{kernel} without dq, {dtype}"
                    print(
                        f"{title:<36} {dim:>4} {figures.registers:>9} {figures.stack:>5} "
                        f"{figures.shared:>7}  {_occurring(figures)}",
                        flush=True,
                    )
                    result.add(
                        {
                            "name": kernel,
                            "variant": variant,
                            "dtype": dtype,
                            "dim": int(dim),
                            "parameters": chosen,
                            **_plain(figures, capability),
                        }
                    )


def _report_cases(kernel: str, capability: int, result: ResultFile) -> None:
    module = importlib.import_module(f"uno_ds.kernels.{kernel}.compile_cases")
    for title, case in module.compile_cases(f"sm_{capability}"):
        figures = compile_kernel(capability=capability, **case)
        print(
            f"{title:<42} {figures.registers:>4} registers {figures.stack:>4} stack "
            f"{figures.shared:>7} shared  {_occurring(figures)}",
            flush=True,
        )
        result.add(
            {"name": title, "parameters": parameters_of(case), **_plain(figures, capability)}
        )


def parameters_of(case: dict[str, Any]) -> dict[str, Any]:
    """What a case of a module compile_cases is compiled with."""
    return case["constants"] | {"warps": case["warps"], "stages": case["stages"]}


def _plain(figures: Compiled, capability: int) -> dict[str, Any]:
    return {**dataclasses.asdict(figures), "feasible": figures.feasible(capability)}


def _occurring(figures: Compiled) -> dict[str, int]:
    return {name: count for name, count in figures.instructions.items() if count}
