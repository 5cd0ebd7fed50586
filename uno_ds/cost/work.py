"""The work of a micro-batch: rows by slab and loss, and visible (query, key) pairs by what backward
computes for them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from uno_ds.cost.scenario import Scenario
from uno_ds.kernels.plan import CAUSAL, FULL, AttentionPlan
from uno_ds.model.architecture import Architecture
from uno_ds.sequence.batch import PackedBatch
from uno_ds.sequence.segments import (
    CAUSAL_KINDS,
    CONTEXT_KINDS,
    LATENT_KINDS,
    SUPERVISION_KINDS,
    Kind,
)

# Of which no token needs a gradient where the understanding expert is frozen.
_CONSTANT_KINDS = (Kind.TEXT, Kind.VIT)


@dataclass(frozen=True)
class Work:
    """Rows and pairs of one layer. context: constant rows; understanding, generation: live rows of
    the two experts.

    context_pairs       pairs of constant queries
    live_pairs          pairs of live queries and live keys;  constant_key_pairs: of live queries
                        and constant keys
    patches             of all images of the visual encoder;  condition_patches: of those that are
                        tokens;  patch_pairs: within images
    noised, captions, answers, metaqueries   rows that a loss reads; captions with negatives
    images              noised images;  encoded_pixels: (height, width) of every image that the
                        codec encodes
    target_grids        patches (rows, columns) of the images of an encoder of targets that is no
                        part of the model
    """

    context: int
    understanding: int
    generation: int
    context_pairs: int
    live_pairs: int
    constant_key_pairs: int
    patches: int
    condition_patches: int
    patch_pairs: int
    noised: int
    captions: int
    answers: int
    metaqueries: int
    encoded_pixels: tuple[tuple[int, int], ...]
    target_grids: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, batch: PackedBatch) -> "Work":
        """Of a batch on the host; some tenths of a millisecond for 32k tokens."""
        context, live = batch.context_plan, batch.live_plan
        pixels: list[tuple[int, int]] = []
        for images, encoded in zip(batch.latents.images, batch.latents.encoded, strict=True):
            if not encoded:
                height, width = images.shape[-2:]
                pixels += [(height, width)] * len(images)
        return cls(
            context=batch.context,
            understanding=batch.understanding,
            generation=batch.generation,
            context_pairs=visible_pairs(context, (0, len(context.segment_T))),
            live_pairs=visible_pairs(live, (batch.context, len(live.segment_T))),
            constant_key_pairs=visible_pairs(live, (0, batch.context)),
            patches=sum(batch.vision.lengths),
            condition_patches=batch.vision.context_rows,
            patch_pairs=sum(length**2 for length in batch.vision.lengths),
            noised=len(batch.latents.noised_X),
            captions=len(batch.captions.rows_Y) + len(batch.negatives.labels.rows_Y),
            answers=len(batch.answers.rows_Y),
            metaqueries=len(batch.metaqueries.index_M),
            encoded_pixels=tuple(pixels),
            target_grids=batch.targets.grids,
        )

    @property
    def rows(self) -> int:
        return self.context + self.understanding + self.generation

    def __add__(self, other: "Work") -> "Work":
        names = [field.name for field in fields(self)]
        return Work(**{name: getattr(self, name) + getattr(other, name) for name in names})


def visible_pairs(plan: AttentionPlan, key_rows: tuple[int, int]) -> int:
    """Visible (query, key) pairs of the plan whose key is one of `key_rows` (first, past the last),
    from the table over segments."""
    segment_T = np.asarray(plan.segment_T)
    position_T = np.asarray(plan.position_T)
    relation_SS = np.asarray(plan.relation_SS)
    queries = slice(*plan.query_rows)
    keys = slice(*key_rows)
    queries_S = _rows_by_segment(segment_T[queries], len(relation_SS))
    keys_S = _rows_by_segment(segment_T[keys], len(relation_SS))
    total = int(queries_S @ (relation_SS == FULL) @ keys_S)
    for query, key in np.argwhere(relation_SS == CAUSAL):
        if not queries_S[query] or not keys_S[key]:
            continue
        key_positions = np.sort(position_T[keys][segment_T[keys] == key])
        query_positions = position_T[queries][segment_T[queries] == query]
        # A query sees the keys at its own position and before it.
        total += int(np.searchsorted(key_positions, query_positions, side="right").sum())
    return total


def _rows_by_segment(segment_T: np.ndarray, segments: int) -> np.ndarray:
    """int64 [S]: how many of the rows each segment has."""
    return np.bincount(segment_T, minlength=segments).astype(np.int64)


def work_of(shape: Architecture, pack: Scenario) -> Work:
    """Of a scenario's pack: full images, no start and end tokens but those that the scenario counts
    as prompt, captions predicted but for their first token. The codec's images are taken to be
    square."""
    pairs = _pairs_of_sample(pack.segments)
    samples, images = pack.samples, pack.samples * pack.images
    vit = pack.rows(Kind.VIT)
    stride = shape.geometry.latent_stride
    pixels = []
    for kind, cells in pack.segments:
        if kind in LATENT_KINDS:
            side = max(1, round(cells**0.5)) * stride
            pixels.append((side, side))
    return Work(
        context=pack.context,
        understanding=pack.supervision,
        generation=pack.generation,
        context_pairs=samples * pairs["context"],
        live_pairs=samples * pairs["live"],
        constant_key_pairs=samples * pairs["constant keys"],
        patches=vit + pack.targets,
        condition_patches=vit,
        patch_pairs=vit * pack.vit + pack.targets * pack.target,
        noised=pack.rows(Kind.NOISED),
        captions=images * (max(0, pack.caption - 1) + max(0, pack.negative - 1)),
        answers=0,
        metaqueries=images * pack.metaqueries,
        encoded_pixels=tuple(pixels * samples),
        target_grids=(_square(pack.own_target),) * images if pack.own_target else (),
    )


def _pairs_of_sample(segments: Sequence[tuple[Kind, int]]) -> dict[str, int]:
    """Visible pairs of one sample: of constant queries ("context"), of live queries with live keys
    and with constant keys."""
    pairs = {"context": 0, "live": 0, "constant keys": 0}
    context: list[tuple[Kind, int]] = []
    noised = 0  # tokens of the image that supervision reads
    for kind, tokens in segments:
        own = _causal(tokens) if kind in CAUSAL_KINDS else tokens**2
        seen = [(Kind.NOISED, noised)] if kind in SUPERVISION_KINDS else context
        constant_keys = tokens * sum(length for key, length in seen if key in _CONSTANT_KINDS)
        live_keys = tokens * sum(length for key, length in seen if key not in _CONSTANT_KINDS)
        if kind in _CONSTANT_KINDS:
            pairs["context"] += own + constant_keys + live_keys
        else:
            pairs["live"] += own + live_keys
            pairs["constant keys"] += constant_keys
        if kind == Kind.NOISED:
            noised = tokens
        elif kind in CONTEXT_KINDS:
            context.append((kind, tokens))
    return pairs


def _square(cells: int) -> tuple[int, int]:
    side = max(1, round(cells**0.5))
    return side, side


def _causal(tokens: int) -> int:
    """Pairs of a causal text with itself."""
    return tokens * (tokens + 1) // 2
