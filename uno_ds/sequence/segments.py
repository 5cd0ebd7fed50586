"""Segments: the pieces of a packed sequence, their visibility, and which of them need a gradient.

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
    target      METAQUERY: float32 [length, width], features of the target image, already encoded
                and pooled
    grid        VIT, METAQUERY: patches (rows, columns) of the image; CLEAN, NOISED: latent patches
                (rows, columns)
    sides       METAQUERY: queries per side of each grid; the grids follow each other
    timestep    NOISED: t in (0, 1), after the shift
    noise       NOISED: float32 [rows * columns, patch values]
    supervises  CAPTION, METAQUERY: index, within the sample, of the noised segment that is read
    weight      CAPTION, METAQUERY: factor of its losses, by the noise level of what is read
    negative    CAPTION: a wrong one, which the image's other caption must be more likely than
    """

    kind: Kind
    rope_ids: np.ndarray
    token_ids: np.ndarray | None = None
    answer: bool = False
    pixels: np.ndarray | None = None
    latent: np.ndarray | None = None
    target: np.ndarray | None = None
    grid: tuple[int, int] = (0, 0)
    sides: tuple[int, ...] = ()
    timestep: float = 0.0
    noise: np.ndarray | None = None
    supervises: int = -1
    weight: float = 1.0
    negative: bool = False

    @property
    def length(self) -> int:
        return len(self.rope_ids)

    @property
    def ids(self) -> np.ndarray:
        """`token_ids` of a text or caption."""
        assert self.token_ids is not None, "texts and captions have token ids"
        return self.token_ids

    @property
    def image(self) -> np.ndarray:
        """`latent` where there is one, else `pixels`, of a segment that shows an image."""
        image = self.pixels if self.latent is None else self.latent
        assert image is not None, "segments of images have pixels or a latent"
        return image

    def generation_tokens(self) -> np.ndarray:
        """bool [length]: which tokens belong to the generation expert (the latents between start
        and end)."""
        mask = np.zeros(self.length, dtype=bool)
        if self.kind in LATENT_KINDS:
            mask[1:-1] = True
        return mask


@dataclass(frozen=True, eq=False)
class Sample:
    """Segments in sequence order. `key`: name of the data row in logs."""

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
        kinds: list[int] = []
        lengths: list[int] = []
        owners: list[int] = []
        supervises: list[int] = []
        for number, sample in enumerate(samples):
            first_of_sample = len(kinds)
            for segment in sample.segments:
                reads_segment = segment.supervises >= 0
                kinds.append(segment.kind)
                lengths.append(segment.length)
                owners.append(number)
                supervises.append(first_of_sample + segment.supervises if reads_segment else -1)
        return cls(
            kind_S=np.array(kinds, dtype=np.int64),
            length_S=np.array(lengths, dtype=np.int64),
            sample_S=np.array(owners, dtype=np.int64),
            supervises_S=np.array(supervises, dtype=np.int64),
        )

    def relation(self) -> np.ndarray:
        """int8 [S, S], row = query segment, column = key segment: NONE, FULL or CAUSAL. The only
        definition of visibility; training, sampling and the cost model use it."""
        index_S = np.arange(len(self.kind_S))
        context_S = np.isin(self.kind_S, CONTEXT_KINDS)
        supervision_S = np.isin(self.kind_S, SUPERVISION_KINDS)
        same_sample_SS = self.sample_S[:, None] == self.sample_S[None, :]
        earlier_SS = index_S[None, :] < index_S[:, None]
        reads_context_SS = (
            same_sample_SS & earlier_SS & context_S[None, :] & ~supervision_S[:, None]
        )
        reads_noised_SS = self.supervises_S[:, None] == index_S[None, :]
        relation_SS = np.where(reads_context_SS | reads_noised_SS, FULL, NONE).astype(np.int8)
        causal_S = np.isin(self.kind_S, CAUSAL_KINDS)
        relation_SS[index_S, index_S] = np.where(causal_S, CAUSAL, FULL)
        return relation_SS


def parts_needing_gradient(
    table: SegmentTable, relation: np.ndarray, train_understanding: bool, stop_at_context: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(bool [S], bool [S]): whether the understanding and the generation part of each segment need
    a gradient.

    A part needs one if its expert trains, if its input embedding trains (metaqueries), or if it
    sees a part that needs one. `stop_at_context` cuts this closure at understanding parts of
    context segments, which become constants, unless the understanding expert itself trains."""
    kind_S = table.kind_S
    generation_S = np.isin(kind_S, LATENT_KINDS)
    if train_understanding:
        return np.ones(len(kind_S), dtype=bool), generation_S
    constant_S = np.isin(kind_S, CONTEXT_KINDS) & stop_at_context
    sees_SS = relation != NONE
    understanding_S = kind_S == Kind.METAQUERY
    while True:
        need_S = understanding_S | generation_S
        sees_need_S = (sees_SS & need_S[None, :]).any(axis=1)
        grown_S = understanding_S | (sees_need_S & ~constant_S)
        if (grown_S == understanding_S).all():
            return understanding_S, generation_S
        understanding_S = grown_S
