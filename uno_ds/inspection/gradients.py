"""Gradients of the losses: their norms, the cosines between them, and their shares of the update,
at the weights of every layer and at the noised latents that all losses share.

Cosines between the gradients of tasks: Yu et al. 2020, arXiv:2001.06782, definition 1. The share of
loss i is <g_i, g> / <g, g> with g the sum of all g_i, so that shares sum to 1; a loss whose
gradient points against the update has a negative one.

Shape suffixes: docs/notation.md."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from uno_ds.inspection.hidden_states import LayerOutputs, evenly_spaced, noised_rows
from uno_ds.objectives.uno import UnoObjective
from uno_ds.sequence.batch import PackedBatch

WINDOWS = ((0.0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1.0))
MOST_LAYERS = 4  # of those at whose output the latents' gradients are kept
ALL = "all"
_INPUT = ("vae2llm", "time_embedder")
_OUTPUT = ("llm2vae", "norm_gen")


def measure_gradients(
    objective: UnoObjective,
    batches: Sequence[PackedBatch],
    counts: torch.Tensor,
    windows: Sequence[tuple[float, float]] = WINDOWS,
) -> dict[str, Any]:
    """The gradients of one step's weighted losses, without changing any weight or gradient:

    losses   names of the losses that have a weight and tokens in the step
    weights  {part of the model: products}, parts being "all", "layer 1" ..., "input" (from latents
             and t to the width of the model), "output" (the velocity), "metaqueries" (their
             embeddings and their head)
    latents  {"layer 1" ...: {"0.00-0.33" ...: products}}: at the output of some layers, at the
             noised latents, by their noise level; a level belongs to the window that begins with it

    products: {"norm": {loss: number}, "cosine": {"flow_caption": number}, "share": {loss: number}}.
    What has no gradient in a part has a norm of 0, no cosine and no share (None).

    `batches` are this rank's micro-batches, all of which must be on the objective's device, and
    `counts` the tokens with each loss over all ranks. Each loss has a forward and a backward pass
    of its own. A weight's gradient is summed over ranks as it is computed and each rank keeps
    its part in host memory: for each loss, the bytes of the trained weights over the number of
    ranks, in fp32 where there are several micro-batches. Collective."""
    names = [
        name
        for number, name in enumerate(objective.losses)
        if objective.settings.weights[name] and counts[number] > 0
    ]
    if "answer" in names and not objective.model.read_context:
        names.remove("answer")
    if "regression" in names and objective.regression is None:
        names.remove("regression")
    layers = evenly_spaced(len(objective.model.layers), MOST_LAYERS)
    weights: dict[str, list[dict[str, torch.Tensor]]] = {}
    latents: dict[int, list[torch.Tensor]] = {number: [] for number in layers}
    for name in names:
        own = {name: objective.scales[name]}
        parts, rows = _gradients_of(objective, own, batches, counts, layers)
        for part, tensors in parts.items():
            weights.setdefault(part, []).append(tensors)
        for number, rows_XH in rows.items():
            latents[number].append(rows_XH)
    sums = {part: _gram_of_part(losses) for part, losses in weights.items()}
    noise_X = torch.cat([batch.latents.timestep_G[batch.latents.noised_X] for batch in batches])
    windowed: dict[tuple[int, tuple[float, float]], torch.Tensor] = {}
    for number, window in itertools.product(layers, windows):
        inside_X = _inside(noise_X, window).cpu()
        windowed[number, window] = _gram([rows_XH[inside_X] for rows_XH in latents[number]])
    if sums:
        _sum_over_ranks([*sums.values(), *windowed.values()], counts.device)
        sums = {ALL: torch.stack(list(sums.values())).sum(dim=0)} | sums
    at_latents: dict[str, dict[str, Any]] = {f"layer {number}": {} for number in layers if names}
    for number, window in windowed if names else ():
        found = products(windowed[number, window], names)
        at_latents[f"layer {number}"][window_name(window)] = found
    return {
        "losses": names,
        "weights": {part: products(gram, names) for part, gram in sums.items()},
        "latents": at_latents,
    }


def latent_norms(
    objective: UnoObjective,
    batches: Sequence[PackedBatch],
    counts: torch.Tensor,
    groups: Sequence[Sequence[str]],
) -> list[float]:
    """For each group of losses: the norm, over the noised latents of all ranks, of the gradient of
    the group's weighted sum at the output of the first layer. Weights are those of the settings,
    whatever `objective.scales` is. Arguments as in `measure_gradients`. A forward and a backward
    pass for each group. Collective."""
    squares = torch.zeros(len(groups), dtype=torch.float64)
    for number, names in enumerate(groups):
        scales = dict.fromkeys(names, 1.0)
        _, rows = _gradients_of(objective, scales, batches, counts, [1], keep_weights=False)
        squares[number] = rows[1].double().square().sum()
    _sum_over_ranks([squares], counts.device)
    return [float(square) for square in squares.sqrt()]


def products(gram: torch.Tensor, names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Norms, cosines and shares from the inner products of the losses' gradients."""
    norms = gram.diagonal().clamp(min=0).sqrt().tolist()
    whole = float(gram.sum())
    pulls = gram.sum(dim=1).tolist()
    cosines: dict[str, float | None] = {}
    for first, second in itertools.combinations(range(len(names)), 2):
        scale = norms[first] * norms[second]
        cosine = _finite(float(gram[first, second]) / scale) if scale else None
        cosines[f"{names[first]}_{names[second]}"] = cosine
    shares = [_finite(pull / whole) if whole > 0 else None for pull in pulls]
    return {
        "norm": {name: _finite(norm) for name, norm in zip(names, norms, strict=True)},
        "cosine": cosines,
        "share": dict(zip(names, shares, strict=True)),
    }


