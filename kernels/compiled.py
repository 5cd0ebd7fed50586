"""Compiles a Triton kernel for a GPU that need not be there and reads from the machine code what it
will cost.

Registers, stack and shared memory say whether a choice of tiles is feasible, counts of instructions
whether the matrix units and wide loads are used. Not for a process under TRITON_INTERPRET=1, where
nothing is compiled."""

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
# Opcodes that say something: matrix products, wide and asynchronous copies, spills.
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
        """Blocks come into shared memory by the copy engine or by 8 or 16 bytes a thread, not value
        by value."""
        return any(self.instructions[name] for name in ("UTMALDG", "LDGSTS.128", "LDGSTS.64"))


def compile_kernel(
    function: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    warps: int,
    stages: int,
) -> Compiled:
    """`signature`: Triton type of each argument that is no constant. Pointers are taken to be
    aligned to 16 bytes."""
    names = function.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(names)
        if types[name].startswith("*")
    }
    source = ASTSource(fn=function, signature=types, constexprs=constants, attrs=aligned)
    kernel = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(kernel.asm["cubin"])
        usage, code = _tool("cuobjdump", "-res-usage", file), _tool("nvdisasm", "-c", file)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    return Compiled(int(found[1]), int(found[2]), kernel.metadata.shared, instruction_counts(code))


def instruction_counts(code: str) -> dict[str, int]:
    """Instructions of disassembled machine code that are in WATCHED; copies are told apart by their
    width in bits."""
    counts = Counter({name: 0 for name in WATCHED})
    for opcode, *suffixes in (
        match.split(".")
        for match in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code)
    ):
        if opcode in ("LDG", "STG", "LDGSTS"):
            opcode += "." + next((width for width in ("128", "64") if width in suffixes), "32")
        elif opcode == "MUFU":
            opcode += "." + suffixes[0]
        counts["RED" if opcode in ("REDG", "ATOMG") else opcode] += 1
    return {name: counts[name] for name in WATCHED}


def _tool(name: str, *arguments: Any) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run(
        [path, *map(str, arguments)], check=True, capture_output=True, text=True
    ).stdout
