"""What metaqueries are trained to predict: the registry of regression targets.

To add one: its features here and an entry in REGRESSION_TARGETS. Settings, the objective,
preparation and the cost model read this table. Shape suffixes: docs/notation.md."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from uno_ds.model.architecture import Architecture
from uno_ds.model.vision import Connector, one_thread
from uno_ds.model.vision_folder import FolderEncoder, VisionFolder, read_vision_folder
from uno_ds.objectives import hog
from uno_ds.sequence.batch import RegressionTargets, VisionRows
from uno_ds.sequence.segments import Segment
from uno_ds.sequence.target_builder import TargetSource, target_cells
from uno_ds.settings import SettingsError

if TYPE_CHECKING:
    from uno_ds.objectives.uno import ObjectiveSettings

Features = TypeVar("Features", np.ndarray, torch.Tensor)
ENCODER_KEY = "objective.regression_encoder"
# Added to the deviation of spatial normalisation, so that a constant feature becomes 0 (with
# regression_mean_share 1): what rounding leaves of it in fp64 is far smaller, in fp32 it is not.
EPSILON = 1e-6


@dataclass(frozen=True)
class RegressionTarget:
    """`features(vit_PW, connector, lengths)`: a row for each patch of all images, from the visual
    encoder's features; `lengths`: patches of each image. The connector is None where the encoder
    was loaded for a target without `uses_connector`. `head_width`: width of these rows, to which a
    linear head maps metaqueries; None: no head, the rows are as wide as the language model.

    `program(pixels_3hw, patch)`: where it is given, it makes the rows of an image's patches on the
    host, and `features` only gives no rows of that width. `own_encoder`: the rows come from
    objective.regression_encoder, and so does their width."""

    features: Callable[[torch.Tensor, Connector | None, Sequence[int]], torch.Tensor]
    head_width: Callable[[Architecture], int | None]
    uses_connector: bool
    program: Callable[[np.ndarray, int], np.ndarray] | None = None
    own_encoder: bool = False

    @property
    def reads_vision(self) -> bool:
        """Whether the model's visual encoder has to encode the target image."""
        return self.program is None and not self.own_encoder


def _encoder_features(
    vit_PW: torch.Tensor, connector: Connector | None, lengths: Sequence[int]
) -> torch.Tensor:
    return vit_PW


def _connector_tokens(
    vit_PW: torch.Tensor, connector: Connector | None, lengths: Sequence[int]
) -> torch.Tensor:
    assert connector is not None, "this target uses the connector"
    return connector(vit_PW, lengths)


def _no_features(
    vit_PW: torch.Tensor, connector: Connector | None, lengths: Sequence[int]
) -> torch.Tensor:
    return vit_PW.new_zeros(0, hog.WIDTH)


def _of_own_encoder(*_: Any) -> Any:
    raise AssertionError("`feature_rows` and `head_width` ask the encoder itself")


REGRESSION_TARGETS: dict[str, RegressionTarget] = {
    "vit": RegressionTarget(
        _encoder_features, head_width=lambda shape: shape.vit_hidden, uses_connector=False
    ),
    "connector": RegressionTarget(
        _connector_tokens, head_width=lambda shape: None, uses_connector=True
    ),
    "hog": RegressionTarget(
        _no_features,
        head_width=lambda shape: hog.WIDTH,
        uses_connector=False,
        program=hog.hog_features,
    ),
    "encoder": RegressionTarget(
        _of_own_encoder, head_width=_of_own_encoder, uses_connector=False, own_encoder=True
    ),
}


def get_regression_target(name: str) -> RegressionTarget:
    """Raises ValueError for a name that is not in the registry."""
    if name not in REGRESSION_TARGETS:
        allowed = ", ".join(REGRESSION_TARGETS)
        raise ValueError(f"Unknown regression target {name!r}; allowed are {allowed}.")
    return REGRESSION_TARGETS[name]


