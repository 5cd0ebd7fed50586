"""Hidden states of training's own forward pass, taken by hooks.

Shape suffixes: docs/notation.md."""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import torch

from uno_ds.objectives.uno import UnoObjective
from uno_ds.sequence.batch import PackedBatch

# Called with the number of the layer, its live output rows [L, H] and the batch.
Observe = Callable[[int, torch.Tensor, PackedBatch], None]


class LayerOutputs:
    """While entered, calls `observe` with what each of `layers` (1: the first) returns for the live
    rows in every forward pass of the objective."""

    def __init__(self, objective: UnoObjective, layers: Sequence[int], observe: Observe):
        self.objective, self.layers, self.observe = objective, layers, observe
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for number in self.layers:
            layer = self.objective.model.layers[number - 1]
            self._handles.append(layer.register_forward_hook(self._hook(number)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, number: int) -> Any:
        def hook(module: Any, arguments: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            _, live_LH = output
            batch = next(value for value in arguments if isinstance(value, PackedBatch))
            self.observe(number, live_LH, batch)

        return hook


class ImageMeans(LayerOutputs):
    """While entered, keeps the mean of each image's rows at the noised latents after each of
    `layers`. `tokens`: rows of an image, the same for all."""

    def __init__(self, objective: UnoObjective, layers: Sequence[int], tokens: int):
        super().__init__(objective, layers, self._keep)
        self.tokens = tokens
        self._means: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}

    def _keep(self, layer: int, live_LH: torch.Tensor, batch: PackedBatch) -> None:
        states_BTH = noised_rows(live_LH, batch).float().unflatten(0, (-1, self.tokens))
        self._means[layer].append(states_BTH.mean(dim=1))

    def of(self, layer: int) -> torch.Tensor:
        """[B, H], in the order of the images."""
        return torch.cat(self._means[layer])


def noised_rows(live_LH: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """[X, H]: the rows of the generation expert at noised latents, of a layer's live rows."""
    return live_LH[batch.understanding :][batch.latents.noised_X]


def hidden_states(
    objective: UnoObjective, batch: PackedBatch, layers: Sequence[int]
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """({layer: [X, H]}: the residual stream at the noised latents after each of `layers` (1: the
    first), sums of the losses over their tokens, in the order of `losses`) of a forward pass of
    training."""
    states: dict[int, torch.Tensor] = {}

    def keep(number: int, live_LH: torch.Tensor, batch: PackedBatch) -> None:
        states[number] = noised_rows(live_LH, batch).detach()

    device = objective.model.lm_head.weight.device
    counts = torch.ones(len(objective.losses), dtype=torch.float64, device=device)
    with torch.no_grad(), LayerOutputs(objective, layers, keep):
        _, losses = objective(batch, counts)
    return states, losses


def evenly_spaced(layers: int, most: int) -> list[int]:
    """At most `most` of the layers 1 to `layers`, evenly spaced, the last among them."""
    count = min(layers, most)
    return [round((number + 1) * layers / count) for number in range(count)]
