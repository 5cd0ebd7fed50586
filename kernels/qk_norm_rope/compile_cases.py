"""The kernels with the launch parameters of the table and the published model's shape, for
compiling them without a GPU."""

from collections.abc import Iterator
from typing import Any

from uno_ds.kernels.launch import table
from uno_ds.kernels.qk_norm_rope import rows

HEADS, KEY_HEADS, DIM, HEADS_OF_PROGRAM = 28, 4, 128, 4
# Arguments that have the dtype of the model.
VALUES = (
    *("q", "k", "v", "q_weight", "k_weight", "cos", "sin"),
    *("q_out", "k_out", "v_out", "q_grad", "k_grad", "v_grad", "dq", "dk", "dv"),
)
VARIANTS: tuple[tuple[str, Any, dict[str, bool]], ...] = (
    ("forward", rows.qk_norm_rope_forward, {"HAS_PLACE": True}),
    ("forward", rows.qk_norm_rope_forward, {"HAS_PLACE": False}),
    ("backward", rows.qk_norm_rope_backward, {"HAS_PLACE": False, "WANTS_WEIGHT": True}),
    ("backward", rows.qk_norm_rope_backward, {"HAS_PLACE": False, "WANTS_WEIGHT": False}),
)


def compile_cases(architecture: str = "sm_90") -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, arguments of `compile_kernel` but the capability)."""
    for precision, dtype in (("half", "bf16"), ("single", "fp32")):
        chosen = table(__package__)[architecture][precision]["any"]
        signature = {name: f"*{dtype}" for name in VALUES}
        signature |= {"q_sums": "*fp32", "k_sums": "*fp32"}
        signature |= {"place": "*i32", "first": "i32", "length": "i32", "eps": "fp32"}
        for kernel, function, flags in VARIANTS:
            constants = {
                "N": HEADS,
                "K": KEY_HEADS,
                "F": DIM // 2,
                "HEADS": HEADS_OF_PROGRAM,
                "BLOCK_T": chosen[kernel]["BLOCK_T"],
            }
            set_flags = [flag for flag, is_set in flags.items() if is_set]
            name = " ".join([function.__name__, dtype, *set_flags])
            arguments = {
                "function": function,
                "signature": signature,
                "constants": constants | flags,
                "warps": chosen[kernel]["warps"],
                "stages": 1,
            }
            yield name, arguments
