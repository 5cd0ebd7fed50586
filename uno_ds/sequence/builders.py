"""Builders of a batch's tensors: each takes the segments of its kind one by one and makes one
group.

`add` returns the rows that the segment got, `tensors` the group. Shape suffixes: docs/notation.md.
"""

import enum
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from uno_ds.kernels.plan import FULL, build_plan
from uno_ds.sequence.batch import (
    LabelledRows,
    LatentRows,
    MetaqueryRows,
    NegativeCaptions,
    VisionRows,
)
from uno_ds.sequence.partners import partner_rows
from uno_ds.sequence.segments import Kind, Segment


class Origin(enum.IntEnum):
    """The list that an understanding token's input embedding comes from."""

    TEXT = 0
    VISION = 1
    METAQUERY = 2


class InputBuilder:
    """The row of [text; vision context; metaqueries] that is the input embedding of each token."""

    def __init__(self) -> None:
        self._origins: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []

    def add(self, origin: Origin, rows: np.ndarray) -> None:
        self._origins.append(np.full(len(rows), origin))
        self._rows.append(rows)

    def add_latents(self, count: int) -> None:
        """Tokens of the generation expert, whose input is a latent: this column is not read for
        them."""
        self.add(Origin.TEXT, np.zeros(count, dtype=np.int64))

    def tensor(self, order_U: np.ndarray, text_rows: int, vision_rows: int) -> torch.Tensor:
        """[U], for the tokens `order_U`."""
        origin_T = concatenated(self._origins, np.int64)
        row_T = concatenated(self._rows, np.int64)
        first_row = np.array([0, text_rows, text_rows + vision_rows])
        source_T = first_row[origin_T] + row_T
        return torch.from_numpy(source_T[order_U])


class TextBuilder:
    """Token ids of all texts and image boundaries."""

    def __init__(self) -> None:
        self._ids: list[np.ndarray] = []
        self.rows = 0

    def add(self, token_ids: np.ndarray) -> np.ndarray:
        self._ids.append(token_ids)
        self.rows += len(token_ids)
        return np.arange(self.rows - len(token_ids), self.rows)

    def tensor(self) -> torch.Tensor:
        return torch.from_numpy(concatenated(self._ids, np.int64))


class VisionBuilder:
    """Images of the visual encoder."""

    def __init__(self, patch_side: int, table_side: int):
        self.patch_side, self.table_side = patch_side, table_side
        self._conditions: list[Segment] = []
        self._targets: list[Segment] = []
        self.context_rows = 0

    def add_condition(self, segment: Segment) -> np.ndarray:
        self._conditions.append(segment)
        count = segment.grid[0] * segment.grid[1]
        self.context_rows += count
        return np.arange(self.context_rows - count, self.context_rows)

    def add_target(self, segment: Segment) -> None:
        self._targets.append(segment)

    def tensors(self) -> VisionRows:
        segments = self._conditions + self._targets
        patches = [patchify(segment.image, self.patch_side) for segment in segments]
        positions = [grid_positions(segment.grid, self.table_side) for segment in segments]
        lengths = [len(image) for image in patches]
        no_patch = np.zeros((0, 3 * self.patch_side**2), dtype=np.float32)
        images = np.arange(len(segments))
        image_P = np.repeat(images, lengths)
        same_image = np.where(images[:, None] == images[None, :], FULL, 0).astype(np.int8)
        plan = build_plan(
            image_P, np.zeros(len(image_P), dtype=np.int64), same_image, images, (0, len(image_P))
        )
        return VisionRows(
            patches_PC=torch.from_numpy(np.concatenate([no_patch, *patches])),
            positions_P=torch.from_numpy(concatenated(positions, np.int64)),
            plan=plan,
            lengths=tuple(lengths),
            context_rows=self.context_rows,
            context_images=len(self._conditions),
        )


class LatentGroup(NamedTuple):
    """Images that can be stacked: all latents or all pixels, of one shape."""

    encoded: bool
    shape: tuple[int, ...]


