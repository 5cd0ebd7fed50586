"""From samples to the tensors of one micro-batch: three contiguous slabs and everything the model reads, built on the host.

Rows of a batch are tokens in SLAB order: [context: understanding, no gradient | understanding, live | generation, live].
Legend of shape suffixes: T tokens, U understanding rows (context and live), G generation rows, N noised latent rows,
M metaqueries, R those whose target image is in the pack and E those whose target was prepared, P patches of all images of the
visual encoder.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from uno_ds.kernels.plan import FULL, AttentionPlan, build_plan
from uno_ds.sequence.segments import (
    LATENT_KINDS,
    Kind,
    Sample,
    Segment,
    SegmentTable,
    parts_needing_gradient,
)
from uno_ds.sequence.tasks import Geometry, SpecialTokens


class Packer:
    """Fills a token budget with samples: first come, first served; what does not fit waits for the next pack."""

    def __init__(self, token_budget: int):
        self.token_budget, self.samples, self.tokens = token_budget, [], 0

    def offer(self, sample: Sample) -> bool:
        """Takes the sample if it fits and says whether it did."""
        if self.tokens + sample.length > self.token_budget:
            return False
        self.samples.append(sample)
        self.tokens += sample.length
        return True


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One micro-batch of one rank. Index columns are int64 and count rows of the tensor that their name says.

    context, understanding, generation   rows of the three slabs
    order_T              sequence position of each slab row
    rope_T               RoPE id of each slab row
    context_plan, live_plan              who sees whom, for the queries of the context slab and of the two live slabs
    text_ids             ids of all text and image-boundary tokens
    vit_patches_PC       float32, patches (p, p, channel) of condition images, then of regression targets
    vit_positions_P, vit_plan            place in the position table; attention within each image
    vit_context          how many of the P rows are tokens of the sequence
    vit_lengths, vit_context_images      patches of each image, and how many of the images are condition images
    metaquery_M, metaquery_positions_M   which query, and its place in the visual encoder's 2-D position table
    understanding_source_U               row of [text; vit; metaqueries] that each understanding row starts from
    latent_images        images grouped by size: pixels [n, 3, h, w], or latents [n, c, h, w] where latent_encoded says so
    latent_source_G      row of the grouped latents that each generation row starts from
    timestep_G, latent_positions_G       t (0: clean) and place in the latent position table
    noise_NC, noised_N   noise, and the generation rows it belongs to
    caption_rows, caption_labels, answer_rows, answer_labels, metaquery_rows_M   understanding rows with a loss
    target_patches_RK, target_weights_RK   the patches whose mean is a metaquery's target (padded with weight 0)
    prepared_targets_EW, target_source_M   targets that were prepared, and the row of [R; E] that is each metaquery's target
    """

    keys: tuple[str, ...]
    context: int
    understanding: int
    generation: int
    vit_context: int
    vit_context_images: int
    vit_lengths: tuple[int, ...]
    latent_encoded: tuple[bool, ...]
    latent_images: tuple[torch.Tensor, ...]
    context_plan: AttentionPlan
    live_plan: AttentionPlan
    vit_plan: AttentionPlan
    order_T: torch.Tensor
    rope_T: torch.Tensor
    text_ids: torch.Tensor
    vit_patches_PC: torch.Tensor
    vit_positions_P: torch.Tensor
    metaquery_M: torch.Tensor
    metaquery_positions_M: torch.Tensor
    understanding_source_U: torch.Tensor
    latent_source_G: torch.Tensor
    timestep_G: torch.Tensor
    latent_positions_G: torch.Tensor
    noise_NC: torch.Tensor
    noised_N: torch.Tensor
    caption_rows: torch.Tensor
    caption_labels: torch.Tensor
    answer_rows: torch.Tensor
    answer_labels: torch.Tensor
    metaquery_rows_M: torch.Tensor
    target_patches_RK: torch.Tensor
    target_weights_RK: torch.Tensor
    prepared_targets_EW: torch.Tensor
    target_source_M: torch.Tensor

    @property
    def tokens(self) -> int:
        return len(self.order_T)

    @property
    def loss_counts(self) -> dict[str, int]:
        """Tokens with each loss in this batch."""
        return {
            "flow": len(self.noised_N),
            "caption": len(self.caption_rows),
            "regression": len(self.metaquery_M),
            "answer": len(self.answer_rows),
        }

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "PackedBatch":
        """A copy on `device`; floating-point tensors in `dtype` if one is given."""

        def move(value):
            if isinstance(value, torch.Tensor):
                return value.to(
                    device,
                    dtype=dtype if dtype is not None and value.is_floating_point() else None,
                    non_blocking=True,
                )
            if isinstance(value, AttentionPlan):
                return value.to(device)
            return tuple(move(item) for item in value) if isinstance(value, tuple) else value

        return PackedBatch(
            **{field.name: move(getattr(self, field.name)) for field in dataclasses.fields(self)}
        )


