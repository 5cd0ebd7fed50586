"""Packing: samples fill a token budget, and a full pack becomes the tensors of one micro-batch.

What depends on the place of a row in its pack is computed here, on the host: the order of the rows
by slab, index columns, and the attention plans. Shape suffixes: docs/notation.md.
"""

from dataclasses import replace
from itertools import chain

import numpy as np
import torch

from uno_ds.kernels.plan import AttentionPlan, build_plan
from uno_ds.sequence.batch import PackedBatch
from uno_ds.sequence.builders import (
    InputBuilder,
    LabelBuilder,
    LatentBuilder,
    MetaqueryBuilder,
    NegativeBuilder,
    Origin,
    TextBuilder,
    VisionBuilder,
    concatenated,
)
from uno_ds.sequence.composition import Geometry, SpecialTokens
from uno_ds.sequence.negatives import captions_of, with_negatives
from uno_ds.sequence.segments import Kind, Sample, Segment, SegmentTable, parts_needing_gradient
from uno_ds.sequence.target_builder import TargetBuilder, TargetSource

MODELS_ENCODER = TargetSource()


class Packer:
    """Fills a token budget with samples: first come, first served; what does not fit waits for the
    next pack. `negatives`: captions get a negative from an earlier sample of the pack."""

    def __init__(self, token_budget: int, negatives: bool = False):
        self.token_budget = token_budget
        self.negatives = negatives
        self.samples: list[Sample] = []
        self.tokens = 0
        self._captions: list[np.ndarray] = []

    def offer(self, sample: Sample) -> bool:
        """Takes the sample if it fits, and returns whether it did."""
        if self.negatives:
            sample = with_negatives(sample, self._captions)
        if self.tokens + sample.length > self.token_budget:
            return False
        self.samples.append(sample)
        self.tokens += sample.length
        self._captions += [caption.ids for caption in captions_of(sample)]
        return True


class Collator:
    """Turns samples into a PackedBatch. `train_understanding`: the understanding expert trains, so
    no row is a constant. `stop_at_context`: where it is frozen, its rows of context segments are
    constants. `targets`: what computes regression targets. `contrast`: each noised image gets
    another one of the pack to be contrasted with."""

    def __init__(
        self,
        geometry: Geometry,
        tokens: SpecialTokens,
        train_understanding: bool,
        stop_at_context: bool,
        targets: TargetSource = MODELS_ENCODER,
        contrast: bool = False,
    ):
        self.geometry, self.tokens = geometry, tokens
        self.targets, self.contrast = targets, contrast
        self.train_understanding, self.stop_at_context = train_understanding, stop_at_context

    def __call__(self, samples: list[Sample], supervision: float = 1.0) -> PackedBatch:
        """`supervision`: factor of the losses of captions and metaqueries."""
        table = SegmentTable.of(samples)
        segments = list(chain.from_iterable(sample.segments for sample in samples))
        relation_SS = table.relation()
        live_understanding_S, _ = parts_needing_gradient(
            table, relation_SS, self.train_understanding, self.stop_at_context
        )
        first_token_S = np.cumsum(table.length_S) - table.length_S
        segment_T = np.repeat(np.arange(len(segments)), table.length_S)
        position_T = np.arange(len(segment_T)) - first_token_S[segment_T]

        generation_T = concatenated([segment.generation_tokens() for segment in segments], bool)
        slab_T = np.where(generation_T, 2, np.where(live_understanding_S[segment_T], 1, 0))
        order_T = np.argsort(slab_T, kind="stable")
        context, understanding, generation = np.bincount(slab_T, minlength=3).tolist()
        row_of_token_T = np.empty_like(order_T)
        row_of_token_T[order_T] = np.arange(len(order_T))

        def plan(first_query: int, end_of_queries: int) -> AttentionPlan:
            return build_plan(
                segment_T[order_T],
                position_T[order_T],
                relation_SS,
                table.sample_S,
                (first_query, end_of_queries),
                need_T=np.arange(len(order_T)) >= context,
            )

        rope_T = concatenated([segment.rope_ids for segment in segments], np.int64)
        rows = _Rows(self, supervision)
        for segment, first, sample in zip(segments, first_token_S, table.sample_S, strict=True):
            rows.add(segment, row_of_token_T[first : first + segment.length], int(sample))
        return PackedBatch(
            keys=tuple(sample.key for sample in samples),
            context=context,
            understanding=understanding,
            generation=generation,
            order_T=torch.from_numpy(order_T),
            rope_T=torch.from_numpy(rope_T[order_T]),
            context_plan=plan(0, context),
            live_plan=plan(context, len(order_T)),
            text_ids=rows.text.tensor(),
            understanding_source_U=rows.inputs.tensor(
                order_T[: context + understanding], rows.text.rows, rows.vision.context_rows
            ),
            vision=rows.vision.tensors(),
            latents=rows.latents.tensors(),
            captions=rows.captions.tensors(),
            negatives=rows.negatives.tensors(),
            answers=rows.answers.tensors(),
            metaqueries=rows.metaqueries.tensors(),
            targets=rows.targets.tensors(rows.vision.context_rows),
        )