class LatentBuilder:
    """Images of the codec, clean and noised."""

    def __init__(self, latent_values: int, table_side: int, contrast: bool):
        self.latent_values, self.table_side = latent_values, table_side
        self.contrast = contrast
        self._segments: list[Segment] = []
        self._samples: list[int] = []

    def add(self, segment: Segment, sample: int) -> None:
        self._segments.append(segment)
        self._samples.append(sample)

    def tensors(self) -> LatentRows:
        segments = self._segments
        rows = np.array([segment.grid[0] * segment.grid[1] for segment in segments], dtype=np.int64)
        groups = self._groups()
        first_row = self._first_rows(groups, rows)
        source = [start + np.arange(count) for start, count in zip(first_row, rows, strict=True)]
        positions = [grid_positions(segment.grid, self.table_side) for segment in segments]
        timesteps = np.array([segment.timestep for segment in segments], dtype=np.float32)
        noised = np.array([segment.kind == Kind.NOISED for segment in segments], dtype=bool)
        noise = [segment.noise for segment in segments if segment.noise is not None]
        no_noise = np.zeros((0, self.latent_values), dtype=np.float32)
        return LatentRows(
            images=tuple(self._stacked(members) for members in groups.values()),
            encoded=tuple(group.encoded for group in groups),
            source_G=torch.from_numpy(concatenated(source, np.int64)),
            positions_G=torch.from_numpy(concatenated(positions, np.int64)),
            timestep_G=torch.from_numpy(np.repeat(timesteps, rows)),
            noise_XC=torch.from_numpy(np.concatenate([no_noise, *noise])),
            noised_X=torch.from_numpy(np.flatnonzero(np.repeat(noised, rows))),
            partner_X=torch.from_numpy(self._partner_rows()),
        )

    def _partner_rows(self) -> np.ndarray:
        pairs = zip(self._segments, self._samples, strict=True)
        noised = [pair for pair in pairs if self.contrast and pair[0].kind == Kind.NOISED]
        return partner_rows([segment.grid for segment, _ in noised], [own for _, own in noised])

    def _groups(self) -> dict[LatentGroup, list[int]]:
        """Numbers of the segments of each group."""
        groups: dict[LatentGroup, list[int]] = {}
        for number, segment in enumerate(self._segments):
            encoded = segment.latent is not None
            group = LatentGroup(encoded, segment.image.shape)
            groups.setdefault(group, []).append(number)
        return groups

    def _first_rows(self, groups: dict[LatentGroup, list[int]], rows: np.ndarray) -> np.ndarray:
        """For each segment, its first row when the groups are laid one after the other."""
        grouped = list(chain.from_iterable(groups.values()))
        first_row = np.zeros(len(rows), dtype=np.int64)
        first_row[grouped] = np.cumsum(rows[grouped]) - rows[grouped]
        return first_row

    def _stacked(self, members: list[int]) -> torch.Tensor:
        return torch.from_numpy(np.stack([self._segments[number].image for number in members]))


class LabelBuilder:
    """Texts that are trained by cross entropy: every token after the first is predicted."""

    def __init__(self) -> None:
        self._rows: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []

    def add(self, segment: Segment, rows: np.ndarray, weight: float = 1.0) -> None:
        self._rows.append(rows[:-1])
        self._labels.append(segment.ids[1:])
        self._weights.append(np.full(len(rows) - 1, weight))

    def tensors(self) -> LabelledRows:
        return LabelledRows(
            torch.from_numpy(concatenated(self._rows, np.int64)),
            torch.from_numpy(concatenated(self._labels, np.int64)),
            weights_or_none(self._weights),
        )


