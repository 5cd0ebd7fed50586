"""The order in which the modules of the objective run in one micro-batch, which decides what ZeRO-3
gathers when."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

_VISION = ("layer_norm1", "q_proj", "k_proj", "v_proj", "out_proj", "layer_norm2", "fc1", "fc2")
# A projection with an adapter calls its parts in this order.
_ADAPTED = (".base_layer", ".lora_A.default", ".lora_B.default")


@dataclass(frozen=True)
class Visit:
    """A module is entered. `drops`: modules whose frozen weights DeepSpeed releases right after,
    needed again or not."""

    backward: bool
    module: str
    drops: tuple[str, ...] = ()


def visits(modules: Iterable[str], recompute: bool) -> Iterator[Visit]:
    """Modules with parameters in the order in which they run; see Bagel, Layer and UnoObjective.

    A recomputed layer's backward starts at the expert module that ran last, which triggers the
    recomputation; after that module's backward DeepSpeed releases every frozen weight that the
    recomputation gathered."""
    modules = list(modules)
    adapted = {name.removesuffix(_ADAPTED[0]) for name in modules if name.endswith(_ADAPTED[0])}

    def layer(number: int) -> list[tuple[str, bool]]:
        modules_of_layer: list[tuple[str, bool]] = []
        for name, alive in _layer(number, number < layers[-1]):
            parts = _ADAPTED if name in adapted else ("",)
            modules_of_layer += [(name + part, alive) for part in parts]
        return modules_of_layer

    def of(prefix: str) -> list[str]:
        return [name for name in modules if name.startswith(prefix)]

    blocks = sorted({int(name.split(".")[3]) for name in of("model.vit.layers.")})
    vision = [
        "model.vit.patch_embedding",
        "model.vit.position_embedding",
        *(f"model.vit.layers.{number}.{name}" for number, name in product(blocks, _VISION)),
        "model.vit.post_layernorm",
    ]
    before = [
        *of("metaqueries"),
        *vision,
        *of("model.connector"),
        "model.token_embedding",
        "model.vae2llm",
        *of("model.time_embedder"),
    ]
    after = ["model.norm", "model.norm_gen", "model.llm2vae", "model.lm_head", *of("regression")]
    layers = sorted({int(name.split(".")[2]) for name in of("model.layers.")})
    for name in before:
        yield Visit(False, name)
    for number in layers:
        for name, _ in layer(number):
            yield Visit(False, name)
    for name in after:
        yield Visit(False, name)
    for name in reversed(after):
        yield Visit(True, name)
    for number in reversed(layers):
        live = [name for name, alive in layer(number) if alive]
        yield Visit(True, live[-1])
        if recompute:
            for name in live:
                yield Visit(True, name, drops=tuple(live) if name == live[-1] else ())
        for name in reversed(live[:-1]):
            yield Visit(True, name)
    for name in (*reversed(of("model.time_embedder")), "model.vae2llm", *of("metaqueries")):
        yield Visit(True, name)


def _layer(number: int, finish_context: bool) -> list[tuple[str, bool]]:
    """(module, part of the graph) of one layer's forward."""
    und, gen = f"model.layers.{number}.und.", f"model.layers.{number}.gen."
    queries = ("q_proj", "q_norm")
    keys = ("k_proj", "k_norm", "v_proj")
    rest = ("o_proj", "post_norm", "gate_proj", "up_proj", "down_proj")
    context = ["input_norm", *keys]
    context_after: list[str] = []
    if finish_context:
        context += queries
        context_after += rest
    modules = [(und + name, False) for name in context]
    for names in (("input_norm", *queries, *keys), rest):
        for expert in (und, gen):
            modules += [(expert + name, True) for name in names]
    modules += [(und + name, False) for name in context_after]
    return modules
