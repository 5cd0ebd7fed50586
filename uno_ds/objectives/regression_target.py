"""What metaqueries are trained to predict: the registry of regression targets.

To add one: its features here and an entry in REGRESSION_TARGETS. Settings, the objective,
preparation and the cost model read this table. Shape suffixes: docs/notation.md."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from uno_ds.model.architecture import Architecture
from uno_ds.model.vision import Connector


@dataclass(frozen=True)
class RegressionTarget:
    """`features(vit_PW, connector, lengths)`: a row for each patch of all images, from the visual
    encoder's features; `lengths`: patches of each image. The connector is None where the encoder
    was loaded for a target without `uses_connector`. `head_width`: width of these rows, to which a
    linear head maps metaqueries; None: no head, the rows are as wide as the language model."""

    features: Callable[[torch.Tensor, Connector | None, Sequence[int]], torch.Tensor]
    head_width: Callable[[Architecture], int | None]
    uses_connector: bool


def _encoder_features(
    vit_PW: torch.Tensor, connector: Connector | None, lengths: Sequence[int]
) -> torch.Tensor:
    return vit_PW


def _connector_tokens(
    vit_PW: torch.Tensor, connector: Connector | None, lengths: Sequence[int]
) -> torch.Tensor:
    assert connector is not None, "this target uses the connector"
    return connector(vit_PW, lengths)


REGRESSION_TARGETS: dict[str, RegressionTarget] = {
    "vit": RegressionTarget(
        _encoder_features, head_width=lambda shape: shape.vit_hidden, uses_connector=False
    ),
    "connector": RegressionTarget(
        _connector_tokens, head_width=lambda shape: None, uses_connector=True
    ),
}


def get_regression_target(name: str) -> RegressionTarget:
    """Raises ValueError for a name that is not in the registry."""
    if name not in REGRESSION_TARGETS:
        allowed = ", ".join(REGRESSION_TARGETS)
        raise ValueError(f"Unknown regression target {name!r}; allowed are {allowed}.")
    return REGRESSION_TARGETS[name]