class NegativeBuilder:
    """Negative captions beside the captions of their images. An image is named by its sample and
    its segment in it, and its caption is added before its negative."""

    def __init__(self) -> None:
        self._labels = LabelBuilder()
        # Rows of all captions and negatives so far; first row and number of rows of an image's
        # caption, and of each negative with its image.
        self._caption_rows = self._negative_rows = 0
        self._captions: dict[tuple[int, int], tuple[int, int]] = {}
        self._negatives: list[tuple[tuple[int, int], int, int]] = []
        self._weights: list[np.ndarray] = []

    def add_caption(self, segment: Segment, image: tuple[int, int]) -> None:
        count = segment.length - 1
        self._captions[image] = self._caption_rows, count
        self._caption_rows += count

    def add(
        self, segment: Segment, rows: np.ndarray, image: tuple[int, int], weight: float
    ) -> None:
        count = segment.length - 1
        self._labels.add(segment, rows)
        self._negatives.append((image, self._negative_rows, count))
        self._negative_rows += count
        self._weights.append(np.array([weight]))

    def tensors(self) -> NegativeCaptions:
        tokens: list[np.ndarray] = []
        shares: list[np.ndarray] = []
        for image, first, count in self._negatives:
            caption_first, caption_count = self._captions[image]
            caption = caption_first + np.arange(caption_count)
            negative = self._caption_rows + first + np.arange(count)
            tokens.append(np.concatenate([caption, negative])[None])
            parts = [np.full(caption_count, -1 / caption_count), np.full(count, 1 / count)]
            shares.append(np.concatenate(parts)[None])
        widest = max((pair.shape[1] for pair in tokens), default=1)
        none = np.zeros((0, widest))
        tokens_BT = np.concatenate([none, *(padded(pair, widest) for pair in tokens)])
        shares_BT = np.concatenate([none, *(padded(pair, widest) for pair in shares)])
        return NegativeCaptions(
            labels=self._labels.tensors(),
            tokens_BT=torch.from_numpy(tokens_BT.astype(np.int64)),
            shares_BT=torch.from_numpy(shares_BT),
            weights_B=weights_or_none(self._weights),
        )


class MetaqueryBuilder:
    def __init__(self, table_side: int):
        self.table_side = table_side
        self._index: list[np.ndarray] = []
        self._positions: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []
        self._count = 0

    def add(self, segment: Segment, rows: np.ndarray, weight: float = 1.0) -> np.ndarray:
        self._weights.append(np.full(segment.length, weight))
        self._index.append(np.arange(segment.length))
        self._positions.append(_cell_positions(segment, self.table_side))
        self._rows.append(rows)
        self._count += segment.length
        return np.arange(self._count - segment.length, self._count)

    def tensors(self) -> MetaqueryRows:
        return MetaqueryRows(
            torch.from_numpy(concatenated(self._index, np.int64)),
            torch.from_numpy(concatenated(self._positions, np.int64)),
            torch.from_numpy(concatenated(self._rows, np.int64)),
            weights_or_none(self._weights),
        )


def patchify(pixels: np.ndarray, side: int) -> np.ndarray:
    """[c, h, w] -> [h/side * w/side, side * side * c]: patches, each flattened as (row, column,
    channel)."""
    channels, height, width = pixels.shape
    grid = pixels.reshape(channels, height // side, side, width // side, side)
    return np.ascontiguousarray(grid.transpose(1, 3, 2, 4, 0)).reshape(-1, side * side * channels)


def padded(cells: np.ndarray, width: int) -> np.ndarray:
    return np.pad(cells, ((0, 0), (0, width - cells.shape[1])))


def concatenated(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=dtype), *arrays]).astype(dtype)


def weights_or_none(weights: list[np.ndarray]) -> torch.Tensor | None:
    """float32, one after the other; None where all of them are 1."""
    joined = concatenated(weights, np.float32)
    return None if (joined == 1).all() else torch.from_numpy(joined)


def grid_positions(grid: tuple[int, int], table_side: int) -> np.ndarray:
    """Place of each patch of the grid in a table of `table_side` columns, row by row."""
    return (np.arange(grid[0])[:, None] * table_side + np.arange(grid[1])).reshape(-1)


def _cell_positions(segment: Segment, table_side: int) -> np.ndarray:
    """Place of the patch in the middle of each metaquery's cell."""
    places = []
    for side in segment.sides:
        rows, columns = (_middles(size, side) for size in segment.grid)
        places.append((rows[:, None] * table_side + columns).reshape(-1))
    return np.concatenate(places)


def _middles(size: int, side: int) -> np.ndarray:
    return ((np.arange(side) + 0.5) * size / side).astype(np.int64)
