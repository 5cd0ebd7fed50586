"""Builder of the regression targets of a batch (as builders.py)."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from uno_ds.sequence.batch import RegressionTargets
from uno_ds.sequence.builders import concatenated, padded
from uno_ds.sequence.segments import Segment


@dataclass(frozen=True)
class TargetSource:
    """What computes the regression targets that were not prepared: the model's visual encoder, or
    `program`, which makes [M, W] of the segment of metaqueries on the host, or with `own_encoder`
    an encoder that is no part of the model and reads the images in RegressionTargets."""

    program: Callable[[Segment], np.ndarray] | None = None
    own_encoder: bool = False


class TargetBuilder:
    """Regression targets of the metaqueries: patches of an image in the pack, or features that are
    prepared or made by program. `keeps_images`: for an encoder that is no part of the model."""

    def __init__(self, keeps_images: bool = False) -> None:
        self.keeps_images = keeps_images
        self._images: list[np.ndarray] = []
        self._grids: list[tuple[int, int]] = []
        self._patches: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []
        self._prepared: list[np.ndarray] = []
        self._is_prepared: list[np.ndarray] = []
        self._target_patches = 0

    def add(self, segment: Segment) -> None:
        self._is_prepared.append(np.full(segment.length, segment.target is not None))
        if segment.target is not None:
            self._prepared.append(segment.target)
            return
        if self.keeps_images:
            self._images.append(segment.image)
            self._grids.append(segment.grid)
        patches, weights = target_cells(segment)
        self._patches.append(patches + self._target_patches)
        self._weights.append(weights)
        self._target_patches += segment.grid[0] * segment.grid[1]

    def tensors(self, first_patch: int) -> RegressionTargets:
        """`first_patch`: patches of the visual encoder before those of the first target image."""
        if self.keeps_images:
            first_patch = 0
        widest = max((patches.shape[1] for patches in self._patches), default=1)
        patches = [padded(cells + first_patch, widest) for cells in self._patches]
        weights = [padded(cells, widest) for cells in self._weights]
        none = np.zeros((0, widest))
        prepared = np.concatenate(self._prepared) if self._prepared else np.zeros((0, 0))
        is_prepared_M = concatenated(self._is_prepared, bool)
        computed = int((~is_prepared_M).sum())
        source_M = np.where(
            is_prepared_M,
            computed + np.cumsum(is_prepared_M) - 1,
            np.cumsum(~is_prepared_M) - 1,
        )
        return RegressionTargets(
            patches_RP=torch.from_numpy(np.concatenate([none, *patches]).astype(np.int64)),
            weights_RP=torch.from_numpy(np.concatenate([none, *weights]).astype(np.float32)),
            prepared_EW=torch.from_numpy(prepared.astype(np.float32, copy=False)),
            source_M=torch.from_numpy(source_M.astype(np.int64)),
            images=tuple(map(torch.from_numpy, self._images)),
            grids=tuple(self._grids),
        )


def target_cells(segment: Segment) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [M, K] patches of the target image, float [M, K] weights): the mean over each
    metaquery's grid cell, one grid after the other. Cells overlap where the grid does not divide
    the image, as in adaptive average pooling."""
    cells = []
    for side in segment.sides:
        row_spans, column_spans = (_spans(size, side) for size in segment.grid)
        for rows, columns in itertools.product(row_spans, column_spans):
            cells.append((rows[:, None] * segment.grid[1] + columns).reshape(-1))
    widest = max(len(cell) for cell in cells)
    patches = np.zeros((len(cells), widest), dtype=np.int64)
    weights = np.zeros((len(cells), widest))
    for number, cell in enumerate(cells):
        patches[number, : len(cell)] = cell
        weights[number, : len(cell)] = 1 / len(cell)
    return patches, weights


def _spans(size: int, side: int) -> list[np.ndarray]:
    """The patches of each of `side` cells along one axis of `size` patches."""
    return [np.arange(i * size // side, -(-(i + 1) * size // side)) for i in range(side)]
