"""Sizes of a recipe's adapters, as operations and memory depend on them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from uno_ds.cost.parameters import Parameter
from uno_ds.model.adapters import target_modules
from uno_ds.model.architecture import Architecture

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe


@dataclass(frozen=True)
class Adapters:
    """Multiply-adds of one row in all layers. products: A and B of every adapter; last_products:
    B after each layer's last projection, which activation checkpointing does not compute again;
    plain_last: the last projection itself in layers where it has no adapter. interface: the latent
    interface trains beside them."""

    products: int
    last_products: int
    plain_last: int
    interface: bool


def adapters_of(recipe: "Recipe") -> Adapters | None:
    """None where the recipe trains none. DoRA's products are not counted."""
    if recipe.model.train != "lora":
        return None
    shape, rank = recipe.architecture, recipe.lora.rank
    modules = target_modules(recipe.lora, shape)
    last = [name for name in modules if name.endswith("down_proj")]
    return Adapters(
        products=rank * sum(sum(_sizes(shape)[name.rpartition(".")[2]]) for name in modules),
        last_products=rank * shape.hidden * len(last),
        plain_last=shape.hidden * shape.mlp * (shape.layers - len(last)),
        interface="interface" in recipe.lora.also_train,
    )


def _sizes(shape: Architecture) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each projection of an expert."""
    hidden, query, key, mlp = shape.hidden, shape.query_width, shape.key_width, shape.mlp
    return {
        "q_proj": (hidden, query),
        "k_proj": (hidden, key),
        "v_proj": (hidden, key),
        "o_proj": (query, hidden),
        "gate_proj": (hidden, mlp),
        "up_proj": (hidden, mlp),
        "down_proj": (mlp, hidden),
    }


def values_kept_for_adapters(parameters: Iterable[Parameter]) -> int:
    """Values that autograd keeps of one row in all layers: the input of each A, once where several
    have the same, and the output of each A, which is B's input."""
    kept = 0
    inputs: dict[tuple[str, str], int] = {}
    for parameter in parameters:
        module, mark, _ = parameter.name.partition(".lora_A.")
        if not mark:
            continue
        layer, _, projection = module.rpartition(".")
        rank, width = parameter.shape
        kept += rank
        inputs[layer, _INPUT_OF[projection]] = width
    return kept + sum(inputs.values())


_INPUT_OF = {
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "o_proj": "output",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "down",
}
