"""Segments: the pieces of a packed sequence, who sees whom, and which of them need a gradient.

Shape suffixes: docs/notation.md.
"""

import enum
from dataclasses import dataclass, field

import numpy as np

from uno_ds.kernels.plan import CAUSAL, FULL, NONE


class Kind(enum.IntEnum):
    TEXT = 0
    VIT = 1
    CLEAN = 2
    NOISED = 3
    CAPTION = 4
    METAQUERY = 5


CONTEXT_KINDS = (Kind.TEXT, Kind.VIT, Kind.CLEAN)
SUPERVISION_KINDS = (Kind.CAPTION, Kind.METAQUERY)
LATENT_KINDS = (Kind.CLEAN, Kind.NOISED)
CAUSAL_KINDS = (Kind.TEXT, Kind.CAPTION)


@dataclass(frozen=True, eq=False)
class Segment:
    """One segment of one sample. Only the fields of its kind are set.

    token_ids   TEXT, CAPTION: int64 [length], `bos ids eos`
    answer      TEXT: the tokens after bos are trained by cross entropy
    pixels      VIT: float32 [3, h, w] in [-1, 1] for the visual encoder; METAQUERY: the same of the
                target image, unless
                `target` is given;
                CLEAN, NOISED: float32 [3, h, w] for the codec, unless `latent` is given
    latent      CLEAN, NOISED: float32 [channels, h / downsample, w / downsample], already encoded
    target      METAQUERY: float32 [side * side, width], features of the target image, already
                encoded and pooled
    grid        VIT, METAQUERY: patches (rows, columns) of the image; CLEAN, NOISED: latent patches
                (rows, columns)
    side        METAQUERY: queries per side of the grid
    timestep    NOISED: t in (0, 1), after the shift
    noise       NOISED: float32 [rows * columns, patch values]
    supervises  CAPTION, METAQUERY: index, within the sample, of the noised segment that is read
    """

    kind: Kind
    rope_ids: np.ndarray
    token_ids: np.ndarray | None = None
    answer: bool = False
    pixels: np.ndarray | None = None
    latent: np.ndarray | None = None
    target: np.ndarray | None = None
    grid: tuple[int, int] = (0, 0)
    side: int = 0
    timestep: float = 0.0
    noise: np.ndarray | None = None
    supervises: int = -1

    @property
    def length(self) -> int:
        return len(self.rope_ids)

    def generation_tokens(self) -> np.ndarray:
        """bool [length]: which tokens belong to the generation expert (the latents between start
        and end)."""
        mask = np.zeros(self.length, dtype=bool)
        if self.kind in LATENT_KINDS:
            mask[1:-1] = True
        return mask


@dataclass(frozen=True, eq=False)
class Sample:
    """Segments in sequence order. `key` names the row it came from in logs."""

    key: str
    segments: list[Segment] = field(default_factory=list)

    @property
    def length(self) -> int:
        return sum(segment.length for segment in self.segments)


@dataclass(frozen=True, eq=False)
class SegmentTable:
    """The segments of a whole pack, as columns. `supervises` counts from the pack's first segment;
    -1 elsewhere."""

    kind_S: np.ndarray
    length_S: np.ndarray
    sample_S: np.ndarray
    supervises_S: np.ndarray

    @classmethod
    def of(cls, samples: list[Sample]) -> "SegmentTable":
        kinds, lengths, owners, supervises, first = [], [], [], [], 0
        for number, sample in enumerate(samples):
            for segment in sample.segments:
                kinds.append(segment.kind)
                lengths.append(segment.length)
                owners.append(number)
                supervises.append(first + segment.supervises if segment.supervises >= 0 else -1)
            first += len(sample.segments)
        return cls(
            *(np.array(column, dtype=np.int64) for column in (kinds, lengths, owners, supervises))
        )

    def relation(self) -> np.ndarray:
        """int8 [S, S], row = query segment: NONE, FULL or CAUSAL. The one statement of who sees
        whom."""
        kind, index = self.kind_S, np.arange(len(self.kind_S))
        same_sample = self.sample_S[:, None] == self.sample_S[None, :]
        reads_context = same_sample & (index[:, None] > index[None, :])
        reads_context &= (
            np.isin(kind, CONTEXT_KINDS)[None, :] & ~np.isin(kind, SUPERVISION_KINDS)[:, None]
        )
        reads_noised = self.supervises_S[:, None] == index[None, :]
        relation = np.where(reads_context | reads_noised, FULL, NONE).astype(np.int8)
        relation[index, index] = np.where(np.isin(kind, CAUSAL_KINDS), CAUSAL, FULL)
        return relation


def parts_needing_gradient(
    table: SegmentTable, relation: np.ndarray, train_understanding: bool, stop_at_context: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(bool [S], bool [S]): whether the understanding and the generation part of each segment need
    a gradient.

    A part needs one if its expert trains, if its input embedding trains (metaqueries), or if it
    sees a part that needs one. `stop_at_context` cuts this closure at understanding parts of
    context segments, which become constants, unless the understanding expert itself trains."""
    kind = table.kind_S
    has_generation = np.isin(kind, LATENT_KINDS)
    if train_understanding:
        return np.ones(len(kind), dtype=bool), has_generation
    sees = relation != NONE
    cut = np.isin(kind, CONTEXT_KINDS) if stop_at_context else np.zeros(len(kind), dtype=bool)
    understanding = kind == Kind.METAQUERY
    while True:
        reached = (sees & (understanding | has_generation)[None, :]).any(axis=1) & ~cut
        grown = understanding | reached
        if (grown == understanding).all():
            return understanding, has_generation
        understanding = grown