def part_of(name: str) -> str:
    """The part of `measure_gradients` that a parameter of the objective belongs to."""
    pieces = name.split(".")
    if pieces[0] != "model":
        return "metaqueries"
    if pieces[1] == "layers":
        return f"layer {int(pieces[2]) + 1}"
    if pieces[1] in _INPUT:
        return "input"
    return "output" if pieces[1] in _OUTPUT else "understanding"


def window_name(window: tuple[float, float]) -> str:
    return f"{window[0]:.2f}-{window[1]:.2f}"


def flattened(report: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, number) of every number of a report, names joined by "/"."""
    for key, value in report.items():
        if isinstance(value, dict):
            for name, number in flattened(value):
                yield f"{key.replace(' ', '_')}/{name}", number
        elif isinstance(value, float):
            yield key, value


@contextmanager
def only(objective: UnoObjective, scales: Mapping[str, float]) -> Iterator[None]:
    """The objective's total is the sum of these weighted losses, times their scales, alone; all its
    modules are called all the same."""
    before = objective.scales
    objective.scales = dict.fromkeys(objective.losses, 0.0) | dict(scales)
    try:
        yield
    finally:
        objective.scales = before


def _gradients_of(
    objective: UnoObjective,
    scales: Mapping[str, float],
    batches: Sequence[PackedBatch],
    counts: torch.Tensor,
    layers: Sequence[int],
    keep_weights: bool = True,
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[int, torch.Tensor]]:
    """({part: {parameter: this rank's part of its gradient}}, {layer: gradient [X, H] of the noised
    rows of all batches}) of the weighted losses in `scales`, times their scales. Without
    `keep_weights` no weight has an entry, and nothing is reduced."""
    parameters = [
        (key, parameter)
        for key, parameter in objective.named_parameters()
        if parameter.requires_grad
    ]
    own: dict[str, dict[str, torch.Tensor]] = {part_of(key): {} for key, _ in parameters}
    rows: dict[int, list[torch.Tensor]] = {number: [] for number in layers}

    def keep_rows(number: int, live_LH: torch.Tensor, batch: PackedBatch) -> None:
        def hook(gradient: torch.Tensor) -> None:
            rows_XH = noised_rows(gradient, batch)
            rows[number].append(rows_XH.to("cpu", _wide(rows_XH), copy=True))

        live_LH.register_hook(hook)

    def keep_own(key: str) -> Any:
        tensors = own[part_of(key)]

        def hook(gradient: torch.Tensor) -> torch.Tensor:
            # In the place of the gradient, so that it is freed while backward continues.
            freed = gradient.new_zeros(()).expand_as(gradient)
            if not keep_weights:
                return freed
            mine = _own_part(gradient)
            if len(batches) == 1:
                mine = mine.to(gradient.dtype)
            tensors[key] = tensors[key] + mine if key in tensors else mine
            return freed

        return hook

    handles = [parameter.register_hook(keep_own(key)) for key, parameter in parameters]
    try:
        with (
            only(objective, scales),
            torch.enable_grad(),
            LayerOutputs(objective, layers, keep_rows),
        ):
            for batch in batches:
                total, _ = objective(batch, counts)
                # Without `backward`, whose gradients DeepSpeed would reduce and keep.
                torch.autograd.grad(
                    total, [parameter for _, parameter in parameters], allow_unused=True
                )
    finally:
        for handle in handles:
            handle.remove()
    return own, {number: torch.cat(pieces) for number, pieces in rows.items()}


def _own_part(gradient: torch.Tensor) -> torch.Tensor:
    """This rank's part of a gradient, flat and on the host, summed over the ranks; fp32 at least.
    Collective."""
    wide = _wide(gradient)
    if _ranks() == 1:
        return gradient.detach().to("cpu", wide, copy=True).flatten()
    whole = gradient.detach().to(wide, copy=True).contiguous()
    dist.all_reduce(whole)
    size = math.ceil(whole.numel() / _ranks())
    start = size * dist.get_rank()
    return whole.flatten()[start : start + size].to("cpu", copy=True)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _no_gram(losses: int) -> torch.Tensor:
    return torch.zeros(losses, losses, dtype=torch.float64)


def _gram(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """fp64 [losses, losses]: inner products."""
    gram = _no_gram(len(gradients))
    for first, second in itertools.combinations_with_replacement(range(len(gradients)), 2):
        product = (gradients[first].double() * gradients[second].double()).sum()
        gram[first, second] = gram[second, first] = product
    return gram


def _gram_of_part(losses: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Over all weights of a part; a weight that a loss does not reach has no gradient of it."""
    keys = sorted(set().union(*losses))
    none = torch.zeros(())
    grams = (_gram([own.get(key, none) for own in losses]) for key in keys)
    return sum(grams, _no_gram(len(losses)))


def _inside(noise_X: torch.Tensor, window: tuple[float, float]) -> torch.Tensor:
    """Whether each level is in the window; the last window holds 1 too."""
    low, high = window
    return (noise_X >= low) & ((noise_X < high) | (high >= 1))


def _sum_over_ranks(tensors: Sequence[torch.Tensor], device: torch.device) -> None:
    """In place, in one reduction."""
    if _ranks() == 1:
        return
    joined = torch.cat([tensor.flatten() for tensor in tensors]).to(device)
    dist.all_reduce(joined)
    for tensor, values in zip(tensors, joined.cpu().split([t.numel() for t in tensors])):
        tensor.copy_(values.view_as(tensor))


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