class Collator:
    """Lays samples out as a PackedBatch. `train_understanding`: the understanding expert trains, so nothing is constant."""

    def __init__(
        self,
        geometry: Geometry,
        tokens: SpecialTokens,
        train_understanding: bool,
        stop_at_context: bool,
    ):
        self.geometry, self.tokens = geometry, tokens
        self.train_understanding, self.stop_at_context = train_understanding, stop_at_context

    def __call__(self, samples: list[Sample]) -> PackedBatch:
        table = SegmentTable.of(samples)
        segments = [segment for sample in samples for segment in sample.segments]
        relation = table.relation()
        need_understanding, _ = parts_needing_gradient(
            table, relation, self.train_understanding, self.stop_at_context
        )
        segment_T = np.repeat(np.arange(len(segments)), table.length_S)
        position_T = np.arange(len(segment_T)) - np.repeat(
            np.cumsum(table.length_S) - table.length_S, table.length_S
        )
        generation_T = _concatenate([segment.generation_tokens() for segment in segments], bool)
        slab_T = np.where(generation_T, 2, np.where(need_understanding[segment_T], 1, 0))
        order = np.argsort(slab_T, kind="stable")
        context, understanding, generation = np.bincount(slab_T, minlength=3).tolist()
        row_of_token = np.empty_like(order)
        row_of_token[order] = np.arange(len(order))

        plans = [
            build_plan(
                segment_T[order],
                position_T[order],
                relation,
                table.sample_S,
                rows,
                need_K=np.arange(len(order)) >= context,
            )
            for rows in ((0, context), (context, len(order)))
        ]
        return PackedBatch(
            keys=tuple(sample.key for sample in samples),
            context=context,
            understanding=understanding,
            generation=generation,
            context_plan=plans[0],
            live_plan=plans[1],
            order_T=torch.from_numpy(order),
            rope_T=torch.from_numpy(
                _concatenate([segment.rope_ids for segment in segments], np.int64)[order]
            ),
            **self._understanding(segments, order[: context + understanding]),
            **self._latents(segments),
            **self._losses(segments, table, row_of_token),
        )

    def _understanding(self, segments: list[Segment], order_U: np.ndarray) -> dict:
        """Where the understanding rows start from: text ids, visual-encoder patches, metaqueries."""
        geometry, boundary = self.geometry, [self.tokens.start_of_image, self.tokens.end_of_image]
        text, patches, positions, image_lengths, queries, query_positions = [], [], [], [], [], []
        conditions = [segment for segment in segments if segment.kind == Kind.VIT]
        targets = [
            segment
            for segment in segments
            if segment.kind == Kind.METAQUERY and segment.target is None
        ]
        sources, texts, vits, metaqueries = [], 0, 0, 0
        for segment in segments:
            boundary_source = np.array([[0, texts], [0, texts + 1]])
            if segment.token_ids is not None:
                text.append(segment.token_ids)
                sources.append(_numbered(0, texts, segment.length))
                texts += segment.length
            elif segment.kind == Kind.METAQUERY:
                queries.append(np.arange(segment.length))
                query_positions.append(_metaquery_positions(segment, geometry.vit_side))
                sources.append(_numbered(2, metaqueries, segment.length))
                metaqueries += segment.length
            else:
                inside = segment.length - 2
                text.append(np.array(boundary))
                texts += 2
                body = (
                    _numbered(1, vits, inside)
                    if segment.kind == Kind.VIT
                    else np.zeros((inside, 2), dtype=np.int64)
                )
                sources.append(np.concatenate([boundary_source[:1], body, boundary_source[1:]]))
                if segment.kind == Kind.VIT:
                    vits += inside
        for segment in conditions + targets:
            patches.append(patchify(segment.pixels, geometry.vit_stride))
            positions.append(_positions(segment.grid, geometry.vit_side))
            image_lengths.append(len(patches[-1]))
        source_T2 = np.concatenate(sources) if sources else np.zeros((0, 2), dtype=np.int64)
        first_row = np.array([0, texts, texts + vits])
        image_P = np.repeat(np.arange(len(image_lengths)), image_lengths)
        images = np.arange(len(image_lengths))
        own_image = np.where(images[:, None] == images[None, :], FULL, 0).astype(np.int8)
        return dict(
            vit_context=vits,
            vit_context_images=len(conditions),
            vit_lengths=tuple(image_lengths),
            text_ids=torch.from_numpy(_concatenate(text, np.int64)),
            vit_patches_PC=torch.from_numpy(
                np.concatenate(patches)
                if patches
                else np.zeros((0, 3 * geometry.vit_stride**2), dtype=np.float32)
            ),
            vit_positions_P=torch.from_numpy(_concatenate(positions, np.int64)),
            vit_plan=build_plan(
                image_P,
                np.zeros(len(image_P), dtype=np.int64),
                own_image,
                images,
                (0, len(image_P)),
            ),
            metaquery_M=torch.from_numpy(_concatenate(queries, np.int64)),
            metaquery_positions_M=torch.from_numpy(_concatenate(query_positions, np.int64)),
            understanding_source_U=torch.from_numpy(
                (first_row[source_T2[:, 0]] + source_T2[:, 1])[order_U]
            ),
        )

    def _latents(self, segments: list[Segment]) -> dict:
        """Images of the codec grouped by size, and for every generation row its place, noise level and noise."""
        images = [segment for segment in segments if segment.kind in LATENT_KINDS]
        groups: dict[tuple, list[int]] = {}
        for number, segment in enumerate(images):
            array = segment.pixels if segment.latent is None else segment.latent
            groups.setdefault((segment.latent is not None, array.shape), []).append(number)
        rows = np.array([segment.grid[0] * segment.grid[1] for segment in images], dtype=np.int64)
        first = np.zeros(len(images), dtype=np.int64)
        offset = 0
        for members in groups.values():
            for number in members:
                first[number] = offset
                offset += rows[number]
        stacked = tuple(
            torch.from_numpy(
                np.stack(
                    [
                        images[number].latent if encoded else images[number].pixels
                        for number in members
                    ]
                )
            )
            for (encoded, _), members in groups.items()
        )
        noised = np.array([segment.kind == Kind.NOISED for segment in images], dtype=bool)
        noise = [segment.noise for segment in images if segment.kind == Kind.NOISED]
        return dict(
            latent_images=stacked,
            latent_encoded=tuple(encoded for encoded, _ in groups),
            latent_source_G=torch.from_numpy(
                _concatenate(
                    [start + np.arange(count) for start, count in zip(first, rows, strict=True)],
                    np.int64,
                )
            ),
            timestep_G=torch.from_numpy(
                np.repeat(
                    np.array([segment.timestep for segment in images], dtype=np.float32), rows
                )
            ),
            latent_positions_G=torch.from_numpy(
                _concatenate(
                    [_positions(segment.grid, self.geometry.latent_side) for segment in images],
                    np.int64,
                )
            ),
            noise_NC=torch.from_numpy(
                np.concatenate(noise)
                if noise
                else np.zeros((0, self.geometry.latent_values), dtype=np.float32)
            ),
            noised_N=torch.from_numpy(np.flatnonzero(np.repeat(noised, rows))),
        )

    def _losses(
        self, segments: list[Segment], table: SegmentTable, row_of_token: np.ndarray
    ) -> dict:
        """Rows whose output a loss reads, with their labels."""
        captions, answers, queries = ([], []), ([], []), []
        target_patches, target_weights, prepared, target_sources = [], [], [], []
        first_patch = sum(
            segment.grid[0] * segment.grid[1] for segment in segments if segment.kind == Kind.VIT
        )
        for segment, start in zip(
            segments, np.cumsum(table.length_S) - table.length_S, strict=True
        ):
            rows = row_of_token[start : start + segment.length]
            if segment.kind == Kind.METAQUERY:
                queries.append(rows)
                kept = prepared if segment.target is not None else target_patches
                target_sources.append(
                    _numbered(int(kept is prepared), sum(map(len, kept)), segment.length)
                )
                if segment.target is not None:
                    prepared.append(segment.target)
                    continue
                patch, weight = _target_cells(segment)
                target_patches.append(patch + first_patch)
                target_weights.append(weight)
                first_patch += segment.grid[0] * segment.grid[1]
            elif segment.kind == Kind.CAPTION or segment.answer:
                wanted = captions if segment.kind == Kind.CAPTION else answers
                wanted[0].append(rows[:-1])
                wanted[1].append(segment.token_ids[1:])
        widest = max((patch.shape[1] for patch in target_patches), default=1)
        pad = [((0, 0), (0, widest - patch.shape[1])) for patch in target_patches]
        empty = np.zeros((0, widest))
        source_M2 = np.concatenate([np.zeros((0, 2), dtype=np.int64), *target_sources])
        first_row = np.array([0, sum(map(len, target_patches))])
        return dict(
            caption_rows=torch.from_numpy(_concatenate(captions[0], np.int64)),
            caption_labels=torch.from_numpy(_concatenate(captions[1], np.int64)),
            answer_rows=torch.from_numpy(_concatenate(answers[0], np.int64)),
            answer_labels=torch.from_numpy(_concatenate(answers[1], np.int64)),
            metaquery_rows_M=torch.from_numpy(_concatenate(queries, np.int64)),
            target_patches_RK=torch.from_numpy(
                np.concatenate([empty, *map(np.pad, target_patches, pad)]).astype(np.int64)
            ),
            target_weights_RK=torch.from_numpy(
                np.concatenate([empty, *map(np.pad, target_weights, pad)]).astype(np.float32)
            ),
            prepared_targets_EW=torch.from_numpy(
                np.concatenate(prepared) if prepared else np.zeros((0, 0), dtype=np.float32)
            ),
            target_source_M=torch.from_numpy(first_row[source_M2[:, 0]] + source_M2[:, 1]),
        )


