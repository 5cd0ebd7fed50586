"""How a sample is laid out: ids, cells and targets lie where they should, and none is longer than
announced."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from composed_samples import (
    CAPTION,
    GEOMETRY,
    INSTRUCTION,
    PROMPT,
    RANDOM,
    SPECIAL,
    edit,
    image,
    kinds,
    make_composer,
    the,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from rounding import assert_equal_up_to_rounding

from uno_ds.data.layouts import get_layout
from uno_ds.data.layouts.conversation import conversation_sample, conversation_views
from uno_ds.data.layouts.edit import edit_sample
from uno_ds.data.layouts.text_to_image import text_to_image_sample
from uno_ds.objectives.visual_regression import grid_targets
from uno_ds.sequence.batch import PackedBatch
from uno_ds.sequence.composition import ImageViews
from uno_ds.sequence.packing import Collator
from uno_ds.sequence.segments import Kind, Sample


@st.composite
def laid_out(draw) -> Sample:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    composer = make_composer(**RANDOM | dict(metaquery_grid=draw(st.integers(0, 3))))
    ids = st.lists(st.integers(5, 99), max_size=5)
    views = st.builds(
        image,
        st.tuples(st.integers(1, 3), st.integers(1, 3)),
        st.tuples(st.integers(1, 5), st.integers(1, 5)),
    )
    task = draw(st.sampled_from(["t2i", "edit", "vlm"]))
    if task == "t2i":
        return text_to_image_sample(composer, "key", draw(ids), draw(ids), draw(views), rng)
    if task == "edit":
        return edit_sample(composer, "key", draw(views), draw(ids), draw(ids), draw(views), rng)
    turn = st.tuples(st.booleans(), st.lists(st.one_of(ids, views), max_size=3))
    return conversation_sample(composer, "key", draw(st.lists(turn, max_size=4)))


@given(laid_out())
@hypothesis_settings(max_examples=200, deadline=None)
def test_rope_ids_advance_by_text_length_and_one_per_image_and_supervision_starts_after_its_image(
    sample,
):
    following = 0
    for segment in sample.segments:
        if segment.kind in (Kind.CAPTION, Kind.METAQUERY):
            image_id = sample.segments[segment.supervises].rope_ids[0]
            assert sample.segments[segment.supervises].kind == Kind.NOISED
            steps = range(segment.length) if segment.kind == Kind.CAPTION else [0] * segment.length
            assert segment.rope_ids.tolist() == [image_id + 1 + step for step in steps]
        elif segment.kind == Kind.TEXT:
            assert segment.rope_ids.tolist() == list(range(following, following + segment.length))
            following += segment.length
        else:
            assert segment.rope_ids.tolist() == [following] * segment.length
            following += 1


@given(laid_out())
@hypothesis_settings(max_examples=100, deadline=None)
def test_images_have_a_start_and_an_end_and_metaqueries_fill_their_grid(sample):
    for segment in sample.segments:
        if segment.kind in (Kind.VIT, Kind.CLEAN, Kind.NOISED):
            stride = 3 if segment.kind == Kind.VIT else 4
            assert segment.grid == (
                segment.pixels.shape[1] // stride,
                segment.pixels.shape[2] // stride,
            )
            assert segment.length == segment.grid[0] * segment.grid[1] + 2
            assert segment.generation_tokens().tolist() == [False] + [segment.kind != Kind.VIT] * (
                segment.length - 2
            ) + [False]
        else:
            assert not segment.generation_tokens().any()
        if segment.kind == Kind.METAQUERY:
            assert segment.length == sum(side**2 for side in segment.sides)


def test_text_is_wrapped_in_bos_and_eos_and_only_answers_are_trained():
    rng = np.random.default_rng(0)
    sample = edit(make_composer(), rng)
    assert the(sample, Kind.TEXT).token_ids.tolist() == [SPECIAL.bos, *INSTRUCTION, SPECIAL.eos]
    assert the(sample, Kind.CAPTION).token_ids.tolist() == [SPECIAL.bos, *CAPTION, SPECIAL.eos]
    assert not the(sample, Kind.TEXT).answer
    sample = conversation_sample(
        make_composer(),
        "key",
        [(False, [image(), [5, 6]]), (True, [[7]]), (False, [[]]), (True, [[8, 9]])],
    )
    assert kinds(sample) == [Kind.CLEAN, Kind.VIT] + [Kind.TEXT] * 4
    assert [(segment.token_ids.tolist(), segment.answer) for segment in sample.segments[2:]] == [
        ([1, 5, 6, 2], False),
        ([1, 7, 2], True),
        ([1, 2], False),
        ([1, 8, 9, 2], True),
    ]


def test_an_edit_shows_its_source_noises_its_target_and_compares_the_targets_features():
    sample = edit(make_composer(), np.random.default_rng(0))
    shades = {
        segment.kind: segment.pixels.flat[0].item()
        for segment in sample.segments
        if segment.pixels is not None
    }
    assert shades == pytest.approx(
        {Kind.CLEAN: 0.1, Kind.VIT: 0.1, Kind.NOISED: 0.2, Kind.METAQUERY: 0.2}
    )


def test_an_edit_whose_source_has_one_view_drops_the_other():
    source = ImageViews(latent=image().latent)
    composer, rng = make_composer(drop_vit=1.0), np.random.default_rng(0)
    sample = edit_sample(composer, "key", source, INSTRUCTION, CAPTION, image(), rng)
    assert Kind.CLEAN in kinds(sample) and Kind.NOISED in kinds(sample)
    with pytest.raises(AssertionError, match="a view that is not dropped is there"):
        edit_sample(make_composer(), "key", source, INSTRUCTION, CAPTION, image(), rng)


@pytest.mark.parametrize("captions", [False, True])
@pytest.mark.parametrize("metaqueries", [False, True])
def test_the_largest_sample_with_a_noised_image_is_as_large_as_the_announced_one(
    metaqueries, captions
):
    """The budget is checked against it before anything starts."""
    composer, rng, text = (
        make_composer(captions, metaqueries, max_text_tokens=4, metaquery_grid=3),
        np.random.default_rng(0),
        [9] * 4,
    )
    longest = {
        name: get_layout(name).longest_sample(composer, latent_cells=2, vit_cells=6)
        for name in ("t2i", "edit")
    }
    drawn = text_to_image_sample(composer, "key", text, text, image(), rng)
    assert drawn.length == longest["t2i"]
    changed = edit_sample(composer, "key", image(), text, text, image(), rng)
    assert changed.length == longest["edit"]


@pytest.mark.parametrize("how", ["vit", "latents", "both", "random"])
def test_the_largest_question_answer_sample_is_as_large_as_the_announced_one(how):
    composer, rng = (
        make_composer(max_text_tokens=4, conversation_images=how),
        np.random.default_rng(0),
    )
    lengths = []
    for _ in range(20):
        latent, vit = conversation_views(composer.settings, rng)
        shown = ImageViews(image().latent if latent else None, image().vit if vit else None)
        lengths.append(
            conversation_sample(
                composer, "key", [(False, [shown, [9] * 4]), (True, [[9] * 4])]
            ).length
        )
    assert max(lengths) == get_layout("vlm").longest_sample(composer, latent_cells=2, vit_cells=6)


def collate(*samples: Sample) -> PackedBatch:
    return Collator(GEOMETRY, SPECIAL, train_understanding=False, stop_at_context=True)(
        list(samples)
    )


GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(vit=GRIDS, side=st.integers(1, 5))
@hypothesis_settings(max_examples=100, deadline=None)
def test_a_metaquery_stands_at_the_patch_in_the_middle_of_its_cell(vit, side):
    batch = collate(
        text_to_image_sample(
            make_composer(metaquery_grid=side),
            "key",
            PROMPT,
            None,
            image(vit=vit),
            np.random.default_rng(0),
        )
    )
    assert batch.metaqueries.index_M.tolist() == list(range(side * side))
    for query, position in enumerate(batch.metaqueries.positions_M.tolist()):
        for place, number, size in zip(
            divmod(position, GEOMETRY.vit_side), divmod(query, side), vit
        ):
            assert place < size and abs(place + 0.5 - (number + 0.5) * size / side) <= 0.5 + 1e-9


@given(source=GRIDS, targets=st.lists(GRIDS, min_size=1, max_size=3), side=st.integers(1, 5))
@hypothesis_settings(max_examples=100, deadline=None)
def test_the_target_of_a_metaquery_is_the_mean_of_its_images_cell_as_in_adaptive_average_pooling(
    source, targets, side
):
    composer, rng = make_composer(metaquery_grid=side), np.random.default_rng(0)
    batch = collate(
        *[
            edit_sample(
                composer, "key", image(vit=source), INSTRUCTION, CAPTION, image(vit=target), rng
            )
            for target in targets
        ]
    )
    features = torch.from_numpy(
        rng.standard_normal((len(batch.vision.patches_PC), 4))
    ).requires_grad_()
    got = grid_targets(features, batch.targets)
    assert not got.requires_grad
    pooled, first = [], len(targets) * source[0] * source[1]
    for rows, columns in targets:
        own = features[first : first + rows * columns].detach().T.reshape(1, 4, rows, columns)
        pooled.append(F.adaptive_avg_pool2d(own, side)[0].flatten(1).T)
        first += rows * columns
    assert first == len(features)
    assert_equal_up_to_rounding(
        got.float(), torch.cat(pooled), max(rows * columns for rows, columns in targets)
    )