def head_width(settings: "ObjectiveSettings", shape: Architecture) -> int | None:
    """Width of the linear head; None: there is none. Raises SettingsError for an encoder that is
    not there."""
    target = get_regression_target(settings.regression_target)
    if target.own_encoder:
        return vision_folder_of(settings).width
    return target.head_width(shape)


def vision_folder_of(settings: "ObjectiveSettings") -> VisionFolder:
    """The encoder of targets that have one of their own. Raises SettingsError."""
    if settings.regression_encoder is None:
        raise SettingsError(
            ENCODER_KEY,
            f"is missing, but objective.regression_target is {settings.regression_target}; give "
            "the folder of a vision model of transformers.",
        )
    return read_vision_folder(settings.regression_encoder, ENCODER_KEY)


def open_encoder(
    settings: "ObjectiveSettings", device: torch.device, dtype: torch.dtype
) -> FolderEncoder | None:
    """The encoder that regression needs beside the model; None: it needs none. Raises
    SettingsError."""
    target = get_regression_target(settings.regression_target)
    if not target.own_encoder or not settings.regression_weight:
        return None
    return FolderEncoder(vision_folder_of(settings), device, dtype, ENCODER_KEY)


def target_source(settings: "ObjectiveSettings") -> TargetSource:
    """For the collator."""
    target = get_regression_target(settings.regression_target)
    if target.program is None:
        return TargetSource(own_encoder=target.own_encoder)
    program = target.program

    def of_segment(segment: Segment) -> np.ndarray:
        pixels = segment.image
        rows_PW = program(pixels, pixels.shape[1] // segment.grid[0]).astype(np.float64)
        # By numpy: threads that load data do not change torch's number of threads.
        features_PW = _normalised_image(rows_PW, settings)
        patches_MP, weights_MP = target_cells(segment)
        pooled_MW = (features_PW[patches_MP] * weights_MP[..., None]).sum(axis=1)
        return pooled_MW.astype(np.float32)

    return TargetSource(program=of_segment)


def feature_rows(
    settings: "ObjectiveSettings",
    encoder: FolderEncoder | None,
    vit_PW: torch.Tensor,
    connector: Connector | None,
    vision: VisionRows,
    targets: RegressionTargets,
) -> torch.Tensor:
    """[P, W']: the rows that `targets` numbers, normalised. `vit_PW`: features of `vision`;
    `encoder`: of `open_encoder`."""
    target = get_regression_target(settings.regression_target)
    if target.own_encoder:
        assert encoder is not None, "opened where the objective is built"
        features_PW = encoder.features(targets.images, targets.grids)
        lengths = tuple(rows * columns for rows, columns in targets.grids)
        return normalised(features_PW, lengths, settings)
    features_PW = target.features(vit_PW, connector, vision.lengths)
    return normalised(features_PW, vision.lengths if target.reads_vision else (), settings)


def normalised(
    features_PW: torch.Tensor, lengths: Sequence[int], settings: "ObjectiveSettings"
) -> torch.Tensor:
    """[P, W]: the features of images of `lengths` patches as regression_target_norm wants them.

    spatial, of each image and feature: (x - g mean(x)) / (deviation(x) + 1e-6), with mean and
    deviation over the image's patches and g = regression_mean_share (iREPA, arXiv:2512.10794), in
    fp64."""
    if settings.regression_target_norm == "none":
        return features_PW
    # Prepared targets are to have the bits of those computed in training: see model/vision.
    with one_thread():
        images = [
            _normalised_image(image, settings)
            for image in features_PW.double().split(list(lengths))
        ]
    return torch.cat(images).to(features_PW.dtype) if images else features_PW


def _normalised_image(features_PW: Features, settings: "ObjectiveSettings") -> Features:
    if settings.regression_target_norm == "none":
        return features_PW
    if settings.regression_target_norm != "spatial":
        raise ValueError(f"Unknown regression_target_norm {settings.regression_target_norm!r}.")
    mean_W = features_PW.mean(0)
    centred_PW = features_PW - mean_W
    deviation_W = (centred_PW * centred_PW).mean(0) ** 0.5
    return (features_PW - settings.regression_mean_share * mean_W) / (deviation_W + EPSILON)
