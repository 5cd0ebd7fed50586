"""Keys and values of rows that samples have read, so that a step of sampling computes its own rows
only.

Shape suffixes: docs/notation.md.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from uno_ds.kernels.plan import build_plan
from uno_ds.model.bagel import Bagel
from uno_ds.model.codec import Codec, latent_rows
from uno_ds.sequence.batch import PackedBatch
from uno_ds.sequence.composition import SpecialTokens
from uno_ds.sequence.packing import Collator
from uno_ds.sequence.segments import Sample, Segment, SegmentTable

# A segment and the number of the sample that it continues.
Piece = tuple[int, Segment]


class Cache:
    """Keys and values of several samples at once. Visibility is that of SegmentTable, as in
    training."""

    def __init__(self, model: Bagel, tokens: SpecialTokens):
        self.model = model
        # No row of a batch is a constant: the cache takes the place of the context slab.
        self.collate = Collator(
            model.shape.geometry, tokens, train_understanding=True, stop_at_context=False
        )
        empty = model.lm_head.weight.new_zeros(0, model.shape.kv_heads, model.shape.head_width)
        self.keys_values = [(empty, empty)] * model.shape.layers
        self.segments: list[Piece] = []
        self.lengths: list[int] = []
        self.segment_T = np.zeros(0, dtype=np.int64)
        self.position_T = np.zeros(0, dtype=np.int64)

    def lay_out(self, pieces: Sequence[Piece], grow: bool = False) -> PackedBatch:
        """The pieces as a batch, on the model's device, whose live plan is over [cached rows; rows
        of the pieces]. With `grow` each piece prolongs its sample's last segment; else it is a new
        one."""
        return self._lay_out(pieces, grow).batch

    def append(
        self, pieces: Sequence[Piece], codec: Codec | None = None, grow: bool = False
    ) -> torch.Tensor:
        """Computes the rows of the pieces and adds their keys and values; returns the outputs
        [pieces, H] of the last row of each. `codec` encodes their images, to which noise is added
        where their segment is noised."""
        extension = self._lay_out(pieces, grow)
        batch = extension.batch
        understanding_UH, _, added = self.model.extend(
            batch, self._latents(batch, codec), self.keys_values
        )
        self.keys_values = [
            (torch.cat([k, new_k]), torch.cat([v, new_v]))
            for (k, v), (new_k, new_v) in zip(self.keys_values, added, strict=True)
        ]
        self.segment_T = np.concatenate([self.segment_T, extension.segment_T])
        self.position_T = np.concatenate([self.position_T, extension.position_T])
        for sample, segment in pieces:
            if grow:
                self.lengths[self._last_segment(sample)] += segment.length
            else:
                self.segments.append((sample, segment))
                self.lengths.append(segment.length)
        # The last row of every piece is an understanding row: text, or the end token of an image.
        last_token = np.cumsum([segment.length for _, segment in pieces]) - 1
        row_of_token = np.argsort(batch.order_T.cpu().numpy())
        last_row = torch.from_numpy(row_of_token[last_token])
        return understanding_UH[last_row.to(understanding_UH.device)]

    def _latents(self, batch: PackedBatch, codec: Codec | None) -> torch.Tensor:
        """[G, C]: latents of the batch's images, noised where their segment is."""
        latents_GC = latent_rows(batch, codec, self.model.shape)
        noised_X = batch.latents.noised_X
        clean_XC = latents_GC[noised_X]
        t_X1 = batch.latents.timestep_G[noised_X, None]
        latents_GC[noised_X] += t_X1 * (batch.latents.noise_XC - clean_XC)
        return latents_GC

    def velocity(self, batch: PackedBatch, x_GC: torch.Tensor, t: float) -> torch.Tensor:
        """fp32 [G, C]: velocity of noised latents x at noise level t, for the batch that `lay_out`
        returned for noised segments."""
        same_t_G = torch.full_like(batch.latents.timestep_G, t)
        latents = dataclasses.replace(batch.latents, timestep_G=same_t_G)
        timed = dataclasses.replace(batch, latents=latents)
        _, generation_GH, _ = self.model.extend(timed, x_GC, self.keys_values)
        return self.model.llm2vae(generation_GH).float()

    def _lay_out(self, pieces: Sequence[Piece], grow: bool) -> "_Extension":
        # Each piece is a sample of its own here; what it supervises is in the plan below.
        alone = [dataclasses.replace(segment, supervises=-1) for _, segment in pieces]
        batch = self.collate([Sample("", [segment]) for segment in alone])
        lengths = np.array([segment.length for _, segment in pieces], dtype=np.int64)
        first_token = np.cumsum(lengths) - lengths
        order_T = batch.order_T.numpy()
        piece_T = np.repeat(np.arange(len(pieces)), lengths)[order_T]
        position_T = (np.arange(lengths.sum()) - np.repeat(first_token, lengths))[order_T]
        if grow:
            segments = self.segments
            segment_of_piece = np.array([self._last_segment(sample) for sample, _ in pieces])
            position_T = position_T + np.array(self.lengths)[segment_of_piece][piece_T]
        else:
            segments = [*self.segments, *pieces]
            segment_of_piece = len(self.segments) + np.arange(len(pieces))
        segment_T = segment_of_piece[piece_T]
        table = _table(segments)
        cached = len(self.segment_T)
        plan = build_plan(
            np.concatenate([self.segment_T, segment_T]),
            np.concatenate([self.position_T, position_T]),
            table.relation(),
            table.sample_S,
            (cached, cached + len(segment_T)),
        )
        batch = dataclasses.replace(batch, live_plan=plan)
        batch = batch.to(self.model.lm_head.weight.device)
        return _Extension(batch, segment_T, position_T)

    def _last_segment(self, sample: int) -> int:
        return max(number for number, (owner, _) in enumerate(self.segments) if owner == sample)


class _Extension(NamedTuple):
    """A batch, and for each of its rows its segment in the cache and its position there."""

    batch: PackedBatch
    segment_T: np.ndarray
    position_T: np.ndarray


def _table(segments: Sequence[Piece]) -> SegmentTable:
    kinds = [segment.kind for _, segment in segments]
    owners = [sample for sample, _ in segments]
    supervised = [_supervised(segments, piece) for piece in segments]
    return SegmentTable(
        kind_S=np.array(kinds, dtype=np.int64),
        # Visibility does not depend on lengths.
        length_S=np.zeros(len(segments), dtype=np.int64),
        sample_S=np.array(owners, dtype=np.int64),
        supervises_S=np.array(supervised, dtype=np.int64),
    )


def _supervised(segments: Sequence[Piece], piece: Piece) -> int:
    """Place, among all segments, of the one that the piece supervises; -1: none."""
    sample, segment = piece
    if segment.supervises < 0:
        return -1
    of_sample = [number for number, (owner, _) in enumerate(segments) if owner == sample]
    return of_sample[segment.supervises]
