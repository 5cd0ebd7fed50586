"""The kernels with the launch parameters of the table and the published model's shape, for
compiling them without a GPU."""

from collections.abc import Iterator
from typing import Any

from uno_ds.kernels.launch import table
from uno_ds.kernels.metaquery_regression import contrast_tiles, tiles
from uno_ds.kernels.metaquery_regression.contrast_operator import RANGE
from uno_ds.kernels.metaquery_regression.kinds import RegressionKind
from uno_ds.kernels.metaquery_regression.triton_operator import LOSS_ROWS

HIDDEN, FEATURES = 3584, 1152


def compile_cases(architecture: str = "sm_90") -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, arguments of `compile_kernel` but the capability). Names of kernels that multiply
    matrices end in "product"."""
    for precision, dtype in (("single", "fp32"), ("half", "bf16")):
        kernels_of_shape = table(__package__)[architecture][precision]
        for shape in kernels_of_shape if dtype == "bf16" else ("many_rows",):
            chosen = kernels_of_shape[shape]["prediction"]
            blocks = {name: value for name, value in chosen.items() if name != "warps"}
            constants = {"H": HIDDEN, "D": FEATURES, "HAS_HEAD": True} | blocks
            variants = [
                (tiles.regression_sums, {}),
                (tiles.regression_clipped_sums, {}),
                (tiles.regression_slope, {"KIND": RegressionKind.SMOOTH_L1.value}),
            ]
            warps, stages = chosen["warps"], chosen["STAGES"]
            for function, more in variants:
                name = f"{function.__name__} {dtype} {shape} product"
                yield name, _case(function, dtype, constants | more, warps, stages)
        yield from _contrast_cases(kernels_of_shape, dtype)
    without_head = {"H": HIDDEN, "D": HIDDEN, "HAS_HEAD": False} | blocks
    case = _case(tiles.regression_sums, "bf16", without_head, chosen["warps"], 1)
    yield "regression_sums without head", case
    count = {"TILES": -(-FEATURES // blocks["BLOCK_D"]), "BLOCK_M": LOSS_ROWS}
    with_kind = count | {"KIND": RegressionKind.L2.value}
    yield "regression_loss", _case(tiles.regression_loss, "bf16", with_kind, 4, 1)
    contrast = {"BLOCK_M": LOSS_ROWS}
    yield "contrast_loss", _case(contrast_tiles.contrast_loss, "bf16", contrast, 4, 1)
    yield "regression_clipped_loss", _case(tiles.regression_clipped_loss, "bf16", count, 4, 1)


def _contrast_cases(
    kernels_of_shapes: dict[str, Any], dtype: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    for shape in kernels_of_shapes if dtype == "bf16" else ("many_rows",):
        chosen = kernels_of_shapes[shape]["scores"]
        blocks = {name: value for name, value in chosen.items() if name != "warps"}
        constants = {"W": FEATURES, "RANGE": RANGE} | blocks
        for function in (contrast_tiles.contrast_sums, contrast_tiles.contrast_slope):
            case = _case(function, dtype, constants, chosen["warps"], chosen["STAGES"])
            yield f"{function.__name__} {dtype} {shape} scores", case


def _case(
    function: Any, dtype: str, constants: dict[str, Any], warps: int, stages: int
) -> dict[str, Any]:
    tensors = ("hidden", "weight", "target", "slope", "prediction", "candidates")
    signature = {name: f"*{dtype}" for name in tensors}
    wide = ("sums", "statistics", "loss", "grad", "scales", "lengths", "lse")
    signature |= {name: "*fp32" for name in wide}
    signature |= {name: "i32" for name in ("rows", "columns", "ranges", "first", "start")}
    signature["inverse_temperature"] = "fp32"
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    return {
        "function": function,
        "signature": signature,
        "constants": constants,
        "warps": warps,
        "stages": stages,
    }
