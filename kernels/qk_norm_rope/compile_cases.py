"""The kernels with the launch parameters of the table and the published model's shape, to be
compiled without a GPU."""

from collections.abc import Iterator
from typing import Any

from uno_ds.kernels.launch import table
from uno_ds.kernels.qk_norm_rope import rows

HEADS, KEY_HEADS, DIM, TAKEN = 28, 4, 128, 4


def compile_cases(architecture: str = "sm_90") -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, arguments of `compile_kernel` but the capability)."""
    for precision, dtype in (("half", "bf16"), ("single", "fp32")):
        chosen = table(__package__)[architecture][precision]["any"]
        values = (
            "q",
            "k",
            "v",
            "q_weight",
            "k_weight",
            "cos",
            "sin",
            "q_out",
            "k_out",
            "v_out",
            "q_grad",
            "k_grad",
            "v_grad",
            "dq",
            "dk",
            "dv",
        )
        signature = {name: f"*{dtype}" for name in values} | {
            name: "*fp32" for name in ("q_sums", "k_sums")
        }
        signature |= {"place": "*i32", "first": "i32", "length": "i32", "eps": "fp32"}
        for kernel, function, variants in (
            ("forward", rows.qk_norm_rope_forward, ({"HAS_PLACE": True}, {"HAS_PLACE": False})),
            (
                "backward",
                rows.qk_norm_rope_backward,
                (
                    {"HAS_PLACE": False, "WANTS_WEIGHT": True},
                    {"HAS_PLACE": False, "WANTS_WEIGHT": False},
                ),
            ),
        ):
            for more in variants:
                constants = {
                    "N": HEADS,
                    "K": KEY_HEADS,
                    "F": DIM // 2,
                    "HEADS": TAKEN,
                    "BLOCK_T": chosen[kernel]["BLOCK_T"],
                } | more
                name = " ".join(
                    [function.__name__, dtype, *(flag for flag, on in more.items() if on)]
                )
                yield (
                    name,
                    {
                        "function": function,
                        "signature": signature,
                        "constants": constants,
                        "warps": chosen[kernel]["warps"],
                        "stages": 1,
                    },
                )
