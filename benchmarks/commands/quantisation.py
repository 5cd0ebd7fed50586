"""What storing frozen weights in 8 or 4 bits costs in exactness, and what quantising a base takes.

python -m benchmarks quantisation [--json FILE] [--whole]

Errors are those of single products with normal inputs, of the layers of the tiny base and of random
layers of BAGEL-7B's sizes; then the cosine between the gradients of the losses with quantised and
with plain weights, on packs of the tiny recipe: at the latents' input to the generation expert, and
of everything that trains. --whole quantises a sparse file of BAGEL-7B's shape to nf4 as it is read:
seconds and host memory."""

import argparse
import dataclasses
import itertools
import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.commands.loading import resident_growth
from benchmarks.suite.command_line import Parser
from benchmarks.suite.models import build_objective
from benchmarks.suite.packs import packs_of_data
from benchmarks.suite.results import ResultFile
from uno_ds.generation.inference import special_tokens
from uno_ds.model.architecture import packaged, read_architecture
from uno_ds.model.bagel import Bagel
from uno_ds.model.quantisation import KINDS, QuantisedLinear, quantise_frozen, quantised_weights
from uno_ds.model.weights import WEIGHTS_FILE, WeightsFile, bagel_name, meta_tensors
from uno_ds.objectives.uno import LOSSES, UnoObjective
from uno_ds.run import Run, prepare

SHAPES = {"q_proj": (3584, 3584), "k_proj": (512, 3584), "gate_proj": (18944, 3584)}
SHAPES |= {"down_proj": (3584, 18944)}
PACKS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    result = ResultFile(options.json, "quantisation")
    run = prepare("tiny", [f"data.folder={options.data}"] if options.data else [], reads_only=True)
    for kind in KINDS:
        result.add({"name": f"{kind}, layers of the tiny base", **tiny_errors(run, kind)})
        result.add({"name": f"{kind}, random layers", **random_errors(kind)})
        result.add({"name": f"{kind}, gradients", **gradient_cosines(run, kind)})
    if options.whole:
        result.add({"name": "nf4, the whole of BAGEL-7B", **whole_base()})
    for measurement in result.measurements:
        print(json.dumps(measurement))
    result.finish()
    return 0


def quantise(model: nn.Module, kind: str) -> None:
    """Quantises the frozen weights of a model that has values."""
    values = dict(model.state_dict())
    quantise_frozen(model, kind, torch.float32)
    for name, module in quantised_weights(model):
        module.fill(values[name])