class _Rows:
    """The builders of a batch; `add` passes each segment to those of its kind."""

    def __init__(self, collator: Collator, supervision: float):
        geometry, tokens = collator.geometry, collator.tokens
        self.target_source = collator.targets
        self.supervision = supervision
        # Of the segment that is added.
        self._sample = 0
        self.boundary = np.array([tokens.start_of_image, tokens.end_of_image])
        self.inputs = InputBuilder()
        self.text = TextBuilder()
        self.vision = VisionBuilder(geometry.vit_stride, geometry.vit_side)
        self.latents = LatentBuilder(
            geometry.latent_values, geometry.latent_side, collator.contrast
        )
        self.captions = LabelBuilder()
        self.negatives = NegativeBuilder()
        self.answers = LabelBuilder()
        self.metaqueries = MetaqueryBuilder(geometry.vit_side)
        self.targets = TargetBuilder(keeps_images=collator.targets.own_encoder)
        self._adders = {
            Kind.TEXT: self._add_text,
            Kind.CAPTION: self._add_caption,
            Kind.VIT: self._add_condition_image,
            Kind.CLEAN: self._add_latents,
            Kind.NOISED: self._add_latents,
            Kind.METAQUERY: self._add_metaqueries,
        }

    def add(self, segment: Segment, slab_rows: np.ndarray, sample: int) -> None:
        """`slab_rows`: the row of each of its tokens in the batch; `sample`: which one it is of."""
        self._sample = sample
        self._adders[segment.kind](segment, slab_rows)

    def _add_text(self, segment: Segment, slab_rows: np.ndarray) -> None:
        self.inputs.add(Origin.TEXT, self.text.add(segment.ids))
        if segment.answer:
            self.answers.add(segment, slab_rows)

    def _add_caption(self, segment: Segment, slab_rows: np.ndarray) -> None:
        self.inputs.add(Origin.TEXT, self.text.add(segment.ids))
        image = self._sample, segment.supervises
        weight = segment.weight * self.supervision
        if segment.negative:
            self.negatives.add(segment, slab_rows, image, weight)
            return
        self.negatives.add_caption(segment, image)
        self.captions.add(segment, slab_rows, weight)

    def _add_condition_image(self, segment: Segment, slab_rows: np.ndarray) -> None:
        start_and_end = self.text.add(self.boundary)
        self.inputs.add(Origin.TEXT, start_and_end[:1])
        self.inputs.add(Origin.VISION, self.vision.add_condition(segment))
        self.inputs.add(Origin.TEXT, start_and_end[1:])

    def _add_latents(self, segment: Segment, slab_rows: np.ndarray) -> None:
        start_and_end = self.text.add(self.boundary)
        self.inputs.add(Origin.TEXT, start_and_end[:1])
        self.inputs.add_latents(segment.length - 2)
        self.inputs.add(Origin.TEXT, start_and_end[1:])
        self.latents.add(segment, self._sample)

    def _add_metaqueries(self, segment: Segment, slab_rows: np.ndarray) -> None:
        weight = segment.weight * self.supervision
        self.inputs.add(Origin.METAQUERY, self.metaqueries.add(segment, slab_rows, weight))
        source = self.target_source
        if segment.target is None and source.program is not None:
            segment = replace(segment, target=source.program(segment))
        self.targets.add(segment)
        if segment.target is None and not source.own_encoder:
            self.vision.add_target(segment)
