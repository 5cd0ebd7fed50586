"""Who sees whom, how samples are packed, and how slabs are laid out, against routes that share no
code with the product."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uno_ds.sequence.batch import PackedBatch
from uno_ds.sequence.builders import patchify
from uno_ds.sequence.composition import Geometry, SpecialTokens
from uno_ds.sequence.packing import Collator, Packer
from uno_ds.sequence.segments import Kind, Sample, Segment, SegmentTable, parts_needing_gradient

GEOMETRY = Geometry(latent_stride=4, latent_values=12, latent_side=8, vit_stride=4, vit_side=8)
TOKENS = SpecialTokens(bos=1, eos=2, start_of_image=3, end_of_image=4)


@st.composite
def random_sample(draw) -> Sample:
    """Any order of context segments, any number of noised images, each with any supervision
    somewhere behind it."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    segments: list[Segment] = []
    for _ in range(draw(st.integers(1, 7))):
        noised = [place for place, segment in enumerate(segments) if segment.kind == Kind.NOISED]
        kind = draw(
            st.sampled_from(
                list(Kind) if noised else [Kind.TEXT, Kind.VIT, Kind.CLEAN, Kind.NOISED]
            )
        )
        grid = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        supervises = draw(st.sampled_from(noised)) if kind in (Kind.CAPTION, Kind.METAQUERY) else -1
        pixels = rng.standard_normal((3, grid[0] * 4, grid[1] * 4)).astype(np.float32)
        if kind in (Kind.TEXT, Kind.CAPTION):
            ids = np.array([1, *rng.integers(5, 50, size=draw(st.integers(0, 4))), 2])
            segments.append(
                Segment(kind, np.arange(len(ids)), token_ids=ids, supervises=supervises)
            )
        elif kind == Kind.METAQUERY:
            segments.append(
                Segment(
                    kind,
                    np.zeros(4, dtype=np.int64),
                    pixels=pixels,
                    grid=grid,
                    sides=(2,),
                    supervises=supervises,
                )
            )
        else:
            noise = (
                rng.standard_normal((grid[0] * grid[1], 12)).astype(np.float32)
                if kind == Kind.NOISED
                else None
            )
            segments.append(
                Segment(
                    kind,
                    np.zeros(grid[0] * grid[1] + 2, dtype=np.int64),
                    pixels=pixels,
                    grid=grid,
                    noise=noise,
                    timestep=0.5 if kind == Kind.NOISED else 0.0,
                )
            )
    return Sample("drawn", segments)


SAMPLES = st.lists(random_sample(), min_size=1, max_size=4)


def visible_by_hand(samples: list[Sample]) -> np.ndarray:
    """The table of the design, token by token, over the pack in sequence order."""
    tokens = [
        (number, place, segment, offset)
        for number, sample in enumerate(samples)
        for place, segment in enumerate(sample.segments)
        for offset in range(segment.length)
    ]
    mask = np.zeros((len(tokens), len(tokens)), dtype=bool)
    for row, (q_sample, q_place, query, q_offset) in enumerate(tokens):
        for column, (k_sample, k_place, key, k_offset) in enumerate(tokens):
            if q_sample != k_sample:
                continue
            if q_place == k_place:
                mask[row, column] = (
                    k_offset <= q_offset if query.kind in (Kind.TEXT, Kind.CAPTION) else True
                )
            elif query.kind in (Kind.CAPTION, Kind.METAQUERY):
                mask[row, column] = k_place == query.supervises
            else:
                mask[row, column] = k_place < q_place and key.kind in (
                    Kind.TEXT,
                    Kind.VIT,
                    Kind.CLEAN,
                )
    return mask


def collate(
    samples: list[Sample], train_understanding: bool = False, stop: bool = True
) -> PackedBatch:
    return Collator(GEOMETRY, TOKENS, train_understanding, stop)(samples)


@settings(max_examples=60, deadline=None)
@given(SAMPLES, st.booleans(), st.booleans())
def test_every_token_sees_exactly_what_the_visibility_table_says(
    samples, train_understanding, stop
):
    batch = collate(samples, train_understanding, stop)
    in_slab_order = torch.cat([batch.context_plan.visible(), batch.live_plan.visible()]).numpy()
    order = batch.order_T.numpy()
    in_sequence = np.zeros_like(in_slab_order)
    in_sequence[np.ix_(order, order)] = in_slab_order
    assert (in_sequence == visible_by_hand(samples)).all()


@settings(max_examples=60, deadline=None)
@given(SAMPLES, st.booleans())
def test_a_part_needs_a_gradient_exactly_if_a_path_of_sight_leads_to_something_that_trains(
    samples, stop
):
    """Closure by depth-first search over parts, against the fixed point of the product."""
    parts = []
    for number, sample in enumerate(samples):
        for place, segment in enumerate(sample.segments):
            parts.append((number, place, segment, "und"))
            if segment.kind in (Kind.CLEAN, Kind.NOISED):
                parts.append((number, place, segment, "gen"))

    def sees(query, key) -> bool:
        if query[0] != key[0]:
            return False
        if query[1] == key[1]:
            return True
        if query[2].kind in (Kind.CAPTION, Kind.METAQUERY):
            return query[2].supervises == key[1]
        return key[1] < query[1] and key[2].kind in (Kind.TEXT, Kind.VIT, Kind.CLEAN)

    def constant(part) -> bool:
        return stop and part[3] == "und" and part[2].kind in (Kind.TEXT, Kind.VIT, Kind.CLEAN)

    def needs(part, seen: frozenset) -> bool:
        if constant(part):
            return False
        if part[3] == "gen" or part[2].kind == Kind.METAQUERY:
            return True
        return any(
            needs(other, seen | {id(part)})
            for other in parts
            if id(other) not in seen and other is not part and sees(part, other)
        )

    table = SegmentTable.of(samples)
    understanding, generation = parts_needing_gradient(
        table, table.relation(), train_understanding=False, stop_at_context=stop
    )
    assert understanding.tolist() == [
        needs(part, frozenset()) for part in parts if part[3] == "und"
    ]
    assert generation.tolist() == [
        segment.kind in (Kind.CLEAN, Kind.NOISED)
        for sample in samples
        for segment in sample.segments
    ]