def patchify(pixels: np.ndarray, side: int) -> np.ndarray:
    """[c, h, w] -> [h/side * w/side, side * side * c]: rows of patches, each flattened as (row, column, channel)."""
    channels, height, width = pixels.shape
    grid = pixels.reshape(channels, height // side, side, width // side, side)
    return np.ascontiguousarray(grid.transpose(1, 3, 2, 4, 0)).reshape(-1, side * side * channels)


def _concatenate(arrays: list, dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=dtype), *arrays]).astype(dtype)


def _numbered(source: int, first: int, count: int) -> np.ndarray:
    """[count, 2]: rows first, first + 1, ... of the given source."""
    return np.stack([np.full(count, source), first + np.arange(count)], axis=1)


def _positions(grid: tuple[int, int], table_side: int) -> np.ndarray:
    """Place of each patch of the grid in a table of `table_side` columns, row by row."""
    return (np.arange(grid[0])[:, None] * table_side + np.arange(grid[1])).reshape(-1)


def _metaquery_positions(segment: Segment, table_side: int) -> np.ndarray:
    """Place of the patch in the middle of each metaquery's cell."""
    rows, columns = (
        ((np.arange(segment.side) + 0.5) * size / segment.side).astype(np.int64)
        for size in segment.grid
    )
    return (rows[:, None] * table_side + columns).reshape(-1)


def _target_cells(segment: Segment) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [M, K] patches of the target image, float [M, K] weights): the mean over each metaquery's grid cell.

    Cells overlap where the grid does not divide the image, as in adaptive average pooling.
    """
    spans = [
        [
            np.arange(i * size // segment.side, -(-(i + 1) * size // segment.side))
            for i in range(segment.side)
        ]
        for size in segment.grid
    ]
    cells = [
        (row[:, None] * segment.grid[1] + column).reshape(-1)
        for row in spans[0]
        for column in spans[1]
    ]
    widest = max(map(len, cells))
    patches, weights = (
        np.zeros((len(cells), widest), dtype=np.int64),
        np.zeros((len(cells), widest)),
    )
    for number, cell in enumerate(cells):
        patches[number, : len(cell)] = cell
        weights[number, : len(cell)] = 1 / len(cell)
    return patches, weights
