"""Compiles a Triton kernel for a GPU that this machine need not have, and reads its resources from
the machine code.

Registers, stack and shared memory show whether a choice of tiles is feasible, counts of
instructions whether the matrix units and wide loads are used. Not for a process under
TRITON_INTERPRET=1, where nothing is compiled."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Shared memory that one program may have, in bytes, by architecture (CUDA C programming guide,
# compute capabilities).
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
# Opcodes that are counted: matrix products, wide and asynchronous copies, spills.
WATCHED = (
    "HGMMA",
    "HMMA",
    "UTMALDG",
    "UTMAREDG",
    "LDGSTS.128",
    "LDGSTS.64",
    "LDGSTS.32",
    "LDG.128",
    "LDG.64",
    "LDG.32",
    "STG.128",
    "RED",
    "MUFU.EX2",
    "BAR",
    "LDL",
    "STL",
)


@dataclass(frozen=True)
class Compiled:
    """Registers per thread; bytes of stack per thread and of shared memory per program;
    instructions by opcode."""

    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]

    def feasible(self, capability: int) -> bool:
        """No spill, and shared memory that the architecture has."""
        spills = self.instructions["LDL"] + self.instructions["STL"]
        return not self.stack and not spills and self.shared <= SHARED_MEMORY[capability]

    @property
    def copies_wide(self) -> bool:
        """Whether blocks are copied to shared memory by the copy engine or by 8 or 16 bytes a
        thread, rather than value by value."""
        return any(self.instructions[name] for name in ("UTMALDG", "LDGSTS.128", "LDGSTS.64"))


def compile_kernel(
    function: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    warps: int,
    stages: int,
) -> Compiled:
    """`signature`: Triton type of each argument that is no constant. `capability`: 90 for sm_90.
    Pointers are assumed to be aligned to 16 bytes."""
    names = function.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    pointers = [number for number, name in enumerate(names) if types[name].startswith("*")]
    aligned = {(number,): [["tt.divisibility", 16]] for number in pointers}
    source = ASTSource(fn=function, signature=types, constexprs=constants, attrs=aligned)
    kernel = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(kernel.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", file)
        code = _tool("nvdisasm", "-c", file)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, f"cuobjdump reports no registers: {usage}"
    return Compiled(
        registers=int(found[1]),
        stack=int(found[2]),
        shared=kernel.metadata.shared,
        instructions=instruction_counts(code),
    )


def instruction_counts(code: str) -> dict[str, int]:
    """Instructions of disassembled machine code that are in WATCHED; copies are counted by their
    width in bits."""
    counts = Counter({name: 0 for name in WATCHED})
    instruction = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)"
    for match in re.findall(instruction, code):
        counts[_watched_name(match)] += 1
    return {name: counts[name] for name in WATCHED}


def _watched_name(instruction: str) -> str:
    """The name in WATCHED of an instruction with its suffixes, if it has one."""
    opcode, *suffixes = instruction.split(".")
    if opcode in ("LDG", "STG", "LDGSTS"):
        width = next((width for width in ("128", "64") if width in suffixes), "32")
        return f"{opcode}.{width}"
    if opcode == "MUFU":
        return f"{opcode}.{suffixes[0]}"
    return "RED" if opcode in ("REDG", "ATOMG") else opcode


def _tool(name: str, *arguments: Any) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run(
        [path, *map(str, arguments)], check=True, capture_output=True, text=True
    ).stdout