@settings(max_examples=60, deadline=None)
@given(SAMPLES, st.booleans(), st.booleans())
def test_slabs_are_contiguous_and_a_permutation_that_keeps_order_inside_each(
    samples, train_understanding, stop
):
    batch = collate(samples, train_understanding, stop)
    order = batch.order_T.numpy()
    assert sorted(order) == list(range(sum(sample.length for sample in samples)))
    bounds = np.cumsum([0, batch.context, batch.understanding, batch.generation])
    assert bounds[-1] == len(order)
    for start, stop_row in zip(bounds[:-1], bounds[1:], strict=True):
        assert (np.diff(order[start:stop_row]) > 0).all()
    latent = np.concatenate(
        [segment.generation_tokens() for sample in samples for segment in sample.segments]
    )
    assert (latent[order] == (np.arange(len(order)) >= bounds[2])).all(), (
        "the generation slab holds the latents and nothing else"
    )
    rope = np.concatenate([segment.rope_ids for sample in samples for segment in sample.segments])
    assert (batch.rope_T.numpy() == rope[order]).all()
    if train_understanding:
        assert batch.context == 0


@settings(max_examples=60, deadline=None)
@given(SAMPLES, st.booleans())
def test_every_row_starts_from_its_own_token_patch_or_query(samples, stop):
    """Follows each slab row back to its content, segment by segment."""
    batch = collate(samples, stop=stop)
    texts, vits = len(batch.text_ids), batch.vision.context_rows
    row_of = np.argsort(batch.order_T.numpy())
    source, latent_rows = (
        batch.understanding_source_U.numpy(),
        torch.cat(
            [
                torch.from_numpy(patchify(image.numpy(), 4))
                for images in batch.latents.images
                for image in images
            ]
            or [torch.zeros(0, 48)]
        ),
    )
    undivided = batch.context + batch.understanding
    place = 0
    for sample in samples:
        for segment in sample.segments:
            rows = row_of[place : place + segment.length]
            place += segment.length
            if segment.token_ids is not None:
                assert (batch.text_ids[source[rows]].numpy() == segment.token_ids).all()
            elif segment.kind == Kind.METAQUERY:
                assert (
                    batch.metaqueries.index_M[source[rows] - texts - vits].numpy() == np.arange(4)
                ).all()
            else:
                assert batch.text_ids[source[rows[[0, -1]]]].tolist() == [3, 4]
                patches = patchify(segment.pixels, 4)
                if segment.kind == Kind.VIT:
                    assert np.array_equal(
                        batch.vision.patches_PC[source[rows[1:-1]] - texts].numpy(), patches
                    )
                else:
                    inside = rows[1:-1] - undivided
                    assert np.array_equal(
                        latent_rows[batch.latents.source_G[inside]].numpy(), patches
                    )
                    assert np.allclose(batch.latents.timestep_G[inside], segment.timestep)
    noise = [
        segment.noise
        for sample in samples
        for segment in sample.segments
        if segment.kind == Kind.NOISED
    ]
    assert np.array_equal(
        batch.latents.noise_XC.numpy(),
        np.concatenate([np.zeros((0, 12), dtype=np.float32), *noise]),
    )
    assert (batch.latents.timestep_G[batch.latents.noised_X] == 0.5).all() and len(
        batch.latents.noised_X
    ) == int((batch.latents.timestep_G > 0).sum())


@settings(max_examples=60, deadline=None)
@given(SAMPLES)
def test_losses_read_the_rows_that_predict_each_label(samples):
    batch = collate(samples)
    token_at = {}
    place = 0
    for sample in samples:
        for segment in sample.segments:
            for offset in range(segment.length):
                token_at[place] = (segment, offset)
                place += 1
    order = batch.order_T.tolist()
    read = [token_at[order[row]] for row in batch.captions.rows_Y.tolist()]
    assert all(segment.kind == Kind.CAPTION for segment, _ in read)
    assert [
        int(segment.token_ids[offset + 1]) for segment, offset in read
    ] == batch.captions.labels_Y.tolist()
    assert len(read) == sum(
        segment.length - 1
        for segment, offset in token_at.values()
        if segment.kind == Kind.CAPTION and offset == 0
    )
    assert [
        token_at[order[row]][1] for row in batch.metaqueries.rows_M.tolist()
    ] == batch.metaqueries.index_M.tolist()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(11, 40))
def test_packing_never_exceeds_the_budget_never_cuts_and_takes_everything_in_order(lengths, budget):
    waiting = [
        Sample(
            str(number),
            [Segment(Kind.TEXT, np.arange(n + 2), token_ids=np.array([1, *[7] * n, 2]))],
        )
        for number, n in enumerate(lengths)
    ]
    packs, packer = [], Packer(budget)
    for sample in waiting:
        if not packer.offer(sample):
            packs.append(packer.samples)
            packer = Packer(budget)
            assert packer.offer(sample), "a sample within the budget fits an empty pack"
    packs.append(packer.samples)
    assert [sample for pack in packs for sample in pack] == waiting
    for pack in packs:
        batch = collate(pack)
        assert batch.tokens == sum(sample.length for sample in pack) <= budget
        assert batch.text_ids.tolist() == [
            token for sample in pack for token in sample.segments[0].token_ids
        ]
