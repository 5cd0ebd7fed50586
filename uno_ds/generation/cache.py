"""What samples have read so far, kept as keys and values, so that a step of sampling computes its
own rows only.

Shape suffixes: docs/notation.md.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from uno_ds.kernels.plan import build_plan
from uno_ds.model.bagel import Bagel
from uno_ds.model.codec import Codec, latent_rows
from uno_ds.sequence.batch import PackedBatch
from uno_ds.sequence.packing import Collator
from uno_ds.sequence.segments import Sample, Segment, SegmentTable
from uno_ds.sequence.tasks import SpecialTokens

# A segment and the number of the sample that it continues.
Piece = tuple[int, Segment]


class Cache:
    """Keys and values of several samples at once. Who sees whom is what SegmentTable says, as in
    training."""

    def __init__(self, model: Bagel, tokens: SpecialTokens):
        self.model = model
        # Nothing is a constant here: the slab of constants is the cache itself.
        self.collate = Collator(
            model.shape.geometry, tokens, train_understanding=True, stop_at_context=False
        )
        empty = model.lm_head.weight.new_zeros(0, model.shape.kv_heads, model.shape.head_dim)
        self.keys_values = [(empty, empty)] * model.shape.layers
        self.segments: list[Piece] = []
        self.lengths: list[int] = []
        self.segment_T = np.zeros(0, dtype=np.int64)
        self.position_T = np.zeros(0, dtype=np.int64)

    def lay_out(self, pieces: Sequence[Piece], grow: bool = False) -> PackedBatch:
        """The pieces as a batch, on the model's device, whose live plan is over [cached rows; rows
        of the pieces]. With `grow` each piece prolongs its sample's last segment; else it is a new
        one."""
        return self._lay_out(pieces, grow)[0]

    def append(
        self, pieces: Sequence[Piece], codec: Codec | None = None, grow: bool = False
    ) -> torch.Tensor:
        """Computes the rows of the pieces and keeps their keys and values; returns the outputs
        [pieces, H] of the last row of each. `codec` encodes their images, which are noised where
        their segment is."""
        batch, segment_T, position_T = self._lay_out(pieces, grow)
        latents_GC = latent_rows(batch, codec, self.model.shape)
        noised = batch.latents.noised_X
        latents_GC[noised] += batch.latents.timestep_G[noised, None] * (
            batch.latents.noise_XC - latents_GC[noised]
        )
        understanding_UH, _, added = self.model.extend(batch, latents_GC, self.keys_values)
        self.keys_values = [
            (torch.cat([k, new_k]), torch.cat([v, new_v]))
            for (k, v), (new_k, new_v) in zip(self.keys_values, added, strict=True)
        ]
        self.segment_T, self.position_T = (
            np.concatenate([self.segment_T, segment_T]),
            np.concatenate([self.position_T, position_T]),
        )
        for piece in pieces:
            if grow:
                self.lengths[self._last_segment(piece[0])] += piece[1].length
            else:
                self.segments.append(piece)
                self.lengths.append(piece[1].length)
        # All rows that end a piece are understanding rows: text, and the end token of an image.
        ends = np.cumsum([piece.length for _, piece in pieces]) - 1
        row_of_token = np.argsort(batch.order_T.cpu().numpy())
        return understanding_UH[torch.from_numpy(row_of_token[ends]).to(understanding_UH.device)]

    def velocity(self, batch: PackedBatch, x_GC: torch.Tensor, t: float) -> torch.Tensor:
        """fp32 [G, C]: velocity of noised latents x at noise level t, for a batch that `lay_out`
        made of noised segments."""
        same_t_G = torch.full_like(batch.latents.timestep_G, t)
        latents = dataclasses.replace(batch.latents, timestep_G=same_t_G)
        timed = dataclasses.replace(batch, latents=latents)
        _, generation_GH, _ = self.model.extend(timed, x_GC, self.keys_values)
        return self.model.llm2vae(generation_GH).float()

    def _lay_out(
        self, pieces: Sequence[Piece], grow: bool
    ) -> tuple[PackedBatch, np.ndarray, np.ndarray]:
        """(batch, segment and position of each of its rows)."""
        batch = self.collate([Sample("", [segment]) for _, segment in pieces])
        lengths = np.array([segment.length for _, segment in pieces], dtype=np.int64)
        first, order = np.cumsum(lengths) - lengths, batch.order_T.numpy()
        piece_T = np.repeat(np.arange(len(pieces)), lengths)[order]
        position_T = (np.arange(lengths.sum()) - np.repeat(first, lengths))[order]
        if grow:
            grown = np.array([self._last_segment(sample) for sample, _ in pieces])
            segments, number_of_piece = self.segments, grown
            position_T = position_T + np.array(self.lengths)[grown][piece_T]
        else:
            segments, number_of_piece = (
                [*self.segments, *pieces],
                len(self.segments) + np.arange(len(pieces)),
            )
        table = SegmentTable(
            kind_S=np.array([segment.kind for _, segment in segments], dtype=np.int64),
            length_S=np.zeros(len(segments), dtype=np.int64),
            sample_S=np.array([sample for sample, _ in segments], dtype=np.int64),
            supervises_S=np.array(
                [_supervised(segments, piece) for piece in segments], dtype=np.int64
            ),
        )
        segment_T = number_of_piece[piece_T]
        cached = len(self.segment_T)
        plan = build_plan(
            np.concatenate([self.segment_T, segment_T]),
            np.concatenate([self.position_T, position_T]),
            table.relation(),
            table.sample_S,
            (cached, cached + len(segment_T)),
        )
        batch = dataclasses.replace(batch, live_plan=plan)
        return batch.to(self.model.lm_head.weight.device), segment_T, position_T

    def _last_segment(self, sample: int) -> int:
        return max(number for number, (owner, _) in enumerate(self.segments) if owner == sample)


def _supervised(segments: Sequence[Piece], piece: Piece) -> int:
    """Place, among all segments, of the one that the piece reads as supervision; -1: none."""
    sample, segment = piece
    return (
        [number for number, (owner, _) in enumerate(segments) if owner == sample][
            segment.supervises
        ]
        if segment.supervises >= 0
        else -1
    )