def relative_error(layer: QuantisedLinear, weight: torch.Tensor) -> float:
    """Of a product with normal inputs."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, weight.shape[1], generator=generator)
    difference = layer.dequantised(torch.float32) - weight.float()
    return float((x @ difference.T).norm() / (x @ weight.float().T).norm())


def tiny_errors(run: Run, kind: str) -> dict[str, Any]:
    """{projection: [least, mean, largest] relative error over its layers}."""
    objective = objective_of(run)
    weights = dict(objective.model.state_dict())
    quantise(objective.model, kind)
    found: dict[str, list[float]] = defaultdict(list)
    for name, module in quantised_weights(objective.model):
        if isinstance(module, QuantisedLinear):
            found[name.split(".")[-2]].append(relative_error(module, weights[name]))
    return {"errors": {name: spread(errors) for name, errors in found.items()}}


def random_errors(kind: str) -> dict[str, Any]:
    """{projection: relative error} of layers with normal weights."""
    errors = {}
    for name, shape in SHAPES.items():
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(shape, generator=generator, dtype=torch.float32).bfloat16()
        parent = nn.Module()
        parent.connector = nn.Module()
        parent.connector.fc1 = nn.Linear(shape[1], shape[0], bias=False)
        parent.requires_grad_(False)
        quantise_frozen(parent, kind, torch.float32)
        layer = parent.connector.fc1
        assert isinstance(layer, QuantisedLinear)
        layer.fill(weight)
        errors[name] = relative_error(layer, weight)
    return {"errors": errors}


def spread(values: Sequence[float]) -> list[float]:
    return [min(values), sum(values) / len(values), max(values)]


def objective_of(run: Run) -> UnoObjective:
    return build_objective(run.recipe, torch.device("cpu"), torch.float32, random=False)


def gradients(run: Run, kind: str | None) -> Iterator[dict[str, torch.Tensor]]:
    """Of each pack and loss: {latents: at the output of vae2llm, trained: of all trained
    weights}."""
    objective = objective_of(run)
    if kind is not None:
        quantise(objective.model, kind)
    assert run.tokenizer is not None
    collate = run.recipe.collator(special_tokens(run.tokenizer))
    kept: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    objective.model.vae2llm.register_forward_hook(keep)
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    for pack in itertools.islice(packs_of_data(run, 0, 1), PACKS):
        batch = collate(pack)
        tokens = [batch.loss_counts[name] for name in objective.losses]
        counts = torch.tensor(tokens, dtype=torch.float64)
        for understanding in (False, True):
            weights = {"caption": 0.05, "regression": 0.1} if understanding else {"flow": 1.0}
            objective.settings = _weighted(run, weights)
            objective.zero_grad()
            kept.clear()
            total, _ = objective(batch, counts)
            total.backward()
            latents = kept[0].grad
            assert latents is not None
            parts = [p.grad.flatten() for p in trained if p.grad is not None]
            name = "understanding" if understanding else "flow"
            yield {f"{name}, latents": latents.flatten(), f"{name}, trained": torch.cat(parts)}


def _weighted(run: Run, weights: dict[str, float]) -> Any:
    """The objective's settings with these weights alone."""
    given: dict[str, Any] = {f"{name}_weight": weights.get(name, 0.0) for name in LOSSES}
    return dataclasses.replace(run.recipe.objective, **given)


def gradient_cosines(run: Run, kind: str) -> dict[str, Any]:
    """{gradient: [least, mean, largest] cosine over packs}."""
    found: dict[str, list[float]] = defaultdict(list)
    for plain, quantised in zip(gradients(run, None), gradients(run, kind), strict=True):
        for name, gradient in plain.items():
            pair = gradient.double(), quantised[name].double()
            cosine = torch.cosine_similarity(*pair, dim=0)
            found[name].append(float(cosine))
    return {"cosines": {name: spread(cosines) for name, cosines in found.items()}}


def whole_base() -> dict[str, Any]:
    """Bytes and seconds of reading and quantising all of BAGEL-7B, tensor by tensor."""
    shape = read_architecture(packaged("bagel_7b"))
    like = {bagel_name(name): tensor for name, tensor in meta_tensors(shape).items()}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_sparse(Path(folder) / WEIGHTS_FILE, like)
        weights = WeightsFile(Path(folder))
        with torch.device("meta"):
            model = Bagel(shape)
        model.requires_grad_(False)
        quantise_frozen(model, "nf4", torch.bfloat16)
        with resident_growth(found, "quantising"):
            for name, module in quantised_weights(model):
                module.fill(weights.read(bagel_name(name)))
        held = sum(module.nbytes for _, module in quantised_weights(model))
        values = sum(module.shape.numel() for _, module in quantised_weights(model))
        largest = max(module.shape.numel() for _, module in quantised_weights(model))
    return {**found, "quantised_bytes": held, "values": values, "largest_tensor_bytes": 2 * largest}


def write_sparse(path: Path, like: dict[str, torch.Tensor]) -> None:
    """A safetensors file of bf16 zeros that takes no room on the disk."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in like.items():
        start, end = end, end + 2 * math.prod(tensor.shape)
        sizes = list(tensor.shape)
        header[name] = {"dtype": "BF16", "shape": sizes, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="quantisation", description="Errors and cost of quantised frozen weights.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file")
    parser.add_argument("--data", metavar="DIR", help="folder of the drawn scenes")
    parser.add_argument(
        "--whole",
        action="store_true",
        help="also quantise a sparse file of BAGEL-7B's shape: 10 GB of memory",
    )
    return parser.parse_args(arguments)
