"""What a micro-batch asks of the model: rows by slab and loss, and visible (query, key) pairs by
what backward does for them."""

from dataclasses import dataclass, fields

import numpy as np

from uno_ds.cost.scenario import Scenario
from uno_ds.kernels.plan import CAUSAL, FULL, AttentionPlan
from uno_ds.model.architecture import Architecture
from uno_ds.sequence.batch import PackedBatch


@dataclass(frozen=True)
class Work:
    """Rows and pairs of one layer. context: constant rows; understanding, generation: live rows of
    the two experts.

    context_pairs       pairs of constant queries
    live_pairs          pairs of live queries and live keys;  constant_key_pairs: of live queries
                        and constant keys
    patches             of all images of the visual encoder;  condition_patches: of those that are
                        tokens;  patch_pairs: within images
    noised, captions, answers, metaqueries   rows that a loss reads
    images              noised images;  encoded_pixels: (height, width) of every image that the
                        codec encodes
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

    @classmethod
    def of(cls, batch: PackedBatch) -> "Work":
        """Of a batch on the host; some tenths of a millisecond for 32k tokens."""
        context, live = batch.context_plan, batch.live_plan
        pixels = [
            tuple(images.shape[-2:])
            for images, encoded in zip(batch.latents.images, batch.latents.encoded, strict=True)
            if not encoded
            for _ in range(len(images))
        ]
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
            captions=len(batch.captions.rows_Y),
            answers=len(batch.answers.rows_Y),
            metaqueries=len(batch.metaqueries.index_M),
            encoded_pixels=tuple(pixels),
        )

    @property
    def rows(self) -> int:
        return self.context + self.understanding + self.generation

    def __add__(self, other: "Work") -> "Work":
        return Work(
            **{
                field.name: getattr(self, field.name) + getattr(other, field.name)
                for field in fields(self)
            }
        )


def visible_pairs(plan: AttentionPlan, key_rows: tuple[int, int]) -> int:
    """(query, key) pairs that the plan shows, with keys of these rows, from the table over
    segments."""
    segment_T, position_T, relation_SS = (
        np.asarray(x) for x in (plan.segment_T, plan.position_T, plan.relation_SS)
    )
    queries, keys = slice(*plan.query_rows), slice(*key_rows)
    count = len(relation_SS)
    query_S, key_S = (
        np.bincount(segment_T[rows], minlength=count).astype(np.int64) for rows in (queries, keys)
    )
    total = int(query_S @ (relation_SS == FULL) @ key_S)
    for query, key in np.argwhere(relation_SS == CAUSAL):
        if not query_S[query] or not key_S[key]:
            continue
        key_positions = np.sort(position_T[keys][segment_T[keys] == key])
        query_positions = position_T[queries][segment_T[queries] == query]
        # A query sees the keys at its own position and before it.
        total += int(np.searchsorted(key_positions, query_positions, side="right").sum())
    return total


def work_of(shape: Architecture, pack: Scenario) -> Work:
    """Of a scenario's pack: full images, no start and end tokens but those that the scenario counts
    as prompt, captions predicted but for their first token. Square images, as far as the codec's
    pixels go."""
    samples, latents, caption, queries = pack.samples, pack.latents, pack.caption, pack.metaqueries
    prompt, vit, clean = pack.prompt, pack.vit, pack.clean

    # Visible pairs of one sample, by who reads what (docs/architecture.md, segments).
    within_context = _causal(prompt) + vit**2 + prompt * vit
    context_reads_clean = (prompt + vit) * clean
    within_latents = latents**2 + clean**2 + latents * clean
    within_supervision = _causal(caption) + queries**2
    supervision_reads_latents = (caption + queries) * latents
    latents_read_context = latents * (prompt + vit)

    stride = shape.geometry.latent_stride
    pixels = []
    for cells in (latents, clean):
        if cells:
            side = max(1, round(cells**0.5)) * stride
            pixels.append((side, side))
    return Work(
        context=pack.context,
        understanding=pack.supervision,
        generation=pack.generation,
        context_pairs=samples * (within_context + context_reads_clean),
        live_pairs=samples * (within_latents + within_supervision + supervision_reads_latents),
        constant_key_pairs=samples * latents_read_context,
        patches=samples * (vit + pack.target),
        condition_patches=samples * vit,
        patch_pairs=samples * (vit**2 + pack.target**2),
        noised=samples * latents,
        captions=samples * max(0, caption - 1),
        answers=0,
        metaqueries=samples * queries,
        encoded_pixels=tuple(pixels * samples),
    )


def _causal(tokens: int) -> int:
    """Pairs of a causal text with itself."""
    return tokens * (tokens + 1) // 2
